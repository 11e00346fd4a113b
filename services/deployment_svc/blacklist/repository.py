"""Queries on the provider blacklist."""

from collections.abc import Collection

from sqlalchemy import Select, or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from services.deployment_svc.blacklist.models import BlacklistEntry
from services.kit.columns import now


def in_force() -> Select[BlacklistEntry]:
    """The entries that exclude now."""
    return select(BlacklistEntry).where(or_(BlacklistEntry.expires_at.is_(None), BlacklistEntry.expires_at > now()))


async def excluded(session: AsyncSession, providers: Collection[str]) -> set[str]:
    """Those of the providers that are excluded now."""
    statement = in_force().where(BlacklistEntry.provider_address.in_(providers))
    return {row.provider_address for row in (await session.scalars(statement)).all()}
