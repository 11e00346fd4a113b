"""Which provider gets the next bot, and which gets none for a while: pure functions, no database, no clock of their own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal

from services.deployment_svc.markets.driver import Offer
from services.deployment_svc.settings import DeploymentSettings

_UNKNOWN_UPTIME = Decimal("0.95")
_NOT_AUDITED = Decimal("0.9")
_OFFLINE = Decimal("0.1")


@dataclass(frozen=True)
class Standing:
    """What is known of a provider when a choice is made."""

    good: int = 0
    bad: int = 0
    """Recent outcomes."""
    was_ready: bool = False
    """Whether it has ever brought a bot up."""
    in_flight: int = 0
    """Bots that it is bringing up now."""
    excluded: bool = False
    probing: bool = False
    """Its exclusion has just ended: one bot at a time until one comes up."""


UNKNOWN = Standing()


@dataclass(frozen=True)
class Choice:
    """The offer to take, or none, and why."""

    offer: Offer | None
    why: str
    wait: bool = False
    """Without an offer: whether one may be had as soon as others have come up."""


def reliability(good: int, bad: int) -> Decimal:
    """Share of good outcomes, drawn towards one half while there are few. Above 0, below 1."""
    return Decimal(good + 1) / Decimal(good + bad + 2)


def score(standing: Standing, offer: Offer) -> Decimal:
    """How much a provider is trusted, above 0, at most 1: record, uptime, audit."""
    uptime = _UNKNOWN_UPTIME if offer.uptime is None else max(Decimal("0.01"), min(Decimal(1), offer.uptime))
    result = reliability(standing.good, standing.bad) * uptime
    if offer.audited is False:
        result *= _NOT_AUDITED
    return result if offer.online else result * _OFFLINE


def has_room(standing: Standing, s: DeploymentSettings) -> bool:
    """Whether a provider may be given one more: who has never brought a bot up gets few at once, who is on probation one."""
    if standing.probing:
        return standing.in_flight < 1
    return standing.was_ready or standing.in_flight < s.unproven_in_flight


def choose(offers: Sequence[Offer], standings: Mapping[str, Standing], tried: Sequence[str], s: DeploymentSettings) -> Choice:
    """The offer with the least price for its trust, of those not tried yet, or of all when all were; of equal ones by name."""
    known = {offer.provider: standings.get(offer.provider, UNKNOWN) for offer in offers}
    left_out = sorted(name for name, standing in known.items() if standing.excluded)
    usable = [offer for offer in offers if not known[offer.provider].excluded]
    if not usable:
        return Choice(None, f"all {len(offers)} bidders are blacklisted" if offers else "no provider made an offer")
    fresh = [offer for offer in usable if offer.provider not in tried] or usable
    free = [offer for offer in fresh if has_room(known[offer.provider], s)]
    if not free:
        return Choice(None, "the bidders have to prove themselves on other bots first", wait=True)
    best = min(free, key=lambda offer: (offer.price / score(known[offer.provider], offer), offer.provider))
    return Choice(best, _why(best, known[best.provider], len(usable), left_out))


def _why(best: Offer, standing: Standing, usable: int, left_out: Sequence[str]) -> str:
    facts = [f"score {score(standing, best):.2f}"]
    if best.uptime is not None:
        facts.append(f"uptime {best.uptime * 100:.1f} %")
    if best.audited is not None:
        facts.append("audited" if best.audited else "not audited")
    facts.append(f"{standing.good} of {standing.good + standing.bad} recent outcomes good")
    if standing.probing:
        facts.append("on probation")
    text = f"{best.provider} at {best.price:.6f} an hour ({', '.join(facts)}), of {usable} offers"
    return text + (f"; blacklisted: {', '.join(left_out)}" if left_out else "")


@dataclass(frozen=True)
class Record:
    """What stands against a provider after one more failure."""

    failures: int
    """Within the window."""
    deployments: int
    """How many deployments they are of."""
    probing: bool
    strikes: int
    """Exclusions so far, less what was made good."""
    bidders: int
    """How many providers made offers within the window."""
    excluded_bidders: int


def exclusion(record: Record, s: DeploymentSettings) -> timedelta | None:
    """For how long the provider is excluded; None: not at all."""
    enough = record.failures >= s.blacklist_failures and record.deployments >= s.blacklist_deployments
    if not (enough or record.probing):
        return None
    if record.excluded_bidders + 1 > record.bidders * s.blacklist_share:
        return None
    return timedelta(seconds=min(s.blacklist_max_s, s.blacklist_first_s * 2 ** min(30, record.strikes)))
