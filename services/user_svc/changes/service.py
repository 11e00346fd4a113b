"""ChangeService: the feed of changes, read from the table so that any process serves all of them."""

import time
from collections.abc import AsyncIterator

from clawplane.errors.v1.errors_pb2 import ErrorReason
from clawplane.user.v1 import change_service_pb2, change_service_pb2_grpc
from services.kit.call import Call
from services.kit.errors import OutOfRange
from services.kit.proto import to_proto
from services.user_svc.changes import repository

_PAGE = 500
_POLL_S = 0.1
_BEAT_S = 0.4


class ChangeService(change_service_pb2_grpc.ChangeServiceServicer):
    """See proto/clawplane/user/v1/change_service.proto."""

    async def WatchChanges(
        self, request: change_service_pb2.WatchChangesRequest, call: Call
    ) -> AsyncIterator[change_service_pb2.WatchChangesResponse]:
        async with call.read() as session:
            oldest, newest = await repository.bounds(session)
        seq = request.after_seq if request.after_seq >= 0 else newest
        if seq > newest or (seq < oldest - 1 and seq > 0) or (seq == 0 and oldest > 1):
            raise OutOfRange(
                "changes after this number are not kept; read everything anew and follow from latest_seq",
                reason=ErrorReason.ERROR_REASON_OUT_OF_RANGE, latest_seq=newest,
            )  # fmt: skip
        yield change_service_pb2.WatchChangesResponse(seq=seq)
        beat = time.monotonic()
        async for _ in call.ticks(_POLL_S):
            more = True
            while more:
                # A transaction a tick: an open one would hold back PostgreSQL's clean-up for as long as somebody watches.
                async with call.read() as session:
                    rows = await repository.after(session, seq, _PAGE)
                for row in rows:
                    seq = row.seq
                    yield change_service_pb2.WatchChangesResponse(seq=seq, change=to_proto(row, change_service_pb2.Change))
                more = len(rows) == _PAGE
                if rows:
                    beat = time.monotonic()
            if time.monotonic() - beat >= _BEAT_S:
                beat = time.monotonic()
                yield change_service_pb2.WatchChangesResponse(seq=seq)
