"""Queries on users."""

from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from clawplane.user.v1 import user_pb2
from services.kit.auth import CLERK
from services.kit.coalesce import Loader
from services.kit.columns import now
from services.kit.db import Database, alone, insert_for
from services.kit.proto import columns_for
from services.kit.rows import by_key
from services.user_svc.organizations.models import Membership, Organization
from services.user_svc.users.models import Identity, User

UserRow = tuple[User, Organization]
"""A user and the personal organization, which holds tier and subscription status."""


async def find(session: AsyncSession, *, with_deleted: bool = False, **columns: Any) -> UserRow | None:
    """The user whose columns have exactly these values."""
    statement = select(User, Organization).join(Organization, Organization.id == User.personal_org_id)
    statement = statement.where(*(getattr(User, name) == value for name, value in columns.items()))
    if not with_deleted:
        statement = statement.where(User.deleted_at.is_(None))
    row = (await session.execute(statement)).one_or_none()
    return (row[0], row[1]) if row else None


def loader(db: Database) -> Loader[Any]:
    """Users by id, each row with what the personal organization says of tier and subscription; the deleted ones too."""
    statement = select(*columns_for(User, user_pb2.User, "email_verified_at"), Organization.tier, Organization.subscription_status)
    return Loader(by_key(db, statement.join(Organization, Organization.id == User.personal_org_id), User.id))


async def by_identity(session: AsyncSession, provider: str, subject: str) -> UserRow | None:
    """The user who signs in this way."""
    user_id = await session.scalar(select(Identity.user_id).where(Identity.provider == provider, Identity.subject == subject))
    return await find(session, id=user_id) if user_id else None


async def link(session: AsyncSession, user: User, provider: str, subject: str) -> None:
    """Notes that a user signs in this way. It may have been the way of somebody else, who is gone or has another address by now."""
    row = insert_for(session)(Identity).values(user_id=user.id, provider=provider, subject=subject)
    await session.execute(row.on_conflict_do_update(index_elements=["provider", "subject"], set_={"user_id": user.id, "updated_at": now()}))


async def membership(session: AsyncSession, user_id: str, org_id: str) -> tuple[User, str, int] | None:
    """An active user, the organization ("" asks for the personal one) and the role there. A deleted organization admits nobody."""
    clerk_id = user_id.removeprefix(CLERK) if user_id.startswith(CLERK) else ""
    meant = User.clerk_user_id == clerk_id if clerk_id else User.id == user_id
    statement = (
        select(User, Membership.org_id, Membership.role)
        .join(Membership, Membership.user_id == User.id)
        .join(Organization, Organization.id == Membership.org_id)
        .where(meant, User.is_active, User.deleted_at.is_(None), Membership.org_id == (org_id or User.personal_org_id))
        .where(Organization.deleted_at.is_(None))
    )
    row = (await session.execute(statement)).one_or_none()
    return (row[0], row[1], row[2]) if row else None


async def lock(session: AsyncSession, user_id: str, *, with_deleted: bool = False) -> UserRow | None:
    """The user, locked until the transaction ends."""
    if await session.get(User, user_id, with_for_update=True, populate_existing=True) is None:
        return None
    return await find(session, with_deleted=with_deleted, id=user_id)


async def taken_usernames(session: AsyncSession, base: str) -> set[str]:
    """The usernames that are ``base`` or start with ``base-``; until the transaction ends, nobody else looks for one of these."""
    await alone(session, f"username {base}")
    statement = select(User.username).where((User.username == base) | User.username.startswith(f"{base}-", autoescape=True))
    return set((await session.scalars(statement)).all())
