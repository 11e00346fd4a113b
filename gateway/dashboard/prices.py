"""For operators: the price book, what is used without a price, and pricing stored usage anew."""

import re
import time
import uuid
from collections.abc import Mapping
from datetime import UTC, date, datetime
from typing import Any

import grpc
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import code_pb2
from starlette.responses import RedirectResponse, Response

from clawplane.deployment.v1 import price_pb2, price_service_pb2, usage_service_pb2
from gateway.dashboard.render import HEADERS, link, render
from gateway.dashboard.visit import Visit, violations
from gateway.errors import ApiError, from_rpc, not_found

PAGE = "/dashboard/prices"
_PAGE_SIZE = 50
_UNPRICED = 10
_RECOST_S = 20
"""So long pricing anew goes on before the page says how far it is; whoever waits behind a proxy would be told nothing."""
_TOLD = (code_pb2.INVALID_ARGUMENT, code_pb2.ALREADY_EXISTS, code_pb2.FAILED_PRECONDITION, code_pb2.NOT_FOUND)
"""What a form is refused with that its page can say."""
_MILLISECONDS = re.compile(r"[0-9]{1,13}", re.ASCII)
_AMOUNTS = ("tokens_in", "tokens_out", "tokens_cached", "tokens_reasoning")
_NEW: dict[str, str] = dict.fromkeys(("provider", "model", "above_tokens_in", *_AMOUNTS, "markup", "effective_from", "effective_to"), "")
_RECOST = {"recost_provider": "", "recost_model": "", "recost_from": "", "recost_to": "", "unpriced_only": "1"}
_RECOST_FIELDS = {"provider": "recost_provider", "model": "recost_model", "start": "recost_from", "end": "recost_to"}


