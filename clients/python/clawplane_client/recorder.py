"""What both recorders share: their options, the events they make, and how a program is told."""

import atexit
import logging
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc

from clawplane.deployment.v1 import usage_service_pb2_grpc
from clawplane_client import errors
from clawplane_client.outbox import MOST_EVENTS, Limits, Outbox, request_of
from clawplane_client.patience import Patience, failure_of
from clawplane_client.shapes import Usage, usage_from_anthropic, usage_from_openai
from clawplane_client.spool import Spool
from clawplane_client.stats import Stats

log = logging.getLogger("clawplane_client")
Token = str | Callable[[], str]
# Our own pauses decide when a service that was away is tried again, not those of the channel.
_CHANNEL = [("grpc.initial_reconnect_backoff_ms", 50), ("grpc.min_reconnect_backoff_ms", 1_000), ("grpc.max_reconnect_backoff_ms", 1_000)]


_ALIVE: "weakref.WeakSet[Recorder]" = weakref.WeakSet()


class Recorder:
    """Base of UsageRecorder and AsyncUsageRecorder."""

    def __init__(
        self, target: str, token: Token, *, spool_dir: str | Path | None = None, credentials: grpc.ChannelCredentials | None = None,
        org_id: str = "", on_rejected: Callable[[errors.Rejection], None] | None = None,
        on_error: Callable[[errors.UsageError], None] | None = None, flush_events: int = 500, flush_interval_s: float = 1.0,
        batch_events: int = MOST_EVENTS, buffer_events: int = 10_000, full_timeout_s: float = 5.0, call_timeout_s: float = 10.0,
        close_timeout_s: float = 5.0, backoff_s: float = 0.2, backoff_max_s: float = 30.0, refused_pause_s: float = 60.0,
        spool_max_bytes: int = 256 * 1024 * 1024, channel_options: Sequence[tuple[str, Any]] = (),
    ) -> None:  # fmt: skip
        """``target`` is host:port of the service, ``token`` an API key or a bot's own key, or a function that returns the one to use now.

        - ``spool_dir``: folder for events while the service is away; all programs that share it must act for the same organization. Without
          one, events wait in memory. SpoolFailed when it cannot be made. Needs a system with flock (Linux, macOS).
        - ``credentials``: for TLS, ``grpc.ssl_channel_credentials()``; without, the token goes over the network as it is.
        - ``org_id``: the organization that pays, for a person's token; a key says it already.
        - ``on_rejected``, ``on_error``: told of what the service will not store, and of what keeps events from being sent. They are called
          between two calls to the service: keep them short, and do not record in them.
        - ``flush_events``, ``flush_interval_s``: events are sent when there are so many, or when the first has waited so long.
        - ``batch_events``: most events of one call, 1 to 5,000.
        - ``buffer_events``: most events in memory. When there is no room, ``record`` moves them to the spool; without a spool, or when that
          is full too, it waits up to ``full_timeout_s`` and then raises BufferFull, SpoolFull or SpoolFailed.
        - ``call_timeout_s``: how long one call may take. ``close_timeout_s``: how long the end may take.
        - ``backoff_s``, ``backoff_max_s``: pause after the first failed call, and the longest; ``refused_pause_s``: pause after a refusal.
        - ``spool_max_bytes``: most bytes of undelivered events in the spool, of all programs that share it.
        - ``channel_options``: gRPC's own.
        """
        if not 1 <= batch_events <= MOST_EVENTS:
            raise ValueError(f"batch_events must be from 1 to {MOST_EVENTS}")
        if min(flush_events, buffer_events) < 1 or min(flush_interval_s, full_timeout_s, close_timeout_s) < 0:
            raise ValueError("flush_events and buffer_events must be at least 1, and no time less than 0")
        if min(call_timeout_s, backoff_s, backoff_max_s, refused_pause_s) <= 0:
            raise ValueError("call_timeout_s, backoff_s, backoff_max_s and refused_pause_s must be more than 0")
        self._target, self._token, self._credentials, self._org_id = target, token, credentials, org_id
        self._on_rejected, self._on_error = on_rejected, on_error
        self._full_timeout_s, self._call_timeout_s, self._close_timeout_s = full_timeout_s, call_timeout_s, close_timeout_s
        self._channel_options = [*_CHANNEL, *channel_options]
        limits = Limits(min(flush_events, buffer_events), flush_interval_s, batch_events, buffer_events)
        self._make_outbox: Callable[[], Outbox] = lambda: Outbox(
            limits, Patience(backoff_s, backoff_max_s, refused_pause_s), Spool(Path(spool_dir), spool_max_bytes) if spool_dir else None
        )
        if isinstance(token, str):
            _checked(token)
        self._outbox = self._make_outbox()
        self._spools = bool(spool_dir)
        self._of_parent: list[Any] = []
        _ALIVE.add(self)
        self._begin(at_once=self._spools)
        atexit.register(self._at_exit)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} for {self._target}>"

    @property
    def stats(self) -> Stats:
        """What it has done so far."""
        return self._outbox.stats

    def _begin(self, *, at_once: bool) -> None:
        """Makes what sends; ``at_once``: earlier runs may have left something in the spool."""
        raise NotImplementedError

    def _at_exit(self) -> None:
        raise NotImplementedError

    def _before_fork(self) -> None:
        """Waits for what must not be under way when the process forks."""

    def _after_fork_in_parent(self) -> None:
        """Goes on with it."""

    def _after_fork_in_child(self) -> None:
        """What was recorded before the fork is the parent's; all that sends, locks and files are made anew."""
        self._outbox.abandon()
        # Kept, since taking it apart is the parent's business as well.
        self._of_parent = [value for name, value in vars(self).items() if name in ("_channel", "_thread", "_task")]
        self._outbox = self._make_outbox()
        self._begin(at_once=False)

    def _open(self, grpc_or_aio: Any) -> Any:
        """A new channel of either kind."""
        if self._credentials is None:
            return grpc_or_aio.insecure_channel(self._target, options=self._channel_options)
        return grpc_or_aio.secure_channel(self._target, self._credentials, options=self._channel_options)

    def _send(self, channel: Callable[[], grpc.Channel], stopping: Callable[[], bool]) -> None:
        """One step, blocking: sends what is to be sent now."""
        batch = self._outbox.next()
        if batch is None:
            return
        try:
            call = usage_service_pb2_grpc.UsageServiceStub(channel()).BatchRecordUsage
            answer = call(request_of(batch), metadata=self._metadata(), timeout=self._call_timeout_s)
        except Exception as error:
            # A call that our own end has cut off says nothing about the service.
            if not stopping():
                self._outbox.failed(failure_of(error))
        else:
            self._outbox.answered(answer)

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        token = _checked(self._token if isinstance(self._token, str) else self._token())
        org = (("clawplane-org", self._org_id),) if self._org_id else ()
        return (("authorization", f"Bearer {token}"), *org)

    def _tell(self) -> None:
        """Tells the program what it should know."""
        while (report := self._outbox.take_report()) is not None:
            try:
                if isinstance(report, errors.Rejection):
                    if self._on_rejected is not None:
                        self._on_rejected(report)
                elif self._on_error is not None:
                    self._on_error(report)
            except Exception:
                log.exception("a function given to the usage recorder failed")

    def _undelivered(self) -> errors.NotDelivered | None:
        """The very last: puts what is left into the spool; what could not be put there."""
        left = self._outbox.finish()
        atexit.unregister(self._at_exit)
        _ALIVE.discard(self)
        if not left:
            return None
        log.error("%s usage events were not delivered", len(left))
        return errors.NotDelivered(left)


def _each(method: str) -> Callable[[], None]:
    def call() -> None:
        for recorder in list(_ALIVE):
            getattr(recorder, method)()

    return call


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_each("_before_fork"), after_in_parent=_each("_after_fork_in_parent"), after_in_child=_each("_after_fork_in_child")
    )


def of_openai(response: Any, provider: str, model: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``record`` for an answer in OpenAI's shape; NoUsage."""
    return _fields(usage_from_openai(response), provider, model, fields)


def of_anthropic(response: Any, provider: str, model: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``record`` for an answer in Anthropic's shape; NoUsage."""
    return _fields(usage_from_anthropic(response), provider, model, fields)


def _fields(usage: Usage | None, provider: str, model: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    if usage is None:
        raise errors.NoUsage("the answer carries no usage that can be read; nothing was recorded")
    counted = {name: getattr(usage, name) for name in ("tokens_in", "tokens_out", "tokens_cached", "tokens_reasoning")}
    return {**fields, **counted, "provider": provider, "model": model or usage.model}


def _checked(token: str) -> str:
    # What gRPC says of a header that it cannot send would show it.
    if not token or not all("!" <= each <= "~" for each in token):
        raise ValueError("the token must be visible ASCII characters, without spaces")
    return token
