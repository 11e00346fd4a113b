"""What the platform asks of a market of providers: order, offers, lease, observe, close, find what is ours."""

from dataclasses import dataclass, field
from decimal import Decimal
from typing import Literal, Protocol


@dataclass(frozen=True)
class Spec:
    """What to run. Carries no secret, so it may be logged and kept by a market."""

    name: str
    """Our name at the market. Whatever carries it is ours; nothing else is ever touched."""
    deployment_id: str
    org_id: str
    model: str
    channel: str


@dataclass(frozen=True)
class Secrets:
    """What only the step that orders the bot may see; nothing of it is printed."""

    claw_key: str = field(repr=False)
    channel_token: str = field(default="", repr=False)
    channel_api_key: str = field(default="", repr=False)


@dataclass(frozen=True)
class Order:
    """A wish placed at a market (Akash: deployment with its dseq)."""

    id: str
    name: str
    manifest: str = field(default="", repr=False)
    """What the market wants back at the lease, secrets and all, so it is stored enveloped; known only to who made the order."""


@dataclass(frozen=True)
class Offer:
    """A provider's bid for an order."""

    provider: str
    price: Decimal
    """For an hour, in the market's own unit; only compared."""
    uptime: Decimal | None = None
    """Share of time that the provider answered, 0 to 1; None when unknown."""
    reference: str = ""
    """The market's own name of the bid."""
    audited: bool | None = None
    """Whether somebody vouches for the provider; None when the market does not say."""
    online: bool = True
    """False when the market knows that the provider does not answer now."""


@dataclass(frozen=True)
class Lease:
    """A provider's promise to run an order."""

    id: str
    provider: str


@dataclass(frozen=True)
class Observation:
    """What the market says about an order now."""

    phase: Literal["absent", "ordered", "starting", "ready", "lost"]
    """absent: no such order. ordered: no lease yet. starting: leased, not answering yet. ready: answers. lost: was leased, is dead."""
    url: str = ""
    lease_id: str = ""
    provider: str = ""
    start_id: str = ""
    """Which start is running, when the bot can say so."""
    reason: str = ""
    is_ours: bool = False
    """When lost or absent: whether we let it end, for instance because our account ran dry, and not the provider."""


Blame = Literal["provider", "market", "request", "order"]


class ProviderError(Exception):
    """A step failed. ``blame`` says who: the provider (choose another), the market (wait), our own request (never retried blindly),
    or the order, which is gone or can no longer be used (make another)."""

    def __init__(self, message: str, blame: Blame = "market", retry_after_s: float = 0):
        super().__init__(message)
        self.blame = blame
        self.retry_after_s = retry_after_s


class Driver(Protocol):
    """A market of providers. Every method may raise ProviderError; each has its own time limits."""

    name: str

    async def create(self, spec: Spec, secrets: Secrets, start_id: str) -> Order:
        """Places an order under ``spec.name``. Not idempotent: look with ``find`` first after a crash. ``start_id`` names this start."""

    async def find(self, name: str) -> list[str]:
        """The ids of the live orders that carry exactly this name."""

    async def offers(self, order: Order) -> list[Offer]:
        """The open bids for an order so far."""

    async def lease(self, order: Order, offer: Offer) -> Lease:
        """Takes an offer and starts the bot. Idempotent for one order: a second call starts no second bot."""

    async def observe(self, order_id: str) -> Observation:
        """What is known of an order now."""

    async def close(self, order_id: str) -> None:
        """Ends an order, its lease and its bot, and leaves nothing behind. Idempotent."""

    async def shutdown(self) -> None:
        """The process stops; bots keep running."""
