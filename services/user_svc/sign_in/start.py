"""The one place where signing in ends: a session with a token that is new each time."""

from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy.ext.asyncio import AsyncSession

from clawplane.user.v1 import session_pb2
from services.kit.call import Call
from services.user_svc.sessions import repository as sessions
from services.user_svc.sessions.validate import to_message
from services.user_svc.settings import UserSettings
from services.user_svc.users.models import User


@dataclass(frozen=True)
class Starter:
    """Starts sessions for whoever has proven who he is."""

    settings: UserSettings

    def start(self, session: AsyncSession, call: Call, user: User, by: str) -> session_pb2.SignedIn:
        """A new session in the caller's transaction. ``by``: how it was proven, for the audit log."""
        row, token = sessions.start(session, user, self.settings.key_environment, call.client)
        call.audit(row.id, org_id=user.personal_org_id, after={"by": by}, subject=user.id)
        return session_pb2.SignedIn(session=to_message(row, timedelta(seconds=self.settings.session_idle_s), row.id), token=token)
