"""How things look on pages: templates, times, amounts, states."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import jinja2
from google.protobuf.json_format import MessageToDict
from google.protobuf.timestamp_pb2 import Timestamp
from markupsafe import Markup
from starlette.responses import Response

from clawplane.audit.v1 import audit_event_pb2
from clawplane.deployment.v1 import deployment_pb2, provider_pb2
from clawplane.user.v1 import invitation_pb2, organization_pb2, user_pb2
from gateway.dashboard.visit import Visit
from gateway.money import price

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    # With "no-referrer" browsers send "Origin: null" with our own forms, which looks like somebody else's.
    "Referrer-Policy": "same-origin",
}
_MINUTE, _HOUR, _DAY = 60, 3600, 86400

STATES = {
    deployment_pb2.STATE_PENDING: ("warn", "Waits for payment"),
    deployment_pb2.STATE_DEPLOYING: ("busy", "Deploying"),
    deployment_pb2.STATE_ACTIVE: ("good", "Active"),
    deployment_pb2.STATE_SUSPENDED: ("warn", "Suspended"),
    deployment_pb2.STATE_FAILED: ("bad", "Failed"),
    deployment_pb2.STATE_EXPIRED: ("", "Expired"),
    deployment_pb2.STATE_CANCELED: ("", "Canceled"),
    deployment_pb2.STATE_CLOSING: ("busy", "Closing"),
    deployment_pb2.STATE_CLOSED: ("", "Closed"),
}
"""State -> (kind of dot, word)."""
HEALTH = {
    provider_pb2.PROVIDER_HEALTH_UNPROVEN: ("", "Unproven"),
    provider_pb2.PROVIDER_HEALTH_HEALTHY: ("good", "Healthy"),
    provider_pb2.PROVIDER_HEALTH_DEGRADED: ("warn", "Degraded"),
    provider_pb2.PROVIDER_HEALTH_PROBING: ("busy", "Probing"),
    provider_pb2.PROVIDER_HEALTH_EXCLUDED: ("bad", "Blacklisted"),
}
CHANNELS = {
    deployment_pb2.CHANNEL_WEB: "Web chat",
    deployment_pb2.CHANNEL_TELEGRAM: "Telegram",
    deployment_pb2.CHANNEL_DISCORD: "Discord",
    deployment_pb2.CHANNEL_WHATSAPP: "WhatsApp",
}

OUTCOMES = {
    provider_pb2.OUTCOME_KIND_LEASE: "Offer taken",
    provider_pb2.OUTCOME_KIND_READY: "Bring up",
    provider_pb2.OUTCOME_KIND_LOST: "Running",
}
ROLES = {
    organization_pb2.ROLE_VIEWER: "Viewer",
    organization_pb2.ROLE_DEVELOPER: "Developer",
    organization_pb2.ROLE_ADMIN: "Admin",
    organization_pb2.ROLE_OWNER: "Owner",
}
INVITATIONS = {
    invitation_pb2.INVITATION_STATE_OPEN: ("busy", "Waits for an answer"),
    invitation_pb2.INVITATION_STATE_ACCEPTED: ("good", "Accepted"),
    invitation_pb2.INVITATION_STATE_DECLINED: ("", "Declined"),
    invitation_pb2.INVITATION_STATE_REVOKED: ("", "Taken back"),
    invitation_pb2.INVITATION_STATE_EXPIRED: ("", "Expired"),
}
AUDIT_OUTCOMES = {
    audit_event_pb2.AUDIT_OUTCOME_DONE: ("good", "Done"),
    audit_event_pb2.AUDIT_OUTCOME_READ: ("", "Read"),
    audit_event_pb2.AUDIT_OUTCOME_REPEATED: ("", "Repeated"),
}
NAVIGATION = (
    ("home", "Home", "/dashboard", ""),
    ("deployments", "Deployments", "/dashboard/deployments", "deployments.list"),
    ("usage", "Usage", "/dashboard/usage", "usage.read"),
    ("keys", "API keys", "/dashboard/keys", "api_keys.list"),
    ("organization", "Organization", "/dashboard/organization", "organizations.get"),
    ("audit", "Audit log", "/dashboard/audit", "audit.list"),
)
"""(name of the page, title, address, permission without which it is not offered)."""


def ago(stamp: Timestamp) -> Markup:
    """A time relative to now, with the exact one on hover."""
    moment = stamp.ToDatetime(UTC)
    exact = moment.strftime("%-d %B %Y, %H:%M:%S UTC")
    shown = relative(moment, datetime.now(UTC))
    return Markup('<time datetime="{}" title="{}">{}</time>').format(moment.isoformat(timespec="seconds"), exact, shown)


def relative(moment: datetime, now: datetime) -> str:
    """ "3 min ago", "in 2 h", "just now"; a date when it is further than a month away."""
    seconds = (now - moment).total_seconds()
    distance = abs(seconds)
    if distance < 10:
        return "just now"
    if distance >= 30 * _DAY:
        return moment.strftime("%-d %b %Y")
    for size, word in ((_DAY, "d"), (_HOUR, "h"), (_MINUTE, "min"), (1, "s")):
        if distance >= size:
            text = f"{int(distance // size)} {word}"
            return f"{text} ago" if seconds > 0 else f"in {text}"
    return "just now"


def exact_money(cost: str | Decimal, currency: str) -> str:
    """An exact decimal for people: two digits, more where it is less than a cent, never rounded to nothing."""
    amount = Decimal(cost or "0")
    if 0 < amount < Decimal("0.000001"):
        return f"<0.000001 {currency.upper()}".strip()
    if amount and abs(amount) < Decimal("0.01"):
        return f"{amount.quantize(Decimal('0.000001')).normalize():f} {currency.upper()}".strip()
    return f"{amount.quantize(Decimal('0.01')):,} {currency.upper()}".strip()


def small_money(amount: Decimal) -> str:
    """An amount in a column of them: four digits, so that they stand below each other."""
    return "<0.0001" if 0 < amount < Decimal("0.0001") else f"{amount.quantize(Decimal('0.0001')):,}"


def count(number: int) -> str:
    """A number with its thousands apart."""
    return f"{number:,}"


def short_count(number: int) -> str:
    """A number where there is little room: 12,345 and 1.235 M."""
    for size, letter in ((10**12, "T"), (10**9, "G"), (10**6, "M")):
        if number >= size:
            return f"{number / size:{',.4g' if number < 1000 * size else ',.0f'}} {letter}"
    return f"{number:,}"


def with_query(query: Mapping[str, str], **changes: Any) -> str:
    """A query with some of its values changed; empty ones are left out."""
    kept = {name: str(value) for name, value in {**query, **changes}.items() if value not in ("", None)}
    return f"?{urlencode(kept, safe='/')}" if kept else "?"


def link(path: str, **query: Any) -> str:
    """An address with what of the query is not empty."""
    return path + with_query({}, **query).rstrip("?")


def payload(message: Any) -> str:
    """What an event says, as JSON to read."""
    return json.dumps(MessageToDict(message), indent=2, ensure_ascii=False)


def _capitalize_first(text: str) -> str:
    return text[:1].upper() + text[1:]


def _numbers(enum: Any) -> dict[str, int]:
    """An enum as templates name it: the last words of a name -> number."""
    prefix = next(value.name for value in enum.DESCRIPTOR.values if value.number == 0).removesuffix("UNSPECIFIED")
    return {value.name.removeprefix(prefix): value.number for value in enum.DESCRIPTOR.values}


def _environment() -> jinja2.Environment:
    loader = jinja2.FileSystemLoader(Path(__file__).parent.parent / "templates")
    made = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, auto_reload=False
    )
    made.filters |= {"ago": ago, "count": count, "short_count": short_count, "decimal": Decimal, "payload": payload}
    made.filters["capitalize_first"] = _capitalize_first
    made.globals |= {
        "money": exact_money, "small_money": small_money, "price": price, "with_query": with_query, "link": link,
        "STATES": STATES, "HEALTH": HEALTH,
        "CHANNELS": CHANNELS, "OUTCOMES": OUTCOMES, "ROLES": ROLES, "INVITATIONS": INVITATIONS, "AUDIT_OUTCOMES": AUDIT_OUTCOMES,
        "NAVIGATION": NAVIGATION, "Role": _numbers(organization_pb2.Role), "Invitation": _numbers(invitation_pb2.InvitationState),
        "State": _numbers(deployment_pb2.State), "Health": _numbers(provider_pb2.ProviderHealth),
        "SUBSCRIPTIONS": {number: name.replace("_", " ").lower() for name, number in _numbers(user_pb2.SubscriptionStatus).items()},
    }  # fmt: skip
    return made


_PAGES = _environment()


NOTICES = {
    "saved": "Saved.",
    "paid": "Thank you. The payment is confirmed by the provider; the bot starts as soon as that arrives.",
    "retry": "The bot is being started again.",
    "cancel": "The order is cancelled.",
    "close": "The bot is being closed.",
    "delete": "The deployment is removed from the list.",
    "rotate": "The bot is being started again with a new key.",
    "excluded": "The provider gets no more bots.",
    "admitted": "The provider may make offers again.",
    "priced": "The price is in the book. What is used from then on is priced by it; price anew what is stored.",
    "price-ended": "The price has an end.",
    "imported": "The prices are in the book.",
    "replayed": "The event was applied again.",
    "signed-out": "You are signed out.",
    "password-set": "The password is set. Every session has ended: sign in with the new one.",
    "password-changed": "The password is changed. Your other sessions have ended.",
    "session-ended": "The session has ended.",
    "sessions-ended": "Your other sessions have ended.",
    "account-deleted": "Your account is deleted. Whoever runs this platform can bring it back within 30 days.",
    "organization-created": "The organization is yours. Invite whom you work with.",
    "organization-back": "The organization is back, with its members. What it ran stays closed.",
    "organization-deleted": "The organization is deleted. You are in your personal one now.",
    "organization-gone": "The organization that you acted in is gone, or you are no member of it now. You are in your personal one.",
    "left": "You have left the organization. You are in your personal one now.",
    "member-role": "The role is changed, and counts at once.",
    "member-remove": "The member is out, and every credential of his for this organization with him.",
    "member-transfer": "The organization has a new owner. You are an admin of it now.",
    "invited": "The invitation is on its way.",
    "invitation-resend": "The invitation is on its way again. The one before no longer works.",
    "invitation-revoke": "The invitation is taken back.",
    "accepted": "Welcome. You act in this organization now; the menu at the top switches.",
    "declined": "The invitation is declined.",
    "key-activate": "The key is switched on.",
    "key-deactivate": "The key is switched off, everywhere within a second.",
    "key-revoke": "The key has ended, everywhere within a second.",
}
"""What an address may ask a page to say."""


def render(template: str, visit: Visit, status: int = 200, **values: Any) -> Response:
    """A page for a visitor."""
    given = {"visit": visit, "notice": NOTICES.get(visit.query.get("done", ""), "")} | values
    return Response(_PAGES.get_template(f"dashboard/{template}").render(given), status, HEADERS, "text/html")
