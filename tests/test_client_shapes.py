"""What the client reads in providers' answers, and what it makes of a program's arguments."""

from datetime import UTC, datetime, timedelta, timezone
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clawplane.deployment.v1 import usage_event_pb2 as pb
from clawplane_client import Usage, usage_from_anthropic, usage_from_openai
from clawplane_client.events import make_event
from services.kit.ids import uuid7_time

CHAT = {
    "id": "chatcmpl-1", "model": "gpt-5-mini-2025-08-07",
    "usage": {
        "prompt_tokens": 1200, "completion_tokens": 340, "total_tokens": 1540,
        "prompt_tokens_details": {"cached_tokens": 1024, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 256, "accepted_prediction_tokens": 0},
    },
}  # fmt: skip
RESPONSE = {
    "id": "resp_1", "model": "gpt-5",
    "usage": {
        "input_tokens": 75, "input_tokens_details": {"cached_tokens": 64}, "output_tokens": 1186,
        "output_tokens_details": {"reasoning_tokens": 1024}, "total_tokens": 1261,
    },
}  # fmt: skip
MESSAGE = {
    "id": "msg_1", "model": "claude-opus-4-5",
    "usage": {
        "input_tokens": 21, "cache_creation_input_tokens": 188, "cache_read_input_tokens": 2000, "output_tokens": 393,
        "cache_creation": {"ephemeral_5m_input_tokens": 188, "ephemeral_1h_input_tokens": 0}, "service_tier": "standard",
    },
}  # fmt: skip


def as_object(value: Any) -> Any:
    """The same as an SDK hands it over: attributes instead of keys."""
    return SimpleNamespace(**{name: as_object(inner) for name, inner in value.items()}) if isinstance(value, dict) else value


def usage(**counts: Any) -> dict[str, Any]:
    return {"model": "m", "usage": counts}


@pytest.mark.parametrize("shape", [lambda it: it, as_object], ids=["dict", "object"])
def test_the_shapes_of_openai(shape: Any) -> None:
    assert usage_from_openai(shape(CHAT)) == Usage(1200, 340, 1024, 256, "gpt-5-mini-2025-08-07")
    assert usage_from_openai(shape(RESPONSE)) == Usage(75, 1186, 64, 1024, "gpt-5")
    assert usage_from_openai(shape({"type": "response.completed", "response": RESPONSE})) == Usage(75, 1186, 64, 1024, "gpt-5")
    # Compatible servers leave out the details, or say null.
    assert usage_from_openai(shape(usage(prompt_tokens=5, completion_tokens=0))) == Usage(5, 0, model="m")
    nothing_said = usage(
        prompt_tokens=5, completion_tokens=1, prompt_tokens_details=None, completion_tokens_details={"reasoning_tokens": None}
    )
    assert usage_from_openai(shape(nothing_said)) == Usage(5, 1, model="m")
    embedding = {"object": "list", "model": "text-embedding-3-small", "usage": {"prompt_tokens": 8, "total_tokens": 8}}
    assert usage_from_openai(shape(embedding)) == Usage(8, 0, model="text-embedding-3-small")


@pytest.mark.parametrize("shape", [lambda it: it, as_object], ids=["dict", "object"])
def test_the_shape_of_anthropic(shape: Any) -> None:
    # Its three counts of what was read are apart from each other; ours is the whole, of which the cached ones are a part.
    assert usage_from_anthropic(shape(MESSAGE)) == Usage(2209, 393, 2000, 0, "claude-opus-4-5")
    assert usage_from_anthropic(shape(usage(input_tokens=7, output_tokens=3))) == Usage(7, 3, model="m")
    without_cache = usage(input_tokens=7, output_tokens=3, cache_creation_input_tokens=None, cache_read_input_tokens=None)
    assert usage_from_anthropic(shape(without_cache)) == Usage(7, 3, model="m")


def test_parts_are_never_more_than_the_whole() -> None:
    odd = usage(
        prompt_tokens=5, completion_tokens=2, prompt_tokens_details={"cached_tokens": 9}, completion_tokens_details={"reasoning_tokens": 3}
    )
    assert usage_from_openai(odd) == Usage(5, 2, 5, 2, "m")


