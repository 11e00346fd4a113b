"""Queries on API keys, their texts, and what a text stands for."""

import math
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from sqlalchemy import ARRAY, Select, Text, Uuid, any_, bindparam, cast, func, or_, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from clawplane.user.v1 import api_key_pb2, api_key_service_pb2
from clawplane.user.v1.change_service_pb2 import Change, ChangeKind
from services.kit import keys, known_keys
from services.kit.auth import Caller
from services.kit.call import Call
from services.kit.coalesce import Loader
from services.kit.columns import now
from services.kit.db import ALL, Database
from services.kit.errors import InvalidState, NotFound
from services.kit.known_keys import KnownKey
from services.kit.proto import to_proto
from services.kit.rows import among, by_key
from services.kit.secrets import SecretBox
from services.user_svc.api_keys.models import ApiKey, ApiKeySecret
from services.user_svc.changes.repository import record
from services.user_svc.organizations.models import Membership, Organization
from services.user_svc.organizations.roles import OF_EVERY_KEY, PERMISSIONS
from services.user_svc.users.models import User

_VALID = api_key_service_pb2.API_KEY_OUTCOME_VALID
_ADMIN = "api_keys.admin"


def seen_by(call: Call) -> Select[ApiKey]:
    """The keys that the caller may know of: his own, or all of the organization. The session narrows them to that."""
    statement = select(ApiKey)
    if call.caller.is_platform or call.caller.may(_ADMIN):
        return statement
    return statement.where(ApiKey.user_id == call.caller.user_id)


async def locked(session: AsyncSession, call: Call, key_id: str) -> ApiKey:
    """A key that the caller may know of, locked until the transaction ends; NotFound otherwise."""
    row = await session.scalar(seen_by(call).where(ApiKey.id == key_id).with_for_update())
    if row is None:
        raise NotFound("API key")
    call.audit(row.id, org_id=row.org_id)
    return row


async def changeable(session: AsyncSession, call: Call, key_id: str) -> ApiKey:
    """The same, of a key that people made and nobody has revoked; InvalidState otherwise."""
    row = await locked(session, call, key_id)
    refuse_bots(row)
    if row.revoked_at is not None:
        raise InvalidState("the key was revoked, which is final: make another one", state="revoked")
    return row


def refuse_bots(row: ApiKey) -> None:
    """InvalidState for a bot's key: it is made and ended with the bot."""
    if row.deployment_id is not None:
        raise InvalidState("this is a bot's key: rotate it by RotateClawKey of its deployment", state="of a bot")


async def add_text(session: AsyncSession, row: ApiKey, key: keys.Key, box: SecretBox, number: int = 1) -> None:
    """Stores another text of a key, of which only a keyed hash is kept."""
    # A flush of its own: the key's row comes before whatever points at it.
    await session.flush()
    session.add(ApiKeySecret(org_id=row.org_id, key_id=row.id, number=number, digest=key.digest(box), digest_key_id=box.hmac_key_id))
    await session.flush()


async def end_texts(session: AsyncSession, key_id: str, at: datetime) -> int:
    """Lets every text of a key end at a time, if it does not end before; the number of the next one."""
    later = or_(ApiKeySecret.expires_at.is_(None), ApiKeySecret.expires_at > at)
    await session.execute(update(ApiKeySecret).where(ApiKeySecret.key_id == key_id, later).values(expires_at=at))
    newest = await session.scalar(select(func.max(ApiKeySecret.number)).where(ApiKeySecret.key_id == key_id))
    return (newest or 0) + 1


async def changed(session: AsyncSession, row: ApiKey) -> None:
    """Tells every process that what it remembers of the key counts no more. Call it last."""
    await session.flush()
    await record(session, ChangeKind.CHANGE_KIND_REVOKED, row.org_id, row.id)


async def revoke(session: AsyncSession, row: ApiKey, reason: str) -> None:
    """Ends a key for good; one that was revoked before stays as it is."""
    if row.revoked_at is None:
        row.revoked_at, row.revoke_reason = now(), reason
        await changed(session, row)


async def revoke_all(session: AsyncSession, user_id: str, reason: str) -> None:
    """Ends all keys that a user has made, wherever. Call it last."""
    theirs = select(ApiKey).where(ApiKey.user_id == user_id, ApiKey.revoked_at.is_(None)).order_by(ApiKey.id).with_for_update()
    for row in (await session.scalars(theirs)).all():
        await revoke(session, row, reason)


async def message(session: AsyncSession, row: ApiKey) -> api_key_pb2.ApiKey:
    """The key with its lineage."""
    found = to_proto(row, api_key_pb2.ApiKey)
    statement = select(ApiKeySecret).where(ApiKeySecret.key_id == row.id).order_by(ApiKeySecret.number.desc())
    found.secrets.extend(to_proto(text, api_key_pb2.ApiKeySecret) for text in (await session.scalars(statement)).all())
    return found


