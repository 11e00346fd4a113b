"""Starting, finding and ending sessions."""

from datetime import timedelta

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from services.kit import auth, keys
from services.kit.columns import now
from services.kit.db import ALL, Database
from services.user_svc.sessions.models import Session
from services.user_svc.users.models import User

ID_PREFIX = "ses"
LIFETIME = timedelta(days=7)


def start(session: AsyncSession, user: User, environment: str) -> tuple[Session, str]:
    """A new session of a user, and its token, which exists nowhere else."""
    key = keys.mint(auth.SESSION, environment, ID_PREFIX)
    made = now()
    row = Session(id=key.id, user_id=user.id, digest=key.sha256(), expires_at=made + LIFETIME, created_at=made)
    session.add(row)
    user.last_login_at = made
    return row, key.text


async def find(session: AsyncSession, token: str) -> Session | None:
    """The session of a token, as long as it holds."""
    key = keys.parse(token, auth.SESSION, ID_PREFIX)
    row = await session.get(Session, key.id) if key is not None else None
    if key is None or row is None or row.revoked_at is not None or row.expires_at <= now() or not key.is_hashed_as(row.digest):
        return None
    return row


async def of_user(session: AsyncSession, session_id: str, user_id: str) -> Session | None:
    """A session of a user, locked until the transaction ends."""
    return await session.scalar(select(Session).where(Session.id == session_id, Session.user_id == user_id).with_for_update())


def resolver(db: Database) -> auth.SessionResolver:
    """Token -> session, straight from the table."""

    async def resolve(token: str) -> auth.Session | None:
        async with db.read(ALL) as session:
            row = await find(session, token)
        return auth.Session(row.id, row.user_id, row.expires_at.timestamp()) if row is not None else None

    return resolve
