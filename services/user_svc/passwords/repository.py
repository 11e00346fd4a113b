"""Reading and writing hashes of passwords."""

from sqlalchemy.ext.asyncio import AsyncSession

from services.kit.columns import now
from services.user_svc.passwords.models import Password


async def hash_of(session: AsyncSession, user_id: str) -> str | None:
    """The stored hash; None when the user has no password."""
    row = await session.get(Password, user_id, populate_existing=True)
    return row.hash if row is not None else None


async def put(session: AsyncSession, user_id: str, hashed: str, *, is_new: bool = True) -> None:
    """Stores a hash. ``is_new``: of another password than before, not the same one hashed anew. The user's row must be locked."""
    row = await session.get(Password, user_id)
    if row is None:
        session.add(Password(user_id=user_id, hash=hashed, changed_at=now()))
        return
    row.hash = hashed
    if is_new:
        row.changed_at = now()
