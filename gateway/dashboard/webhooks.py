"""For operators: the webhook events that came in, and applying one again."""

from typing import Any

from google.rpc import code_pb2
from starlette.responses import RedirectResponse, Response

from clawplane.deployment.v1 import webhook_service_pb2 as payment_pb
from clawplane.user.v1 import webhook_service_pb2 as user_pb
from gateway.dashboard.render import HEADERS, render, with_query
from gateway.dashboard.visit import Visit
from gateway.errors import ApiError

_PAGE_SIZE = 25


def _side(visit: Visit, wanted: str) -> tuple[str, Any, Any]:
    """Which service took them in: payments and deployments, or people and subscriptions."""
    if wanted == "people":
        return "people", visit.services.user_webhooks, user_pb
    return "payments", visit.services.payment_webhooks, payment_pb


async def index(visit: Visit, status: int = 200, of: str = "") -> Response:
    """The events of one service, latest first."""
    side, stub, pb = _side(visit, of or visit.query.get("of", ""))
    chosen = visit.query.get("status", "")
    request = pb.ListWebhookEventsRequest(
        status=chosen if chosen in ("applied", "ignored") else "", page_size=_PAGE_SIZE, page_token=visit.query.get("page_token", "")
    )
    found = await visit.call(stub.ListWebhookEvents, request)
    return render("webhooks.html", visit, status, page="webhooks", side=side, events=found.events, next_page=found.next_page_token)


async def replay(visit: Visit) -> Response:
    """Applies an event again, as if it came now; what was applied before changes nothing."""
    side, stub, pb = _side(visit, visit.form.get("of", ""))
    try:
        await visit.call(stub.ReplayWebhookEvent, pb.ReplayWebhookEventRequest(id=visit.form.get("id", "")))
    except ApiError as error:
        if error.status.code not in (code_pb2.FAILED_PRECONDITION, code_pb2.INVALID_ARGUMENT, code_pb2.NOT_FOUND):
            raise
        visit.problem = error.status.message
        return await index(visit, error.http_status, side)
    return RedirectResponse("/dashboard/webhooks" + with_query({"of": side, "done": "replayed"}), 303, HEADERS)
