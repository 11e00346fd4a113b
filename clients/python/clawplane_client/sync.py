"""UsageRecorder: for programs with threads."""

import logging
import threading
import time
from typing import Any, Unpack

import grpc

from clawplane_client import errors
from clawplane_client.events import CallFields, UsageFields, make_event
from clawplane_client.outbox import Added
from clawplane_client.recorder import Recorder, of_anthropic, of_openai

log = logging.getLogger("clawplane_client")
_LAST_WAIT_S = 1.0


class UsageRecorder(Recorder):
    """Records usage events: each is sent in the background, counted once, and kept while the service is away. Safe for several threads.

    It flushes when the interpreter ends; ``with`` or ``close`` does so at a time of your choosing and raises what could not be delivered.
    """

    def _begin(self, *, at_once: bool) -> None:
        self._starting, self._sending = threading.Lock(), threading.Lock()
        self._sends_none = False
        self._wake, self._stopping = threading.Event(), threading.Event()
        self._progress, self._steps = threading.Condition(), 0
        self._thread: threading.Thread | None = None
        self._channel: grpc.Channel | None = None
        if at_once:
            self._start()

    def __enter__(self) -> "UsageRecorder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def record(self, **fields: Unpack[UsageFields]) -> str:
        """Takes an event and returns its id; see UsageFields. It never waits for the service, nor fails when that is away.

        Raises TypeError or ValueError for arguments that make no event, Closed after ``close``, and BufferFull, SpoolFull or SpoolFailed
        when there is no room for ``full_timeout_s``: in all of these cases the event was not taken.
        """
        event_id, event = make_event(fields)
        deadline = time.monotonic() + self._full_timeout_s
        seen = self._steps
        while (added := self._outbox.add(event)) is Added.NO_ROOM:
            trouble = self._outbox.spill()
            self._wake.set()
            if trouble is not None and not self._wait_for_step(seen, deadline):
                raise trouble
            seen = self._steps
        if added is Added.LOOK_AGAIN:
            self._start()
            self._wake.set()
        return event_id

    def record_openai(self, response: Any, *, provider: str = "openai", model: str = "", **fields: Unpack[CallFields]) -> str:
        """``record`` with the usage, and unless given the model, of an answer in OpenAI's shape; NoUsage when it has none."""
        return self.record(**of_openai(response, provider, model, fields))

    def record_anthropic(self, response: Any, *, provider: str = "anthropic", model: str = "", **fields: Unpack[CallFields]) -> str:
        """``record`` with the usage, and unless given the model, of an answer in Anthropic's shape; NoUsage when it has none."""
        return self.record(**of_anthropic(response, provider, model, fields))

    def flush(self, timeout_s: float = 10.0) -> bool:
        """Sends what there is now; whether the service has answered for all of it, that in the spool included, in time."""
        self._outbox.hurry()
        self._wake.set()
        with self._progress:
            return self._progress.wait_for(lambda: self._outbox.idle, timeout_s)

    def close(self, timeout_s: float | None = None) -> None:
        """Sends what there is, for at most ``timeout_s`` (``close_timeout_s``) seconds; then the rest goes to the spool. NotDelivered when
        there is none, or no room in it. Closing twice is once."""
        self._outbox.close()
        if self._thread is not None:
            self._wake.set()
            with self._progress:
                self._progress.wait_for(lambda: self._outbox.at_rest, self._close_timeout_s if timeout_s is None else timeout_s)
            self._stopping.set()
            self._wake.set()
            if self._channel is not None:
                # A call that is still under way ends now.
                self._channel.close()
            self._thread.join(_LAST_WAIT_S)
        lost = self._undelivered()
        self._tell()
        if lost is not None:
            raise lost

    def _at_exit(self) -> None:
        try:
            self.close()
        except errors.NotDelivered as lost:
            if self._on_error is not None:
                self._on_error(lost)

    def _wait_for_step(self, seen: int, deadline: float) -> bool:
        """Whether the thread has done anything since; False when time is up, or when it is the thread itself that waits."""
        left = deadline - time.monotonic()
        if left <= 0 or threading.current_thread() is self._thread:
            return False
        with self._progress:
            return self._progress.wait_for(lambda: self._steps != seen, left)

    def _start(self) -> None:
        if self._thread is None:
            with self._starting:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="clawplane-usage", daemon=True)
                    self._thread.start()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._wake.wait(self._outbox.pause_s())
                self._wake.clear()
                with self._sending:
                    self._send(self._connected, self._stopping.is_set)
                self._tell()
            except Exception as error:
                # Whatever it is, the events are still there. Its text may hold the token.
                log.error("the usage recorder failed: %s", type(error).__name__)
                self._stopping.wait(_LAST_WAIT_S)
            with self._progress:
                self._steps += 1
                self._progress.notify_all()

    def _connected(self) -> grpc.Channel:
        # Only when there is something to send: a channel does not outlive a fork.
        if self._channel is None:
            self._channel = self._open(grpc)
        return self._channel

    def _before_fork(self) -> None:
        # In a child that was made during a call, gRPC may never work again.
        if self._sending.acquire(timeout=_LAST_WAIT_S):
            self._sends_none = True

    def _after_fork_in_parent(self) -> None:
        if self._sends_none:
            self._sends_none = False
            self._sending.release()
