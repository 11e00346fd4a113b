"""The state machine alone: which states follow which, what comes next, when to give up."""

from datetime import UTC, datetime, timedelta
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.ext.asyncio import AsyncSession

from clawplane.deployment.v1.deployment_pb2 import State
from services.deployment_svc.deployments import repository, state
from services.deployment_svc.deployments.models import Deployment
from services.deployment_svc.deployments.state import Step, next_step
from services.deployment_svc.settings import DeploymentSettings
from services.kit import ids
from services.kit.errors import InvalidState

# Word for word from the design, section 5.
DESIGN = """PENDING -> DEPLOYING | EXPIRED | CANCELED; DEPLOYING -> ACTIVE | FAILED | CLOSING; ACTIVE -> DEPLOYING (lease lost) | SUSPENDED | CLOSING;
SUSPENDED -> DEPLOYING | CLOSING; FAILED -> DEPLOYING (retry, paid only) | CLOSING; EXPIRED -> DEPLOYING (late payment) | CANCELED; CLOSING -> CLOSED."""
STATES = [number for number in State.values() if number]
START = datetime(2026, 1, 1, tzinfo=UTC)


def designed() -> set[tuple[int, int]]:
    """The pairs of the design's table."""
    pairs = set()
    for line in DESIGN.rstrip(".").replace("\n", " ").split(";"):
        before, _, after = line.partition("->")
        for word in after.split("|"):
            pairs.add((State.Value(f"STATE_{before.strip()}"), State.Value(f"STATE_{word.split()[0]}")))
    return pairs


def row(now_in: int = state.DEPLOYING, **known: object) -> Deployment:
    """A deployment as it is after its payment, or with more known of it."""
    fresh: dict[str, object] = {
        "id": ids.new("dep"), "org_id": ids.new("org"), "state": now_in, "undoing": False, "order_intended": False, "attempts": 0,
        "provider": "", "tried_providers": [], "bidders": [], "akash_deployment_id": None, "akash_lease_id": None,
    }  # fmt: skip
    return Deployment(**fresh | known)


@pytest.mark.parametrize(("before", "after"), list(product(STATES, STATES)))
async def test_every_pair_of_states(before: int, after: int) -> None:
    d, session = row(before), AsyncSession()
    if (before, after) in designed():
        repository.move(session, d, after, "as the design says")
        (event,) = session.new
        assert d.state == event.state == after and d.due_at is not None
    else:
        with pytest.raises(InvalidState, match="cannot become"):
            repository.move(session, d, after, "no way")
        assert d.state == before and not session.new


def test_every_state_has_a_status() -> None:
    words = {number: state.status_of(number) for number in STATES}
    assert [words.pop(number) for number in (state.PENDING, state.DEPLOYING, state.ACTIVE)] == [1, 2, 3]
    assert set(words.values()) == {4}


ORDERED = {"order_intended": True, "akash_deployment_id": "o"}
CHOSEN = ORDERED | {"provider": "p"}
LEASED = CHOSEN | {"akash_lease_id": "l"}


@pytest.mark.parametrize(
    ("d", "step"),
    [
        (row(), Step.INTEND),
        (row(order_intended=True), Step.CREATE),
        (row(**ORDERED), Step.CHOOSE),
        (row(**CHOSEN), Step.LEASE),
        (row(**LEASED), Step.READY),
        (row(state.ACTIVE, **LEASED), Step.WATCH),
        (row(undoing=True), Step.UNDO),
        (row(**LEASED, undoing=True), Step.UNDO),
        (row(state.FAILED, **LEASED, undoing=True), Step.UNDO),
        (row(state.FAILED), Step.NOTHING),
        *[(row(state.CLOSING, **known), Step.CLOSE) for known in ({}, ORDERED, CHOSEN, LEASED, LEASED | {"undoing": True})],
        *[(row(end), Step.NOTHING) for end in (state.PENDING, state.EXPIRED, state.CANCELED, state.CLOSED, state.SUSPENDED)],
    ],
)
def test_the_next_step(d: Deployment, step: Step) -> None:
    assert next_step(d) is step


