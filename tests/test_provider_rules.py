"""Which provider is chosen and which is excluded, alone: no database, no clock."""

from datetime import timedelta
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.deployment_svc.markets.driver import Offer
from services.deployment_svc.providers.rules import Record, Standing, choose, exclusion, has_room, score
from services.deployment_svc.settings import DeploymentSettings

S = DeploymentSettings(_env_file=None, service_name="t")  # type: ignore[call-arg]


def offer(name: str, price: str, uptime: str | None = None, **more: bool) -> Offer:
    return Offer(name, Decimal(price), Decimal(uptime) if uptime else None, "", **more)


def chosen(offers: list[Offer], standings: dict[str, Standing] | None = None, tried: list[str] | None = None) -> str:
    choice = choose(offers, standings or {}, tried or [], S)
    return choice.offer.provider if choice.offer else f"none: {choice.why}"


def test_price_first_and_exactly() -> None:
    # No binary float tells these two apart.
    cheap, dear = offer("z", "0.1000000000000000001"), offer("a", "0.1000000000000000002")
    assert chosen([dear, cheap]) == "z"
    assert chosen([dear, cheap], tried=["z"]) == "a" and chosen([dear, cheap], tried=["z", "a"]) == "z"
    assert chosen([offer("b", "1"), offer("a", "1")]) == "a"


def test_uptime_audit_and_record_weigh() -> None:
    assert chosen([offer("a", "1"), offer("b", "1", "0.5"), offer("c", "1", "0.99")]) == "c"
    assert chosen([offer("a", "1", audited=False), offer("b", "1", audited=True)]) == "b"
    assert chosen([offer("a", "1", online=False), offer("b", "5")]) == "b"
    # A provider that fails half of the time is worth taking at much less than half of the price only.
    bad = {"a": Standing(good=5, bad=5, was_ready=True), "b": Standing(good=10, was_ready=True)}
    assert chosen([offer("a", "0.6"), offer("b", "1")], bad) == "b" and chosen([offer("a", "0.4"), offer("b", "1")], bad) == "a"


def test_who_gets_none() -> None:
    excluded = Standing(excluded=True)
    assert chosen([offer("a", "1"), offer("b", "9")], {"a": excluded}) == "b"
    assert chosen([offer("a", "1")], {"a": excluded}) == "none: all 1 bidders are blacklisted"
    assert chosen([]) == "none: no provider made an offer"
    full = Standing(in_flight=3)
    assert chosen([offer("a", "1"), offer("b", "9")], {"a": full}) == "b"
    choice = choose([offer("a", "1")], {"a": full}, [], S)
    assert choice.offer is None and choice.wait
    # Not even at its own price is a place taken at one that is full: the dearer bidder was tried already, so one waits.
    assert choose([offer("a", "1"), offer("b", "9")], {"a": full}, ["b"], S).wait


def test_room() -> None:
    assert has_room(Standing(in_flight=2), S) and not has_room(Standing(in_flight=3), S)
    assert has_room(Standing(in_flight=50, was_ready=True), S)
    assert has_room(Standing(was_ready=True, probing=True), S) and not has_room(Standing(was_ready=True, probing=True, in_flight=1), S)


def test_the_reason_is_told() -> None:
    known = {"a": Standing(good=3, bad=1, was_ready=True), "z": Standing(excluded=True)}
    why = choose([offer("a", "0.5", "0.991", audited=True), offer("z", "0.1")], known, [], S).why
    assert why == "a at 0.500000 an hour (score 0.66, uptime 99.1 %, audited, 3 of 4 recent outcomes good), of 1 offers; blacklisted: z"


H = timedelta(hours=1)


@pytest.mark.parametrize(
    ("record", "term"),
    [
        (Record(2, 2, False, 0, 9, 0), None),
        (Record(3, 1, False, 0, 9, 0), None),
        (Record(3, 2, False, 0, 9, 0), H),
        (Record(3, 2, False, 1, 9, 0), 2 * H),
        (Record(3, 2, False, 7, 9, 0), 128 * H),
        (Record(3, 2, False, 8, 9, 0), timedelta(days=7)),
        (Record(3, 2, False, 5000, 9, 0), timedelta(days=7)),
        # On probation one failure is enough.
        (Record(1, 1, True, 1, 9, 0), 2 * H),
        # At most a third: three of nine, and none of two.
        (Record(9, 9, False, 0, 9, 2), H),
        (Record(9, 9, False, 0, 9, 3), None),
        (Record(9, 9, False, 0, 2, 0), None),
        (Record(9, 9, False, 0, 3, 0), H),
        (Record(1, 1, True, 3, 9, 3), None),
    ],
)
def test_the_rule(record: Record, term: timedelta | None) -> None:
    assert exclusion(record, S) == term


@given(st.integers(0, 200), st.integers(0, 200), st.integers(0, 50))
def test_never_more_than_the_share(bidders: int, excluded: int, strikes: int) -> None:
    if exclusion(Record(5, 5, False, strikes, bidders, excluded), S) is not None:
        assert Fraction(excluded + 1, bidders) <= Fraction(1, 3)


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.decimals(0, 1) | st.none(), st.booleans() | st.none(), st.booleans())
def test_a_score_is_a_share(good: int, bad: int, uptime: Decimal | None, audited: bool | None, online: bool) -> None:
    assert 0 < score(Standing(good, bad), Offer("a", Decimal(1), uptime, "", audited, online)) <= 1
