"""CreateDeployment: one row for one wish, the tier's limit, one open payment page."""

from collections.abc import Awaitable, Callable

from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from clawplane.deployment.v1.deployment_service_pb2 import CreateDeploymentRequest
from clawplane.errors.v1.errors_pb2 import ErrorReason
from clawplane.user.v1.entitlement_service_pb2 import Entitlements
from services.deployment_svc.deployments import repository, secrets, state
from services.deployment_svc.deployments.models import Deployment
from services.deployment_svc.payments.links import Links
from services.deployment_svc.settings import DeploymentSettings
from services.kit import ids
from services.kit.call import Call
from services.kit.errors import Conflict, Exhausted, InvalidArgument, InvalidState
from services.kit.secrets import SecretBox

_TRIES = 4
EntitlementsOf = Callable[[str], Awaitable[Entitlements]]


class Creator:
    """What CreateDeployment needs."""

    def __init__(self, settings: DeploymentSettings, box: SecretBox, links: Links, entitlements: EntitlementsOf) -> None:
        self.settings, self.box, self.links, self.entitlements = settings, box, links, entitlements

    async def create(self, request: CreateDeploymentRequest, call: Call) -> Deployment:
        """The deployment of this wish, with an open payment page."""
        org_id = call.org_id
        if not call.caller.user_id:
            raise InvalidState("a deployment is ordered by a user", reason=ErrorReason.ERROR_REASON_USER_REQUIRED)
        if request.model not in self.settings.models:
            raise InvalidArgument("model", f"must be one of {', '.join(self.settings.models)}")
        entitlements = await self.entitlements(org_id)
        for _ in range(_TRIES):
            deployment_id = await self._row(request, call, entitlements)
            d = await self.links.ensure(deployment_id, entitlements.price_minor, entitlements.currency)
            # Expired or given up in this very moment: the wish is made anew.
            if d.state not in (state.EXPIRED, state.CANCELED):
                return d
        raise Conflict("the deployment is being changed by someone else; try again", retry_after_s=0.5)

    async def _row(self, request: CreateDeploymentRequest, call: Call, entitlements: Entitlements) -> str:
        """The id of the open wish, made if there is none."""

        async def work(session: AsyncSession) -> str:
            await repository.lock_organization(session, call.org_id)
            # While a key is rotated, rows are under two of them, and the index tells neither from the other: whoever makes a wish is alone
            # with its organization, and looks under both.
            prints = secrets.fingerprints(self.box, call.caller.user_id, request.model, request.channel, request.channel_token)
            known = await repository.pending_wish(session, prints.values())
            if known is not None:
                call.audit(known.id)
                return known.id
            limit = entitlements.live_deployments
            if limit and await repository.count_live(session) >= limit:
                raise Exhausted(
                    f"the tier {entitlements.tier} allows {limit} deployments at once: close one, or take a larger tier",
                    reason=ErrorReason.ERROR_REASON_TIER_LIMIT_REACHED, tier=entitlements.tier, limit=limit,
                )  # fmt: skip
            d = self._new(request, call, entitlements, *next(iter(prints.items())))
            session.add(d)
            await session.flush()
            repository.note(session, d, "state.pending", "ordered; waits for payment")
            call.audit(d.id, after={"model": d.model, "price_minor": d.price_minor})
            return d.id

        try:
            result: str = await call.run(work)
        except IntegrityError:
            # Another process made the same wish between our look and our insert: its row is ours too.
            result = await call.run(work)
        return result

    def _new(self, request: CreateDeploymentRequest, call: Call, entitlements: Entitlements, key_id: str, print_: bytes) -> Deployment:
        deployment_id = ids.new("dep")
        provider = self.settings.payment_provider
        return Deployment(
            id=deployment_id, org_id=call.org_id, user_id=call.caller.user_id, email=call.caller.email,
            model=request.model, channel=request.channel, fingerprint=print_, fingerprint_key_id=key_id, state=state.PENDING,
            channel_token_sealed=secrets.seal(self.box, deployment_id, "channel_token", request.channel_token),
            channel_api_key_sealed=secrets.seal(self.box, deployment_id, "channel_api_key", request.channel_api_key),
            payment_provider=provider, livemode=self.links.checkout(provider).livemode,
            price_minor=entitlements.price_minor, currency=entitlements.currency,
        )  # fmt: skip
