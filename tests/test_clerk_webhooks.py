"""Clerk's webhooks over HTTP: signed as Svix does, in any order, each once."""

import base64
import hashlib
import hmac
import json
import time
import uuid
from typing import Any

import grpc
import httpx
import pytest

from clawplane.deployment.v1 import deployment_pb2
from clawplane.user.v1 import user_pb2, user_service_pb2, webhook_service_pb2, webhook_service_pb2_grpc
from services.kit import devkeys
from tests.harness import Person, Stack


def event(kind: str, clerk_id: str, at_s: float, **data: Any) -> dict[str, Any]:
    """An event in Clerk's form."""
    address = {
        "id": "idn_1", "email_address": data.pop("email", f"{clerk_id[5:17]}@example.com"), "object": "email_address",
        "verification": {"status": data.pop("status", "verified"), "strategy": "from_oauth_google"},
    }  # fmt: skip
    known = {
        "id": clerk_id, "object": "user", "email_addresses": [{"id": "idn_0", "email_address": "old@example.com"}, address],
        "primary_email_address_id": "idn_1", "first_name": "Ada", "last_name": "Lovelace", "image_url": "https://img.clerk.com/x", "username": None,
    }  # fmt: skip
    body = {"id": clerk_id, "object": "user", "deleted": True} if kind == "user.deleted" else known | data
    return {"data": body, "event_attributes": {}, "instance_id": "ins_1", "object": "event", "timestamp": int(at_s * 1000), "type": kind}


async def send(stack: Stack, body: dict[str, Any] | bytes, **change: Any) -> httpx.Response:
    """Posts an event, signed by hand as Svix documents it."""
    payload = body if isinstance(body, bytes) else json.dumps(body).encode()
    secret = change.get("secret", devkeys.clerk_webhook_secret(stack.keys))
    message_id, at = change.get("id", f"msg_{uuid.uuid4().hex}"), str(change.get("at", int(time.time())))
    key = base64.b64decode(secret.removeprefix("whsec_"))
    mac = base64.b64encode(hmac.new(key, f"{message_id}.{at}.".encode() + payload, hashlib.sha256).digest()).decode()
    headers = {"svix-id": message_id, "svix-timestamp": at, "svix-signature": f"v1,{base64.b64encode(b'x' * 32).decode()} v1,{mac}", "content-type": "application/json"}
    headers |= change.get("headers", {})
    return await stack.http.post("/webhooks/clerk", content=change.get("sent", payload), headers={k: v for k, v in headers.items() if v})


async def found(stack: Stack, clerk_id: str) -> user_pb2.User | None:
    """The user of that id at Clerk."""
    try:
        return await stack.users.LookupUser(user_service_pb2.LookupUserRequest(clerk_user_id=clerk_id), metadata=stack.operator)
    except grpc.aio.AioRpcError as error:
        assert error.code() is grpc.StatusCode.NOT_FOUND
        return None


async def test_a_user_comes_changes_and_goes(stack: Stack) -> None:
    clerk_id, now = f"user_{uuid.uuid4().hex}", time.time()
    created = event("user.created", clerk_id, now)
    for _ in range(2):
        assert (await send(stack, created, id=f"msg_{clerk_id}")).status_code == 200
    user = await found(stack, clerk_id)
    assert user is not None
    assert (user.full_name, user.email, user.avatar_url) == ("Ada Lovelace", f"{clerk_id[5:17]}@example.com", "https://img.clerk.com/x")
    assert user.HasField("email_verified_at") and user.personal_org_id
    # The later event came first; the earlier one changes nothing.
    await send(stack, event("user.updated", clerk_id, now + 20, first_name="Augusta"))
    await send(stack, event("user.updated", clerk_id, now + 10, first_name="Old"))
    changed = await found(stack, clerk_id)
    assert changed is not None and changed.full_name == "Augusta Lovelace"
    # An address that Clerk has not verified is not taken over.
    await send(stack, event("user.updated", clerk_id, now + 30, first_name="Augusta", email="evil@example.com", status="unverified"))
    changed = await found(stack, clerk_id)
    assert changed is not None and (changed.id, changed.full_name, changed.email) == (user.id, "Augusta Lovelace", user.email)
    assert (await send(stack, event("user.deleted", clerk_id, now + 40))).status_code == 200
    assert await found(stack, clerk_id) is None
    # What comes late does not bring a deleted user back.
    assert (await send(stack, event("user.updated", clerk_id, now + 50))).status_code == 200
    assert await found(stack, clerk_id) is None


async def test_a_deletion_that_comes_first_wins(stack: Stack) -> None:
    clerk_id, now = f"user_{uuid.uuid4().hex}", time.time()
    await send(stack, event("user.deleted", clerk_id, now))
    await send(stack, event("user.created", clerk_id, now - 5))
    assert await found(stack, clerk_id) is None


async def test_a_deletion_closes_what_runs(stack: Stack) -> None:
    clerk_id, now = f"user_{uuid.uuid4().hex}", time.time()
    await send(stack, event("user.created", clerk_id, now))
    user = await found(stack, clerk_id)
    assert user is not None
    live = await stack.live(Person(user, stack.token_for(user.id)))
    await send(stack, event("user.deleted", clerk_id, now + 1))
    await stack.until(live.id, deployment_pb2.STATE_CLOSED)


async def test_other_events_are_stored_as_ignored(stack: Stack) -> None:
    message_id = f"msg_{uuid.uuid4().hex}"
    assert (await send(stack, {"type": "session.created", "data": {"id": "sess_1"}, "object": "event"}, id=message_id)).status_code == 200
    desk = webhook_service_pb2_grpc.WebhookServiceStub(stack.channel)
    request = webhook_service_pb2.ListWebhookEventsRequest(source="clerk", status="ignored", page_size=250)
    (stored,) = [one for one in (await desk.ListWebhookEvents(request, metadata=stack.operator)).events if one.external_id == message_id]
    assert (stored.type, stored.reason) == ("session.created", "events of this type are not handled")


FOREIGN = f"whsec_{base64.b64encode(b'another key of thirty-two bytes!').decode()}"


@pytest.mark.any_engine
@pytest.mark.parametrize(
    "change",
    [
        {"secret": FOREIGN}, {"at": int(time.time()) - 1000}, {"at": int(time.time()) + 1000}, {"sent": b'{"type": "user.deleted"}'},
        {"headers": {"svix-signature": ""}}, {"headers": {"svix-id": "msg_other"}}, {"headers": {"svix-timestamp": "soon"}},
        {"headers": {"svix-signature": "v1,"}}, {"headers": {"svix-signature": "v2,AAAA"}},
    ],
    ids=["foreign key", "stale", "future", "other body", "unsigned", "other id", "no time", "empty", "other version"],
)  # fmt: skip
async def test_what_is_not_signed_is_refused(stack: Stack, change: dict[str, Any]) -> None:
    clerk_id = f"user_{uuid.uuid4().hex}"
    answer = await send(stack, event("user.created", clerk_id, time.time()), **change)
    assert answer.status_code == 400 and "svix-signature" in answer.text
    assert await found(stack, clerk_id) is None


@pytest.mark.parametrize(
    "body", [b"{", b"[]", b'{"type": 5}', b'{"type": "user.created"}', b'{"type": "user.created", "data": {"id": "x"}}', b"\xff"]
)  # fmt: skip
async def test_what_is_no_event_is_told(stack: Stack, body: bytes) -> None:
    answer = await send(stack, body)
    assert answer.status_code == 400, answer.text
