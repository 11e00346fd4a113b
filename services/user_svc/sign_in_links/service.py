"""SignInLinkService: the way into the embedded default."""

from datetime import timedelta

from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncSession

from clawplane.user.v1 import session_pb2, sign_in_link_pb2, sign_in_link_service_pb2, sign_in_link_service_pb2_grpc, user_pb2
from services.kit import keys
from services.kit.call import Call
from services.kit.columns import now
from services.kit.db import ALL
from services.kit.errors import NotFound
from services.kit.proto import to_proto
from services.user_svc.settings import UserSettings
from services.user_svc.sign_in.start import Starter
from services.user_svc.sign_in_links.models import SignInLink
from services.user_svc.users.models import User
from services.user_svc.users.service import UserService

PREFIX, ID_PREFIX = "link", "sil"
LIFETIME = timedelta(minutes=10)


class SignInLinkService(sign_in_link_service_pb2_grpc.SignInLinkServiceServicer):
    """See proto/clawplane/user/v1/sign_in_link_service.proto."""

    def __init__(self, settings: UserSettings, users: UserService, starter: Starter) -> None:
        self.settings, self.users, self.starter = settings, users, starter

    async def CreateSignInLink(
        self, request: sign_in_link_service_pb2.CreateSignInLinkRequest, call: Call
    ) -> sign_in_link_service_pb2.CreateSignInLinkResponse:
        key = keys.mint(PREFIX, self.settings.key_environment, ID_PREFIX)
        wish = user_pb2.User(email=self.settings.operator_email, full_name="Operator")
        identity = user_pb2.Identity(provider="email", subject=self.settings.operator_email)

        async def work(session: AsyncSession) -> SignInLink:
            user, organization = await self.users.ensure(session, call, wish, True, identity)
            user.is_operator = True
            made = now()
            row = SignInLink(id=key.id, user_id=user.id, digest=key.sha256(), expires_at=made + LIFETIME, created_at=made)
            session.add(row)
            call.audit(row.id, org_id=organization.id)
            return row

        row = await self.users.retry_username(call, work, False)
        link = to_proto(row, sign_in_link_pb2.SignInLink)
        return sign_in_link_service_pb2.CreateSignInLinkResponse(sign_in_link=link, token=key.text)

    async def RedeemSignInLink(
        self, request: sign_in_link_service_pb2.RedeemSignInLinkRequest, call: Call
    ) -> sign_in_link_service_pb2.RedeemSignInLinkResponse:
        key = keys.parse(request.token, PREFIX, ID_PREFIX)
        if key is None:
            raise NotFound("sign-in link")

        async def work(session: AsyncSession) -> session_pb2.SignedIn:
            # One statement: of several that come at once, one takes the link.
            taken = (
                update(SignInLink)
                .where(SignInLink.digest == key.sha256(), SignInLink.used_at.is_(None), SignInLink.expires_at > now())
                .values(used_at=now())
                .returning(SignInLink.user_id)
            )
            user_id = await session.scalar(taken)
            user = await session.get(User, user_id) if user_id else None
            if user is None or not user.is_active or user.deleted_at is not None:
                raise NotFound("sign-in link")
            return self.starter.start(session, call, user, "link")

        answer = await call.run(work, ALL)
        return sign_in_link_service_pb2.RedeemSignInLinkResponse(session=answer.session, token=answer.token)
