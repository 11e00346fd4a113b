"""Minting, checking and revoking the keys of bots."""

from datetime import datetime

from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession

from services.deployment_svc.claw_keys.models import ClawKey
from services.deployment_svc.deployments.models import Deployment
from services.kit import keys
from services.kit.auth import AccessResolver, Caller, KeyResolver
from services.kit.columns import now
from services.kit.db import ALL, Database
from services.kit.secrets import SecretBox

PREFIX, ID_PREFIX = "claw", "ckey"
PERMISSIONS = frozenset({"usage.record", "models.call"})
"""All that a bot may do."""


def mint(session: AsyncSession, d: Deployment, box: SecretBox, environment: str) -> keys.Key:
    """A new key for the next start of a deployment. The text exists only in the returned object."""
    key = keys.mint(PREFIX, environment, ID_PREFIX)
    session.add(ClawKey(id=key.id, org_id=d.org_id, deployment_id=d.id, user_id=d.user_id, digest=key.digest(box)))
    return key


async def mint_for_start(session: AsyncSession, d: Deployment, box: SecretBox, environment: str) -> str:
    """The text of a new key, which is the deployment's latest from now on."""
    if d.attempting_since:
        # Those of starts that came to nothing: a provider that has failed may still know one.
        await revoke(session, d.id, d.attempting_since)
    key = mint(session, d, box, environment)
    # A flush of its own: the key's row comes before whatever points at it.
    await session.flush()
    d.claw_key_id = key.id
    return key.text


async def revoke(session: AsyncSession, deployment_id: str, since: datetime | None = None) -> None:
    """Revokes every key of a deployment, or those that were minted since a time."""
    statement = update(ClawKey).where(ClawKey.deployment_id == deployment_id, ClawKey.revoked_at.is_(None))
    if since is not None:
        statement = statement.where(ClawKey.created_at >= since)
    await session.execute(statement.values(revoked_at=now()))


async def keep_only(session: AsyncSession, deployment_id: str, running: str, otherwise: str | None) -> str | None:
    """Revokes every key of a deployment but that of the start which runs, and returns its id.

    ``running`` is what the market says; when that is no unrevoked key of the deployment, ``otherwise`` is kept.
    """
    statement = select(ClawKey).where(ClawKey.deployment_id == deployment_id, ClawKey.revoked_at.is_(None))
    valid = (await session.scalars(statement)).all()
    kept = running if running in {key.id for key in valid} else otherwise
    for key in valid:
        if key.id != kept:
            key.revoked_at = now()
    return kept


def resolver(db: Database, box: SecretBox, access: AccessResolver) -> KeyResolver:
    """Key text -> the bot as a caller. Organization, user and deployment are the key's, whatever the bot says; the key holds only as
    long as its user does."""

    async def resolve(text: str) -> Caller | None:
        key = keys.parse(text, PREFIX, ID_PREFIX)
        if key is None:
            return None
        async with db.read(ALL) as session:
            row = await session.scalar(select(ClawKey).where(ClawKey.id == key.id))
        if row is None or row.revoked_at is not None or not key.matches(box, row.digest):
            return None
        if await access(row.user_id, row.org_id) is None:
            return None
        return Caller("claw", row.id, PERMISSIONS, row.org_id, row.user_id, deployment_id=row.deployment_id, key_id=row.id)

    return resolve
