"""An answer on its way: wherever the network cuts it, the caller gets the same events, and the same usage is seen."""

import itertools
import json
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.models.openai import Usage
from gateway.models.relay import BrokenStream, Meter


def chunk(content: str, usage: object = None) -> bytes:
    choices = [{"index": 0, "delta": {"content": content}}] if content else []
    return b"data: " + json.dumps({"choices": choices, "usage": usage}).encode()


TOLD = {"prompt_tokens": 9, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}
# Somebody talks of usage and of the end, which is none.
EVENTS = [chunk("one"), chunk('"usage": {"prompt_tokens": 1}'), b": still here", chunk("[DONE] data: x"), chunk("", TOLD), b"data: [DONE]"]


async def pieces(raw: bytes, cuts: list[int]) -> AsyncIterator[bytes]:
    edges = [0, *sorted({cut % len(raw) for cut in cuts}), len(raw)]
    for start, end in itertools.pairwise(edges):
        if end > start:
            yield raw[start:end]


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n"])
@given(cuts=st.lists(st.integers(0, 10_000), max_size=40), wants_usage=st.booleans())
async def test_cuts_change_nothing(end: bytes, cuts: list[int], wants_usage: bool) -> None:
    meter = Meter(wants_usage)
    passed = [piece async for piece in meter.relay(pieces(b"".join(event + end for event in EVENTS), cuts))]
    got = [event for event in (b"".join(passed) + b"".join(meter.held)).replace(b"\r\n", b"\n").split(b"\n\n") if event]
    assert got == [event for event in EVENTS if wants_usage or event != EVENTS[4]]
    # The end and the provider's count are passed on only after the call is settled.
    assert b"".join(meter.held).endswith(b"data: [DONE]\n\n") and EVENTS[5] not in b"".join(passed)
    assert meter.usage == Usage(9, 3, 4, 0) and meter.is_done


async def test_half_an_event_is_a_break() -> None:
    with pytest.raises(BrokenStream):
        _ = [piece async for piece in Meter(False).relay(pieces(EVENTS[0] + b"\n\n" + EVENTS[1], []))]
