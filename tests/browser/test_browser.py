"""The dashboard as people use it: by its words, in a real browser, with scripts and without."""

import os
import re
from typing import Any

import pytest
from axe_playwright_python.async_playwright import Axe

from tests.browser.conftest import SCREENSHOTS, Browser
from tests.harness import Person, Stack

PAGES = {
    "home": "/dashboard",
    "deployments": "/dashboard/deployments",
    "new-deployment": "/dashboard/deployments/new",
    "usage": "/dashboard/usage",
    "usage-filtered": "/dashboard/usage?by=provider&show=tokens&days=90&type=chat&zone=Europe/Berlin",
    "usage-refused": "/dashboard/usage?by=user&days=90&model=gpt-3.2",
    "prices": "/dashboard/prices?provider=akashml&model=llama-4-scout",
    "providers": "/dashboard/providers",
    "provider-outcomes": "/dashboard/providers/outcomes?address=akash1w7d9f2k5s8z3v6b0n4mqe",
    "webhooks": "/dashboard/webhooks",
    "users": "/dashboard/users",
    "sign-in": "/dashboard/sign-in?next=/dashboard",
    "api": "/docs",
    "not-found": "/dashboard/deployments/dep_00000000000000000000000000000000",
}
LOOKS = [(dark, narrow) for dark in (False, True) for narrow in (False, True)]
_REWRITE = os.environ.get("SCREENSHOTS", "1") == "1"


async def order(page: Any, name: str = "") -> str:
    """Orders a bot that talks on the web; the page is the deployment's afterwards. Returns its address."""
    await page.goto("/dashboard")
    await page.get_by_role("link", name="New deployment").click()
    await page.get_by_label("Model").select_option("claude-opus-4.5")
    await page.get_by_role("radio", name=re.compile("^Web chat")).check()
    await page.get_by_role("button", name="Order for 99.00 USD").click()
    await page.wait_for_url(re.compile(r"/dashboard/deployments/dep_"))
    if name:
        await page.get_by_label("Name").fill(name)
        await page.get_by_role("button", name="Save").click()
        await page.get_by_role("heading", name=name).wait_for()
    return str(page.url).partition("?")[0]


async def pay(page: Any) -> None:
    """Pays on the page that the deployment leads to, and comes back."""
    await page.get_by_role("link", name="Pay 99.00 USD").first.click()
    await page.get_by_role("button", name="Pay 99.00 USD").click()
    await page.get_by_text("Paid. The deployment starts now.").wait_for()
    await page.get_by_role("link", name="Continue").click()


async def test_order_pay_watch_chat_and_close(browser: Browser, stack: Stack, operator: Person) -> None:
    page = await browser.context(stack)
    address = await order(page, "Front desk")
    await page.get_by_text("Waits for payment").first.wait_for()
    # Whatever reloads the page loses this.
    await page.evaluate("window.stayed = true")
    other = await page.context.new_page()
    browser.listen(other)
    await other.goto(address)
    await pay(other)
    await page.locator("#head").get_by_text("Active").wait_for()
    assert await page.evaluate("window.stayed") is True
    await page.locator("#timeline").get_by_text("state.active").wait_for()
    # The page that was led back to follows as well, and has the chat once it is loaded again.
    await other.locator("#head").get_by_text("Active").wait_for()
    await other.goto(address)
    for number, message in enumerate(("Hello, who are you?", "And what do you cost?"), 1):
        await other.get_by_placeholder("Message").fill(message)
        await other.get_by_role("button", name="Send").click()
        await other.locator(".turn-bot").nth(number - 1).wait_for()
    assert await other.locator(".turn-you p").all_inner_texts() == ["Hello, who are you?", "And what do you cost?"]
    await other.locator("#used").get_by_text("claude-opus-4.5").wait_for()
    await shoot(browser, stack, "deployment", address.removeprefix(stack.url), other)
    # What cannot be undone asks first.
    assert not await other.get_by_role("button", name="Close the bot").is_visible()
    await other.get_by_text("Close…").click()
    await other.get_by_role("button", name="Close the bot").click()
    await other.locator("#head").get_by_text("Closed").wait_for()
    await page.locator("#head").get_by_text("Closed").wait_for()
    assert await page.evaluate("window.stayed") is True


async def test_home_and_list_follow_by_themselves(browser: Browser, stack: Stack, operator: Person) -> None:
    page = await browser.context(stack)
    address = await order(page, "Follower")
    watching = await page.context.new_page()
    await watching.goto("/dashboard")
    await watching.evaluate("window.stayed = true")
    await watching.locator("#attention").get_by_text("Follower").wait_for()
    await pay(page)
    await watching.locator("#running").get_by_text("Follower").wait_for()
    assert await watching.evaluate("window.stayed") is True
    await page.goto(address)
    await page.locator("#head").get_by_text("Active").wait_for()
    copied = page.locator("#facts").get_by_title("Copy").first
    await copied.click()
    assert await page.evaluate("navigator.clipboard.readText()") == address.rpartition("/")[2]


