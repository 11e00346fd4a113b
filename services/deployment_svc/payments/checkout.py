"""What the platform asks of a payment provider."""

import hashlib
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal, Protocol

import orjson

from services.deployment_svc.deployments.models import Deployment
from services.deployment_svc.payments.models import PaymentSession
from services.kit.errors import Unavailable

_DAY_S = 24 * 3600


@dataclass(frozen=True)
class Wish:
    """What a payment page is for."""

    deployment_id: str
    org_id: str
    user_id: str
    email: str
    description: str
    amount_minor: int
    currency: str
    closes_at: datetime | None
    """When the page closes; None means after the provider's own longest time."""
    success_url: str
    cancel_url: str
    link_number: int

    @classmethod
    def of(cls, d: Deployment, link: PaymentSession, public_url: str, ttl_s: int) -> "Wish":
        """The page of one link of a deployment. The same link always gives the same wish, so a repeated call is a replay."""
        here = f"{public_url}/dashboard/deployments/{d.id}"
        # Counted from the row, not from now: a repeated call must have the same parameters.
        closes_at = link.created_at.replace(microsecond=0) + timedelta(seconds=ttl_s) if ttl_s < _DAY_S else None
        return cls(
            d.id, d.org_id, d.user_id, d.email, f"Bot on {d.model}", link.amount_minor, link.currency, closes_at,
            f"{here}?paid=1", here, link.link_number,
        )  # fmt: skip

    def idempotency_key(self) -> str:
        """Row, link and parameters: the row alone would be answered with the dead link of the day before."""
        parameters = orjson.dumps(self, option=orjson.OPT_SORT_KEYS)
        return f"{self.deployment_id}-{self.link_number}-{hashlib.sha256(parameters).hexdigest()[:24]}"


@dataclass(frozen=True)
class Session:
    """What a provider says of a payment page."""

    id: str
    status: Literal["open", "complete", "expired"]
    url: str
    paid: bool
    payment_id: str
    payment_failed: bool
    amount_minor: int
    currency: str
    livemode: bool
    expires_at: datetime


@dataclass(frozen=True)
class Charge:
    """What a provider says of a payment."""

    payment_id: str
    amount_minor: int
    currency: str
    livemode: bool
    refunded_minor: int
    disputed: bool


class CheckoutError(Unavailable):
    """The provider did not do what was asked; the text names no secret and nothing of the provider's answer."""

    def __init__(self, message: str, retry_after_s: float = 2, *, is_final: bool = False) -> None:
        super().__init__(message, retry_after_s)
        self.is_final = is_final
        """Asking again with the same idempotency key would give the same answer."""


class Checkout(Protocol):
    """A payment provider. Every method may raise CheckoutError; each has its own time limit."""

    name: str
    livemode: bool

    async def create(self, wish: Wish) -> Session:
        """Makes a payment page; idempotent by the wish's key."""

    async def retrieve(self, session_id: str) -> Session:
        """The page as it is now."""

    async def expire(self, session_id: str) -> Session:
        """Closes an open page and returns it as it is then: "complete" when it was paid before."""

    async def charge(self, payment_id: str) -> Charge:
        """A payment as it is now."""
