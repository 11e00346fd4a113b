"""Usage and prices as people use them: by their words, in a real browser, with scripts and without."""

import csv
import re
from decimal import Decimal
from typing import Any

from tests.browser.conftest import Browser
from tests.browser.test_browser import shoot
from tests.harness import Person, Stack


async def cells(page: Any, region: str) -> tuple[list[str], list[list[str]]]:
    """(heads, rows) of a table."""
    table = page.get_by_role("region", name=region)
    heads = await table.locator("thead th").all_inner_texts()
    return heads, [row.split("\t") for row in await table.locator("tbody tr").all_inner_texts()]


async def downloaded(page: Any, link: str) -> list[dict[str, str]]:
    """The rows of a file that a link leads to."""
    async with page.expect_download() as download:
        await page.get_by_role("link", name=link).click()
    with (await (await download.value).path()).open(newline="") as file:
        return list(csv.DictReader(file))


async def test_usage_says_the_same_in_bars_tables_and_files(browser: Browser, stack: Stack, operator: Person) -> None:
    page = await browser.context(stack)
    await page.goto("/dashboard")
    await page.get_by_role("link", name="Usage", exact=True).click()
    await page.get_by_role("link", name="Tokens", exact=True).click()
    assert await page.locator("svg.chart .bars rect").count() > 60
    heads, rows = await cells(page, "Usage by day and model")
    lines = await downloaded(page, "Sums as CSV")
    shown = {
        (row[0], head): int(cell.replace(",", "")) for row in rows for head, cell in zip(heads[1:-2], row[1:-2], strict=True) if cell != "–"
    }
    assert shown == {(one["day"], one["model"]): int(one["tokens_in"]) + int(one["tokens_out"]) for one in lines}
    assert [int(row[-1].replace(",", "")) for row in rows] == [
        sum(tokens for (day, _), tokens in shown.items() if day == row[0]) for row in rows
    ]
    events = await downloaded(page, "Every call as CSV")
    assert sum(int(one["tokens_total"]) for one in events) == sum(shown.values()) and len(events) == sum(
        int(one["events"]) for one in lines
    )
    _, by_model = await cells(page, "Usage by model")
    assert [row[0] for row in by_model] == heads[1:-2]
    assert [int(row[3].replace(",", "")) for row in by_model] == [
        sum(n for (_, model), n in shown.items() if model == row[0]) for row in by_model
    ]


async def test_from_the_whole_to_a_part_of_it_and_back(browser: Browser, stack: Stack, operator: Person) -> None:
    page = await browser.context(stack, script=False)
    await page.goto("/dashboard/usage")
    await page.get_by_label("Group by").select_option("Provider")
    await page.get_by_role("button", name="Show").click()
    assert page.url.endswith("/dashboard/usage?by=provider")
    await page.get_by_role("region", name="Usage by provider").get_by_role("link", name="anthropic").click()
    await page.get_by_text("Filtered: Provider anthropic").wait_for()
    assert await page.get_by_label("Provider", exact=True).input_value() == "anthropic"
    await page.get_by_label("Group by").select_option("Model")
    await page.get_by_role("button", name="Show").click()
    assert re.search(r"usage\?provider=anthropic$", page.url)
    _, rows = await cells(page, "Usage by model")
    assert [row[0] for row in rows] == ["claude-opus-4.5"] and rows[0][1].strip() == "100 %"
    # A time of one's own by a clock of one's own, and what is wrong with it stands beside the field.
    await page.get_by_label("Time zone").fill("Europe/Berlim")
    await page.get_by_role("button", name="Show").click()
    await page.locator("#zone-problem").get_by_text("Europe/Berlin").wait_for()
    await page.get_by_label("Time zone").fill("Europe/Berlin")
    await page.get_by_role("button", name="Show").click()
    await page.get_by_text("by the clock of Europe/Berlin").wait_for()
    await page.get_by_role("link", name="Show all").click()
    assert "provider" not in page.url and "zone=Europe/Berlin" in page.url
    await page.get_by_role("link", name="Filter by model, user, key or deployment").click()
    await page.locator("select[name=user]").select_option(label="Operator")
    await page.get_by_label("Model", exact=True).fill("gpt-3.2")
    await page.get_by_role("button", name="Show").click()
    await page.get_by_text("Filtered: Model gpt-3.2, User Operator").wait_for()
    assert "filters=1" not in page.url
    await page.get_by_role("link", name="Today").click()
    await page.get_by_role("heading", name="by hour and model").wait_for()


async def test_the_browsers_own_clock_is_taken(browser: Browser, stack: Stack, operator: Person) -> None:
    page = await browser.context(stack)
    elsewhere = await page.context.browser.new_context(
        timezone_id="Australia/Adelaide", base_url=stack.url, storage_state=await page.context.storage_state()
    )
    home = await elsewhere.new_page()
    browser.listen(home)
    await home.goto("/dashboard")
    await home.get_by_role("link", name="Usage", exact=True).click()
    await home.get_by_text("by the clock of Australia/Adelaide").wait_for()
    assert "zone=Australia/Adelaide" in home.url.replace("%2F", "/")
    assert await home.locator("#zones option").count() > 300
    await elsewhere.close()


async def test_a_model_gets_its_price(browser: Browser, stack: Stack, operator: Person) -> None:
    page = await browser.context(stack)
    await page.goto("/dashboard")
    await page.get_by_role("link", name="Prices").click()
    await page.get_by_role("link", name="Give llama-4-scout of akashml a price").click()
    form = page.locator("#new")
    await form.get_by_label("A million tokens in").fill("0,2")
    await form.get_by_label("A million tokens out").fill("0.6")
    await form.get_by_label("Counts from").fill("2026-01-01")
    await form.get_by_role("button", name="Add the price").click()
    await page.locator("#tokens_in-problem").wait_for()
    assert await form.get_by_label("A million tokens out").input_value() == "0.6"
    await form.get_by_label("A million tokens in").fill("0.2")
    await form.get_by_role("button", name="Add the price").click()
    await page.get_by_text("The price is in the book.").wait_for()
    await page.locator("#recost").get_by_label("Provider").fill("akashml")
    await page.get_by_role("button", name="Say what would change").click()
    await page.get_by_role("heading", name="What pricing anew would change").wait_for()
    await shoot(browser, stack, "prices-recost", "", like=page)
    await page.get_by_role("button", name=re.compile(r"Price \d+ calls anew")).click()
    await page.get_by_role("heading", name="Usage is priced anew").wait_for()
    after = Decimal((await page.locator("#recosted dd.strong").inner_text()).split()[0].replace(",", ""))
    lines = await stack.http.get("/v1/usage:export", params={"format": "csv", "provider": "akashml"}, headers=dict(operator.metadata))
    costs = sum((Decimal(one["cost"]) for one in csv.DictReader(lines.text.splitlines())), Decimal(0))
    assert after == costs.quantize(Decimal("0.01"))
    # Given up again, so that other pictures have something without a price.
    await page.get_by_role("link", name="End the price of llama-4-scout of akashml").click()
    await page.get_by_role("button", name="End the price").click()
    await page.get_by_text("The price has an end.").wait_for()
