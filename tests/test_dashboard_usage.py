"""The pages of what is used: the explorer, its files, the limits, and the operators' price book."""

import csv
import io
import json
import random
import re
import secrets
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from clawplane.deployment.v1 import price_pb2, price_service_pb2, quota_pb2, quota_service_pb2, usage_event_pb2
from clawplane.deployment.v1 import usage_service_pb2 as rpc
from gateway.dashboard import quotas
from gateway.dashboard.prices import counts
from gateway.dashboard.render import short_count
from gateway.dashboard.usage import change, latency, rate, told
from gateway.dashboard.usage_query import Query
from services.kit import ids
from services.kit.columns import now
from tests.harness import Person, Stack
from tests.test_dashboard import customer, signed_in
from tests.usage_rows import THEN, at_random, row, store

SPAN = {"from": (THEN - timedelta(days=14)).date().isoformat(), "to": (THEN + timedelta(days=14)).date().isoformat()}


def text_of(html: str) -> str:
    """What a page says, without its tags."""
    return " ".join(re.sub(r"<[^>]+>", " ", html).split())


def table(text: str) -> list[dict[str, str]]:
    """The rows of CSV."""
    return list(csv.DictReader(io.StringIO(text, newline="")))


async def total(stack: Stack, person: Person, **more: Any) -> rpc.UsageSum:
    """What the service says of the same days."""
    start = THEN - timedelta(days=14)
    request = rpc.SummarizeUsageRequest(start=start, end=THEN + timedelta(days=14), **more)  # type: ignore[arg-type]
    return (await stack.usage.SummarizeUsage(request, metadata=person.metadata)).total


async def test_page_files_and_service_say_the_same(stack: Stack) -> None:
    person, browser = await customer(stack)
    rows = at_random(person.org_id, random.Random(17), 150)
    await store(stack, rows)
    for filters in ({}, {"provider": "anthropic"}, {"key": next(one.api_key_id for one in rows if one.api_key_id)}, {"type": "tool"}):
        said = {{"key": "api_key_id"}.get(name, name): 6 if value == "tool" else value for name, value in filters.items()}
        expected = await total(stack, person, **said)
        assert expected.events
        async with browser.stream("GET", "/dashboard/usage", params=SPAN | filters) as answer:
            page = (await answer.aread()).decode()
        assert answer.status_code == 200
        assert f"{expected.events:,}" in page and f"{Decimal(expected.cost).quantize(Decimal('0.01')):,} USD" in page
        sums = table((await browser.get("/dashboard/usage.csv", params=SPAN | filters)).text)
        assert list(sums[0])[:4] == ["day", "model", "events", "errors"]
        every = await browser.get("/dashboard/usage/events", params=SPAN | filters)
        assert "usage-events-" in every.headers["content-disposition"] and every.headers["content-security-policy"]
        lines = table(every.text)
        assert (
            sum(int(one["tokens_total"]) for one in lines)
            == sum(int(one["tokens_in"]) + int(one["tokens_out"]) for one in sums)
            == expected.tokens_total
        )
        assert sum(Decimal(one["cost"] or 0) for one in lines) == sum(Decimal(one["cost"]) for one in sums) == Decimal(expected.cost)
        assert sum(not one["adjusts"] for one in lines) == sum(int(one["events"]) for one in sums) == expected.events
        # The links on the page lead to these files.
        for path in ("/dashboard/usage.csv", "/dashboard/usage/events"):
            found = re.search(rf'href="{path}\?([^"]+)"', page)
            assert found and all(f"{name}={value}" in found[1] for name, value in (SPAN | filters).items())
    ndjson = (await browser.get("/dashboard/usage/events", params=SPAN | {"format": "ndjson"})).text.splitlines()
    assert len([json.loads(one) for one in ndjson]) == len(table((await browser.get("/dashboard/usage/events", params=SPAN)).text))
    await browser.aclose()


