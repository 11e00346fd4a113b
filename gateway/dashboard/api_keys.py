"""API keys: made with a text that is shown once, changed, rotated, switched off and ended."""

import uuid
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from google.rpc import code_pb2
from starlette.responses import RedirectResponse, Response

from clawplane.user.v1 import api_key_pb2, api_key_service_pb2
from gateway.dashboard.render import HEADERS, link, render
from gateway.dashboard.visit import Visit, violations
from gateway.errors import ApiError, not_found

PAGE = "/dashboard/keys"
TERMS = {"7": "in a week", "30": "in 30 days", "90": "in 90 days", "365": "in a year", "": "never"}
GRACES = {"0": "at once", "300": "after 5 minutes", "3600": "after an hour", "86400": "after a day"}
PERIODS = ("second", "minute", "hour", "day")
ENVIRONMENTS = {"live": api_key_pb2.API_KEY_ENVIRONMENT_LIVE, "test": api_key_pb2.API_KEY_ENVIRONMENT_TEST}
_PAGE_SIZE = 25
_FIELDS = {"name", "environment", "permissions", "expires_at", "rate"}
_IDS = {"id", "api_key.id"}


async def index(visit: Visit) -> Response:
    """The keys, newest first."""
    request = api_key_service_pb2.ListApiKeysRequest(page_size=_PAGE_SIZE, page_token=visit.query.get("page_token", ""))
    state = visit.query.get("state", "")
    if state in ("on", "off"):
        request.is_active = state == "on"
    found = await visit.call(visit.services.api_keys.ListApiKeys, request)
    return render("keys.html", visit, page="keys", keys=found.api_keys, next_page=found.next_page_token, state=state, state_of=state_of)


async def new(visit: Visit, status: int = 200) -> Response:
    """The form for a key. Whoever must prove that it is he does so before it is filled in."""
    visit.need("api_keys.create")
    if status == 200:
        await visit.ask_fresh()
    given = {"name": "", "environment": "live", "days": "90", "rate_count": "", "rate_period": "minute"} | visit.form
    return render(
        "key_new.html", visit, status, page="keys", given=given, groups=groups(visit.who.grantable_permissions), terms=TERMS,
        chosen=visit.repeated.get("permissions", []), periods=PERIODS, request_id=visit.form.get("request_id") or uuid.uuid4(),
    )  # fmt: skip


async def create(visit: Visit) -> Response:
    """Makes the key and shows its text; the same form sent again shows the same one."""
    key = _wish(visit)
    key.environment = ENVIRONMENTS.get(visit.form.get("environment", ""), api_key_pb2.API_KEY_ENVIRONMENT_UNSPECIFIED)
    request = api_key_service_pb2.CreateApiKeyRequest(api_key=key, request_id=visit.form.get("request_id", ""))
    try:
        made = await visit.call(visit.services.api_keys.CreateApiKey, request)
    except ApiError as error:
        _blame(visit, error)
        return await new(visit, error.http_status)
    return _shown(visit, made, rotated=False)


def _shown(visit: Visit, made: Any, *, rotated: bool) -> Response:
    """The one page with the text on it. Nothing keeps it."""
    return render("key_shown.html", visit, page="keys", key=made.api_key, text=made.key, rotated=rotated, base=visit.public_url)


async def show(visit: Visit, status: int = 200) -> Response:
    """One key."""
    try:
        request = api_key_service_pb2.GetApiKeyRequest(id=visit.http.path_params["id"])
        key = await visit.call(visit.services.api_keys.GetApiKey, request)
    except ApiError as error:
        raise not_found("There is no such key.") if _IDS & violations(error).keys() else error from None
    count, _, period = key.rate.partition("/")
    given = {"name": key.name, "rate_count": count, "rate_period": period or "minute", "days": "keep"} | visit.form
    offered = sorted({*visit.who.grantable_permissions, *key.permissions})
    return render(
        "key.html", visit, status, page="keys", key=key, given=given, groups=groups(offered), periods=PERIODS, graces=GRACES,
        chosen=visit.repeated.get("permissions") or list(key.permissions), terms={"keep": "as it is"} | TERMS, state=state_of(key),
        request_id=uuid.uuid4(),
    )  # fmt: skip


async def back(visit: Visit) -> Response:
    """To the key, from the address that a form was sent to."""
    return RedirectResponse(f"{PAGE}/{visit.http.path_params['id']}", 303, HEADERS)


