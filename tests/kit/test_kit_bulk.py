"""Rules by column: never sounder than protovalidate, and as sound for what callers really send."""

from typing import Any

import protovalidate
import pytest
from buf.validate import validate_pb2
from hypothesis import given
from hypothesis import strategies as st

from clawplane.deployment.v1 import price_pb2
from clawplane.deployment.v1 import usage_event_pb2 as pb
from clawplane.user.v1 import user_pb2
from services.deployment_svc.usage.rows import SAID, read
from services.kit import ids
from services.kit.bulk import Bulk

EVENTS = Bulk(pb.UsageEvent, SAID)
TEXTS = st.sampled_from(["", "x", "x\0y", "a b", "x\n", "\n", "é", "dep_" + "0" * 32, "dep_" + "0" * 32 + "\n", "dep_" + "g" * 32, "openai", "OpenAI", "0.5", "0.", "1" * 65, "x" * 101])
NUMBERS = st.sampled_from([0, 1, -1, 10**9, 10**9 + 1, 86_400_000, 86_400_001, 1000, 1001, 2**31 - 1])


def good() -> dict[str, Any]:
    """An event that breaks no rule."""
    return {"id": str(ids.uuid7()), "provider": "openai", "model": "gpt-3.2", "tokens_in": 5}


def _sound(events: list[pb.UsageEvent]) -> bool:
    return EVENTS.sound([read(event) for event in events])


def test_what_callers_send_is_sound() -> None:
    events = [pb.UsageEvent(**good(), deployment_id=ids.new("dep"), metadata={"a": "b"}, stated_cost="0.25", type=1) for _ in range(100)]
    assert _sound(events) and _sound([])


FIELDS = [
    field
    for field in pb.UsageEvent.DESCRIPTOR.fields
    if field.message_type is None and (field.cpp_type != field.CPPTYPE_STRING or field.GetOptions().HasExtension(validate_pb2.field))
]
"""What callers say, and is checked; other texts are only for answers."""


def wrong(draw: st.DrawFn) -> pb.UsageEvent:
    """An event with some fields of any kind."""
    given_ = good()
    for field in draw(st.lists(st.sampled_from(FIELDS), max_size=3)):
        if field.cpp_type == field.CPPTYPE_STRING:
            given_[field.name] = draw(TEXTS)
        elif field.cpp_type == field.CPPTYPE_BOOL:
            given_[field.name] = draw(st.booleans())
        else:
            value = draw(NUMBERS)
            given_[field.name] = min(value, 2**31 - 1) if field.cpp_type in (field.CPPTYPE_INT32, field.CPPTYPE_ENUM) else value
    if draw(st.booleans()):
        given_["metadata"] = draw(st.dictionaries(st.text(max_size=42), st.sampled_from(["", "x", "x" * 500, "x" * 501]), max_size=22))
    return pb.UsageEvent(**given_)


def _texts(event: pb.UsageEvent) -> list[str]:
    """All of an event."""
    plain = [getattr(event, field.name) for field in FIELDS if field.cpp_type == field.CPPTYPE_STRING]
    return [*plain, *event.metadata.keys(), *event.metadata.values()]


@given(st.lists(st.composite(wrong)(), min_size=1, max_size=4))
def test_it_says_what_protovalidate_says(events: list[pb.UsageEvent]) -> None:
    assert _sound(events) == (not any(EVENTS.wrong(one) for one in events))
    for one in events:
        found = EVENTS.wrong(one)
        assert bool(found) == bool(protovalidate.collect_violations(one) or any("\0" in text for text in _texts(one)))


@pytest.mark.parametrize("kind", [price_pb2.Price, user_pb2.User])
def test_rules_that_it_does_not_know_are_refused_when_it_is_made(kind: Any) -> None:
    with pytest.raises(ValueError, match="rules"):
        Bulk(kind, [field.name for field in kind.DESCRIPTOR.fields])


def test_no_rule_is_left_out_since_nobody_reads_its_field() -> None:
    with pytest.raises(ValueError, match="not read"):
        Bulk(pb.UsageEvent, [name for name in SAID if name != "model"])
