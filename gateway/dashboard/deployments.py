"""Deployments: the list, the order form, one bot with its timeline, and what its owner can do to it."""

import uuid
from collections.abc import Mapping
from typing import Any

from google.rpc import code_pb2
from starlette.responses import RedirectResponse, Response

from clawplane.deployment.v1 import (
    deployment_pb2,
    deployment_service_pb2,
    model_call_service_pb2,
    usage_service_pb2,
)
from clawplane.user.v1 import entitlement_service_pb2
from gateway import stream
from gateway.dashboard.home import ATTENTION, LIVE, RUNNING
from gateway.dashboard.render import CHANNELS, HEADERS, STATES, render
from gateway.dashboard.visit import Visit, violations
from gateway.errors import ApiError, not_found
from gateway.transcode import to_json

PAGE_SIZE = 25
_IDS = {"id", "deployment_id", "deployment.id"}
"""What requests call a deployment's identifier."""
ENDED = (deployment_pb2.STATE_EXPIRED, deployment_pb2.STATE_CANCELED, deployment_pb2.STATE_CLOSED)
GROUPS = {"running": RUNNING, "attention": ATTENTION, "ended": ENDED}
WORDS = {deployment_pb2.State.Name(state).removeprefix("STATE_").lower(): state for state in STATES}
"""What the filter of states takes, beside the groups."""
_CHANNELS: dict[str, Any] = {deployment_pb2.Channel.Name(channel).removeprefix("CHANNEL_").lower(): channel for channel in CHANNELS}


def _channel(given: Mapping[str, str]) -> "deployment_pb2.Channel.ValueType":
    found: deployment_pb2.Channel.ValueType = _CHANNELS.get(given.get("channel", ""), deployment_pb2.CHANNEL_UNSPECIFIED)
    return found


async def index(visit: Visit) -> Response:
    """The list, with filters."""
    state = visit.query.get("state", "")
    states = GROUPS.get(state) or ((WORDS[state],) if state in WORDS else ())
    request = deployment_service_pb2.ListDeploymentsRequest(
        states=states, model=visit.query.get("model", "")[:100], channel=_channel(visit.query),
        page_size=PAGE_SIZE, page_token=visit.query.get("page_token", ""),
    )  # fmt: skip
    found, counted, catalog = await visit.calls(
        visit.call(visit.services.deployments.ListDeployments, request),
        visit.call(visit.services.deployments.SummarizeDeployments, deployment_service_pb2.SummarizeDeploymentsRequest()),
        visit.call(visit.services.models.GetModelCatalog, model_call_service_pb2.GetModelCatalogRequest()),
    )
    return render(
        "deployments.html", visit, page="deployments", deployments=found.deployments, next_page=found.next_page_token,
        counts={one.state: one.count for one in counted.counts}, total=counted.total, models=catalog.models, words=WORDS,
        channels=_CHANNELS, filtered=any(visit.query.get(name) for name in ("state", "model", "channel")),
    )  # fmt: skip


async def new(visit: Visit, status: int = 200) -> Response:
    """The order form; what was sent stays in it, but for secrets."""
    visit.need("deployments.create")
    catalog, limits, counted = await visit.calls(
        visit.call(visit.services.models.GetModelCatalog, model_call_service_pb2.GetModelCatalogRequest()),
        visit.call(visit.services.entitlements.GetEntitlements, entitlement_service_pb2.GetEntitlementsRequest()),
        visit.call(visit.services.deployments.SummarizeDeployments, deployment_service_pb2.SummarizeDeploymentsRequest()),
    )
    live = sum(one.count for one in counted.counts if one.state in LIVE)
    given = {"model": catalog.models[0] if catalog.models else "", "channel": "web"} | visit.form
    return render(
        "new.html", visit, status, page="deployments", models=catalog.models, limits=limits, live=live, given=given, channels=_CHANNELS,
        request_id=uuid.uuid4(),
    )  # fmt: skip


async def create(visit: Visit) -> Response:
    """Orders the bot and leads to it; the same form sent twice is one order."""
    request = deployment_service_pb2.CreateDeploymentRequest(
        model=visit.form.get("model", "")[:101], channel=_channel(visit.form),
        channel_token=visit.form.get("channel_token", ""), channel_api_key=visit.form.get("channel_api_key", ""),
        request_id=visit.form.get("request_id", ""),
    )  # fmt: skip
    try:
        made = await visit.call(visit.services.deployments.CreateDeployment, request)
    except ApiError as error:
        if error.status.code in (code_pb2.UNAUTHENTICATED, code_pb2.PERMISSION_DENIED):
            raise
        visit.blame(error)
        return await new(visit, error.http_status)
    return RedirectResponse(f"/dashboard/deployments/{made.id}", 303, HEADERS)


