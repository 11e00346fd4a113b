"""The account of an address that somebody has just proven to have."""

from sqlalchemy import delete
from sqlalchemy.ext.asyncio import AsyncSession

from clawplane.user.v1 import user_pb2
from services.kit.call import Call
from services.kit.columns import now
from services.kit.db import alone
from services.kit.errors import SignInFailed
from services.user_svc.api_keys import repository as api_keys
from services.user_svc.passwords.models import Password
from services.user_svc.sessions import repository as sessions
from services.user_svc.users import repository
from services.user_svc.users.models import Identity, User
from services.user_svc.users.service import UserService

PROVIDER = "email"


async def of_address(session: AsyncSession, users: UserService, call: Call, address: str, full_name: str = "") -> User:
    """The user of an address, locked; made when there is none. SignInFailed when the account was switched off."""
    # As ``UserService.ensure``: of two who come first, one makes the account.
    await alone(session, f"e-mail {address}")
    found = await repository.find(session, email=address)
    row = await repository.lock(session, found[0].id) if found else None
    if row is None:
        row = await users.create(session, call, user_pb2.User(email=address, full_name=full_name), True, None)
    user = row[0]
    if not user.is_active:
        raise SignInFailed()
    was_proven = user.email_verified_at is not None
    if not was_proven:
        await _prove(session, user)
    await repository.link(session, user, PROVIDER, address)
    if not was_proven:
        await sessions.revoke_all(session, user.id, user.personal_org_id)
        await api_keys.revoke_all(session, user.id, "the address of the account was proven by its owner")
    return user


async def _prove(session: AsyncSession, user: User) -> None:
    """Who proves the address has the account. What others put on it before, who never proved it, goes: they would keep a way in."""
    user.email_verified_at, user.clerk_user_id = now(), None
    for model in (Identity, Password):
        await session.execute(delete(model).where(model.user_id == user.id).execution_options(synchronize_session=False))
    await session.flush()
