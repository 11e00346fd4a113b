"""SubscriptionService: what payment providers say of customers and subscriptions."""

from datetime import datetime

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession

from clawplane.user.v1 import subscription_service_pb2 as rpc
from clawplane.user.v1 import subscription_service_pb2_grpc
from clawplane.user.v1.change_service_pb2 import ChangeKind
from services.kit.call import Call
from services.kit.db import alone
from services.kit.inbox import take_in
from services.kit.proto import to_datetime, to_proto
from services.kit.standard import list_page
from services.user_svc.base import WebhookEvent
from services.user_svc.changes.repository import record
from services.user_svc.organizations.models import Organization
from services.user_svc.settings import UserSettings
from services.user_svc.subscriptions.models import Subscription
from services.user_svc.subscriptions.rules import is_newer, projection
from services.user_svc.users import repository as users

Event = rpc.ApplyCustomerEventRequest | rpc.ApplySubscriptionEventRequest
Outcome = tuple[str, str]
"""(user id or "", what happened)."""


class SubscriptionService(subscription_service_pb2_grpc.SubscriptionServiceServicer):
    """See proto/clawplane/user/v1/subscription_service.proto."""

    def __init__(self, settings: UserSettings) -> None:
        self.settings = settings

    async def ApplyCustomerEvent(self, request: rpc.ApplyCustomerEventRequest, call: Call) -> rpc.ApplySubscriptionEventResponse:
        return await self._once(request, call)

    async def ApplySubscriptionEvent(
        self, request: rpc.ApplySubscriptionEventRequest, call: Call
    ) -> rpc.ApplySubscriptionEventResponse:
        return await self._once(request, call)

    async def ListSubscriptions(self, request: rpc.ListSubscriptionsRequest, call: Call) -> rpc.ListSubscriptionsResponse:
        statement = select(Subscription)
        if request.org_id:
            statement = statement.where(Subscription.org_id == request.org_id)
        answer = rpc.ListSubscriptionsResponse
        return await list_page(call, request, answer, statement, Subscription.id, lambda row: to_proto(row, rpc.Subscription))

    async def _once(self, request: Event, call: Call) -> rpc.ApplySubscriptionEventResponse:
        response = rpc.ApplySubscriptionEventResponse()

        async def work(session: AsyncSession) -> None:
            response.Clear()
            taken = await take_in(
                session, WebhookEvent, source=request.provider, external_id=request.external_id, type=request.type, status="applied",
                occurred_at=to_datetime(request.occurred_at, "occurred_at"), payload=MessageToDict(request),
            )  # fmt: skip
            if taken is None:
                response.duplicate = True
                return
            response.user_id, response.outcome = await self.apply(session, request)
            (await session.get_one(WebhookEvent, taken)).reason = response.outcome
            call.audit(response.user_id or request.customer_id, after={"type": request.type, "outcome": response.outcome})

        await call.run(work)
        return response

    async def apply(self, session: AsyncSession, event: Message) -> Outcome:
        """Applies an event within the caller's transaction, also one that is replayed."""
        if isinstance(event, rpc.ApplyCustomerEventRequest):
            return await self._customer(session, event)
        assert isinstance(event, rpc.ApplySubscriptionEventRequest)
        return await self._subscription(session, event)

    async def _customer(self, session: AsyncSession, event: rpc.ApplyCustomerEventRequest) -> Outcome:
        await alone(session, f"customer {event.provider} {event.customer_id}")
        holder = await users.find(session, with_deleted=True, polar_customer_id=event.customer_id)
        if event.deleted:
            if holder is None:
                return "", "the customer was nobody's"
            user, _ = holder
            if _is_older(user.polar_event_at, event):
                return user.id, "older than what was applied before"
            user.polar_customer_id, user.polar_event_at = None, to_datetime(event.occurred_at, "occurred_at")
            return user.id, "unlinked"
        row = await users.lock(session, event.user_id) if event.user_id else None
        if row is None:
            return "", "ignored: the customer carries no id of a user of ours"
        user, organization = row
        if holder is not None and holder[0].id != user.id:
            # Whoever is right, a customer's money and history must not change hands by an event.
            return user.id, "ignored: the customer is linked to another user"
        if _is_older(user.polar_event_at, event):
            return user.id, "older than what was applied before"
        outcome = "linked" if user.polar_customer_id is None else "linked before"
        if user.polar_customer_id not in (None, event.customer_id):
            outcome = f"linked anew; was {user.polar_customer_id}"
        user.polar_customer_id, user.polar_event_at = event.customer_id, to_datetime(event.occurred_at, "occurred_at")
        await session.flush()
        # Subscriptions that were told of before their customer.
        adopted = await session.execute(
            update(Subscription)
            .where(Subscription.provider == event.provider, Subscription.customer_id == event.customer_id, Subscription.org_id.is_(None))
            .values(org_id=organization.id)
            .returning(Subscription.id)
        )
        if adopted.all():
            await self._project(session, organization)
        return user.id, outcome

    async def _subscription(self, session: AsyncSession, event: rpc.ApplySubscriptionEventRequest) -> Outcome:
        await alone(session, f"subscription {event.provider} {event.subscription_id}")
        found = await users.lock(session, event.user_id) if event.user_id else None
        if found is None:
            holder = await users.find(session, polar_customer_id=event.customer_id)
            found = await users.lock(session, holder[0].id) if holder else None
        known = await session.scalar(
            select(Subscription).where(Subscription.provider == event.provider, Subscription.external_id == event.subscription_id)
        )
        at = to_datetime(event.occurred_at, "occurred_at")
        if known is not None and not is_newer(known, at, event.status):
            return found[0].id if found else "", "older than what was applied before"
        if known is None:
            known = Subscription(provider=event.provider, external_id=event.subscription_id)
            session.add(known)
        known.customer_id, known.product_id, known.status, known.changed_at = event.customer_id, event.product_id, event.status, at
        known.tier = self.settings.polar_tiers.get(event.product_id, "")
        known.cancel_at_period_end = event.cancel_at_period_end
        ends = event.HasField("current_period_end")
        known.current_period_end = to_datetime(event.current_period_end, "current_period_end") if ends else None
        if found is not None:
            known.org_id = known.org_id or found[1].id
        await session.flush()
        organization = await session.get(Organization, known.org_id) if known.org_id else None
        if organization is None:
            return "", "kept until its customer is a user's"
        tier = await self._project(session, organization)
        user_id = found[0].id if found else ""
        return user_id, f"tier {tier}" if known.tier else f"no tier is set for the product {event.product_id}; tier {tier}"

    async def _project(self, session: AsyncSession, organization: Organization) -> str:
        """Sets tier and status to what the subscriptions say, and tells other services when that is news."""
        # One at a time for an organization: else two events of two subscriptions would each miss the other's.
        await session.refresh(organization, with_for_update=True)
        rows = (await session.scalars(select(Subscription).where(Subscription.org_id == organization.id))).all()
        tier, status = projection(rows, self.settings.tiers, self.settings.default_tier)
        if (organization.tier, organization.subscription_status) != (tier, status):
            organization.tier, organization.subscription_status = tier, status
            await session.flush()
            await record(session, ChangeKind.CHANGE_KIND_ENTITLEMENTS, organization.id, organization.id)
        return tier


def _is_older(known: datetime | None, event: rpc.ApplyCustomerEventRequest) -> bool:
    return known is not None and to_datetime(event.occurred_at, "occurred_at") < known