async def show(visit: Visit, status: int = 200, turns: "list[tuple[str, str]] | None" = None) -> Response:
    """One deployment. ``turns``: what was said in the chat so far, as (who, text)."""
    wanted = visit.http.path_params["id"]
    services = visit.services
    of_it = usage_service_pb2.SummarizeUsageRequest(deployment_id=wanted, group_by=[usage_service_pb2.USAGE_GROUP_MODEL])
    events = deployment_service_pb2.ListDeploymentEventsRequest(
        deployment_id=wanted, page_size=100, page_token=visit.query.get("page_token", "")
    )
    try:
        d, happened, used, catalog = await visit.calls(
            visit.call(services.deployments.GetDeployment, deployment_service_pb2.GetDeploymentRequest(id=wanted)),
            visit.call(services.deployments.ListDeploymentEvents, events),
            visit.call(services.usage.SummarizeUsage, of_it),
            visit.call(services.models.GetModelCatalog, model_call_service_pb2.GetModelCatalogRequest()),
        )
    except ApiError as error:
        raise _as_not_found(error) from None
    return render(
        "deployment.html", visit, status, page="deployments", d=d, events=list(happened.events)[::-1], later=happened.next_page_token,
        usage=used, models=sorted({*catalog.models, d.model}), turns=turns or [], can=_can(visit, d), request_id=uuid.uuid4(),
    )  # fmt: skip


_NEEDS = {
    "pay": "deployments.create", "retry": "deployments.update", "cancel": "deployments.close", "close": "deployments.close",
    "delete": "deployments.close", "rotate": "deployments.update", "chat": "deployments.get",
}  # fmt: skip
"""What is to be done -> the permission that its call asks for."""


def _can(visit: Visit, d: deployment_pb2.Deployment) -> set[str]:
    """What the visitor can do to a deployment as it is."""
    state = deployment_pb2.State.Name(d.state).removeprefix("STATE_")
    found = {
        "PENDING": {"pay", "cancel"}, "DEPLOYING": {"cancel"}, "ACTIVE": {"chat", "rotate", "close"}, "SUSPENDED": {"close"},
        "FAILED": {"retry", "close"}, "EXPIRED": {"delete"}, "CANCELED": {"delete"}, "CLOSED": {"delete"},
    }.get(state, set())  # fmt: skip
    return {action for action in found if visit.may(_NEEDS[action])}


async def act(visit: Visit) -> Response:
    """Retry, cancel, close, delete, or another key; leads back to the deployment, which says what became of it."""
    action, wanted = visit.http.path_params["action"], visit.http.path_params["id"]
    deployments, pb = visit.services.deployments, deployment_service_pb2
    request_id = visit.form.get("request_id", "")
    known: dict[str, tuple[Any, Any]] = {
        "retry": (deployments.RetryDeployment, pb.RetryDeploymentRequest(id=wanted, request_id=request_id)),
        "cancel": (deployments.CancelDeployment, pb.CancelDeploymentRequest(id=wanted)),
        "close": (deployments.CloseDeployment, pb.CloseDeploymentRequest(id=wanted)),
        "delete": (deployments.DeleteDeployment, pb.DeleteDeploymentRequest(id=wanted)),
        "rotate": (deployments.RotateClawKey, pb.RotateClawKeyRequest(id=wanted, request_id=request_id)),
    }
    if action not in known:
        raise not_found()
    return await _done(visit, *known[action], action)


async def back(visit: Visit) -> Response:
    """To the deployment, from the address that a form was sent to: whoever loads that again asks for no more than to see it."""
    return RedirectResponse(f"/dashboard/deployments/{visit.http.path_params['id']}", 303, HEADERS)


async def change(visit: Visit) -> Response:
    """Another name, or another model."""
    d = deployment_pb2.Deployment(
        id=visit.http.path_params["id"], display_name=visit.form.get("display_name", "")[:101], model=visit.form.get("model", "")[:101],
        etag=visit.form.get("etag", ""),
    )  # fmt: skip
    request = deployment_service_pb2.UpdateDeploymentRequest(deployment=d)
    request.update_mask.paths.extend(["display_name", *(["model"] if d.model else [])])
    return await _done(visit, visit.services.deployments.UpdateDeployment, request, "saved")


async def _done(visit: Visit, rpc: Any, request: Any, what: str) -> Response:
    wanted = visit.http.path_params["id"]
    try:
        await visit.call(rpc, request)
    except ApiError as error:
        error = _as_not_found(error)
        if error.status.code in (code_pb2.UNAUTHENTICATED, code_pb2.PERMISSION_DENIED, code_pb2.NOT_FOUND):
            raise error from None
        visit.blame(error)
        visit.problem = visit.problem or "; ".join(visit.problems.values())
        return await show(visit, error.http_status)
    back = "/dashboard/deployments" if what == "delete" else f"/dashboard/deployments/{wanted}"
    return RedirectResponse(f"{back}?done={what}", 303, HEADERS)


def _as_not_found(error: ApiError) -> ApiError:
    """What is no identifier at all is as little there as one of somebody else."""
    return not_found("There is no such deployment.") if _IDS & violations(error).keys() else error


async def stream_one(visit: Visit) -> Response:
    """The events of one deployment, for its page."""
    request = deployment_service_pb2.WatchDeploymentRequest(id=visit.http.path_params["id"])
    return await _stream(visit, visit.services.deployments.WatchDeployment, request)


async def stream_all(visit: Visit) -> Response:
    """The events of all deployments of the organization."""
    return await _stream(visit, visit.services.deployments.WatchDeployments, deployment_service_pb2.WatchDeploymentsRequest())


async def _stream(visit: Visit, rpc: Any, request: Any) -> Response:
    stream.resume(visit.http, request)
    return await stream.answer(rpc(request, metadata=visit.metadata), visit.http.app.state.stopping, to_json)
