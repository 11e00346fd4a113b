"""ChangeService: the feed of changes."""

from collections.abc import AsyncIterator

from clawplane.user.v1 import change_service_pb2, change_service_pb2_grpc
from services.kit.call import Call
from services.user_svc.changes import feed


class ChangeService(change_service_pb2_grpc.ChangeServiceServicer):
    """See proto/clawplane/user/v1/change_service.proto."""

    def __init__(self, tail: feed.Tail) -> None:
        self.tail = tail

    async def WatchChanges(
        self, request: change_service_pb2.WatchChangesRequest, call: Call
    ) -> AsyncIterator[change_service_pb2.WatchChangesResponse]:
        async for message in feed.watch(self.tail, call.ticks(0), request.after_seq):
            yield message
