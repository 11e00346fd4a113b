"""One call of the model endpoint, from its opening to its settlement."""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import aiohttp
import orjson
import structlog
from starlette.requests import ClientDisconnect
from starlette.types import Send

from clawplane.deployment.v1 import model_call_pb2, model_call_service_pb2, usage_event_pb2
from gateway.models import openai
from gateway.models.ask import Asker, Unanswered
from gateway.models.openai import OpenAiError, Usage, Wish
from gateway.models.relay import BrokenStream, Meter
from gateway.models.renew import Kept, Renewer
from gateway.models.settle import Settler
from gateway.models.upstreams import Upstream

log = structlog.get_logger()
_SEND_S = 15.0
"""A caller who takes nothing for so long is gone."""
_NEVER_WAITS = 32 * 1024
"""So much is buffered, whether or not the caller reads."""
_MOST_BYTES = 64 * 1024 * 1024
_OK, _ERROR = usage_event_pb2.USAGE_STATUS_OK, usage_event_pb2.USAGE_STATUS_ERROR


class Client:
    """Who asked, for as long as he listens."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.is_there = True
        self._sent = 0
        self.has_begun = False

    async def begin(self, status: int, content_type: str, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
        """Status and headers."""
        self.has_begun = True
        await self._pass({"type": "http.response.start", "status": status, "headers": [(b"content-type", content_type.encode()), *headers]})

    async def write(self, body: bytes, *, more: bool = True) -> None:
        """A piece of the answer."""
        await self._pass({"type": "http.response.body", "body": body, "more_body": more})

    async def refuse(self, error: OpenAiError) -> None:
        """An error as the whole answer."""
        raw = orjson.dumps(error.body)
        more = [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
        await self.begin(error.status, "application/json", [(b"content-length", str(len(raw)).encode()), *more])
        await self.write(raw, more=False)

    async def _pass(self, message: Any) -> None:
        if not self.is_there:
            return
        self._sent += len(message.get("body", b""))
        try:
            if self._sent < _NEVER_WAITS:
                await self._send(message)
            else:
                async with asyncio.timeout(_SEND_S):
                    await self._send(message)
        except (OSError, ClientDisconnect, TimeoutError):
            self.is_there = False


class Exchange:
    """One call from its opening to its settlement."""

    def __init__(
        self, asker: Asker, settler: Settler, renewer: Renewer, wish: Wish, upstream: Upstream, call: model_call_pb2.ModelCall,
        client: Client,
    ) -> None:  # fmt: skip
        self.asker, self.settler, self.renewer = asker, settler, renewer
        self.wish, self.upstream, self.call, self.client = wish, upstream, call, client
        self._began = time.monotonic()
        self._meter = Meter(wish.wants_usage)
        self._kept: Kept | None = None
        self._is_settled = False

    async def run(self) -> None:
        """Asks the provider and passes its answer on; whatever happens, the call is settled."""
        try:
            async with self.renewer.keep(self.call) as self._kept:
                answer = await self.asker.ask(self.upstream, self.wish, self.call.max_tokens)
                try:
                    await (self._stream(answer) if self.wish.stream else self._whole(answer))
                finally:
                    answer.close()
        except Unanswered as error:
            await self._settle(Usage(0, 0), estimated=True, status=_ERROR)
            await self.client.refuse(error.error)
        except (aiohttp.ClientError, BrokenStream, TimeoutError, ValueError) as error:
            log.warning("model.broken", provider=self.upstream.provider, call=self.call.id, error=type(error).__name__)
            await self._settle_what_was_seen()
            await self._tell_of_the_break()
        finally:
            # Only a cancelled task comes here unsettled: the process stops.
            if not self._is_settled:
                await self._settle_what_was_seen()

    async def _whole(self, answer: aiohttp.ClientResponse) -> None:
        pieces, size = [], 0
        async for piece in answer.content.iter_any():
            pieces.append(piece)
            size += len(piece)
            if size > _MOST_BYTES:
                raise BrokenStream("the answer is too long")
        raw = b"".join(pieces)
        try:
            said = orjson.loads(raw)
        except orjson.JSONDecodeError:
            raise BrokenStream("the answer is not JSON") from None
        self._meter.usage = openai.usage_of(said)
        self._meter.events = len(raw) // 4
        await self._settle_what_was_seen(_OK)
        await self.client.begin(200, "application/json", [(b"content-length", str(len(raw)).encode())])
        await self.client.write(raw, more=False)

    async def _stream(self, answer: aiohttp.ClientResponse) -> None:
        if not answer.headers.get("content-type", "").startswith("text/event-stream"):
            raise BrokenStream("the provider does not stream")
        await self.client.begin(200, "text/event-stream", [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")])
        async for ready in self._meter.relay(answer.content.iter_any()):
            await self.client.write(ready)
            if self._meter.is_done:
                break
        if not self._meter.is_done and self._meter.usage is None:
            raise BrokenStream("the stream ended before its end")
        # Who has seen the end can rely on it that the call is counted.
        await self._settle_what_was_seen(_OK)
        await self.client.write(b"".join(self._meter.held), more=False)
        await self.asker.finish(answer)

    async def _settle_what_was_seen(self, status: "usage_event_pb2.UsageStatus.ValueType" = _ERROR) -> None:
        """By the provider's count, which comes at the end of an answer; where it told none, by an estimate."""
        if self._meter.usage is not None:
            await self._settle(self._meter.usage, estimated=False, status=_OK)
        else:
            seen = min(self._meter.events, self.call.max_tokens)
            await self._settle(Usage(self.wish.tokens_in, seen), estimated=True, status=status)

    async def _settle(self, usage: Usage, *, estimated: bool, status: "usage_event_pb2.UsageStatus.ValueType") -> None:
        self._is_settled, left_s = True, 0.0
        if self._kept is not None:
            # Being settled is no reason to cut off what is still to be written.
            self.renewer.done(self._kept)
            left_s = self._kept.expires_at - asyncio.get_running_loop().time()
        request = model_call_service_pb2.ModelCallUsage(
            id=self.call.id, tokens_in=usage.tokens_in, tokens_out=usage.tokens_out, tokens_cached=usage.tokens_cached,
            tokens_reasoning=usage.tokens_reasoning, estimated=estimated, status=status,
            latency_ms=int((time.monotonic() - self._began) * 1000),
        )  # fmt: skip
        await self.settler.settle(request, time.monotonic() + left_s)

    async def _tell_of_the_break(self) -> None:
        error = OpenAiError(502, "the model's provider broke off", "server_error", "upstream_broken")
        if not self.client.has_begun:
            await self.client.refuse(error)
        elif self.wish.stream:
            await self.client.write(b"data: " + orjson.dumps(error.body) + b"\n\n", more=False)
        else:
            await self.client.write(b"", more=False)

