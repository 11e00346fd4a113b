"""UserService: creation and look-up of users."""

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from google.protobuf.json_format import MessageToDict, MessageToJson
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from clawplane.user.v1 import user_pb2, user_service_pb2, user_service_pb2_grpc
from clawplane.user.v1.organization_pb2 import Role
from services.kit import ids
from services.kit.audit import diff
from services.kit.call import Call
from services.kit.coalesce import Loader
from services.kit.columns import now
from services.kit.db import ALL, alone
from services.kit.errors import AlreadyExists, Conflict, Error, InvalidArgument, NotFound
from services.kit.inbox import take_in
from services.kit.paging import page
from services.kit.proto import assign, to_datetime, to_proto
from services.user_svc.base import WebhookEvent
from services.user_svc.organizations import heirs
from services.user_svc.organizations.models import Membership, Organization
from services.user_svc.sessions.repository import revoke_all
from services.user_svc.sessions.service import person_of
from services.user_svc.settings import UserSettings
from services.user_svc.users import account, clerk, lifecycle, repository
from services.user_svc.users.models import Identity, User
from services.user_svc.users.rules import free_username, normal_email, username_from

_MAX_JSON = 16 * 1024
_TRIES = 5
T = TypeVar("T")


class UserService(user_service_pb2_grpc.UserServiceServicer):
    """See proto/clawplane/user/v1/user_service.proto."""

    def __init__(self, settings: UserSettings, load: Loader[Any]) -> None:
        self.settings, self.load = settings, load

    async def CreateUser(self, request: user_service_pb2.CreateUserRequest, call: Call) -> user_pb2.User:
        _check_size(request.user)
        if not request.user.email:
            raise InvalidArgument("user.email", "value is required")
        identity = request.identity if request.HasField("identity") else None

        async def work(session: AsyncSession) -> repository.UserRow:
            return await self.create(session, call, request.user, request.email_verified, identity)

        return to_message(await self.retry_username(call, work, bool(request.user.username)))

    async def GetUser(self, request: user_service_pb2.GetUserRequest, call: Call) -> user_pb2.User:
        if not call.caller.is_platform and request.id != call.caller.user_id:
            raise NotFound("user")
        row = await self.load(request.id)
        if row is None or row.deleted_at is not None:
            raise NotFound("user")
        return to_message((row, row))

    async def LookupUser(self, request: user_service_pb2.LookupUserRequest, call: Call) -> user_pb2.User:
        by = request.WhichOneof("by") or ""
        value = getattr(request, by)
        async with call.read() as session:
            row = await repository.find(session, **{by: value.strip().lower() if by in {"email", "username"} else value})
        if row is None:
            raise NotFound("user")
        return to_message(row)

    async def EnsureUser(self, request: user_service_pb2.EnsureUserRequest, call: Call) -> user_pb2.User:
        wish = user_pb2.User(email=request.email, full_name=request.full_name)

        async def work(session: AsyncSession) -> repository.UserRow:
            return await self.ensure(session, call, wish, request.email_verified, request.identity)

        return to_message(await self.retry_username(call, work, False))

    async def ensure(
        self, session: AsyncSession, call: Call, wish: user_pb2.User, verified: bool, identity: user_pb2.Identity
    ) -> repository.UserRow:
        """The user of an identity, linked or made when it is new; part of the caller's transaction."""
        await alone(session, f"e-mail {normal_email(wish.email)}")
        known = await repository.by_identity(session, identity.provider, identity.subject)
        if known:
            return known
        same_email = await repository.find(session, email=normal_email(wish.email))
        if same_email is None:
            return await self.create(session, call, wish, verified, identity)
        user, _ = same_email
        # Linking on an address that either side has not proven would hand the account to a stranger.
        if not (verified and user.email_verified_at):
            raise AlreadyExists("email")
        _link(session, user, identity)
        call.audit(user.id, after={"linked": identity.provider})
        return same_email

    async def ListUsers(self, request: user_service_pb2.ListUsersRequest, call: Call) -> user_service_pb2.ListUsersResponse:
        statement = select(User)
        if not request.show_deleted:
            statement = statement.where(User.deleted_at.is_(None))
        if request.prefix:
            prefix = request.prefix.strip().lower()
            statement = statement.where(
                User.email.startswith(prefix, autoescape=True) | User.username.startswith(prefix, autoescape=True)
            )
        if request.tier:
            of_tier = select(Organization.id).where(Organization.tier == request.tier)
            statement = statement.where(User.personal_org_id.in_(of_tier))
        async with call.read() as session:
            users, token = await page(session, statement, User.id, request)
            ids_ = [user.personal_org_id for user in users]
            found = (await session.scalars(select(Organization).where(Organization.id.in_(ids_)))).all()
        organizations = {organization.id: organization for organization in found}
        messages = [to_message((user, organizations[user.personal_org_id])) for user in users]
        return user_service_pb2.ListUsersResponse(users=messages, next_page_token=token)

    async def UpdateUser(self, request: user_service_pb2.UpdateUserRequest, call: Call) -> user_pb2.User:
        wish = request.user
        if not call.caller.is_platform and wish.id != call.caller.user_id:
            raise NotFound("user")
        _check_size(wish)

        async def work(session: AsyncSession) -> repository.UserRow:
            row = await repository.lock(session, wish.id)
            if row is None:
                raise NotFound("user")
            user, _ = row
            if wish.etag and wish.etag != str(user.version):
                raise Conflict("the user was changed by someone else; read it again and repeat")
            before = to_message(row)
            written = assign(user, wish, request.update_mask)
            if "username" in written and not user.username:
                raise InvalidArgument("user.username", "cannot be taken away")
            call.audit(user.id, org_id=user.personal_org_id, **diff(before, to_message(row)))
            await session.flush()
            return row

        # A user is of no organization: whichever one he acts in, the log of the personal one says it.
        return to_message(await call.run(work, ALL))

    async def UpdateUserAccount(self, request: user_service_pb2.UpdateUserAccountRequest, call: Call) -> user_pb2.User:
        if request.HasField("tier") and request.tier not in self.settings.tiers:
            raise InvalidArgument("tier", f"must be one of {', '.join(self.settings.tiers)}")

        async def work(session: AsyncSession) -> repository.UserRow:
            row = await repository.lock(session, request.id)
            if row is None:
                raise NotFound("user")
            before = to_message(row)
            await account.update(session, row, request)
            call.audit(row[0].id, org_id=row[1].id, **diff(before, to_message(row)))
            return row

        return to_message(await call.run(work))

    async def DeleteUser(self, request: user_service_pb2.DeleteUserRequest, call: Call) -> user_pb2.User:
        return await self._with(call, request.id, lambda session, row: lifecycle.delete(session, row, call))

    async def DeleteSelf(self, request: user_service_pb2.DeleteSelfRequest, call: Call) -> user_pb2.User:
        user_id = person_of(call)

        async def work(session: AsyncSession) -> repository.UserRow:
            row = await repository.lock(session, user_id)
            if row is None:
                raise NotFound("user")
            await heirs.check_handed_over(session, row[0])
            call.audit(user_id, org_id=row[1].id)
            await lifecycle.delete(session, row, call)
            await revoke_all(session, user_id, row[1].id)
            return row

        return to_message(await call.run(work, ALL))

    async def UndeleteUser(self, request: user_service_pb2.UndeleteUserRequest, call: Call) -> user_pb2.User:
        return await self._with(call, request.id, lifecycle.undelete)

    async def _with(
        self, call: Call, user_id: str, change: Callable[[AsyncSession, repository.UserRow], Awaitable[object]]
    ) -> user_pb2.User:
        """Changes a user, deleted or not."""

        async def work(session: AsyncSession) -> repository.UserRow:
            row = await repository.lock(session, user_id, with_deleted=True)
            if row is None:
                raise NotFound("user")
            before = to_message(row)
            await change(session, row)
            call.audit(row[0].id, org_id=row[1].id, **diff(before, to_message(row)))
            return row

        return to_message(await call.run(work))

    async def SyncClerkUser(
        self, request: user_service_pb2.SyncClerkUserRequest, call: Call
    ) -> user_service_pb2.SyncClerkUserResponse:
        response = user_service_pb2.SyncClerkUserResponse()

        async def work(session: AsyncSession) -> None:
            response.Clear()
            taken = await take_in(
                session, WebhookEvent, source="clerk", external_id=request.external_id, status="applied",
                type="user.deleted" if request.deleted else "user.updated", occurred_at=to_datetime(request.occurred_at, "occurred_at"),
                payload=MessageToDict(request),
            )  # fmt: skip
            if taken is None:
                response.duplicate = True
                return
            response.user_id, response.outcome = await self.sync(session, call, request)
            (await session.get_one(WebhookEvent, taken)).reason = response.outcome

        await self.retry_username(call, work, False)
        return response

    async def sync(self, session: AsyncSession, call: Call, request: user_service_pb2.SyncClerkUserRequest) -> tuple[str, str]:
        """Applies what Clerk said: (user id or "", what happened)."""
        if request.deleted:
            user_id, outcome = await clerk.forget(session, request, call)
            call.audit(user_id, after={"outcome": outcome})
            return user_id, outcome
        if await clerk.is_gone(session, request.clerk_user_id):
            return "", "ignored: Clerk has deleted this user"
        row = await repository.find(session, with_deleted=True, clerk_user_id=request.clerk_user_id)
        if row is not None:
            outcome = await clerk.update(session, row, request)
            call.audit(row[0].id, org_id=row[1].id, after={"outcome": outcome})
            return row[0].id, outcome
        if not request.email:
            return "", "ignored: no e-mail address, and no user of this identity"
        wish, identity = clerk.wish_of(request)
        user, _ = await self.ensure(session, call, wish, request.email_verified, identity)
        user.clerk_event_at = to_datetime(request.occurred_at, "occurred_at")
        return user.id, "linked or made"

    async def retry_username(self, call: Call, work: Callable[[AsyncSession], Awaitable[T]], named: bool, tenant: str = "") -> T:
        """Repeats when another call took the made-up username, the identity or the address in the same moment. ``tenant``: see Call.run."""
        for attempt in range(_TRIES):
            try:
                return await call.run(work, tenant)  # type: ignore[no-any-return]
            except IntegrityError as error:
                if named or attempt == _TRIES - 1:
                    raise
                last: Error | IntegrityError = error
        raise last

    async def create(
        self, session: AsyncSession, call: Call, wish: user_pb2.User, verified: bool, identity: user_pb2.Identity | None
    ) -> repository.UserRow:
        """Makes a user with the personal organization, in the caller's transaction; AlreadyExists when the address is taken."""
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
        call.audit(user.id, org_id=organization.id, **diff(None, to_message((user, organization))))
        return user, organization


def _check_size(user: user_pb2.User) -> None:
    for name in ("preferences", "settings"):
        if len(MessageToJson(getattr(user, name))) > _MAX_JSON:
            raise InvalidArgument(f"user.{name}", "is more than 16 KiB as JSON")


def _link(session: AsyncSession, user: User, identity: user_pb2.Identity) -> None:
    session.add(Identity(user_id=user.id, provider=identity.provider, subject=identity.subject))
    if identity.provider == "clerk":
        user.clerk_user_id = identity.subject


def to_message(row: repository.UserRow) -> user_pb2.User:
    """The user as others see it; tier and subscription status are the personal organization's."""
    user, organization = row
    message = to_proto(user, user_pb2.User)
    message.tier, message.subscription_status = organization.tier, organization.subscription_status  # type: ignore[assignment]
    message.email_verified = user.email_verified_at is not None
    message.is_premium = organization.tier != "starter"
    return message
