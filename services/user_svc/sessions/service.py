"""SessionService: what a session's token stands for, and its end."""

from clawplane.user.v1 import session_pb2, session_service_pb2, session_service_pb2_grpc
from clawplane.user.v1.change_service_pb2 import ChangeKind
from services.kit.call import Call
from services.kit.columns import now
from services.kit.errors import NotFound
from services.kit.proto import to_proto
from services.user_svc.changes.repository import record
from services.user_svc.sessions import repository


class SessionService(session_service_pb2_grpc.SessionServiceServicer):
    """See proto/clawplane/user/v1/session_service.proto."""

    async def ValidateSession(self, request: session_service_pb2.ValidateSessionRequest, call: Call) -> session_pb2.Session:
        async with call.read() as session:
            row = await repository.find(session, request.token)
        if row is None:
            raise NotFound("session")
        return to_proto(row, session_pb2.Session)

    async def RevokeSession(self, request: session_service_pb2.RevokeSessionRequest, call: Call) -> session_pb2.Session:
        async with call.transaction() as session:
            row = await repository.of_user(session, request.id, call.caller.user_id) if call.caller.user_id else None
            if row is None:
                raise NotFound("session")
            if row.revoked_at is None:
                row.revoked_at = now()
                await record(session, ChangeKind.CHANGE_KIND_REVOKED, call.org_id, row.id)
            call.audit(row.id)
        return to_proto(row, session_pb2.Session)