async def test_every_way_to_look_at_it(stack: Stack) -> None:
    person, browser = await customer(stack)
    await store(stack, [row(person.org_id, THEN), *at_random(person.org_id, random.Random(19), 60)])
    async with browser:
        for by in ("model", "provider", "type", "user", "key", "deployment", "agent", "project"):
            for show in ("cost", "tokens", "calls"):
                answer = await browser.get("/dashboard/usage", params=SPAN | {"by": by, "show": show})
                assert answer.status_code == 200 and "<svg" in answer.text and "<meter" in answer.text, (by, show)
        day = THEN.date().isoformat()
        for query, word in (
            ({"from": day, "to": day}, "By hour"),
            (SPAN, "By day"),
            ({"from": "2026-01-01", "to": "2026-12-31"}, "No usage"),
        ):
            assert word in text_of((await browser.get("/dashboard/usage", params=query)).text), query
        year = {"from": f"{THEN.year}-01-01", "to": f"{THEN.year}-06-30", "zone": "Asia/Kathmandu"}
        months = text_of((await browser.get("/dashboard/usage", params=year)).text)
        assert "By month" in months and "by the clock of Asia/Kathmandu" in months and f"{THEN.year}-03" in months
        nothing = text_of((await browser.get("/dashboard/usage", params=SPAN | {"model": "none-such"})).text)
        assert "No usage fits these filters" in nothing


async def test_what_cannot_be_shown_is_said_beside_its_field(stack: Stack) -> None:
    _, browser = await customer(stack)
    wrong: list[tuple[dict[str, str], str]] = [
        ({"zone": "Nowhere"}, "zone"), ({"zone": "../etc/passwd"}, "zone"), ({"from": "yesterday"}, "from"), ({"to": "0001-01-01"}, "to"),
        ({"from": "2027-03-02", "to": "2027-03-01"}, "from"), ({"type": "song"}, "type"), ({"user": "=1"}, "user"),
    ]  # fmt: skip
    too_far: list[tuple[dict[str, str], str]] = [
        ({"from": "2020-01-01", "to": "2027-01-01"}, "to"), ({"days": "90", "by": "user", "model": "x"}, "model"),
        ({"days": "90", "model": "x", "agent": ids.new("agnt")}, "agent"),
    ]  # fmt: skip
    async with browser:
        for query, field in wrong + too_far:
            answer = await browser.get("/dashboard/usage", params=query)
            assert answer.status_code == 400 and f'id="{field}-problem"' in answer.text, query
            # A file has no place to say it; every call may be had, however far back.
            assert (await browser.get("/dashboard/usage.csv", params=query)).status_code == 400, query
            every = await browser.get("/dashboard/usage/events", params=query)
            assert every.status_code == (200 if (query, field) in too_far else 400), query
        # What is merely unknown is left alone.
        for query in ({"days": "17"}, {"by": "colour"}, {"show": "love"}, {"nonsense": "1"}):
            assert (await browser.get("/dashboard/usage", params=query)).status_code == 200, query
        evil = '"><script>alert(1)</script>'
        for name in ("model", "provider", "key", "zone", "from", "by"):
            assert "<script>alert" not in (await browser.get("/dashboard/usage", params={name: evil})).text, name


async def test_addresses_stay_short(stack: Stack) -> None:
    _, browser = await customer(stack)
    async with browser:
        sent = {"show": "", "days": "7", "by": "", "from": "", "to": "", "zone": "Europe/Berlin", "model": "", "user": ""}
        answer = await browser.get("/dashboard/usage", params=sent)
        assert (answer.status_code, answer.headers["location"]) == (303, "/dashboard/usage?days=7&zone=Europe/Berlin")
        answer = await browser.get("/dashboard/usage", params=sent | {"from": "2027-01-01"})
        assert answer.headers["location"] == "/dashboard/usage?from=2027-01-01&zone=Europe/Berlin"


async def test_nobody_sees_anothers_usage(stack: Stack) -> None:
    _, browser = await customer(stack)
    victim = await stack.person()
    await store(stack, [row(victim.org_id, THEN, user_id=victim.user.id, model="secret-model")])
    async with browser:
        for query in (SPAN, SPAN | {"user": victim.user.id}, SPAN | {"model": "secret-model"}, SPAN | {"by": "user"}):
            page = await browser.get("/dashboard/usage", params=query)
            assert page.status_code == 200 and "No usage" in page.text
            assert len(table((await browser.get("/dashboard/usage/events", params=query)).text)) == 0
            assert len(table((await browser.get("/dashboard/usage.csv", params=query)).text)) == 0


