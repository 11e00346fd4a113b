"""Home: what runs, what it cost this month, what needs attention."""

from datetime import UTC, datetime

from starlette.responses import Response

from clawplane.deployment.v1 import deployment_pb2, deployment_service_pb2, provider_pb2, provider_service_pb2, quota_pb2, usage_service_pb2
from clawplane.user.v1 import entitlement_service_pb2
from gateway.dashboard import quotas
from gateway.dashboard.render import render
from gateway.dashboard.visit import Visit

RUNNING = (deployment_pb2.STATE_ACTIVE, deployment_pb2.STATE_DEPLOYING, deployment_pb2.STATE_CLOSING)
ATTENTION = (deployment_pb2.STATE_FAILED, deployment_pb2.STATE_PENDING, deployment_pb2.STATE_SUSPENDED)
LIVE = (deployment_pb2.STATE_PENDING, deployment_pb2.STATE_DEPLOYING, deployment_pb2.STATE_ACTIVE, deployment_pb2.STATE_SUSPENDED)
"""What counts against the plan's number of deployments."""
_SHOWN = 8
_UNWELL = (provider_pb2.PROVIDER_HEALTH_DEGRADED, provider_pb2.PROVIDER_HEALTH_EXCLUDED, provider_pb2.PROVIDER_HEALTH_PROBING)


async def home(visit: Visit) -> Response:
    """The first page."""
    services = visit.services
    month = usage_service_pb2.SummarizeUsageRequest(group_by=[usage_service_pb2.USAGE_GROUP_DEPLOYMENT])
    month.start.FromDatetime(datetime.now(UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0))
    listing = services.deployments.ListDeployments
    counted, running, attention, usage, limits, checked, providers = await visit.calls(
        visit.call(services.deployments.SummarizeDeployments, deployment_service_pb2.SummarizeDeploymentsRequest()),
        visit.call(listing, deployment_service_pb2.ListDeploymentsRequest(states=RUNNING, page_size=_SHOWN)),
        visit.call(listing, deployment_service_pb2.ListDeploymentsRequest(states=ATTENTION, page_size=_SHOWN)),
        visit.call(services.usage.SummarizeUsage, month),
        visit.call(services.entitlements.GetEntitlements, entitlement_service_pb2.GetEntitlementsRequest()),
        quotas.checked(visit),
        _unwell(visit),
    )
    counts = {one.state: one.count for one in counted.counts}
    meters = [quotas.meter(one, usage.total.currency) for one in checked]
    return render(
        "home.html", visit, page="home", counts=counts, total=counted.total, running=running.deployments, attention=attention.deployments,
        more_running=sum(counts.get(state, 0) for state in RUNNING) - len(running.deployments),
        more_attention=sum(counts.get(state, 0) for state in ATTENTION) - len(attention.deployments),
        usage=usage.total, costs={one.deployment_id: one for one in usage.sums}, limits=limits, providers=providers,
        money_meter=quotas.monthly(meters, quota_pb2.QUOTA_UNIT_MONEY), token_meter=quotas.monthly(meters, quota_pb2.QUOTA_UNIT_TOKENS),
        tight=[one for one in meters if one.percent >= quotas.NEARLY], live=sum(counts.get(state, 0) for state in LIVE),
    )  # fmt: skip


async def _unwell(visit: Visit) -> list[provider_pb2.Provider]:
    """For operators: the providers that are not well."""
    if not visit.who.is_operator:
        return []
    found = await visit.call(visit.services.providers.ListProviders, provider_service_pb2.ListProvidersRequest(page_size=250))
    return [provider for provider in found.providers if provider.health in _UNWELL]
