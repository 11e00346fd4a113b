"""Starting, finding and ending sessions."""

from collections.abc import Sequence
from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from clawplane.user.v1.change_service_pb2 import ChangeKind
from services.kit import auth, keys
from services.kit.client import Client
from services.kit.columns import now
from services.user_svc.changes.repository import record
from services.user_svc.sessions.models import Session
from services.user_svc.users.models import User

ID_PREFIX = "ses"
LIFETIME = timedelta(days=7)
FRESH = timedelta(seconds=auth.FRESH_S)


def start(session: AsyncSession, user: User, environment: str, client: Client | None = None) -> tuple[Session, str]:
    """A new session of a user, and its token, which exists nowhere else. ``client``: where the user signs in."""
    key = keys.mint(auth.SESSION, environment, ID_PREFIX)
    made = now()
    row = Session(
        id=key.id, user_id=user.id, digest=key.sha256(), expires_at=made + LIFETIME, created_at=made, last_seen_at=made, fresh_at=made
    )
    if client is not None:
        row.ip, row.device = client.ip, client.agent
    session.add(row)
    user.last_login_at = made
    return row, key.text


def ends_at(row: Session, idle: timedelta) -> datetime:
    """When a session ends if it is not used any more."""
    return min(row.expires_at, row.last_seen_at + idle)


async def find(session: AsyncSession, token: str, idle: timedelta) -> Session | None:
    """The session of a token, as long as it holds."""
    key = keys.parse(token, auth.SESSION, ID_PREFIX)
    row = await session.get(Session, key.id) if key is not None else None
    if key is None or row is None or row.revoked_at is not None or ends_at(row, idle) <= now() or not key.is_hashed_as(row.digest):
        return None
    return row


def holding(user_id: str, idle: timedelta) -> tuple[ColumnElement[bool], ...]:
    """What is true of the sessions of a user that hold."""
    at = now()
    return (Session.user_id == user_id, Session.revoked_at.is_(None), Session.expires_at > at, Session.last_seen_at > at - idle)


async def of_user(session: AsyncSession, session_id: str, user_id: str) -> Session | None:
    """A session of a user, locked until the transaction ends."""
    return await session.scalar(select(Session).where(Session.id == session_id, Session.user_id == user_id).with_for_update())


async def revoke(session: AsyncSession, row: Session, org_id: str) -> None:
    """Ends a session that ``of_user`` has locked, and tells who remembers it. Call it last."""
    if row.revoked_at is None:
        row.revoked_at = now()
        await record(session, ChangeKind.CHANGE_KIND_REVOKED, org_id, row.id)


async def revoke_all(session: AsyncSession, user_id: str, org_id: str, *, but: str = "") -> int:
    """Ends all sessions of a user except one, and tells who remembers them; returns how many. Call it last."""
    statement = (
        update(Session)
        .where(Session.user_id == user_id, Session.revoked_at.is_(None), Session.expires_at > now(), *([Session.id != but] if but else []))
        .values(revoked_at=now())
        .returning(Session.id)
        .execution_options(synchronize_session=False)
    )
    ended = sorted((await session.scalars(statement)).all())
    for session_id in ended:
        await record(session, ChangeKind.CHANGE_KIND_REVOKED, org_id, session_id)
    return len(ended)


async def seen(session: AsyncSession, session_ids: Sequence[str]) -> None:
    """Takes note that sessions were used now. That is no change that their owner should see."""
    at = now()
    await session.execute(
        update(Session)
        .where(Session.id.in_(session_ids), Session.last_seen_at < at)
        .values(last_seen_at=at, updated_at=Session.updated_at)
        .execution_options(synchronize_session=False)
    )
