"""An answer on its way from a provider to a caller: passed on as it comes, counted on the way, read to its end in any case."""

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import orjson

from gateway.models.openai import DONE, Usage, usage_of

_MOST_BUFFERED = 4 * 1024 * 1024
_OF_INTEREST = re.compile(rb'"usage"\s*:\s*\{|\[DONE\]')


class BrokenStream(Exception):
    """The provider's stream is none, or ended before its end."""


@dataclass
class Meter:
    """What was seen of an answer."""

    wants_usage: bool
    usage: Usage | None = None
    events: int = 0
    """Chunks so far: about one token each."""
    is_done: bool = False
    held: list[bytes] = field(default_factory=list)
    """What is passed on only after the usage is written down."""

    async def relay(self, source: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """The events as they are, several at once where they came so, all but the last ones: those are ``held``."""
        rest = b""
        async for piece in source:
            rest += piece
            # Events end with an empty line; what is not whole yet waits.
            whole, cut, rest = rest.rpartition(b"\n\n")
            if not cut:
                whole, cut, rest = rest.rpartition(b"\r\n\r\n")
            if len(rest) > _MOST_BUFFERED:
                raise BrokenStream("an event is too long")
            if not cut:
                continue
            ready = self._take(whole + cut)
            if ready:
                yield ready
        if rest.strip():
            raise BrokenStream("the stream ended within an event")

    def _take(self, block: bytes) -> bytes:
        if not _may_tell_usage(block) and DONE not in block:
            self.events += block.count(b"\ndata:") + block.startswith(b"data:")
            return block
        if b"\r" in block:
            block = block.replace(b"\r\n", b"\n")
        # What comes before the first event of interest needs no look of its own.
        found = _OF_INTEREST.search(block)
        start = block.rfind(b"\n\n", 0, found.start()) + 2 if found else 0
        start = start if start > 1 else 0
        self.events += block.count(b"data:", 0, start)
        ready = [block[:start]]
        for event in block[start:].split(b"\n\n"):
            if event.strip() and self._look(event):
                ready.append(event + b"\n\n")
        return b"".join(ready)

    def _look(self, event: bytes) -> bool:
        """Whether an event is passed on at once."""
        data = b"\n".join(line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:"))
        if data == DONE:
            self.is_done = True
            self.held.append(event + b"\n\n")
            return False
        self.events += bool(data)
        if not _may_tell_usage(data):
            return True
        try:
            said = orjson.loads(data)
        except orjson.JSONDecodeError:
            return True
        usage = usage_of(said)
        if usage is None:
            return True
        self.usage = usage
        if said.get("choices"):
            return True
        # A chunk of its own for the usage: the caller gets it if he asked for it.
        self.events -= 1
        if self.wants_usage:
            self.held.append(event + b"\n\n")
        return False


def _may_tell_usage(data: bytes) -> bool:
    """Whether a usage that is not null may be in it. Text inside JSON has its quotes escaped, so nothing that somebody said looks so."""
    return data.count(b'"usage"') > data.count(b'"usage":null') + data.count(b'"usage": null')
