"""UsageService: the ledger of model usage."""

import asyncio
import re
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from itertools import count
from operator import attrgetter

from clawplane.deployment.v1 import usage_event_pb2, usage_service_pb2_grpc
from clawplane.deployment.v1 import usage_service_pb2 as rpc
from services.deployment_svc.settings import DeploymentSettings
from services.deployment_svc.usage import adjust, reading, recost, repository, summary
from services.deployment_svc.usage.ledger import CHUNK, Ledger
from services.deployment_svc.usage.models import UsageEvent
from services.deployment_svc.usage.rows import SAID, Reporter, Row, Window, read, row_of
from services.kit.bulk import Bulk
from services.kit.call import Call
from services.kit.columns import now
from services.kit.errors import Error, InvalidArgument, InvalidFields
from services.kit.proto import to_proto

_RULES = Bulk(usage_event_pb2.UsageEvent, SAID)
_DEPLOYMENT, _NAMED = re.compile("dep_[0-9a-f]{32}"), attrgetter("deployment_id")


class UsageService(usage_service_pb2_grpc.UsageServiceServicer):
    """See proto/clawplane/deployment/v1/usage_service.proto."""

    def __init__(self, ledger: Ledger, settings: DeploymentSettings) -> None:
        self.ledger, self.settings = ledger, settings
        self._late, self._ahead = timedelta(days=settings.usage_late_days), timedelta(seconds=settings.usage_ahead_s)

    def _window(self) -> Window:
        return Window.around(now(), self._late, self._ahead)

    async def RecordUsage(self, request: rpc.RecordUsageRequest, call: Call) -> rpc.RecordUsageResponse:
        who, book = await _reporter([request.event], call), self.ledger.book
        try:
            row = row_of(request.event, read(request.event), who, self._window(), book)
        except InvalidArgument as error:
            raise InvalidFields([(f"event.{field}", text) for field, text in error.violations]) from None
        stored: Row | UsageEvent | None = row
        is_new = await self.ledger.record(row, book)
        # Where the prices have changed meanwhile, it was stored at the new ones.
        if not is_new or self.ledger.book.version != book.version:
            async with call.read() as session:
                stored = await repository.find(session, row.id, row.month)
            assert stored is not None
            if not _may_see(stored, call):
                return rpc.RecordUsageResponse(duplicate=not is_new)
        return rpc.RecordUsageResponse(event=to_proto(stored, usage_event_pb2.UsageEvent), duplicate=not is_new)

    async def BatchRecordUsage(self, request: rpc.BatchRecordUsageRequest, call: Call) -> rpc.BatchRecordUsageResponse:
        response = rpc.BatchRecordUsageResponse()
        events = list(request.events)
        who, window, seen = await _reporter(events, call), self._window(), set[repository.Key]()
        commits: list[asyncio.Task[set[repository.Key]]] = []
        with self.ledger.room.taken(len(events), commits):
            for start in range(0, len(events), CHUNK):
                rows = self._rows(events[start : start + CHUNK], start, who, window, seen, response)
                commits.append(asyncio.create_task(self.ledger.store(rows, self.ledger.book)))
                # The next rows are made while the database works on these; two chunks at a time are enough for that.
                await asyncio.wait(commits[-2:-1] or commits, timeout=None if len(commits) > 1 else 0)
            # Each to its end, also when one fails: what was stored then is a duplicate when the caller sends it again.
            await asyncio.wait(commits)
        response.accepted = sum(len(commit.result()) for commit in commits)
        response.rejected = len(response.errors)
        response.duplicates = len(events) - response.rejected - response.accepted
        return response

    def _rows(
        self, events: Sequence[usage_event_pb2.UsageEvent], start: int, who: Reporter, window: Window, seen: set[repository.Key],
        response: rpc.BatchRecordUsageResponse,
    ) -> list[Row]:  # fmt: skip
        """The rows of those events of a chunk that may be stored and were not among those before; the errors of the others."""
        values, book, rows = list(map(read, events)), self.ledger.book, []
        all_sound = _RULES.sound(values)
        for index, event, said in zip(count(start), events, values, strict=False):
            try:
                if not all_sound and (found := _RULES.wrong(event)):
                    raise InvalidFields(found)
                row = row_of(event, said, who, window, book)
            except Error as error:
                field, text = error.violations[0] if error.violations else ("", error.message)
                response.errors.add(index=index, id=event.id, field=field, message=text)
                continue
            if (key := row.key) not in seen:
                seen.add(key)
                rows.append(row)
        return rows

    async def ListUsage(self, request: rpc.ListUsageRequest, call: Call) -> rpc.ListUsageResponse:
        return await reading.list_events(request, call)

    async def ExportUsage(self, request: rpc.ExportUsageRequest, call: Call) -> AsyncIterator[rpc.ExportUsageResponse]:
        async for piece in reading.export(request, call):
            yield piece

    async def SummarizeUsage(self, request: rpc.SummarizeUsageRequest, call: Call) -> rpc.SummarizeUsageResponse:
        return await summary.summarize(request, call, self.ledger.book.currency)

    async def AdjustUsage(self, request: rpc.AdjustUsageRequest, call: Call) -> usage_event_pb2.UsageEvent:
        return await adjust.adjust(request, call, self.ledger)

    async def RecostUsage(self, request: rpc.RecostUsageRequest, call: Call) -> AsyncIterator[rpc.RecostUsageResponse]:
        async for progress in recost.recost(request, call, self.ledger):
            yield progress


async def _reporter(events: Sequence[usage_event_pb2.UsageEvent], call: Call) -> Reporter:
    """Who reports. A bot's own deployment needs no look-up."""
    caller = call.caller
    own: frozenset[str] = frozenset()
    named = set() if caller.deployment_id else set(filter(_DEPLOYMENT.fullmatch, set(map(_NAMED, events))))
    if named:
        async with call.read() as session:
            own = frozenset(await repository.own_deployments(session, named))
    return Reporter(
        call.org_id, caller.user_id or None, api_key_of(call), caller.deployment_id or None, own, caller.may("usage.state_cost")
    )


def _may_see(stored: UsageEvent, call: Call) -> bool:
    """Whether the caller may be told of an event whose id he sends: it may be another's of the organization."""
    caller, own_key = call.caller, api_key_of(call)
    return (
        caller.may("usage.read")
        or (bool(caller.deployment_id) and stored.deployment_id == caller.deployment_id)
        or (own_key is not None and stored.api_key_id == own_key)
    )


def api_key_of(call: Call) -> str | None:
    """The API key that a call is made with; a session is none."""
    return call.caller.key_id if call.caller.kind in ("key", "claw") else None