class Unwilling:
    """An object whose attributes raise."""

    @property
    def usage(self) -> Any:
        raise RuntimeError("not now")


@pytest.mark.parametrize("read", [usage_from_openai, usage_from_anthropic])
def test_what_carries_no_usage_is_none(read: Any) -> None:
    malformed: list[Any] = [
        None, {}, [], "usage", 5, {"usage": None}, {"usage": []}, {"usage": {}}, {"error": {"message": "overloaded"}}, Unwilling(),
        usage(prompt_tokens=5, completion_tokens=-1), usage(prompt_tokens="5", completion_tokens=1), usage(completion_tokens=1),
        usage(prompt_tokens=True, completion_tokens=1), usage(prompt_tokens=1.5, completion_tokens=1), usage(prompt_tokens=10**10, completion_tokens=1),
        usage(prompt_tokens=5, completion_tokens=1, prompt_tokens_details={"cached_tokens": "many"}), usage(input_tokens=5),
        usage(input_tokens=5, output_tokens=None), usage(input_tokens=-5, output_tokens=1), usage(output_tokens=4), usage(input_tokens=[], output_tokens=4),
    ]  # fmt: skip
    assert [read(answer) for answer in malformed] == [None] * len(malformed)
    assert usage_from_anthropic(usage(input_tokens=10**9, output_tokens=1, cache_read_input_tokens=1)) is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["usage", "response", "model", *CHAT["usage"], *RESPONSE["usage"], *MESSAGE["usage"], "cached_tokens"]), inner, max_size=5
    ), max_leaves=12,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(JSON)
def test_no_answer_makes_them_raise(answer: Any) -> None:
    for read in (usage_from_openai, usage_from_anthropic):
        for shaped in (answer, as_object(answer)):
            found = read(shaped)
            assert found is None or (
                0 <= found.tokens_cached <= found.tokens_in <= 10**9 and 0 <= found.tokens_reasoning <= found.tokens_out
            )


def made(**fields: Any) -> pb.UsageEvent:
    return pb.UsageEvent.FromString(make_event({"provider": "openai", "model": "gpt-5"} | fields)[1])


def test_an_event_has_its_id_and_time_from_the_start() -> None:
    before = datetime.now(UTC)
    one, two = made(), made()
    inside = uuid7_time(UUID(one.id))
    assert one.id != two.id and inside is not None and UUID(one.id).variant == UUID(two.id).variant
    assert before <= one.occurred_at.ToDatetime(UTC) <= datetime.now(UTC)
    assert abs(inside - one.occurred_at.ToDatetime(UTC)) <= timedelta(milliseconds=1)
    # An id carries the time of its event: else an event of last month would contradict itself.
    earlier = datetime(2026, 1, 31, 23, 30, tzinfo=timezone(timedelta(hours=1)))
    late = made(occurred_at=earlier)
    assert late.occurred_at.ToDatetime(UTC) == earlier and uuid7_time(UUID(late.id)) == earlier
    assert made(event_id=late.id).occurred_at == late.occurred_at
    assert made(event_id="mine", occurred_at=earlier).id == "mine"


def test_words_stand_for_types_and_states() -> None:
    event = made(type="embedding", status="canceled")
    assert (event.type, event.status) == (pb.USAGE_TYPE_EMBEDDING, pb.USAGE_STATUS_CANCELED)
    assert made(type=pb.USAGE_TYPE_AUDIO).type == pb.USAGE_TYPE_AUDIO


@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        ({"tokens": 5}, TypeError, "tokens"), ({"model": ""}, TypeError, "model"), ({"org_id": "org_1"}, TypeError, "org_id"),
        ({"cost": "1"}, TypeError, "cost"), ({"type": "song"}, ValueError, "embedding"), ({"metadata": {"a": "b\0"}}, ValueError, "U\\+0000"),
        ({"occurred_at": datetime(2026, 1, 1)}, ValueError, "time zone"),
        ({"metadata": {"a": "x" * 70_000}}, ValueError, "65536 bytes"), ({"tokens_in": 2**64}, ValueError, "range"),
    ],
)  # fmt: skip
def test_what_is_no_event_is_told_at_once(fields: dict[str, Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        made(**fields)
