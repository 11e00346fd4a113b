"""Standard Webhooks, the signature that Clerk (by Svix) and Polar share: only the headers' names and the form of the key differ."""

import base64
import hashlib
import hmac
import re
from collections.abc import Mapping, Sequence

from gateway.webhooks.event import BadSignature

MAX_HEADER_CHARS = 4096
_TIME = re.compile(r"[0-9]{1,12}\Z", re.ASCII)
_ID = re.compile(r"[!-~]{1,255}\Z")


def sign(payload: bytes, key: bytes, message_id: str, at_s: int) -> str:
    """The signature header for a payload; ``at_s`` is Unix time in seconds."""
    return f"v1,{_digest(payload, key, message_id, str(at_s))}"


def verify(prefix: str, payload: bytes, headers: Mapping[str, str], keys: Sequence[bytes], now_s: float, tolerance_s: int) -> str:
    """The message's id when one of the keys signed it; BadSignature otherwise. Stale and future times are refused alike.

    ``prefix``: "svix" or "webhook", before "-id", "-timestamp" and "-signature".
    """
    message_id, at, given = (headers.get(f"{prefix}-{name}", "") for name in ("id", "timestamp", "signature"))
    if not (message_id and at and given):
        raise BadSignature(f"the headers {prefix}-id, {prefix}-timestamp and {prefix}-signature are needed")
    if not (_ID.match(message_id) and _TIME.match(at) and len(given) <= MAX_HEADER_CHARS and given.isascii()):
        raise BadSignature("a header of the signature is malformed")
    signatures = [one.removeprefix("v1,").encode() for one in given.split() if one.startswith("v1,")]
    # No early exit: the time taken must not tell which key or signature came close.
    matches = [hmac.compare_digest(_digest(payload, key, message_id, at).encode(), one) for key in keys for one in signatures]
    if not any(matches):
        raise BadSignature("no signature matches")
    if abs(now_s - int(at)) > tolerance_s:
        raise BadSignature("the signature's time is too far from now")
    return message_id


def _digest(payload: bytes, key: bytes, message_id: str, at: str) -> str:
    return base64.b64encode(hmac.new(key, b"%s.%s.%s" % (message_id.encode(), at.encode(), payload), hashlib.sha256).digest()).decode()
