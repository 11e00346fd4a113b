"""UserService: creation and look-up of users."""

from google.protobuf.json_format import MessageToJson
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from clawplane.user.v1 import user_pb2, user_service_pb2, user_service_pb2_grpc
from clawplane.user.v1.organization_pb2 import Role
from services.kit import ids
from services.kit.call import Call
from services.kit.columns import now
from services.kit.errors import AlreadyExists, Error, InvalidArgument, NotFound
from services.kit.proto import assign, to_proto
from services.user_svc.organizations.models import Membership, Organization
from services.user_svc.settings import UserSettings
from services.user_svc.users import repository
from services.user_svc.users.models import Identity, User
from services.user_svc.users.rules import free_username, normal_email, username_from

_MAX_JSON = 16 * 1024
_TRIES = 5


class UserService(user_service_pb2_grpc.UserServiceServicer):
    """See proto/clawplane/user/v1/user_service.proto."""

    def __init__(self, settings: UserSettings) -> None:
        self.settings = settings

    async def CreateUser(self, request: user_service_pb2.CreateUserRequest, call: Call) -> user_pb2.User:
        for name in ("preferences", "settings"):
            if len(MessageToJson(getattr(request.user, name))) > _MAX_JSON:
                raise InvalidArgument(f"user.{name}", "is more than 16 KiB as JSON")
        identity = request.identity if request.HasField("identity") else None

        async def work(session: AsyncSession) -> repository.UserRow:
            return await self._create(session, call, request.user, request.email_verified, identity)

        return to_message(await self._retry_username(call, work, bool(request.user.username)))

    async def GetUser(self, request: user_service_pb2.GetUserRequest, call: Call) -> user_pb2.User:
        if not call.caller.is_platform and request.id != call.caller.user_id:
            raise NotFound("user")
        async with call.read() as session:
            row = await repository.find(session, id=request.id)
        if row is None:
            raise NotFound("user")
        return to_message(row)

    async def LookupUser(self, request: user_service_pb2.LookupUserRequest, call: Call) -> user_pb2.User:
        by = request.WhichOneof("by") or ""
        value = getattr(request, by)
        async with call.read() as session:
            row = await repository.find(session, **{by: value.strip().lower() if by in {"email", "username"} else value})
        if row is None:
            raise NotFound("user")
        return to_message(row)

    async def EnsureUser(self, request: user_service_pb2.EnsureUserRequest, call: Call) -> user_pb2.User:
        identity = request.identity

        async def work(session: AsyncSession) -> repository.UserRow:
            await repository.alone(session, normal_email(request.email))
            known = await repository.by_identity(session, identity.provider, identity.subject)
            if known:
                return known
            same_email = await repository.find(session, email=normal_email(request.email))
            if same_email:
                user, _ = same_email
                # Linking on an address that either side has not proven would hand the account to a stranger.
                if not (request.email_verified and user.email_verified):
                    raise AlreadyExists("email")
                _link(session, user, identity)
                call.audit(user.id, after={"linked": identity.provider})
                return same_email
            wish = user_pb2.User(email=request.email, full_name=request.full_name)
            return await self._create(session, call, wish, request.email_verified, identity)

        return to_message(await self._retry_username(call, work, False))

    async def _retry_username(self, call: Call, work: object, named: bool) -> repository.UserRow:
        """Repeats when another call took the made-up username, the identity or the address in the same moment."""
        for attempt in range(_TRIES):
            try:
                return await call.run(work)  # type: ignore[arg-type, no-any-return]
            except IntegrityError as error:
                if named or attempt == _TRIES - 1:
                    raise
                last: Error | IntegrityError = error
        raise last

    async def _create(
        self, session: AsyncSession, call: Call, wish: user_pb2.User, verified: bool, identity: user_pb2.Identity | None
    ) -> repository.UserRow:
        email = normal_email(wish.email)
        user, organization = User(id=ids.new("usr")), Organization(id=ids.new("org"))
        assign(user, wish)
        base = user.username or username_from(email)
        taken = set() if user.username else await repository.taken_usernames(session, base)
        user.email, user.username = email, free_username(base, taken)
        if await repository.find(session, email=email):
            raise AlreadyExists("email")
        user.email_verified_at = now() if verified else None
        user.personal_org_id = organization.id
        organization.name = user.full_name or user.username
        organization.is_personal, organization.tier = True, self.settings.default_tier
        session.add(organization)
        await session.flush()
        session.add(user)
        await session.flush()
        session.add(Membership(org_id=organization.id, user_id=user.id, role=Role.ROLE_OWNER))
        if identity:
            _link(session, user, identity)
        await session.flush()
        call.audit(user.id, org_id=organization.id, after={"username": user.username})
        return user, organization


def _link(session: AsyncSession, user: User, identity: user_pb2.Identity) -> None:
    session.add(Identity(user_id=user.id, provider=identity.provider, subject=identity.subject))
    if identity.provider == "clerk":
        user.clerk_user_id = identity.subject


def to_message(row: repository.UserRow) -> user_pb2.User:
    """The user as others see it; tier and subscription status are the personal organization's."""
    user, organization = row
    message = to_proto(user, user_pb2.User)
    message.tier, message.subscription_status = organization.tier, organization.subscription_status  # type: ignore[assignment]
    message.is_premium = organization.tier != "starter"
    return message