_OF_A_TEXT = (
    select(
        ApiKeySecret.digest, ApiKeySecret.expires_at.label("text_ends"), ApiKey.id, ApiKey.org_id, ApiKey.user_id, ApiKey.deployment_id,
        ApiKey.permissions, ApiKey.rate, ApiKey.expires_at, ApiKey.is_active, ApiKey.revoked_at, User.email,
        User.is_active.label("user_active"), User.deleted_at.label("user_deleted"), Organization.deleted_at.label("org_deleted"),
        Membership.role,
    )
    .join(ApiKey, ApiKey.id == ApiKeySecret.key_id)
    .join(User, User.id == ApiKey.user_id)
    .join(Organization, Organization.id == ApiKey.org_id)
    .outerjoin(Membership, (Membership.org_id == ApiKey.org_id) & (Membership.user_id == ApiKey.user_id))
)  # fmt: skip


def finder(db: Database, box: SecretBox) -> Callable[[str], Awaitable[KnownKey | None]]:
    """Key text -> what it stands for now, straight from the tables; None when there is no such key. Garbage reads nothing."""
    load: Any = Loader(by_key(db, _OF_A_TEXT, ApiKeySecret.digest))  # type: ignore[arg-type]

    async def find(text: str) -> KnownKey | None:
        key = known_keys.parse(text)
        if key is None:
            return None
        for hmac_key_id in box.hmac_key_ids:
            digest = key.digest(box, hmac_key_id)
            if (row := await load(digest)) is not None:
                if hmac_key_id != box.hmac_key_id:
                    # Only now is the text at hand to hash it under the current key.
                    await _rehash(db, digest, key.digest(box), box.hmac_key_id)
                return _known(row)
        return None

    return find


async def _rehash(db: Database, old: bytes, new: bytes, key_id: str) -> None:
    """Puts a hash under another key in the place of an older one, if nobody did before."""
    statement = update(ApiKeySecret).where(ApiKeySecret.digest == old).values(digest=new, digest_key_id=key_id)
    await db.run(lambda session: session.execute(statement.execution_options(synchronize_session=False)), ALL)


def _known(row: Any) -> KnownKey:
    in_force = row.is_active and row.revoked_at is None and row.org_deleted is None
    holds = in_force and row.user_active and row.user_deleted is None and row.role is not None
    permissions, of_caller = _granted(tuple(row.permissions), row.role) if holds else (frozenset[str](), OF_EVERY_KEY)
    ends = min((at for at in (row.text_ends, row.expires_at) if at is not None), default=None)
    answer = api_key_service_pb2.VerifyApiKeyResponse(
        outcome=_VALID, key_id=row.id, org_id=row.org_id, user_id=row.user_id, deployment_id=row.deployment_id or "",
        permissions=sorted(permissions), rate=row.rate, email=row.email, expires_at=ends,
    )  # fmt: skip
    caller = Caller(
        "claw" if row.deployment_id else "key", row.id, of_caller, row.org_id, row.user_id, row.email,
        row.deployment_id or "", row.id, rate=row.rate,
    )  # fmt: skip
    return KnownKey(caller, holds, ends.timestamp() if ends is not None else math.inf, answer, permissions)


@lru_cache(maxsize=10_000)
def _granted(given: tuple[str, ...], role: int) -> tuple[frozenset[str], frozenset[str]]:
    """What a key may that was given this, and the same with what every key may. Many keys are given the same, and share it."""
    # Never more than the creator may now, whatever the key was given.
    permissions = frozenset(given) & PERMISSIONS[role]
    return permissions, permissions | OF_EVERY_KEY


def concerned(change: Change) -> list[str]:
    """Which keys a change concerns: the one that was changed, or all of a user and organization whose access changed."""
    if change.kind == ChangeKind.CHANGE_KIND_ENTITLEMENTS:
        return []
    return [change.subject] if change.kind == ChangeKind.CHANGE_KIND_REVOKED else [change.subject, change.org_id]


def use_writer(db: Database) -> Callable[[Sequence[str]], Awaitable[None]]:
    """Writes down that keys were used now, in one statement."""

    # As one text: by itself each is a UUID to be made and sent, and there may be thousands at a time.
    used = func.string_to_array(func.replace(bindparam("keys", type_=Text), f"{known_keys.ID_PREFIX}_", ""), ",")
    # In a sub-select, which is evaluated once: else it would be for each row that is looked at again after a lock.
    once = select(cast(used, ARRAY(Uuid))).scalar_subquery()
    is_used = among(db, ApiKey.id) if db.is_sqlite else ApiKey.id == any_(cast(once, ARRAY(Uuid)))
    # Being used is no change that an owner should see.
    at = bindparam("at", type_=ApiKey.last_used_at.type)
    statement = (
        update(ApiKey)
        .where(is_used, or_(ApiKey.last_used_at.is_(None), ApiKey.last_used_at < at))
        .values(last_used_at=at, updated_at=ApiKey.updated_at)
    )

    async def write(key_ids: Sequence[str]) -> None:
        asked = list(key_ids) if db.is_sqlite else ",".join(key_ids)

        async def work(session: AsyncSession) -> None:
            await (await session.connection()).execute(statement, {"keys": asked, "at": now()})

        await db.run(work, ALL)

    return write
