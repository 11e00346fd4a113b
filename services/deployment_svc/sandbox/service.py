"""SandboxService: what a customer does on the sandbox's payment page."""

import secrets as random

from clawplane.deployment.v1 import sandbox_service_pb2, sandbox_service_pb2_grpc, sandbox_session_pb2
from clawplane.deployment.v1.sandbox_service_pb2 import SandboxAction
from clawplane.deployment.v1.sandbox_session_pb2 import SandboxSessionStatus
from services.deployment_svc.sandbox.checkout import COMPLETE, EXPIRED, OPEN, locked
from services.deployment_svc.sandbox.models import SandboxSession
from services.kit.call import Call
from services.kit.errors import InvalidState, NotFound
from services.kit.proto import to_proto


class SandboxService(sandbox_service_pb2_grpc.SandboxServiceServicer):
    """See proto/clawplane/deployment/v1/sandbox_service.proto."""

    async def GetSandboxSession(
        self, request: sandbox_service_pb2.GetSandboxSessionRequest, call: Call
    ) -> sandbox_session_pb2.SandboxSession:
        async with call.transaction() as session:
            row = await locked(session, request.id)
        if row is None:
            raise NotFound("session")
        return to_proto(row, sandbox_session_pb2.SandboxSession)

    async def ActOnSandboxSession(
        self, request: sandbox_service_pb2.ActOnSandboxSessionRequest, call: Call
    ) -> sandbox_session_pb2.SandboxSession:
        async with call.transaction() as session:
            row = await locked(session, request.id)
            if row is None:
                raise NotFound("session")
            _act(row, request.action)
        return to_proto(row, sandbox_session_pb2.SandboxSession)


def _act(row: SandboxSession, action: int) -> None:
    needed = COMPLETE if action == SandboxAction.SANDBOX_ACTION_REFUND else OPEN
    if row.status != needed:
        word = SandboxSessionStatus.Name(row.status).removeprefix("SANDBOX_SESSION_STATUS_").lower()  # type: ignore[arg-type]
        raise InvalidState(f"the session is {word}", state=word)
    if action == SandboxAction.SANDBOX_ACTION_EXPIRE:
        row.status = EXPIRED
    elif action == SandboxAction.SANDBOX_ACTION_REFUND:
        row.refunded_minor = row.amount_minor
    else:
        row.payment_intent_id = row.payment_intent_id or f"pi_sandbox_{random.token_hex(16)}"
        if action == SandboxAction.SANDBOX_ACTION_PAY:
            row.status = COMPLETE
