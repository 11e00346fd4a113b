"""Clerk's webhooks, signed by Svix: the key, and what an event means. Pure; knows no HTTP."""

import base64
import re
from typing import Any

from clawplane.user.v1 import user_service_pb2
from gateway.webhooks.event import BadEvent, Ignore

USER_EVENTS = ("user.created", "user.updated", "user.deleted")
_TYPE = re.compile(r"[A-Za-z0-9_.]{1,100}\Z")
_USER_ID = re.compile(r"user_[A-Za-z0-9]{1,100}\Z")
_MAX_MS = 253402300799_000


def key_of(secret: str) -> bytes:
    """The key in a signing secret ("whsec_" and base64); ValueError when it is none."""
    return base64.b64decode(secret.removeprefix("whsec_"), validate=True)


def translate(event: Any, message_id: str, at_s: int) -> user_service_pb2.SyncClerkUserRequest | Ignore:
    """What an event says of a user. ``at_s`` counts where the event does not say when it happened."""
    if not isinstance(event, dict) or not isinstance(event.get("type"), str) or not _TYPE.match(event["type"]):
        raise BadEvent("an event has a type")
    if event["type"] not in USER_EVENTS:
        return Ignore(message_id, event["type"], "events of this type are not handled")
    data = event.get("data")
    if not isinstance(data, dict) or not isinstance(data.get("id"), str) or not _USER_ID.match(data["id"]):
        raise BadEvent("data.id is no id of a user")
    meaning = user_service_pb2.SyncClerkUserRequest(
        external_id=message_id, clerk_user_id=data["id"], deleted=event["type"] == "user.deleted"
    )
    meaning.occurred_at.FromMilliseconds(_milliseconds(event.get("timestamp"), data.get("updated_at"), at_s))
    if meaning.deleted:
        return meaning
    meaning.email, meaning.email_verified = _primary_email(data)
    meaning.username = _text(data.get("username"), 255)
    meaning.full_name = " ".join(filter(None, (_text(data.get(name), 100) for name in ("first_name", "last_name"))))[:200]
    meaning.avatar_url = _text(data.get("image_url"), 2048)
    return meaning


def _milliseconds(*candidates: Any) -> int:
    *given, at_s = candidates
    for value in given:
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _MAX_MS:
            return value
    return int(at_s) * 1000


def _primary_email(data: dict[str, Any]) -> tuple[str, bool]:
    addresses = data.get("email_addresses")
    for one in addresses if isinstance(addresses, list) else []:
        if isinstance(one, dict) and one.get("id") == data.get("primary_email_address_id") and isinstance(one.get("email_address"), str):
            verification = one.get("verification")
            return one["email_address"][:254], isinstance(verification, dict) and verification.get("status") == "verified"
    return "", False


def _text(value: Any, most: int) -> str:
    return value[:most] if isinstance(value, str) else ""
