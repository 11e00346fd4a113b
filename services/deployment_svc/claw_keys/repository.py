"""Bots as callers. Their keys are API keys of the user service; those of bots that were started before are checked here until they end."""

from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession

from services.deployment_svc.claw_keys.models import ClawKey
from services.kit import keys, known_keys
from services.kit.auth import AccessResolver, Caller, KeyResolver
from services.kit.columns import now
from services.kit.db import ALL, Database
from services.kit.feed import Remembered
from services.kit.known_keys import KnownKey, Uses
from services.kit.secrets import SecretBox

_OLD, _OLD_HMAC_KEY = "ckey", ""
PERMISSIONS = frozenset({"usage.record", "usage.reserve", "quotas.read", "models.call"})
"""All that a bot may do."""


async def revoke_old(session: AsyncSession, deployment_id: str, but: str = "") -> None:
    """Revokes the keys of a deployment that the user service does not know, but for that of the start ``but``."""
    statement = update(ClawKey).where(ClawKey.deployment_id == deployment_id, ClawKey.revoked_at.is_(None))
    if but:
        statement = statement.where(ClawKey.id != f"{_OLD}_{but[-32:]}")
    await session.execute(statement.values(revoked_at=now()))


def resolver(known: "Remembered[KnownKey | None]", uses: Uses, old: KeyResolver) -> KeyResolver:
    """Key text -> the bot as a caller. Organization, user and deployment are the key's, whatever the bot says."""
    resolve_new = known_keys.resolver(known, uses)

    async def resolve(text: str) -> Caller | None:
        caller = await resolve_new(text)
        # What is known there and does not hold is no older key.
        return caller if caller is not None or known.peek(text) is not None else await old(text)

    return resolve


def old_resolver(db: Database, box: SecretBox, access: AccessResolver) -> KeyResolver:
    """The same of older keys, straight from the table; such a key holds only as long as its user does."""

    async def resolve(text: str) -> Caller | None:
        key = keys.parse(text, known_keys.BOTS, _OLD)
        if key is None:
            return None
        async with db.read(ALL) as session:
            row = await session.scalar(select(ClawKey).where(ClawKey.id == key.id))
        if row is None or row.revoked_at is not None or not key.matches(box, row.digest, _OLD_HMAC_KEY):
            return None
        if await access(row.user_id, row.org_id) is None:
            return None
        return Caller("claw", row.id, PERMISSIONS, row.org_id, row.user_id, deployment_id=row.deployment_id, key_id=row.id)

    return resolve
