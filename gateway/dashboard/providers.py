"""For operators: the market's providers, how they do, and the blacklist."""

from datetime import UTC, datetime, timedelta

from google.rpc import code_pb2
from starlette.responses import RedirectResponse, Response

from clawplane.deployment.v1 import blacklist_service_pb2, provider_service_pb2
from gateway.dashboard.render import HEADERS, render
from gateway.dashboard.visit import Visit
from gateway.errors import ApiError

TERMS = {"1": "for a day", "7": "for a week", "30": "for 30 days", "": "until it is let in again"}
_PAGE_SIZE = 50


async def index(visit: Visit, status: int = 200) -> Response:
    """The providers, and entries for those that never made an offer."""
    listing = provider_service_pb2.ListProvidersRequest(page_size=_PAGE_SIZE, page_token=visit.query.get("page_token", ""))
    found, entries = await visit.calls(
        visit.call(visit.services.providers.ListProviders, listing),
        visit.call(visit.services.blacklist.ListBlacklistEntries, blacklist_service_pb2.ListBlacklistEntriesRequest(page_size=250)),
    )
    known = {provider.address for provider in found.providers}
    strangers = [entry for entry in entries.entries if entry.provider_address not in known] if not visit.query.get("page_token") else []
    return render(
        "providers.html", visit, status, page="providers", providers=found.providers, next_page=found.next_page_token, strangers=strangers,
        terms=TERMS, given={"provider_address": "", "reason": "", "days": "7"} | visit.form,
    )  # fmt: skip


async def outcomes(visit: Visit) -> Response:
    """What came of a provider's offers."""
    address = visit.query.get("address", "")[:128]
    request = provider_service_pb2.ListProviderOutcomesRequest(
        provider_address=address, failures_only=visit.query.get("failures") == "1", page_size=_PAGE_SIZE,
        page_token=visit.query.get("page_token", ""),
    )  # fmt: skip
    found = await visit.call(visit.services.providers.ListProviderOutcomes, request)
    return render("outcomes.html", visit, page="providers", address=address, outcomes=found.outcomes, next_page=found.next_page_token)


async def exclude(visit: Visit) -> Response:
    """Puts a provider on the blacklist."""
    entry = blacklist_service_pb2.AddBlacklistEntryRequest(
        provider_address=visit.form.get("provider_address", ""), reason=visit.form.get("reason", "")
    )
    days = visit.form.get("days", "")
    if days in TERMS and days:
        entry.expires_at.FromDatetime(datetime.now(UTC) + timedelta(days=int(days)))
    try:
        await visit.call(visit.services.blacklist.AddBlacklistEntry, entry)
    except ApiError as error:
        if error.status.code != code_pb2.INVALID_ARGUMENT:
            raise
        visit.blame(error)
        return await index(visit, 400)
    return RedirectResponse("/dashboard/providers?done=excluded", 303, HEADERS)


async def admit(visit: Visit) -> Response:
    """Takes a provider off the blacklist."""
    request = blacklist_service_pb2.RemoveBlacklistEntryRequest(provider_address=visit.form.get("provider_address", ""))
    await visit.call(visit.services.blacklist.RemoveBlacklistEntry, request)
    return RedirectResponse("/dashboard/providers?done=admitted", 303, HEADERS)

