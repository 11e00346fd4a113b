"""What to send next, and what becomes of it: the whole logic of a recorder, without network and without a clock of its own driver.

An event is in memory, in a file of the spool, or answered for; it leaves one place only when it is in the next. The drivers (``sync``,
``aio``) ask ``next`` for a batch, send it, and tell ``answered`` or ``failed``.
"""

import enum
import logging
import threading
import time
from collections import deque
from dataclasses import dataclass

from clawplane.deployment.v1.usage_event_pb2 import UsageEvent
from clawplane.deployment.v1.usage_service_pb2 import BatchRecordUsageRequest, BatchRecordUsageResponse
from clawplane_client import errors
from clawplane_client.memory import Memory, parts
from clawplane_client.patience import Failure, Kind, Patience
from clawplane_client.spool import SEGMENT_BYTES, Leftover, Spool
from clawplane_client.stats import Counts, Stats

log = logging.getLogger("clawplane_client")
MOST_EVENTS = 5_000
"""What the service takes in one call."""
_MOST_BYTES = 1024 * 1024
"""Of a call: a quarter of what the service reads by default."""
_LOOK_S, _LOOK_AGAIN_S = 5.0, 1.0
"""How often the spool is looked at for what other programs have left there; and while one of them drains it."""
_LONGEST_S = 3600.0


@dataclass(frozen=True)
class Limits:
    """How much, and how long."""

    flush_events: int
    flush_interval_s: float
    batch_events: int
    buffer_events: int


class Added(enum.Enum):
    """What became of an event."""

    NO_ROOM = 0
    QUIETLY = 1
    LOOK_AGAIN = 2
    """It is in memory, and whoever waits for ``pause_s`` should ask for it again."""