async def test_limits_are_meters_with_words(stack: Stack) -> None:
    person, browser = await customer(stack)
    limit = quota_pb2.Quota(
        org_id=person.org_id, scope=quota_pb2.QUOTA_SCOPE_ORGANIZATION, period=quota_pb2.QUOTA_PERIOD_DAY, unit=quota_pb2.QUOTA_UNIT_TOKENS,
        amount="1000000", soft=True,
    )  # fmt: skip
    await stack.quotas.SetQuota(quota_service_pb2.SetQuotaRequest(quota=limit), metadata=stack.operator)
    event = usage_event_pb2.UsageEvent(id=str(ids.uuid7()), provider="nobody", model="x", tokens_in=800_000, tokens_out=20_000)
    await stack.usage.RecordUsage(rpc.RecordUsageRequest(event=event), metadata=person.metadata)
    async with browser:
        usage, home = [text_of((await browser.get(path)).text) for path in ("/dashboard/usage", "/dashboard")]
        assert "82 % of 1,000,000 tokens today, resets in " in usage and "Nearly used up" in usage
        assert "Tokens today limit" in home and "What used it" in home and "of 10.00 USD this month" in home


async def priced(stack: Stack, provider: str, model: str) -> str:
    """A price of 3.5 a million; its id."""
    price = price_pb2.Price(provider=provider, model=model, tokens_in="3.5", tokens_out="2")
    return (await stack.prices.CreatePrice(price_service_pb2.CreatePriceRequest(price=price), metadata=stack.operator)).id


def unknown() -> tuple[str, str]:
    """A provider and a model that nobody else has."""
    return f"p{secrets.token_hex(4)}", f"m{secrets.token_hex(4)}"


async def test_what_is_used_without_a_price_is_given_one(stack: Stack) -> None:
    (provider, model), person = unknown(), await stack.person()
    event = usage_event_pb2.UsageEvent(id=str(ids.uuid7()), provider=provider, model=model, tokens_in=1_000_000, tokens_out=0)
    await stack.usage.RecordUsage(rpc.RecordUsageRequest(event=event), metadata=person.metadata)
    async with signed_in(stack) as browser:
        page = await browser.get("/dashboard/prices")
        listing = price_service_pb2.ListUnpricedModelsRequest(page_size=10)
        unpriced = (await stack.prices.ListUnpricedModels(listing, metadata=stack.operator)).models
        assert [f"provider={one.provider}&amp;model={one.model}#new" in page.text for one in unpriced] == [True] * len(unpriced)
        filled = await browser.get("/dashboard/prices", params={"provider": provider, "model": model})
        assert f'value="{provider}"' in filled.text and f'value="{model}"' in filled.text

        form = {"provider": provider, "model": model, "tokens_in": "cheap", "tokens_out": "2", "above_tokens_in": "", "effective_from": ""}
        wrong = await browser.submit("/prices/new", "/prices", **form)
        assert wrong.status_code == 400 and 'id="tokens_in-problem"' in wrong.text and 'value="cheap"' in wrong.text
        for field, value in (("above_tokens_in", "many"), ("effective_from", "soon"), ("markup", "20 %"), ("provider", "Nobody!")):
            wrong = await browser.submit("/prices/new", "/prices", **(form | {"tokens_in": "1", field: value}))
            assert wrong.status_code == 400 and f'id="{field}-problem"' in wrong.text, field
        good = form | {"tokens_in": "3.5", "markup": "0.2", "effective_from": now().date().isoformat(), "request_id": str(ids.uuid7())}
        for _ in range(2):
            made = await browser.submit("/prices/new", "/prices", **good)
            assert (made.status_code, made.headers["location"]) == (303, "/dashboard/prices?done=priced")
        listed = text_of((await browser.get("/dashboard/prices", params={"of": provider})).text)
        assert listed.count("End…") == 1 and "20 %" in listed

        wish = {"recost_provider": provider, "recost_model": "", "recost_from": "", "recost_to": "", "unpriced_only": "1"}
        said = await browser.submit("/prices/recost", "/prices", do="say", **wish)
        assert said.status_code == 200 and "What pricing anew would change" in said.text and "4.20 USD" in text_of(said.text)
        assert "Price 1 calls anew" in text_of(said.text)
        assert "Usage is priced anew" in (await browser.submit("/prices/recost", "/prices", do="apply", **wish)).text
        assert "Would change 0" in text_of((await browser.submit("/prices/recost", "/prices", do="say", **wish)).text)
    (found,) = (await stack.usage.ListUsage(rpc.ListUsageRequest(), metadata=person.metadata)).events
    assert Decimal(found.cost) == Decimal("4.2")


