"""ProviderService: how the market's providers are doing."""

from datetime import timedelta

from sqlalchemy import select

from clawplane.deployment.v1 import blacklist_entry_pb2, provider_pb2, provider_service_pb2, provider_service_pb2_grpc
from services.deployment_svc.blacklist.models import BlacklistEntry
from services.deployment_svc.providers.models import Provider, ProviderOutcome
from services.deployment_svc.providers.repository import standings
from services.deployment_svc.providers.rules import Standing, reliability
from services.deployment_svc.settings import DeploymentSettings
from services.kit.call import Call
from services.kit.columns import now
from services.kit.paging import page
from services.kit.proto import to_proto
from services.kit.standard import list_page

_Health = provider_pb2.ProviderHealth


class ProviderService(provider_service_pb2_grpc.ProviderServiceServicer):
    """See proto/clawplane/deployment/v1/provider_service.proto."""

    def __init__(self, settings: DeploymentSettings) -> None:
        self.settings = settings

    async def ListProviders(
        self, request: provider_service_pb2.ListProvidersRequest, call: Call
    ) -> provider_service_pb2.ListProvidersResponse:
        async with call.read() as session:
            rows, token = await page(session, select(Provider), Provider.address, request, descending=False)
            addresses = [row.address for row in rows]
            known = await standings(session, addresses, self.settings)
            entries = await session.scalars(select(BlacklistEntry).where(BlacklistEntry.provider_address.in_(addresses)))
            listed = {entry.provider_address: entry for entry in entries}
        providers = [self._message(row, known[row.address], listed.get(row.address)) for row in rows]
        return provider_service_pb2.ListProvidersResponse(providers=providers, next_page_token=token)

    def _message(self, row: Provider, standing: Standing, entry: BlacklistEntry | None) -> provider_pb2.Provider:
        message = to_proto(row, provider_pb2.Provider)
        message.score = f"{reliability(standing.good, standing.bad):.3f}"
        message.in_flight = standing.in_flight
        message.health = self._health(row, standing)
        if entry is not None:
            message.blacklist_entry.CopyFrom(to_proto(entry, blacklist_entry_pb2.BlacklistEntry))
        return message

    def _health(self, row: Provider, standing: Standing) -> "_Health.ValueType":
        if standing.excluded:
            return _Health.PROVIDER_HEALTH_EXCLUDED
        if standing.probing:
            return _Health.PROVIDER_HEALTH_PROBING
        recent = now() - timedelta(seconds=self.settings.blacklist_window_s)
        if row.last_failure_at is not None and row.last_failure_at > recent:
            return _Health.PROVIDER_HEALTH_DEGRADED
        if not standing.was_ready:
            return _Health.PROVIDER_HEALTH_UNPROVEN
        return _Health.PROVIDER_HEALTH_HEALTHY

    async def ListProviderOutcomes(
        self, request: provider_service_pb2.ListProviderOutcomesRequest, call: Call
    ) -> provider_service_pb2.ListProviderOutcomesResponse:
        statement = select(ProviderOutcome)
        if request.provider_address:
            statement = statement.where(ProviderOutcome.provider_address == request.provider_address)
        if request.failures_only:
            statement = statement.where(ProviderOutcome.is_good.is_(False))
        answer = provider_service_pb2.ListProviderOutcomesResponse
        return await list_page(
            call, request, answer, statement, ProviderOutcome.id, lambda row: to_proto(row, provider_pb2.ProviderOutcome)
        )
