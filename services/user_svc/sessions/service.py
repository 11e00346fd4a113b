"""SessionService: what a session's token stands for, and whose sessions there are, and their end."""

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from clawplane.errors.v1.errors_pb2 import ErrorReason
from clawplane.user.v1 import session_pb2, session_service_pb2, session_service_pb2_grpc
from services.kit.call import Call
from services.kit.db import ALL
from services.kit.errors import InvalidState, NotFound
from services.kit.standard import list_page
from services.user_svc.sessions import repository
from services.user_svc.sessions.models import Session
from services.user_svc.sessions.validate import Validator, to_message
from services.user_svc.users.models import User


class SessionService(session_service_pb2_grpc.SessionServiceServicer):
    """See proto/clawplane/user/v1/session_service.proto."""

    def __init__(self, validate: Validator) -> None:
        self.validate = validate

    async def ValidateSession(self, request: session_service_pb2.ValidateSessionRequest, call: Call) -> session_pb2.Session:
        valid = await (self.validate.anew(request.token) if request.uncached else self.validate(request.token))
        if valid is None:
            raise NotFound("session")
        return valid.message

    async def ListSessions(
        self, request: session_service_pb2.ListSessionsRequest, call: Call
    ) -> session_service_pb2.ListSessionsResponse:
        statement = select(Session).where(*repository.holding(person_of(call), self.validate.idle))

        def message_of(row: Session) -> session_pb2.Session:
            return to_message(row, self.validate.idle, call.caller.key_id)

        return await list_page(call, request, session_service_pb2.ListSessionsResponse, statement, Session.id, message_of)

    async def RevokeSession(self, request: session_service_pb2.RevokeSessionRequest, call: Call) -> session_pb2.Session:
        async def work(session: AsyncSession) -> Session:
            row = await repository.of_user(session, request.id, call.caller.user_id) if call.caller.user_id else None
            if row is None:
                raise NotFound("session")
            org_id = await _log_of(session, row.user_id)
            call.audit(row.id, org_id=org_id)
            await repository.revoke(session, row, org_id)
            return row

        return to_message(await call.run(work, ALL), self.validate.idle, call.caller.key_id)

    async def RevokeOtherSessions(
        self, request: session_service_pb2.RevokeOtherSessionsRequest, call: Call
    ) -> session_service_pb2.RevokeOtherSessionsResponse:
        return session_service_pb2.RevokeOtherSessionsResponse(revoked_count=await self._revoke(call, call.caller.key_id))

    async def RevokeAllSessions(
        self, request: session_service_pb2.RevokeAllSessionsRequest, call: Call
    ) -> session_service_pb2.RevokeAllSessionsResponse:
        return session_service_pb2.RevokeAllSessionsResponse(revoked_count=await self._revoke(call, ""))

    async def _revoke(self, call: Call, but: str) -> int:
        user_id = person_of(call)

        async def work(session: AsyncSession) -> int:
            org_id = await _log_of(session, user_id)
            ended = await repository.revoke_all(session, user_id, org_id, but=but if but.startswith("ses_") else "")
            call.audit(user_id, org_id=org_id, after={"revoked_count": ended})
            return ended

        ended: int = await call.run(work, ALL)
        return ended


async def _log_of(session: AsyncSession, user_id: str) -> str:
    """The organization whose audit log a person's own doings belong to: the personal one, in whichever the person acts."""
    return (await session.get_one(User, user_id)).personal_org_id


def person_of(call: Call) -> str:
    """The id of the user who calls; InvalidState for services and operators, who are nobody in particular."""
    if not call.caller.user_id:
        raise InvalidState(
            "this is about the account of a person: use a credential of one", reason=ErrorReason.ERROR_REASON_USER_REQUIRED
        )  # fmt: skip
    return call.caller.user_id
