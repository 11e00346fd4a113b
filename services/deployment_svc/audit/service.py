"""AuditService: who did what."""

from collections.abc import AsyncIterator

from clawplane.audit.v1 import audit_event_pb2
from clawplane.deployment.v1 import audit_service_pb2, audit_service_pb2_grpc
from services.kit.audit_events import export_events, list_events
from services.kit.call import Call


class AuditService(audit_service_pb2_grpc.AuditServiceServicer):
    """See proto/clawplane/deployment/v1/audit_service.proto."""

    # The stub loads the messages, which lie in another file, and not the service itself.
    descriptor = audit_service_pb2.DESCRIPTOR

    async def ListAuditEvents(
        self, request: audit_event_pb2.ListAuditEventsRequest, call: Call
    ) -> audit_event_pb2.ListAuditEventsResponse:
        return await list_events(call, request)

    async def ExportAuditEvents(
        self, request: audit_event_pb2.ExportAuditEventsRequest, call: Call
    ) -> AsyncIterator[audit_event_pb2.ExportAuditEventsResponse]:
        async for answer in export_events(call, request):
            yield answer