async def test_a_query_may_have_any_names(stack: Stack) -> None:
    async with signed_in(stack) as browser:
        answer = await browser.get("/dashboard/usage?path=x&query=y&model=")
        assert answer.status_code == 303 and answer.headers["location"] == "/dashboard/usage?path=x&query=y"


async def test_the_book_goes_out_and_comes_in_as_yaml(stack: Stack) -> None:
    provider, model = unknown()
    await priced(stack, provider, model)
    async with signed_in(stack) as browser:
        answer = await browser.get("/dashboard/prices/export")
        assert f"provider: {provider}" in answer.text and "prices-" in answer.headers["content-disposition"]
        checked = await browser.submit("/prices/import", "/prices", yaml=answer.text, do="check")
        assert "0 would be added" in text_of(checked.text)
        more = f"prices:\n  - provider: {provider}\n    model: other\n    tokens_in: '1'\n    tokens_out: '2'\n"
        assert "1 would be added" in text_of((await browser.submit("/prices/import", "/prices", yaml=more, do="check")).text)
        bad = await browser.submit("/prices/import", "/prices", yaml="prices: [1]", do="import")
        assert bad.status_code == 400 and 'id="yaml-problem"' in bad.text and "prices: [1]" in bad.text
        taken = await browser.submit("/prices/import", "/prices", yaml=more, do="import")
        assert taken.headers["location"] == "/dashboard/prices?done=imported"
        assert "other" in text_of((await browser.get("/dashboard/prices", params={"of": provider})).text)


async def test_a_price_is_given_an_end(stack: Stack) -> None:
    provider, model = unknown()
    price = await priced(stack, provider, model)
    async with signed_in(stack) as browser:
        listed = await browser.get("/dashboard/prices", params={"of": provider})
        assert f"end={price}#end" in listed.text
        assert f"End the price of {model}" in text_of((await browser.get("/dashboard/prices", params={"end": price})).text)
        wrong = await browser.submit("/prices/end", "/prices", id=price, effective_to="2001-01-01")
        assert wrong.status_code == 400 and 'id="effective_to-problem"' in wrong.text
        ended = await browser.submit("/prices/end", "/prices", id=price, effective_to="")
        assert ended.headers["location"] == "/dashboard/prices?done=price-ended"
        assert model not in (await browser.get("/dashboard/prices", params={"of": provider})).text
        assert "Ended" in text_of((await browser.get("/dashboard/prices", params={"of": provider, "past": "1"})).text)
        for query in ({"end": f"prc_{'0' * 32}"}, {"end": "nonsense"}):
            assert (await browser.get("/dashboard/prices", params=query)).status_code == 404
        assert (await browser.get("/dashboard/prices/recost")).headers["location"] == "/dashboard/prices"


async def test_pages_of_prices_are_of_one_moment(stack: Stack) -> None:
    provider, _ = unknown()
    for number in range(55):
        await priced(stack, provider, f"m{number:02}")
    seen: list[str] = []
    path = f"/dashboard/prices?of={provider}"
    async with signed_in(stack) as browser:
        while path:
            page = (await browser.get(path)).text
            seen += re.findall(r'class="strong">(m\d\d)<', page)
            found = re.search(r'href="([^"]+)">Next page', page)
            path = found[1].replace("&amp;", "&") if found else ""
    assert sorted(seen) == [f"m{number:02}" for number in range(55)]


async def test_prices_are_for_operators_alone(stack: Stack) -> None:
    _, browser = await customer(stack)
    async with browser:
        assert "/dashboard/prices" not in (await browser.get("/dashboard")).text
        for path in ("/prices", "/prices/export"):
            assert (await browser.get(f"/dashboard{path}")).status_code == 403, path
        form = {
            "provider": "p",
            "model": "m",
            "tokens_in": "1",
            "tokens_out": "1",
            "yaml": "prices: []",
            "id": f"prc_{'0' * 32}",
            "do": "apply",
        }
        for path in ("/prices/new", "/prices/end", "/prices/import", "/prices/recost"):
            assert (await browser.submit(path, "/deployments/new", **form)).status_code == 403, path