SETTINGS = DeploymentSettings(fail_after_attempts=3, fail_after_s=900, backoff_s=2, backoff_max_s=120)


@pytest.mark.parametrize(
    ("attempts", "after_s", "untried", "gives_up", "pause_s"),
    [
        (1, 0, True, False, 0), (1, 0, False, False, 2), (2, 10, False, False, 4), (3, 899, False, False, 8),
        (3, 900, False, True, 8), (3, 900, True, False, 0), (2, 5000, False, False, 4), (9, 5000, True, False, 0),
        (9, 899, False, False, 120), (5000, 899, False, False, 120), (5000, 901, False, True, 120),
    ],
)  # fmt: skip
def test_when_to_give_up(attempts: int, after_s: int, untried: bool, gives_up: bool, pause_s: float) -> None:
    at = START + timedelta(seconds=after_s)
    verdict = state.after_failure(row(attempts=attempts, attempting_since=START), untried, at, SETTINGS)
    assert (verdict.give_up, (verdict.retry_at - at).total_seconds()) == (gives_up, pause_s)


def take(d: Deployment, step: Step, good: bool, at: datetime, market: list[str]) -> datetime:
    """What a step writes down when it went well, or when a provider or our request was at fault; the time of the next one."""
    if step in (Step.UNDO, Step.CLOSE):  # These are repeated until they succeed.
        state.forget_order(d)
        d.state = state.CLOSED if step is Step.CLOSE else d.state
    elif step is Step.INTEND:
        d.order_intended, d.attempts, d.attempting_since = True, d.attempts + 1, d.attempting_since or at
    elif not good:
        d.tried_providers = [*{*d.tried_providers, *([d.provider] if d.provider else [])}]
        untried = bool({*d.bidders} - {*d.tried_providers})
        verdict = state.after_failure(d, untried, at, SETTINGS)
        d.attempts -= untried
        d.undoing, d.state = True, state.FAILED if verdict.give_up else d.state
        return verdict.retry_at + timedelta(seconds=60)
    elif step is Step.CREATE:
        d.akash_deployment_id = "o"
    elif step is Step.CHOOSE:
        d.provider, d.bidders = next((p for p in market if p not in d.tried_providers), market[0]), market
    elif step is Step.LEASE:
        d.akash_lease_id = "l"
    else:
        d.state = state.ACTIVE
    return at + timedelta(seconds=1)


@given(
    known=st.sampled_from([{}, {"order_intended": True}, ORDERED, CHOSEN, LEASED]), now_in=st.sampled_from([state.DEPLOYING, state.CLOSING]),
    undoing=st.booleans(), luck=st.lists(st.booleans(), max_size=60), lasting=st.booleans(), bidders=st.integers(1, 8),
)  # fmt: skip
def test_every_row_comes_to_an_end(
    known: dict[str, object], now_in: int, undoing: bool, luck: list[bool], lasting: bool, bidders: int
) -> None:
    market = [f"p{n}" for n in range(bidders)]
    d, at, was_closing = row(now_in, **known, undoing=undoing), START, now_in == state.CLOSING
    for number in range(1000):
        step = next_step(d)
        if step in (Step.NOTHING, Step.WATCH):
            break
        at = take(d, step, luck[number] if number < len(luck) else not lasting, at, market)
    else:
        raise AssertionError(f"no end: {next_step(d)}")
    if was_closing:
        assert d.state == state.CLOSED
    elif d.state == state.FAILED:
        assert d.attempts >= 3 and not d.order_intended and at - START >= timedelta(seconds=900)
    else:
        assert d.state == state.ACTIVE and d.akash_lease_id
    if lasting and not was_closing and d.state != state.ACTIVE:
        assert d.state == state.FAILED
