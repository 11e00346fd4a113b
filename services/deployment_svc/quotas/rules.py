"""Which limits hold for a caller, how they stand, and whether more fits: pure functions."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from functools import lru_cache
from typing import Any, NamedTuple

from clawplane.errors.v1.errors_pb2 import ErrorReason
from clawplane.user.v1.entitlement_service_pb2 import Entitlements
from services.deployment_svc.usage.rules import PERIODS, period_end, period_of
from services.kit.errors import Error, Exhausted, InvalidArgument

THRESHOLDS = (50, 75, 100)
"""Hundredths of a limit that are told when they are used up."""
ORGANIZATION, TOKENS, MONEY = "organization", "tokens", "money"
_MINOR = Decimal(100)
_NOTHING = Decimal(0)
_SOON_S = 5.0
"""When only calls under way are in the way, it is worth trying again so soon."""
Amount = int | Decimal
"""Tokens, or money in the ledger's currency."""


class Who(NamedTuple):
    """On whose account something is used; empty texts where there is none."""

    org_id: str
    user_id: str = ""
    api_key_id: str = ""
    deployment_id: str = ""

    def subjects(self) -> Iterator[tuple[str, str]]:
        """(scope, subject) of each who may have a limit of his own."""
        if self.user_id:
            yield "user", self.user_id
        if self.api_key_id:
            yield "api_key", self.api_key_id
        if self.deployment_id:
            yield "deployment", self.deployment_id


class Limit(NamedTuple):
    """How much may be used in a period."""

    scope: str
    subject: str
    """The user, API key or deployment; empty: the organization, or in a quota each one."""
    period: str
    unit: str
    amount: Amount
    soft: bool = False
    """Whether it is only told when it is reached."""
    suspends: bool = False
    quota_id: str = ""
    """Empty for what follows from what was paid for."""


class Standing(NamedTuple):
    """What was used in a period, and what is held of it by calls under way."""

    tokens: int = 0
    cost: Decimal = _NOTHING
    tokens_held: int = 0
    cost_held: Decimal = _NOTHING

    def of(self, unit: str) -> tuple[Amount, Amount]:
        """(used, held) in a unit."""
        return (self.tokens, self.tokens_held) if unit == TOKENS else (self.cost, self.cost_held)


_UNUSED = Standing()
Key = tuple[str, str, str, str]
"""(organization, scope, subject, period) of a standing."""


@dataclass
class Standings:
    """How things stand at one moment, of some organizations and callers."""

    at: datetime
    quotas: dict[str, list[Limit]] = field(default_factory=dict)
    """The quotas of each organization; those for each one before those of a subject's own."""
    standing: dict[Key, Standing] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ends = {period: period_end(period, period_of(period, self.at)) for period in PERIODS}
        """When the present hour, day and month end."""

    def of(self, org_id: str, limit: Limit) -> tuple[Amount, Amount]:
        """(used, held) of a limit."""
        return self.standing.get((org_id, limit.scope, limit.subject, limit.period), _UNUSED).of(limit.unit)

    def hold(self, who: Who, tokens: int, cost: Decimal) -> None:
        """Holds more for somebody from now on."""
        for scope, subject in ((ORGANIZATION, ""), *who.subjects()):
            for period in PERIODS:
                key = (who.org_id, scope, subject, period)
                known = self.standing.get(key, _UNUSED)
                self.standing[key] = known._replace(tokens_held=known.tokens_held + tokens, cost_held=known.cost_held + cost)


def entitled(paid_for: Entitlements) -> tuple[Limit, ...]:
    """The limits of what an organization has paid for."""
    return _entitled(paid_for.monthly_credit_minor, paid_for.monthly_tokens, paid_for.hourly_tokens)


@lru_cache(1024)
def _entitled(monthly_credit_minor: int, monthly_tokens: int, hourly_tokens: int) -> tuple[Limit, ...]:
    limits: tuple[tuple[str, str, Amount], ...] = (
        ("month", MONEY, monthly_credit_minor / _MINOR), ("month", TOKENS, monthly_tokens), ("hour", TOKENS, hourly_tokens),
    )  # fmt: skip
    # 0 is the tier's word for without limit.
    return tuple(Limit(ORGANIZATION, "", period, unit, amount) for period, unit, amount in limits if amount)


