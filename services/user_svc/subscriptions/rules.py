"""Which event counts, and which tier follows: pure functions."""

from collections.abc import Iterable, Mapping
from datetime import datetime

from clawplane.user.v1.user_pb2 import SubscriptionStatus
from services.user_svc.settings import Tier
from services.user_svc.subscriptions.models import Subscription

_S = SubscriptionStatus
IN_FORCE = frozenset({_S.SUBSCRIPTION_STATUS_ACTIVE, _S.SUBSCRIPTION_STATUS_PAST_DUE})
"""States that give the tier: a payment that is late is waited for."""
_FINALITY: Mapping[int, int] = {
    _S.SUBSCRIPTION_STATUS_INCOMPLETE: 0, _S.SUBSCRIPTION_STATUS_ACTIVE: 1, _S.SUBSCRIPTION_STATUS_PAST_DUE: 2,
    _S.SUBSCRIPTION_STATUS_UNPAID: 3, _S.SUBSCRIPTION_STATUS_CANCELED: 4,
}  # fmt: skip
"""Of two events of one time, the one that ends more was sent later."""


def is_newer(known: Subscription, at: datetime, status: int) -> bool:
    """Whether an event tells more than what is known."""
    if at != known.changed_at:
        return at > known.changed_at
    return _FINALITY.get(status, 0) >= _FINALITY.get(known.status, 0)


def projection(subscriptions: Iterable[Subscription], tiers: Mapping[str, Tier], default: str) -> tuple[str, int]:
    """(tier, status) of an organization: of the dearest tier in force; without one the default, and the state of what ended last."""
    known = list(subscriptions)
    live = [one for one in known if one.status in IN_FORCE and one.tier in tiers]
    if live:
        best = max(live, key=lambda one: (tiers[one.tier].price_minor, one.status == _S.SUBSCRIPTION_STATUS_ACTIVE, one.id))
        return best.tier, best.status
    last = max(known, key=lambda one: (one.changed_at, one.id), default=None)
    return default, last.status if last is not None else _S.SUBSCRIPTION_STATUS_UNSPECIFIED
