"""Rows to messages and back."""

from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from clawplane.deployment.v1 import deployment_pb2, usage_event_pb2
from clawplane.user.v1 import user_pb2
from services.kit.errors import InvalidArgument
from services.kit.proto import assign, to_proto


def row_of(**columns: Any) -> Any:
    """A row of a class of its own."""
    return type("Row", (), columns)()


def test_a_message_is_the_allow_list() -> None:
    at = datetime(2026, 1, 2, 3, 4, 5, 678_000, UTC)
    row = row_of(
        id="usr_1", email="a@b.c", password_hash="PLANTED", created_at=at, last_login_at=None, clerk_user_id=None, is_active=True, version=7,
        preferences={"theme": "dark", "n": [1, None]}, subscription_status=user_pb2.SUBSCRIPTION_STATUS_ACTIVE,
    )  # fmt: skip
    message = to_proto(row, user_pb2.User)
    assert (message.id, message.email, message.is_active, message.etag, message.clerk_user_id) == ("usr_1", "a@b.c", True, "7", "")
    assert message.created_at.ToDatetime(tzinfo=UTC) == at and not message.HasField("last_login_at")
    assert message.preferences["theme"] == "dark" and message.subscription_status == user_pb2.SUBSCRIPTION_STATUS_ACTIVE
    assert "PLANTED" not in str(message)


def test_decimals_are_written_out_and_names_may_carry_an_underscore() -> None:
    row = row_of(cost=Decimal("1E-9"), metadata=object(), metadata_={"a": "b"}, tokens_in=5)
    message = to_proto(row, usage_event_pb2.UsageEvent)
    assert message.cost == "0.000000001" and message.tokens_in == 5
    assert "metadata" in {field.name for field, _ in message.ListFields()}


def test_lists_become_repeated_fields() -> None:
    assert list(to_proto(row_of(paths=["a", "b"]), FieldMask).paths) == ["a", "b"]


def user(**columns: Any) -> Any:
    """A row."""
    return row_of(id="usr_1", email="old@b.c", full_name="Old", bio="Old", tier="starter", **columns)


def test_a_new_row_takes_what_is_set_but_for_what_is_not_the_callers() -> None:
    row = user()
    written = assign(row, user_pb2.User(id="usr_2", email="new@b.c", tier="business", is_active=True, etag="5", preferences={"a": 1.5}))
    assert sorted(written) == ["email", "preferences"]
    assert (row.id, row.email, row.full_name, row.tier, row.preferences) == ("usr_1", "new@b.c", "Old", "starter", {"a": 1.5})
    row = row_of()
    assert assign(row, deployment_pb2.Deployment(model="m", state=deployment_pb2.STATE_ACTIVE)) == ["model"]


def test_a_mask_says_exactly_what_changes() -> None:
    row = user()
    assert assign(row, user_pb2.User(email="new@b.c", full_name="New"), FieldMask(paths=["full_name", "bio", "tier", "etag"])) == ["full_name", "bio"]
    assert (row.email, row.full_name, row.bio, row.tier) == ("old@b.c", "New", "", "starter")
    # An empty mask means what is set; "*" means all.
    row = user()
    assert assign(row, user_pb2.User(full_name="New"), FieldMask()) == ["full_name"] and row.bio == "Old"
    row = user()
    assert "bio" in assign(row, user_pb2.User(full_name="New", email="new@b.c"), FieldMask(paths=["*"])) and row.bio == "" and row.tier == "starter"


def test_unknown_and_immutable_paths_are_told() -> None:
    for path in ("nonsense", "preferences.theme", "", "fullName", "*,bio"):
        with pytest.raises(InvalidArgument) as failure:
            assign(user(), user_pb2.User(), FieldMask(paths=[path]))
        assert failure.value.violations[0][0] == "update_mask"
    web, telegram = deployment_pb2.CHANNEL_WEB, deployment_pb2.CHANNEL_TELEGRAM
    change = deployment_pb2.Deployment(channel=web)
    for mask in (FieldMask(paths=["channel"]), FieldMask()):
        row = row_of(channel=telegram)
        with pytest.raises(InvalidArgument, match="channel cannot be changed"):
            assign(row, change, mask)
        assert row.channel == telegram
    # The same value is no change.
    assert assign(row_of(channel=web), change, FieldMask(paths=["channel"])) == []
