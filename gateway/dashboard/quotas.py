"""Limits and how much of them is used, as meters."""

from collections.abc import Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import NamedTuple

from clawplane.deployment.v1 import quota_pb2, quota_service_pb2
from gateway.dashboard.render import exact_money
from gateway.dashboard.visit import Visit

_PERIODS = {quota_pb2.QUOTA_PERIOD_HOUR: "hour", quota_pb2.QUOTA_PERIOD_DAY: "day", quota_pb2.QUOTA_PERIOD_MONTH: "month"}
_WHOSE = {
    quota_pb2.QUOTA_SCOPE_USER: "you", quota_pb2.QUOTA_SCOPE_API_KEY: "an API key", quota_pb2.QUOTA_SCOPE_DEPLOYMENT: "a deployment",
}
_NOTICES = 5
NEARLY = 75
"""Hundredths of a limit from which on it needs attention."""


class Meter(NamedTuple):
    """A limit as a bar."""

    title: str
    percent: int
    text: str
    """ "62 % of 1,000,000 tokens this month, resets in 3 days"."""
    state: tuple[str, str]
    """(kind of dot, word)."""
    status: quota_pb2.QuotaStatus


async def checked(visit: Visit) -> Sequence[quota_pb2.QuotaStatus]:
    """The limits that hold for the visitor, the tightest first."""
    if not visit.may("quotas.read"):
        return []
    found: quota_service_pb2.CheckQuotaResponse = await visit.call(visit.services.quotas.CheckQuota, quota_service_pb2.CheckQuotaRequest())
    return found.quotas


async def noticed(visit: Visit) -> Sequence[quota_pb2.QuotaNotice]:
    """What was noticed of limits last."""
    if not visit.may("quotas.read"):
        return []
    request = quota_service_pb2.ListQuotaNoticesRequest(page_size=_NOTICES)
    found: quota_service_pb2.ListQuotaNoticesResponse = await visit.call(visit.services.quotas.ListQuotaNotices, request)
    return found.notices


def meter(status: quota_pb2.QuotaStatus, currency: str) -> Meter:
    """A limit as pages show it; ``currency`` is the ledger's."""
    period = f"this {_PERIODS.get(status.period, 'period')}".replace("this day", "today")
    kind = "Tokens" if status.unit == quota_pb2.QUOTA_UNIT_TOKENS else "Money"
    whose = "" if status.scope == quota_pb2.QUOTA_SCOPE_ORGANIZATION else f" for {_WHOSE.get(status.scope, '')}"
    of = _said(status.unit, status.amount, currency)
    text = f"{status.percent:,} % of {of} {period}, resets {_until(status.resets_at.ToDatetime(UTC))}"
    if Decimal(status.held or 0) > 0:
        text += f"; {_said(status.unit, status.held, currency)} more are held by calls under way"
    return Meter(f"{kind} {period}{whose}", status.percent, text, _state(status), status)


def _state(status: quota_pb2.QuotaStatus) -> tuple[str, str]:
    if status.percent >= 100:
        return ("warn", "Reached; goes on") if status.soft else ("bad", "Used up")
    return ("warn", "Nearly used up") if status.percent >= NEARLY else ("good", "Enough left")


def notice(one: quota_pb2.QuotaNotice, currency: str, whose: str) -> str:
    """What was noticed, in words."""
    of = f"{_said(one.unit, one.amount, currency)} a {_PERIODS.get(one.period, 'period')}"
    return f"{one.percent} % of {of} for {whose}"


def _said(unit: int, amount: str, currency: str) -> str:
    return f"{int(Decimal(amount or 0)):,} tokens" if unit == quota_pb2.QUOTA_UNIT_TOKENS else exact_money(amount, currency)


def _until(when: datetime) -> str:
    seconds = max(0, (when - datetime.now(UTC)).total_seconds())
    for size, word in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= size:
            number = int(seconds // size)
            return f"in {number} {word}{'' if number == 1 else 's'}"
    return "in a moment"


def monthly(meters: Sequence[Meter], unit: "quota_pb2.QuotaUnit.ValueType") -> Meter | None:
    """The organization's limit of a month, if it has one."""
    wanted = (quota_pb2.QUOTA_SCOPE_ORGANIZATION, quota_pb2.QUOTA_PERIOD_MONTH, unit)
    return next((one for one in meters if (one.status.scope, one.status.period, one.status.unit) == wanted), None)
