"""Which session a token stands for: asked for every person's call, and the sign that a session is in use."""

import time
from dataclasses import dataclass
from datetime import timedelta

from clawplane.user.v1 import session_pb2
from services.kit import auth
from services.kit.columns import now
from services.kit.db import ALL, Database
from services.kit.feed import SEEN_S, Follower, Remembered
from services.kit.loops import Loop
from services.kit.proto import to_proto
from services.user_svc.sessions import repository
from services.user_svc.sessions.models import Session

_WRITE_EVERY_S = 5.0


@dataclass(frozen=True, slots=True)
class Valid:
    """A session that holds, for this process and for others."""

    session: auth.Session
    message: session_pb2.Session


class Validator:
    """Answers from memory what was found within the last minute, and writes in batches what was seen in use."""

    def __init__(self, db: Database, follower: Follower, idle_s: float) -> None:
        self.db, self.idle = db, timedelta(seconds=idle_s)
        self._seen: set[str] = set()
        self._known = Remembered(follower, self._find, lambda change: [change.subject], _tags, hidden=True, max_age_s=SEEN_S)

    async def __call__(self, token: str) -> Valid | None:
        """The session of a token; None when it does not hold."""
        valid = await self._known(token)
        return valid if valid is not None and valid.session.expires_at > time.time() else None

    async def anew(self, token: str) -> Valid | None:
        """The same from the tables. Whoever remembers answers must not be given what is remembered here: he may have heard of a change
        before this process has, and would keep what was true before it."""
        return await self._find(token)

    async def resolve(self, token: str) -> auth.Session | None:
        """The same, as the wrapper asks for it."""
        valid = await self(token)
        return valid.session if valid is not None else None

    def loop(self) -> Loop:
        """Writes which sessions were used."""
        return Loop("sessions-seen", self.write, _WRITE_EVERY_S)

    async def write(self) -> bool:
        """One batch."""
        seen, self._seen = self._seen, set()
        if seen:
            async with self.db.transaction(ALL) as session:
                await repository.seen(session, sorted(seen))
        return False

    async def _find(self, token: str) -> Valid | None:
        async with self.db.read(ALL) as session:
            row = await repository.find(session, token, self.idle)
        if row is None:
            return None
        if (now() - row.last_seen_at).total_seconds() >= SEEN_S:
            self._seen.add(row.id)
        fresh_until = row.fresh_at + repository.FRESH
        found = auth.Session(row.id, row.user_id, repository.ends_at(row, self.idle).timestamp(), fresh_until.timestamp())
        return Valid(found, to_message(row, self.idle))


def to_message(row: Session, idle: timedelta, current: str = "") -> session_pb2.Session:
    """The session as its user sees it. ``current``: the id of the one that the call is made with."""
    message = to_proto(row, session_pb2.Session)
    message.idle_at.FromDatetime(repository.ends_at(row, idle))
    message.fresh_until.FromDatetime(row.fresh_at + repository.FRESH)
    message.is_current = row.id == current
    return message


def _tags(valid: Valid | None) -> list[str]:
    return [valid.session.id] if valid is not None else []
