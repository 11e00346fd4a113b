"""The states of a deployment, and what to do next: pure functions, no database, no clock of their own."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum

from clawplane.deployment.v1.deployment_pb2 import State, Status
from services.deployment_svc.deployments.models import Deployment
from services.deployment_svc.settings import DeploymentSettings

PENDING, DEPLOYING, ACTIVE = State.STATE_PENDING, State.STATE_DEPLOYING, State.STATE_ACTIVE
SUSPENDED, FAILED, EXPIRED = State.STATE_SUSPENDED, State.STATE_FAILED, State.STATE_EXPIRED
CANCELED, CLOSING, CLOSED = State.STATE_CANCELED, State.STATE_CLOSING, State.STATE_CLOSED

TRANSITIONS: dict[int, frozenset[int]] = {
    PENDING: frozenset({DEPLOYING, EXPIRED, CANCELED}),
    DEPLOYING: frozenset({ACTIVE, FAILED, CLOSING}),
    ACTIVE: frozenset({DEPLOYING, SUSPENDED, CLOSING}),
    SUSPENDED: frozenset({DEPLOYING, CLOSING}),
    FAILED: frozenset({DEPLOYING, CLOSING}),
    EXPIRED: frozenset({DEPLOYING, CANCELED}),
    CLOSING: frozenset({CLOSED}),
    CANCELED: frozenset(),
    CLOSED: frozenset(),
}
"""The only ways from state to state."""

COUNTED = (PENDING, DEPLOYING, ACTIVE, SUSPENDED)
"""States that count against the tier's limit."""
LIVE = (DEPLOYING, ACTIVE, SUSPENDED, FAILED)
"""Paid, and not yet given up."""


class Step(Enum):
    """What the reconcile loop does next with a deployment."""

    NOTHING = "nothing"
    UNDO = "undo"
    INTEND = "intend"
    CREATE = "create"
    CHOOSE = "choose"
    LEASE = "lease"
    READY = "ready"
    WATCH = "watch"
    CLOSE = "close"


_WORDS: dict[int, "Status.ValueType"] = {PENDING: Status.STATUS_PENDING, DEPLOYING: Status.STATUS_DEPLOYING, ACTIVE: Status.STATUS_ACTIVE}
_FAILED = Status.STATUS_FAILED


def status_of(state: int) -> "Status.ValueType":
    """The state in the seeds' four words."""
    return _WORDS.get(state, _FAILED)


def next_step(d: Deployment) -> Step:
    """The next step, from what is written down alone, so that any process can go on after any crash."""
    if d.state == CLOSING:
        return Step.CLOSE
    if d.undoing:
        return Step.UNDO
    if d.state == ACTIVE:
        return Step.WATCH
    if d.state != DEPLOYING:
        return Step.NOTHING
    if not d.order_intended:
        return Step.INTEND
    if not d.akash_deployment_id:
        return Step.CREATE
    if not d.provider:
        return Step.CHOOSE
    return Step.READY if d.akash_lease_id else Step.LEASE


@dataclass(frozen=True)
class Verdict:
    """What follows from a failed attempt."""

    give_up: bool
    retry_at: datetime


def after_failure(d: Deployment, untried_bidder: bool, at: datetime, s: DeploymentSettings) -> Verdict:
    """Gives up only after enough attempts, over enough time, with no bidder left that was not tried."""
    since = d.attempting_since or at
    enough = d.attempts >= s.fail_after_attempts and at - since >= timedelta(seconds=s.fail_after_s)
    # Another bidder costs nothing to try at once; the same one again deserves a pause.
    pause = 0.0 if untried_bidder else backoff(d.attempts, s)
    return Verdict(enough and not untried_bidder, at + timedelta(seconds=pause))


def backoff(failures: int, s: DeploymentSettings) -> float:
    """Seconds to wait after the given number of failures in a row: doubles up to a limit."""
    return float(min(s.backoff_max_s, s.backoff_s * 2 ** min(30, max(0, failures - 1))))


def begin_anew(d: Deployment) -> None:
    """Attempts count from here: what failed before was about another start."""
    d.attempts, d.attempting_since, d.tried_providers = 0, None, []


def forget_order(d: Deployment) -> None:
    """Clears what was known of an order that is closed now."""
    d.order_intended, d.undoing = False, False
    d.akash_deployment_id = d.manifest_sealed = d.offers_since = None
    d.provider, d.offer_reference, d.provider_url = "", "", ""
    d.bidders = []
    d.akash_lease_id = d.leased_at = d.silent_since = None
