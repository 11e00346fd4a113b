"""The rules of payments under every order and number of facts: one start at most, and no money is kept for nothing."""

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from clawplane.deployment.v1.payment_pb2 import PaymentEvent
from services.deployment_svc.deployments import state
from services.deployment_svc.deployments.models import Deployment
from services.deployment_svc.payments import models, rules
from services.deployment_svc.payments.models import Payment, PaymentSession
from services.kit import ids

START = datetime(2026, 1, 1, tzinfo=UTC)
PRICE = 2900

STORIES: dict[str, list[tuple[int, dict[str, object]]]] = {
    "paid": [(rules.COMPLETED, {"paid": True})],
    "paid slowly": [(rules.COMPLETED, {"paid": False}), (rules.ASYNC_SUCCEEDED, {"paid": True})],
    "refused": [(rules.COMPLETED, {"paid": False}), (rules.ASYNC_FAILED, {})],
    "refused, then paid": [(rules.COMPLETED, {"paid": False}), (rules.ASYNC_FAILED, {}), (rules.ASYNC_SUCCEEDED, {"paid": True})],
    "part given back": [(rules.COMPLETED, {"paid": True}), (rules.REFUND, {"refunded_minor": 1000})],
    "given back": [(rules.COMPLETED, {"paid": True}), (rules.REFUND, {"refunded_minor": 1000}), (rules.REFUND, {"refunded_minor": PRICE})],
    "disputed": [(rules.COMPLETED, {"paid": True}), (rules.DISPUTE, {})],
    "too little": [(rules.COMPLETED, {"paid": True, "amount_minor": 100})],
    "test money": [(rules.COMPLETED, {"paid": True, "livemode": True})],
    "expired": [(rules.EXPIRED, {})],
}
PAYS = {"paid", "paid slowly", "refused, then paid", "part given back", "disputed"}


class Desk:
    """One deployment and its payments, kept as the services' transactions keep them."""

    def __init__(self) -> None:
        self.d = Deployment(
            id=ids.new("dep"), org_id=ids.new("org"), state=state.PENDING, price_minor=PRICE, currency="usd", livemode=False, payment_id=None,
            activated_at=None,
        )  # fmt: skip
        self.pages: dict[str, PaymentSession] = {}
        self.payments: dict[str, Payment] = {}
        self.starts = 0

    def hear(self, event: PaymentEvent, at: datetime) -> None:
        """One fact arrives."""
        page = self.pages.setdefault(event.session_id, PaymentSession(external_id=event.session_id, status=models.OPEN))
        rules.merge_session(page, event)
        if event.kind == rules.EXPIRED:
            if page.status == models.EXPIRED and self.d.state == state.PENDING:
                self.d.state = state.EXPIRED
            return
        payment = self.payments.setdefault(
            event.payment_id,
            Payment(
                id=ids.new("pay"), external_id=event.payment_id, session_id="", status=rules.PROCESSING, amount_minor=event.amount_minor,
                currency=event.currency, livemode=event.livemode, refunded_minor=0, disputed=False, last_event_at=at,
            ),
        )  # fmt: skip
        rules.merge_payment(payment, event, at)
        outcome = rules.settle(self.d, payment)
        if outcome.to is not None:
            assert outcome.to in state.TRANSITIONS[self.d.state], (self.d.state, outcome)
            self.starts += outcome.to == state.DEPLOYING
            self.d.state = outcome.to

    def kept_for_nothing(self) -> list[str]:
        """Payments whose money we have, for which nothing runs, and which nobody is told of."""
        return [
            payment.external_id for payment in self.payments.values()
            if payment.status == rules.SUCCEEDED and payment.id != self.d.payment_id and not (payment.refund_due or payment.payment_mismatch)
        ]  # fmt: skip


def events_of(story: str, number: int) -> list[tuple[datetime, PaymentEvent]]:
    """What a provider says of a payment, in its order."""
    told = []
    for step, (kind, more) in enumerate(STORIES[story]):
        values = {"amount_minor": PRICE, "currency": "usd", "session_id": f"cs_{number}"} | more
        if kind != rules.EXPIRED:
            values["payment_id"] = f"pi_{number}"
        told.append((START + timedelta(seconds=number * 10 + step), PaymentEvent(kind=kind, **values)))  # type: ignore[arg-type]
    return told


@st.composite
def arrivals(draw: st.DrawFn, most: int) -> tuple[list[str], list[tuple[datetime, PaymentEvent]]]:
    """Stories, and all that is said of them: each fact at least once, in any order."""
    stories = draw(st.lists(st.sampled_from(sorted(STORIES)), min_size=1, max_size=most))
    said = [one for number, story in enumerate(stories) for one in events_of(story, number)]
    again = draw(st.lists(st.sampled_from(said), max_size=6))
    return stories, draw(st.permutations(said + again))


@given(told=arrivals(1))
def test_one_payment_ends_the_same_in_every_order(told: tuple[list[str], list[tuple[datetime, PaymentEvent]]]) -> None:
    (story,), said = told
    desk = Desk()
    for at, event in said:
        desk.hear(event, at)
    assert not desk.kept_for_nothing()
    if story in PAYS:
        assert (desk.d.state, desk.starts) == (state.DEPLOYING, 1)
        (payment,) = desk.payments.values()
        assert payment.status == rules.SUCCEEDED and not payment.refund_due and payment.disputed == (story == "disputed")
        assert payment.refunded_minor == (1000 if story == "part given back" else 0)
    elif story == "given back":
        # The refund may overtake the success; either way nothing runs in the end.
        assert desk.d.state in (state.CLOSING, state.CANCELED) and desk.starts == (desk.d.state == state.CLOSING)
        (payment,) = desk.payments.values()
        assert payment.status == rules.REFUNDED and not payment.refund_due
    else:
        assert desk.starts == 0 and desk.d.state == (state.EXPIRED if story == "expired" else state.PENDING)
        assert all(payment.payment_mismatch == (story in ("too little", "test money")) for payment in desk.payments.values())


@given(told=arrivals(4), closed_after=st.integers(0, 20) | st.none())
def test_no_money_is_kept_for_nothing(
    told: tuple[list[str], list[tuple[datetime, PaymentEvent]]], closed_after: int | None
) -> None:
    stories, said = told
    desk = Desk()
    for number, (at, event) in enumerate(said):
        if number == closed_after and desk.d.state in (state.PENDING, state.EXPIRED):
            desk.d.state = state.CANCELED
        desk.hear(event, at)
    assert desk.starts <= 1 and not desk.kept_for_nothing()
    if desk.starts:
        (ground,) = [payment for payment in desk.payments.values() if payment.id == desk.d.payment_id]
        assert rules.agrees(desk.d, ground) and not ground.payment_mismatch
        assert (desk.d.state == state.CLOSING) == (ground.status == rules.REFUNDED)
    elif closed_after is None and "given back" not in stories:
        assert not PAYS & set(stories)
    # What is known of each payment does not depend on what is known of the others.
    for number, story in enumerate(stories):
        known = desk.payments.get(f"pi_{number}")
        alone = Desk()
        for at, event in events_of(story, number):
            alone.hear(event, at)
        assert (known.status if known else None) == (alone.payments[f"pi_{number}"].status if alone.payments else None), story