async def index(visit: Visit, status: int = 200, **more: Any) -> Response:
    """The prices that count now, or all there ever were; before them the models that have none."""
    past = visit.query.get("past") == "1"
    listing = price_service_pb2.ListPricesRequest(
        provider=visit.query.get("of", "").strip()[:64], page_size=_PAGE_SIZE, page_token=visit.query.get("page_token", "")
    )
    # The next page is of the same moment, which its token belongs to.
    at = visit.query.get("at", "")
    if not past:
        listing.effective_at.FromMilliseconds(int(at) if _MILLISECONDS.fullmatch(at) else time.time_ns() // 1_000_000)
    prices = visit.services.prices
    found, unpriced, ending = await visit.calls(
        visit.call(prices.ListPrices, listing),
        visit.call(prices.ListUnpricedModels, price_service_pb2.ListUnpricedModelsRequest(page_size=_UNPRICED)),
        _ending(visit),
    )
    wished = {name: visit.query.get(name, "")[:128] for name in ("provider", "model")}
    form = {"yaml": "", "result": None, "applied": False, "checked": None} | more
    return render(
        "prices.html", visit, status, page="prices", prices=found.prices, next_page=found.next_page_token, unpriced=unpriced.models,
        more_unpriced=bool(unpriced.next_page_token), past=past,
        at=listing.effective_at.ToMilliseconds() or "", given=_NEW | wished | visit.form,
        recost_given=_RECOST | ({"unpriced_only": ""} if "recost_from" in visit.form else {}) | visit.form, amounts=_AMOUNTS,
        request_id=visit.form.get("request_id") or uuid.uuid4(), counts=counts,
        ending=ending, currency=found.prices[0].currency if found.prices else "", **form,
    )  # fmt: skip


async def _ending(visit: Visit) -> price_pb2.Price | None:
    """The price whose end is asked about."""
    wanted = visit.form.get("id") or visit.query.get("end", "")
    if not wanted:
        return None
    try:
        found: price_pb2.Price = await visit.call(visit.services.prices.GetPrice, price_service_pb2.GetPriceRequest(id=wanted))
    except ApiError as error:
        raise not_found("There is no such price.") if "id" in violations(error) else error from None
    return found


async def create(visit: Visit) -> Response:
    """Adds a price."""
    form = visit.form
    price = price_pb2.Price()
    for name in ("provider", "model", *_AMOUNTS, "markup"):
        setattr(price, name, form.get(name, "")[:129])
    problems: dict[str, str] = {}
    if form.get("above_tokens_in"):
        try:
            price.above_tokens_in = int(form["above_tokens_in"].replace(",", ""))
        except ValueError:
            problems["above_tokens_in"] = "must be a whole number"
    if (start := _day(form, "effective_from", problems)) is not None:
        price.effective_from.CopyFrom(start)
    request = price_service_pb2.CreatePriceRequest(price=price, request_id=form.get("request_id", ""))
    return await _done(visit, visit.services.prices.CreatePrice, request, "priced", problems)


async def end(visit: Visit) -> Response:
    """Gives a price an end."""
    problems: dict[str, str] = {}
    request = price_service_pb2.EndPriceRequest(id=visit.form.get("id", ""))
    if (until := _day(visit.form, "effective_to", problems)) is not None:
        request.effective_to.CopyFrom(until)
    return await _done(visit, visit.services.prices.EndPrice, request, "price-ended", problems)


async def export(visit: Visit) -> Response:
    """The whole book as YAML."""
    found = await visit.call(visit.services.prices.ExportPrices, price_service_pb2.ExportPricesRequest())
    headers = {**HEADERS, "Content-Disposition": f'attachment; filename="prices-{datetime.now(UTC):%Y-%m-%d}.yaml"'}
    return Response(found.yaml, 200, headers, "application/yaml")


async def take_in(visit: Visit) -> Response:
    """Says what a YAML file would change, or takes it in."""
    yaml, only_say = visit.secret("yaml"), visit.form.get("do") != "import"
    request = price_service_pb2.ImportPricesRequest(yaml=yaml, validate_only=only_say)
    try:
        found = await visit.call(visit.services.prices.ImportPrices, request)
    except ApiError as error:
        return await _refused(visit, error, yaml=yaml)
    if only_say:
        return await index(visit, yaml=yaml, checked=found)
    return RedirectResponse(link(PAGE, done="imported"), 303, HEADERS)


async def recost(visit: Visit) -> Response:
    """Prices stored usage anew: at first what that would change, then for good."""
    form, problems = visit.form, dict[str, str]()
    request = usage_service_pb2.RecostUsageRequest(
        provider=form.get("recost_provider", "")[:65], model=form.get("recost_model", "")[:129],
        unpriced_only=form.get("unpriced_only") == "1", apply=form.get("do") == "apply",
        after_position=form.get("after_position", "")[:1024],
    )  # fmt: skip
    for name, field in (("recost_from", request.start), ("recost_to", request.end)):
        if (when := _day(form, name, problems)) is not None:
            field.CopyFrom(when)
    if problems:
        visit.problems = problems
        return await index(visit, 400)
    last = usage_service_pb2.RecostUsageResponse()
    deadline = time.monotonic() + _RECOST_S
    call = visit.services.usage.RecostUsage(request, metadata=visit.metadata, timeout=2 * _RECOST_S)
    try:
        async for progress in call:
            last = progress
            if time.monotonic() > deadline:
                break
    except grpc.aio.AioRpcError as error:
        # What it has come to stays.
        if not last.position:
            return await _refused(visit, from_rpc(error), _RECOST_FIELDS)
    finally:
        call.cancel()
    return await index(visit, result=last, applied=request.apply)


async def back(_: Visit) -> Response:
    """To the page, from the address that a form was sent to."""
    return RedirectResponse(PAGE, 303, HEADERS)


async def _done(visit: Visit, rpc: Any, request: Any, what: str, problems: dict[str, str]) -> Response:
    if problems:
        visit.problems = problems
        return await index(visit, 400)
    try:
        await visit.call(rpc, request)
    except ApiError as error:
        return await _refused(visit, error)
    return RedirectResponse(link(PAGE, done=what), 303, HEADERS)


async def _refused(visit: Visit, error: ApiError, fields: Mapping[str, str] | None = None, **more: Any) -> Response:
    """The page with what is wrong beside its fields; raises what is not about a form. ``fields``: a request's -> the form's."""
    if error.status.code not in _TOLD:
        raise error
    visit.blame(error)
    visit.problems = {(fields or {}).get(name, name.removeprefix("price.")): text for name, text in visit.problems.items()}
    if not visit.problems.keys() <= {*_NEW, *_RECOST, "yaml"}:
        # What has no field of its own stands at the head of the page.
        visit.problem = "; ".join(f"{name}: {text}" for name, text in visit.problems.items())
    return await index(visit, error.http_status, **more)


def _day(form: Any, name: str, problems: dict[str, str]) -> Timestamp | None:
    """The beginning of a day, UTC; None for an empty field."""
    text = form.get(name, "")
    if not text:
        return None
    stamp = Timestamp()
    try:
        day = date.fromisoformat(text)
    except ValueError:
        problems[name] = "is no day; write it as 2027-03-31"
        return None
    stamp.FromDatetime(datetime(day.year, day.month, day.day, tzinfo=UTC))
    return stamp


def counts(price: price_pb2.Price) -> tuple[str, str]:
    """(kind of dot, word) for whether a price counts now."""
    now = datetime.now(UTC)
    if price.effective_from.ToDatetime(UTC) > now:
        return "busy", "From then on"
    if price.HasField("effective_to") and price.effective_to.ToDatetime(UTC) <= now:
        return "", "Ended"
    return "good", "Counts"
