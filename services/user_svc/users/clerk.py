"""What Clerk says of a user: ordered by the event's time, and nothing comes after a deletion."""

from sqlalchemy.ext.asyncio import AsyncSession

from clawplane.user.v1 import user_pb2
from clawplane.user.v1.user_service_pb2 import SyncClerkUserRequest
from services.kit.call import Call
from services.kit.columns import now
from services.kit.db import insert_for
from services.kit.proto import to_datetime
from services.user_svc.users import lifecycle, repository
from services.user_svc.users.models import IdentityTombstone
from services.user_svc.users.rules import normal_email

PROVIDER = "clerk"


async def forget(session: AsyncSession, request: SyncClerkUserRequest, call: Call) -> tuple[str, str]:
    """Applies a deletion: (user id or "", what happened). The tombstone stays also when the user was never heard of."""
    insert = insert_for(session)
    await session.execute(
        insert(IdentityTombstone)
        .values(provider=PROVIDER, subject=request.clerk_user_id, occurred_at=to_datetime(request.occurred_at, "occurred_at"))
        .on_conflict_do_nothing()
    )
    known = await repository.find(session, with_deleted=True, clerk_user_id=request.clerk_user_id)
    row = await repository.lock(session, known[0].id, with_deleted=True) if known else None
    if row is None:
        return "", "a deletion of a user who was never heard of"
    return row[0].id, "deleted" if await lifecycle.delete(session, row, call) else "was deleted before"


async def is_gone(session: AsyncSession, clerk_user_id: str) -> bool:
    """Whether Clerk has deleted the user."""
    return await session.get(IdentityTombstone, (PROVIDER, clerk_user_id)) is not None


async def update(session: AsyncSession, row: repository.UserRow, request: SyncClerkUserRequest) -> str:
    """Applies a newer event to a known user, and says what happened."""
    user, organization = row
    at = to_datetime(request.occurred_at, "occurred_at")
    if user.clerk_event_at is not None and at <= user.clerk_event_at:
        return "older than what was applied before"
    user.clerk_event_at = at
    if request.full_name:
        user.full_name = organization.name = request.full_name
    if request.avatar_url.startswith("https://"):
        user.avatar_url = request.avatar_url
    email = normal_email(request.email)
    if not email or not request.email_verified:
        return "updated"
    if email != user.email and await repository.find(session, email=email):
        # The address is someone else's here: taking it over would hand one account to the other.
        return "updated, but for the e-mail address, which another user has"
    if email != user.email or user.email_verified_at is None:
        user.email, user.email_verified_at = email, now()
    return "updated"


def wish_of(request: SyncClerkUserRequest) -> tuple[user_pb2.User, user_pb2.Identity]:
    """The user to make of an event, and the identity."""
    avatar = request.avatar_url if request.avatar_url.startswith("https://") else ""
    wish = user_pb2.User(email=request.email, full_name=request.full_name, avatar_url=avatar)
    return wish, user_pb2.Identity(provider=PROVIDER, subject=request.clerk_user_id)