async def change(visit: Visit) -> Response:
    """Another name, other permissions, another end or rate."""
    key = _wish(visit)
    key.id, key.etag = visit.http.path_params["id"], visit.form.get("etag", "")
    request = api_key_service_pb2.UpdateApiKeyRequest(api_key=key)
    request.update_mask.paths.extend(["name", "permissions", "rate", *(["expires_at"] if visit.form.get("days") != "keep" else [])])
    return await _done(visit, visit.services.api_keys.UpdateApiKey, request, "saved")


async def act(visit: Visit) -> Response:
    """Rotates, switches off and on, or revokes."""
    action, wanted = visit.http.path_params["action"], visit.http.path_params["id"]
    keys, pb = visit.services.api_keys, api_key_service_pb2
    if action == "rotate":
        return await _rotate(visit, wanted)
    known: dict[str, tuple[Any, Any]] = {
        "activate": (keys.ActivateApiKey, pb.ActivateApiKeyRequest(id=wanted)),
        "deactivate": (keys.DeactivateApiKey, pb.DeactivateApiKeyRequest(id=wanted)),
        "revoke": (keys.RevokeApiKey, pb.RevokeApiKeyRequest(id=wanted, reason=visit.form.get("reason", "")[:501])),
    }
    if action not in known:
        raise not_found()
    return await _done(visit, *known[action], f"key-{action}")


async def _rotate(visit: Visit, wanted: str) -> Response:
    request = api_key_service_pb2.RotateApiKeyRequest(id=wanted, request_id=visit.form.get("request_id", ""))
    grace = visit.form.get("grace", "")
    request.grace.seconds = int(grace) if grace in GRACES else 0
    try:
        made = await visit.call(visit.services.api_keys.RotateApiKey, request)
    except ApiError as error:
        _blame(visit, error)
        return await show(visit, error.http_status)
    return _shown(visit, made, rotated=True)


async def _done(visit: Visit, rpc: Any, request: Any, what: str) -> Response:
    try:
        await visit.call(rpc, request)
    except ApiError as error:
        _blame(visit, error)
        return await show(visit, error.http_status)
    return RedirectResponse(link(f"{PAGE}/{visit.http.path_params['id']}", done=what), 303, HEADERS)


def _blame(visit: Visit, error: ApiError) -> None:
    """Puts an error onto the page, by the names that the form's fields have; raises what is not about the form."""
    if error.status.code in (code_pb2.UNAUTHENTICATED, code_pb2.PERMISSION_DENIED, code_pb2.NOT_FOUND) or error.http_status >= 500:
        raise error
    if _IDS & violations(error).keys():
        raise not_found("There is no such key.")
    visit.blame(error)
    visit.problems = {name.removeprefix("api_key.").partition("[")[0]: text for name, text in visit.problems.items()}
    # What has no field of its own stands at the head of the page.
    if not visit.problems.keys() <= _FIELDS:
        visit.problem = "; ".join(f"{name}: {text}" for name, text in visit.problems.items())


def _wish(visit: Visit) -> api_key_pb2.ApiKey:
    """The key as the form wants it."""
    key = api_key_pb2.ApiKey(name=visit.form.get("name", "")[:101], permissions=visit.repeated.get("permissions", []))
    count, period = visit.form.get("rate_count", ""), visit.form.get("rate_period", "")
    if count:
        key.rate = f"{count[:20]}/{period[:10]}"
    days = visit.form.get("days", "")
    if days in TERMS and days:
        # The end of a day, so that the same form sent twice is the same wish.
        today = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
        key.expires_at.FromDatetime(today + timedelta(days=int(days) + 1))
    return key


def groups(permissions: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """Permissions by what they are about, each as (name, what it allows): {"Deployments": [("deployments.list", "List")]}."""
    found: dict[str, list[tuple[str, str]]] = {}
    for name in sorted(permissions):
        noun, _, verb = name.partition(".")
        title = noun.replace("_", " ").replace("api ", "API ")
        found.setdefault(title[:1].upper() + title[1:], []).append((name, verb.replace("_", " ").capitalize()))
    return found


def state_of(key: api_key_pb2.ApiKey) -> tuple[str, str]:
    """(kind of dot, word)."""
    if key.HasField("revoked_at"):
        return "bad", "Revoked"
    if key.HasField("expires_at") and key.expires_at.ToDatetime(UTC) <= datetime.now(UTC):
        return "", "Expired"
    return ("good", "Active") if key.is_active else ("warn", "Switched off")