async def test_an_operator_blacklists_replays_and_changes_a_tier(browser: Browser, stack: Stack, operator: Person) -> None:
    page = await browser.context(stack)
    await order(page)
    await pay(page)
    await page.get_by_role("link", name="Providers").click()
    row = page.get_by_role("row", name=re.compile("akash1w7d9f2k5s8z3v6b0n4mqe"))
    await row.get_by_role("link", name="Blacklist…").click()
    await page.get_by_label("Reason").fill("Loses bots at night")
    await page.get_by_role("button", name="Blacklist").click()
    await page.get_by_text("The provider gets no more bots.").wait_for()
    await row.get_by_text("Blacklisted").wait_for()
    await page.get_by_role("link", name="Webhooks").click()
    await page.get_by_role("button", name=re.compile("Replay checkout.session.completed")).first.click()
    await page.get_by_text("The event was applied again.").wait_for()
    await page.get_by_role("link", name="Users").click()
    await page.get_by_label("E-mail or username starts with").fill("ada")
    await page.get_by_role("button", name="Show").click()
    await page.get_by_text("ada.lovelace@example.com").click()
    await page.locator("details").get_by_label("Tier").fill("pro")
    await page.get_by_role("button", name="Set tier").click()
    await page.get_by_text("Saved.").wait_for()


async def test_everything_but_live_updates_works_without_scripts(browser: Browser, stack: Stack, operator: Person) -> None:
    page = await browser.context(stack, script=False)
    address = await order(page, "Plain")
    await pay(page)
    for _ in range(100):
        await page.goto(address)
        if await page.locator("#head").get_by_text("Active").is_visible():
            break
        await page.wait_for_timeout(100)
    await page.get_by_label("Name").fill("Plainer")
    await page.get_by_role("button", name="Save").click()
    await page.get_by_role("heading", name="Plainer").wait_for()
    await page.get_by_placeholder("Message").fill("Do you need scripts?")
    await page.get_by_role("button", name="Send").click()
    await page.locator(".turn-bot").wait_for()
    await page.get_by_text("Close…").click()
    await page.get_by_role("button", name="Close the bot").click()
    await page.get_by_text("The bot is being closed.").wait_for()
    # An error stands beside its field, and what was typed is still there but for the secret.
    await page.goto("/dashboard/deployments/new")
    await page.get_by_role("radio", name=re.compile("^Telegram")).check()
    await page.get_by_label("Channel token").fill("nonsense")
    await page.get_by_role("button", name="Order for").click()
    await page.locator("#channel_token-problem").get_by_text("BotFather").wait_for()
    assert await page.get_by_role("radio", name=re.compile("^Telegram")).is_checked() and await page.get_by_label("Channel token").input_value() == ""
    await page.get_by_role("button", name="Sign out").click()
    await page.get_by_text("You are signed out.").wait_for()
    await page.goto("/dashboard/usage")
    assert "/dashboard/sign-in?next=" in page.url


@pytest.mark.parametrize("name", PAGES)
async def test_pages_are_sound_in_every_look(browser: Browser, stack: Stack, operator: Person, name: str) -> None:
    """No violation that axe knows, nothing wider than the window, nothing that the policy blocks; and a picture of each."""
    await shoot(browser, stack, name, PAGES[name], signed_out=name == "sign-in")


async def _window(browser: Browser, stack: Stack, org: str, signed_out: bool) -> Any:
    """The window of whoever looks at pages: to sign in for each look would take longer than the looking."""
    if (org, signed_out) not in browser.windows:
        browser.windows[org, signed_out] = await (browser.window(stack) if signed_out else browser.context(stack, org=org))
    return browser.windows[org, signed_out]


async def shoot(browser: Browser, stack: Stack, name: str, path: str, like: Any = None, org: str = "", signed_out: bool = False) -> None:
    """Looks at a page light and dark, wide and at 380 pixels. ``like``: a page whose content is to be shown instead, as a chat's."""
    page = like if like is not None else await _window(browser, stack, org, signed_out)
    for dark, narrow in LOOKS:
        await page.emulate_media(color_scheme="dark" if dark else "light")
        await page.set_viewport_size({"width": 380 if narrow else 1280, "height": 800})
        if like is None:
            await page.goto(path)
            await page.wait_for_load_state("load")
        look = f"{name}-{'dark' if dark else 'light'}-{'380' if narrow else 'wide'}"
        width = await page.evaluate("document.documentElement.scrollWidth")
        assert width <= (380 if narrow else 1280), f"{look}: {width} pixels wide"
        found = await Axe().run(page, options={"resultTypes": ["violations"]})
        assert not found.response["violations"], f"{look}: {found.generate_report()}"
        if _REWRITE and name != "api":
            SCREENSHOTS.mkdir(exist_ok=True)
            await page.screenshot(path=SCREENSHOTS / f"{look}.png", full_page=True)