def holding(paid_for: Sequence[Limit], quotas: Iterable[Limit], who: Who) -> Sequence[Limit]:
    """The limits that hold for a caller: a quota takes the place of what was paid for, and one of a subject's own that for each one."""
    if not quotas:
        return paid_for
    found = {(limit.scope, limit.period, limit.unit): limit for limit in paid_for}
    subjects = dict(who.subjects())
    for quota in quotas:
        subject = subjects.get(quota.scope, "")
        if quota.subject in ("", subject) and (subject or quota.scope == ORGANIZATION):
            found[quota.scope, quota.period, quota.unit] = quota._replace(subject=subject)
    return tuple(found.values())


def percent(used: Amount, amount: Amount) -> int:
    """Hundredths of an amount that are used, rounded down. Of nothing, everything is used."""
    return int(used * 100 // amount) if amount else 100


def tightness(used: Amount, held: Amount, amount: Amount) -> float:
    """What share of an amount is taken; for an order only, so not exact."""
    return float(used + held) / float(amount) if amount else float("inf")


def exact(amount: Amount) -> str:
    """An amount as an exact decimal: "12.5"."""
    return str(amount) if isinstance(amount, int) else f"{amount.normalize():f}"


def refusal(limits: Iterable[Limit], found: Standings, who: Who, tokens: int, cost: Decimal | None, currency: str) -> Error | None:
    """Why so much more may not be used now, or None. ``cost`` None: nobody knows what it would cost."""
    worst: tuple[tuple[datetime, bool], Limit, Amount] | None = None
    for limit in limits:
        if limit.soft:
            continue
        if limit.unit == MONEY and cost is None:
            return InvalidArgument("model", "has no price yet, and a limit of money holds", ErrorReason.ERROR_REASON_NO_PRICE)
        needed: Amount = tokens if limit.unit == TOKENS else cost or _NOTHING
        used, held = found.of(who.org_id, limit)
        if used + held + needed > limit.amount:
            # The one that stands in the way for longest says when it is worth trying again.
            rank = (found.ends[limit.period], limit.unit == MONEY)
            if worst is None or rank > worst[0]:
                worst = (rank, limit, needed)
    if worst is None:
        return None
    (ends, _), limit, needed = worst
    return _exhausted(limit, found.of(who.org_id, limit), needed, currency, (ends - found.at).total_seconds())


EACH: Mapping[str, str] = {"hour": "an hour", "day": "a day", "month": "a month"}
_WHOSE: Mapping[str, str] = {ORGANIZATION: "organization", "user": "user", "api_key": "API key", "deployment": "deployment"}


def _exhausted(limit: Limit, standing: tuple[Amount, Amount], needed: Amount, currency: str, left_s: float) -> Exhausted:
    used, held = standing
    if limit[:4] == (ORGANIZATION, "", "month", MONEY):
        money = {"credit": limit.amount, "spent": used, "held": held, "needed": needed}
        said: dict[str, Any] = {name: exact(value) for name, value in money.items()}
        return Exhausted(
            f"the month's credit of {said['credit']} {currency.upper()} does not cover this call: {said['spent']} are spent, "
            f"{said['held']} are held by calls under way, and this one may cost {said['needed']}",
            reason=ErrorReason.ERROR_REASON_CREDIT_EXHAUSTED, currency=currency, **said,
        )  # fmt: skip
    unit = "tokens" if limit.unit == TOKENS else currency.upper()
    told = {"amount": limit.amount, "used": used, "held": held, "needed": needed}
    numbers: dict[str, Any] = {name: exact(value) for name, value in told.items()}
    # What is more than the whole limit never fits; what only calls under way keep out may fit when they are done.
    wait_s = None if needed > limit.amount else left_s if used + needed > limit.amount else min(_SOON_S, left_s)
    return Exhausted(
        f"the {_WHOSE[limit.scope]}'s limit of {numbers['amount']} {unit} {EACH[limit.period]} does not cover this call: "
        f"{numbers['used']} are used, {numbers['held']} are held by calls under way, and this one may need {numbers['needed']}",
        reason=ErrorReason.ERROR_REASON_QUOTA_EXHAUSTED, retry_after_s=wait_s, scope=limit.scope, subject=limit.subject,
        period=limit.period, unit=limit.unit, **numbers,
    )  # fmt: skip