@pytest.mark.any_engine
def test_what_became_of_a_number() -> None:
    assert change(150, 100) == ("↑", "50 % more") and change("50", "100") == ("↓", "50 % less")
    assert (
        change(0, 0) == ("", "none")
        and change(5, 5) == ("", "the same")
        and change(5, 0) == ("", "none before")
        and change(0, 5) == ("↓", "none now")
    )
    assert change(1001, 1000) == ("↑", "0 % more") and change(20_000, 10) == ("↑", "199,900 % more")
    assert [latency(one) for one in (0, 12, 999, 1000, 12_345)] == ["–", "12 ms", "999 ms", "1.0 s", "12.3 s"]
    assert [rate(*one) for one in ((0, 0), (0, 5), (1, 3), (1, 100_000))] == ["–", "0 %", "33.3 %", "<0.1 %"]
    assert [short_count(one) for one in (0, 999_999, 1_234_567, 12_345_678_901, 12_345 * 10**12)] == ["0", "999,999", "1.235 M", "12.35 G", "12,345 T"]
    assert told({}, "key", "") == "no API key" and told({}, "user", f"usr_{'0' * 32}") == "usr_00000000…"
    assert told({"user": {"usr_1": "Ada"}}, "user", "usr_1") == "Ada" and told({}, "model", "gpt-3.2") == "gpt-3.2"


@pytest.mark.any_engine
def test_bars_follow_the_clock_of_the_zone() -> None:
    zone = {"zone": "Europe/Berlin"}
    short, long_ = (Query.of(zone | {"from": day, "to": day}) for day in ("2026-03-29", "2026-10-25"))
    assert (len(short.axis()), len(long_.axis()), short.period) == (23, 25, "hour")
    assert [short.short(when) for when in short.axis()[:4]] == ["00:00", "01:00", "03:00", "04:00"]
    days = Query.of(zone | {"from": "2026-03-01", "to": "2026-03-31"})
    assert [days.label(when) for when in days.axis()] == [f"2026-03-{number:02}" for number in range(1, 32)] and days.period == "day"
    assert days.end - days.start == timedelta(days=31) - timedelta(hours=1)
    months = Query.of({"from": "2026-01-15", "to": "2026-06-15"})
    assert [months.label(when) for when in months.axis()] == [f"2026-{number:02}" for number in range(1, 7)] and months.period == "month"
    today = datetime.now(ZoneInfo("Pacific/Kiritimati")).date()
    preset = Query.of({"zone": "Pacific/Kiritimati", "days": "7"})
    assert (preset.first, preset.last, preset.days) == (today - timedelta(days=6), today, "7")
    assert Query.of({"from": "2027-03-01", "days": "7"}).days == "" and Query.of({"to": "2027-03-30"}).first == date(2027, 3, 1)


@pytest.mark.any_engine
def test_a_meter_says_what_counts() -> None:
    status = quota_pb2.QuotaStatus(
        scope=quota_pb2.QUOTA_SCOPE_USER, period=quota_pb2.QUOTA_PERIOD_MONTH, unit=quota_pb2.QUOTA_UNIT_MONEY, amount="50", used="31", held="2.5",
        percent=62,
    )  # fmt: skip
    status.resets_at.FromDatetime(now() + timedelta(days=3, hours=1))
    made = quotas.meter(status, "usd")
    assert made.title == "Money this month for you" and made.state == ("good", "Enough left")
    assert made.text == "62 % of 50.00 USD this month, resets in 3 days; 2.50 USD more are held by calls under way"
    status.percent, status.unit, status.amount, status.held = 100, quota_pb2.QUOTA_UNIT_TOKENS, "1000000", ""
    assert quotas.meter(status, "usd").state == ("bad", "Used up")
    status.soft = True
    assert quotas.meter(status, "usd").state == ("warn", "Reached; goes on")
    status.resets_at.FromDatetime(now() + timedelta(hours=1, seconds=5))
    assert quotas.meter(status, "usd").text == "100 % of 1,000,000 tokens this month, resets in 1 hour"


@pytest.mark.any_engine
def test_whether_a_price_counts() -> None:
    price = price_pb2.Price()
    price.effective_from.FromDatetime(datetime(2020, 1, 1, tzinfo=UTC))
    assert counts(price) == ("good", "Counts")
    price.effective_to.FromDatetime(datetime(2021, 1, 1, tzinfo=UTC))
    assert counts(price) == ("", "Ended")
    price.effective_from.FromDatetime(now() + timedelta(days=1))
    assert counts(price) == ("busy", "From then on")