class Outbox:
    """The events of one recorder. Safe for several threads."""

    def __init__(self, limits: Limits, patience: Patience, spool: Spool | None) -> None:
        self._limits, self._patience, self._spool = limits, patience, spool
        if spool:
            spool.tell = self._tell
        self._memory = Memory(limits.buffer_events)
        self._work = threading.Lock()
        """Held by whoever moves events from place to place. Never together with a call to the service, or by ``add``."""
        self._pieces: deque[list[bytes]] = deque()
        """What is to be sent now; taken from ``_leftover``, or from memory when that is None."""
        self._leftover: Leftover | None = None
        self._reports: deque[errors.Rejection | errors.UsageError] = deque()
        self._counts = Counts()
        self._urgent = self._closed = self._finished = self._memory_was_last = False
        self._backlog = spool is not None
        self._look_at = self._spill_at = 0.0
        self._spool_trouble: errors.UsageError | None = None

    @property
    def stats(self) -> Stats:
        """The numbers now."""
        return self._counts.stats(self._memory.held)

    @property
    def idle(self) -> bool:
        """Whether the service has answered for everything, that in the spool included."""
        return not self._memory.held and not self._backlog

    @property
    def at_rest(self) -> bool:
        """Whether a program may end: nothing is in memory, and nothing more can be done about the spool now."""
        return not self._memory.held and (not self._backlog or self._patience.away or (self._spool is not None and self._spool.busy))

    def add(self, event: bytes) -> Added:
        """Takes an event. Closed after ``close``."""
        place = self._memory.put(event)
        if not place:
            return Added.NO_ROOM
        self._counts.add(recorded=1)
        return Added.LOOK_AGAIN if place in (1, self._limits.flush_events) else Added.QUIETLY

    def pause_s(self) -> float:
        """How long there is nothing to do."""
        away_s, due_s = self._patience.wait_s, self._due_s()
        if away_s > 0:
            return min(away_s, max(due_s, self._spill_at - time.monotonic())) if self._spool else away_s
        if self._pieces:
            return 0
        look_s = max(0.0, self._look_at - time.monotonic()) if self._spool else _LONGEST_S
        return min(due_s, look_s)

    def next(self) -> list[bytes] | None:
        """The batch to send now, again and again until it is answered; None when there is none."""
        with self._work:
            if self._finished:
                return None
            if self._patience.wait_s > 0:
                if self._spool and self._due_s() <= 0 and time.monotonic() >= self._spill_at:
                    self._spill()
                return None
            if not self._pieces:
                self._load()
            return self._pieces[0] if self._pieces else None

    def answered(self, response: BatchRecordUsageResponse) -> None:
        """The service has answered for the batch."""
        with self._work:
            if not self._pieces:
                return
            if self._patience.succeeded():
                log.info("the service answers again")
            batch = self._pieces.popleft()
            for wrong in response.errors:
                if 0 <= wrong.index < len(batch):
                    self._reject(batch[wrong.index], wrong.field, wrong.message)
            self._counts.add(accepted=response.accepted, duplicates=response.duplicates, rejected=response.rejected)
            self._forget(batch)

    def failed(self, failure: Failure) -> None:
        """The batch brought no answer. What was under way goes where the end of the program does not reach it, if there is such a place."""
        with self._work:
            if not self._pieces:
                return
            self._counts.add(failures=1)
            if failure.kind is Kind.BAD:
                self._divide(failure)
                return
            if failure.kind is Kind.REFUSED:
                log.error("the service refuses usage events, they are kept: %s %s", failure.code, failure.details)
                self._reports.append(errors.SendRefused(failure.code, failure.details))
            elif not self._patience.away:
                log.warning("the service is away, usage events are kept: %s %s", failure.code, failure.details)
            self._patience.failed(failure)
            self._retreat()

    def spill(self) -> errors.UsageError | None:
        """Makes room by moving what waits in memory to the spool; what was in the way of it, or None."""
        with self._work:
            if self._spool is None:
                return errors.BufferFull(f"{self._limits.buffer_events} usage events wait to be sent, and there is no spool")
            return None if self._spill() else self._spool_trouble

    def hurry(self) -> None:
        """Sends what there is now, without waiting for more of it."""
        self._urgent = self._memory.waiting > 0
        self._look_at = 0
        self._patience.hurry()

    def close(self) -> None:
        """Takes no more."""
        self._closed = True
        self._memory.close()
        self.hurry()

    def finish(self) -> list[UsageEvent]:
        """The last thing: what is in memory goes to the spool. Those that could not."""
        with self._work:
            self._finished = True
            self._retreat()
            if self._spool:
                self._spool.seal()
            left = self._memory.take(self._memory.held, 2**62)
            self._memory.forget(len(left))
            return [UsageEvent.FromString(event) for event in left]

    def abandon(self) -> None:
        """In a child process: lets go of files, and touches neither what they hold nor a lock, which a thread may have had at the fork."""
        if self._spool:
            self._spool.abandon(self._leftover)

    def take_report(self) -> errors.Rejection | errors.UsageError | None:
        """The next thing that the program should be told; None when it has been told all."""
        return self._reports.popleft() if self._reports else None

    def _due_s(self) -> float:
        waiting = self._memory.waiting
        if not waiting:
            return _LONGEST_S
        if self._urgent or waiting >= self._limits.flush_events:
            return 0
        return max(0.0, self._limits.flush_interval_s - self._memory.waited_s)

    def _load(self) -> None:
        # What the end of the program would take goes first, then by turns: else it would be at risk for as long as a backlog drains.
        from_memory = self._memory.waiting and (self._closed or (self._due_s() <= 0 and not self._memory_was_last))
        if not from_memory and (leftover := self._oldest()):
            self._memory_was_last = False
            self._leftover = leftover
            self._pieces.extend(parts(leftover.events, self._limits.batch_events, _MOST_BYTES))
        elif self._due_s() <= 0:
            self._memory_was_last = True
            self._pieces.append(self._memory.take(self._limits.batch_events, _MOST_BYTES))
            self._urgent = self._urgent and self._memory.waiting > 0

    def _oldest(self) -> Leftover | None:
        if self._spool is None or time.monotonic() < self._look_at:
            return None
        try:
            leftover = self._spool.oldest()
            self._backlog = leftover is not None or self._spool.busy
        except errors.SpoolFailed as error:
            self._tell_of_spool(error)
            leftover = None
        if leftover is None:
            self._look_at = time.monotonic() + (_LOOK_AGAIN_S if self._spool.busy else _LOOK_S)
        return leftover

    def _forget(self, batch: list[bytes]) -> None:
        if self._leftover is None:
            self._memory.forget(len(batch))
        elif not self._pieces:
            assert self._spool is not None
            self._spool.done(self._leftover)
            self._leftover = None

    def _divide(self, failure: Failure) -> None:
        self._patience.succeeded()
        batch = self._pieces.popleft()
        if len(batch) > 1:
            half = len(batch) // 2
            self._pieces.extendleft([batch[half:], batch[:half]])
            return
        self._reject(batch[0], "", failure.details or failure.code)
        self._counts.add(rejected=1)
        self._forget(batch)

    def _reject(self, event: bytes, field: str, message: str) -> None:
        rejection = errors.Rejection(UsageEvent.FromString(event), field, message)
        log.error("the service rejects usage event %s: %s %s", rejection.event.id, field, message)
        self._reports.append(rejection)

    def _retreat(self) -> None:
        if self._leftover is None:
            self._memory.put_back([event for piece in self._pieces for event in piece])
        self._pieces.clear()
        if self._spool:
            self._spool.release(self._leftover)
            self._leftover = None
            self._spill()

    def _spill(self) -> bool:
        assert self._spool is not None
        while self._memory.waiting:
            events = self._memory.take(MOST_EVENTS, SEGMENT_BYTES)
            try:
                self._spool.append(events)
            except (errors.SpoolFull, errors.SpoolFailed) as error:
                self._memory.put_back(events)
                self._tell_of_spool(error)
                self._spill_at = time.monotonic() + max(_LOOK_AGAIN_S, self._limits.flush_interval_s)
                return False
            self._spool_trouble, self._backlog, self._look_at = None, True, 0.0
            self._counts.add(spooled=len(events))
            self._memory.forget(len(events))
        return True

    def _tell_of_spool(self, error: errors.UsageError) -> None:
        # Once, until it works again.
        if type(error) is not type(self._spool_trouble):
            self._tell(error)
        self._spool_trouble = error

    def _tell(self, error: errors.UsageError) -> None:
        log.error("%s", error)
        self._reports.append(error)


def request_of(batch: list[bytes]) -> BatchRecordUsageRequest:
    """The call that carries a batch."""
    request = BatchRecordUsageRequest()
    for event in batch:
        request.events.add().MergeFromString(event)
    return request
