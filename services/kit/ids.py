"""Identifiers: a prefix that tells the kind, and a UUID of version 7, so that later ones sort later."""

import os
import re
import threading
import time
import uuid
from datetime import UTC, datetime

PREFIXES = {
    "User": "usr",
    "Organization": "org",
    "Membership": "mem",
    "Identity": "idn",
    "Session": "ses",
    "SignInLink": "sil",
    "OneTimeCode": "otc",
    "OAuthState": "oas",
    "Invitation": "inv",
    "ApiKey": "key",
    "ApiKeySecret": "ksec",
    "MailMessage": "mail",
    "Subscription": "sub",
    "Deployment": "dep",
    "DeploymentEvent": "devt",
    "PaymentSession": "pses",
    "Payment": "pay",
    "WebhookEvent": "whe",
    "AuditEvent": "aud",
    "ClawKey": "ckey",
    "UsageRow": "use",
    "ProviderOutcome": "pout",
    "UsageReservation": "call",
    "Price": "prc",
    "Quota": "quo",
    "QuotaNotice": "qnt",
    "Agent": "agnt",
    "Thread": "thrd",
    "Project": "prj",
}
"""Kind -> prefix. A credential never shares its prefix with an identifier (kit/keys.py)."""

NO_ORG = "org_" + "0" * 32
"""Stands in audit rows for calls that concern no single organization."""

_HEX = re.compile("[0-9a-f]{32}")
_lock = threading.Lock()
_last = 0


def uuid7() -> uuid.UUID:
    """A UUID of version 7: milliseconds, then a counter that keeps the order within a process, then random bits."""
    global _last
    with _lock:
        # 12 bits below the millisecond hold 1/4096 ms, bumped by one when the clock stands still.
        now = max(time.time_ns() * 4096 // 1_000_000, _last + 1)
        _last = now
    millis, fraction = divmod(now, 4096)
    random = int.from_bytes(os.urandom(8), "big") >> 2
    return uuid.UUID(int=(millis << 80) | (0x7 << 76) | (fraction << 64) | (0b10 << 62) | random)


def uuid7_time(value: uuid.UUID) -> datetime | None:
    """The time inside a UUID of version 7; None for any other version."""
    if value.version != 7:
        return None
    return datetime.fromtimestamp((value.int >> 80) / 1000, UTC)


def new_after(prefix: str, last: str) -> str:
    """A new identifier that sorts after ``last`` ("" for none), also when the clock of whoever made that one runs ahead."""
    made = new(prefix)
    if made > last:
        return made
    return f"{prefix}_{int(last.partition('_')[2], 16) + 1:032x}"


def lowest(prefix: str) -> str:
    """Sorts before every identifier of a kind."""
    return f"{prefix}_{0:032x}"


def new(prefix: str) -> str:
    """A new identifier, for instance ``new("dep")`` -> "dep_0199..."."""
    return f"{prefix}_{uuid7().hex}"


def to_uuid(identifier: str, prefix: str) -> uuid.UUID:
    """The UUID inside an identifier; ValueError when it is of another kind or malformed."""
    return uuid.UUID(hex=digits(identifier, prefix))


def digits(identifier: str, prefix: str) -> str:
    """The digits of the UUID inside an identifier; ValueError when it is of another kind or malformed."""
    head, _, tail = identifier.partition("_")
    # UUID() alone takes other spellings too, which would make several texts of one identifier.
    if head != prefix or not _HEX.fullmatch(tail):
        raise ValueError(f"an identifier of the form {prefix}_<32 hexadecimal digits> is needed")
    return tail
