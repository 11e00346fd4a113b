"""Identity and access as people use them: signing in, inviting, keys, proving that it is you; and how their pages look."""


import re
import secrets
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from services.kit.columns import now
from services.kit.db import ALL
from services.user_svc.sessions.models import Session
from tests.browser import history
from tests.browser.conftest import Browser
from tests.browser.test_browser import shoot
from tests.harness import Stack
from tests.signing_in import GOOD
from tests.simulators.oauth import OAuthSimulator

DOORS = {
    "sign-in-password": "/dashboard/sign-in/password",
    "sign-up": "/dashboard/sign-up",
    "reset": "/dashboard/reset",
    "mailbox": "/dashboard/mailbox?to=alan@northwind.example",
}
PAGES = {
    "organization": "/dashboard/organization",
    "new-organization": "/dashboard/organizations/new",
    "no-invitation": "/dashboard/invitation?token=nonsense",
    "keys": "/dashboard/keys",
    "key": "/dashboard/keys/{key}",
    "new-key": "/dashboard/keys/new",
    "account": "/dashboard/account",
    "step-up": "/dashboard/step-up?next=/dashboard/keys/new",
    "audit": "/dashboard/audit",
}



def address(name: str) -> str:
    """An address that nobody has."""
    return f"{name}.{secrets.token_hex(3)}@northwind.example"


async def code_from_mailbox(page: Any, email: str) -> str:
    """Reads a code where the sign-in page says that it is, in a second tab."""
    mailbox = await page.context.new_page()
    await mailbox.goto("/dashboard/mailbox")
    await mailbox.get_by_label("To").fill(email)
    await mailbox.get_by_role("button", name="Show").click()
    text = await mailbox.locator("article .text").first.text_content()
    await mailbox.close()
    found = re.search(r"^\s*([2-9A-Z]{6})\s*$", text, re.MULTILINE)
    assert found, text
    return found.group(1)


async def sign_in(page: Any, email: str) -> None:
    """By a code from the mail; the page is whatever was wanted afterwards."""
    await page.get_by_label("E-mail address").fill(email)
    await page.get_by_role("button", name="Send me a code").click()
    await page.get_by_text(email).wait_for()
    await page.get_by_label("Code").fill((await code_from_mailbox(page, email)).lower())
    await page.get_by_role("button", name="Sign in").click()


async def choose(page: Any, organization: str) -> None:
    """Switches to an organization."""
    await page.locator(".switch summary").click()
    await page.locator(".switch").get_by_role("button", name=organization).click()
    await page.locator(".switch summary").get_by_text(organization).wait_for()


async def make_organization(page: Any, name: str) -> None:
    """A new organization, which the page is in afterwards."""
    await page.locator(".switch summary").click()
    await page.get_by_role("link", name="New organization").click()
    await page.get_by_label("Name").fill(name)
    await page.get_by_role("button", name="Make it").click()
    await page.get_by_role("heading", name=name).wait_for()


@pytest.mark.parametrize("script", [True, False])
async def test_sign_in_invite_accept_and_switch(browser: Browser, stack: Stack, script: bool) -> None:
    owner, guest = address("ada"), address("grace")
    page = await browser.window(stack, script=script)
    await page.goto("/dashboard/organization")
    await sign_in(page, owner)
    await page.wait_for_url("**/dashboard/organization")
    await make_organization(page, "Analytical Engines")
    await page.get_by_label("E-mail address").fill(guest)
    await page.get_by_role("button", name="Invite").click()
    await page.get_by_text("The invitation is on its way.").wait_for()
    await page.locator("#invitations").get_by_text(guest).wait_for()
    # The invited one opens the link of the mail in a browser of her own, is led to sign in, and comes back.
    other = await browser.window(stack, script=script)
    await other.goto(f"/dashboard/mailbox?to={guest}")
    await other.locator("article .text a").first.click()
    await sign_in(other, guest)
    await other.get_by_role("heading", name="Join Analytical Engines?").wait_for()
    await other.get_by_role("button", name="Accept").click()
    await other.get_by_role("heading", name="Analytical Engines").wait_for()
    # She is a developer: what is for admins is not there for her.
    assert not await other.get_by_role("button", name="Invite").is_visible() and await other.get_by_role("link", name="API keys").is_visible()
    await choose(other, "Personal")
    await choose(other, "Analytical Engines")
    await page.goto("/dashboard/organization")
    await page.locator(".entries summary").filter(has_text=guest.partition("@")[0]).click()
    await page.get_by_label("Role", exact=True).first.select_option("Viewer")
    await page.get_by_role("button", name="Set role").click()
    await page.get_by_text("The role is changed").wait_for()
    await other.goto("/dashboard")
    for _ in range(50):
        if not await other.get_by_role("link", name="API keys").is_visible():
            break
        await other.wait_for_timeout(100)
        await other.goto("/dashboard")
    await page.locator(".entries summary").filter(has_text=guest.partition("@")[0]).click()
    await page.get_by_text("Remove…").click()
    await page.get_by_role("button", name="Remove the member").click()
    await page.get_by_text("The member is out").wait_for()
    for _ in range(50):
        await other.goto("/dashboard/organization")
        if await other.get_by_text("You are in your personal one.").is_visible():
            break
        await other.wait_for_timeout(100)
    assert await other.get_by_text("You are in your personal one.").is_visible()


async def test_a_key_is_made_copied_rotated_and_revoked(browser: Browser, stack: Stack) -> None:
    page = await browser.window(stack)
    await page.goto("/dashboard/keys")
    await sign_in(page, address("katherine"))
    await page.get_by_role("link", name="Make the first key").click()
    await page.get_by_label("Name").fill("Nightly report")
    deployments = page.get_by_role("group", name="Deployments")
    await deployments.get_by_label("List").check()
    await page.get_by_label("Calls at most").fill("60")
    await page.get_by_role("button", name="Make the key").click()
    shown = page.locator("#key")
    await page.get_by_title("Copy").click()
    text = await page.evaluate("navigator.clipboard.readText()")
    assert text == await shown.inner_text() and text.startswith("cp_live_")
    await shoot(browser, stack, "key-shown", "", page)
    called = await stack.http.get("/v1/deployments", headers={"authorization": f"Bearer {text}"})
    assert called.status_code == 200
    await page.get_by_role("link", name="I have copied it").click()
    await page.get_by_label("The old text ends").select_option("after an hour")
    await page.get_by_role("button", name="Rotate").click()
    await page.get_by_role("heading", name="The new text of the key").wait_for()
    fresh = await page.locator("#key").inner_text()
    assert fresh != text
    for each in (text, fresh):
        assert (await stack.http.get("/v1/deployments", headers={"authorization": f"Bearer {each}"})).status_code == 200
    await page.get_by_role("link", name="I have copied it").click()
    await page.get_by_text("Revoke…").click()
    await page.get_by_label("Reason").fill("The laptop was lost")
    await page.get_by_role("button", name="Revoke the key").click()
    await page.get_by_text("The key has ended").wait_for()
    await page.get_by_text("The laptop was lost").wait_for()
    for _ in range(40):
        statuses = [(await stack.http.get("/v1/deployments", headers={"authorization": f"Bearer {each}"})).status_code for each in (text, fresh)]
        if statuses == [401, 401]:
            break
        await page.wait_for_timeout(50)
    assert statuses == [401, 401]


@pytest.mark.parametrize("script", [True, False])
async def test_sign_up_grow_stale_and_prove_it(browser: Browser, stack: Stack, script: bool) -> None:
    email = address("alan")
    page = await browser.window(stack, script=script)
    await page.goto("/dashboard/sign-in")
    await page.get_by_role("link", name="Sign up with a password").click()
    await page.get_by_label("E-mail address").fill(email)
    await page.get_by_label("Password").fill("password1234")
    await page.get_by_role("button", name="Sign up").click()
    await page.locator("#password-problem").wait_for()
    await page.get_by_label("Password").fill(GOOD)
    await page.get_by_role("button", name="Sign up").click()
    await page.get_by_label("Code").fill(await code_from_mailbox(page, email))
    if script:
        await shoot(browser, stack, "sign-up-code", "", page)
    await page.get_by_role("button", name="Make the account").click()
    await page.get_by_role("heading", name="Home").wait_for()
    # Two hours pass, for this session alone.
    db = history.database(stack, "user_svc")
    old = (await page.context.cookies())[0]["value"]
    async with db.transaction(ALL) as session:
        await session.execute(sa.update(Session).where(Session.id == f"ses_{old.split('_')[2]}").values(fresh_at=now() - timedelta(hours=2)))
    await db.close()
    await page.goto("/dashboard/keys/new")
    await page.get_by_role("heading", name="Prove that it is you").wait_for()
    await page.get_by_label("Password").fill("not-the-password-at-all")
    await page.get_by_role("button", name="Go on").click()
    await page.get_by_text("That did not work").wait_for()
    await page.get_by_role("button", name="Send me a code").click()
    await page.get_by_label("Code").fill(await code_from_mailbox(page, email))
    if script:
        await shoot(browser, stack, "step-up-code", "", page)
    await page.get_by_role("button", name="Go on").first.click()
    await page.get_by_role("heading", name="New API key").wait_for()
    # Forgotten, and set anew.
    await page.get_by_role("button", name="Sign out").click()
    await page.get_by_role("link", name="Use a password").click()
    await page.get_by_role("link", name="Forgot it, or never had one?").click()
    await page.get_by_label("E-mail address").fill(email)
    await page.get_by_role("button", name="Send me a code").click()
    await page.get_by_label("Code").fill(await code_from_mailbox(page, email))
    await page.get_by_label("New password").fill(f"{GOOD}-two")
    if script:
        await shoot(browser, stack, "reset-code", "", page)
    await page.get_by_role("button", name="Set the password").click()
    await page.get_by_label("Password").fill(f"{GOOD}-two")
    await page.get_by_role("button", name="Sign in").click()
    await page.get_by_role("heading", name="Home").wait_for()


async def test_an_account_elsewhere_is_the_way_in(browser: Browser, stack: Stack, elsewhere: OAuthSimulator) -> None:
    email = address("linus")
    person = {"sub": secrets.token_hex(8), "email": email, "email_verified": True, "name": "Linus Pauling"}
    await elsewhere.post("/control/person", {"provider": "google", "person": person})
    page = await browser.window(stack)
    await page.goto("/dashboard/account")
    await page.get_by_role("link", name="Continue with Google").click()
    await page.get_by_role("heading", name="Linus Pauling").wait_for()
    assert page.url == f"{stack.url}/dashboard/account"
    names = {cookie["name"]: cookie for cookie in await page.context.cookies()}
    assert names["clawplane"]["httpOnly"] and "clawplane-oauth" not in names
    # The address that one came back with is worth nothing in another browser, nor here a second time.
    await page.goto("/dashboard/oauth/callback?state=x&code=y")
    await page.get_by_text("That sign-in does not hold").wait_for()


async def test_the_menu_of_organizations_in_every_look(browser: Browser, stack: Stack, company: tuple[str, str]) -> None:
    page = await browser.context(stack, org=company[0])
    await page.goto("/dashboard/organization")
    await page.locator(".switch summary").click()
    await shoot(browser, stack, "switcher", "", page)
    await page.keyboard.press("Escape")
    await page.locator(".entries summary").filter(has_text="Grace Hopper").click()
    await shoot(browser, stack, "organization-member", "", page)


@pytest.mark.parametrize("name", DOORS)
async def test_doors_are_sound_in_every_look(browser: Browser, stack: Stack, company: tuple[str, str], name: str) -> None:
    await shoot(browser, stack, name, DOORS[name], signed_out=True)


@pytest.mark.parametrize("name", PAGES)
async def test_pages_are_sound_in_every_look(browser: Browser, stack: Stack, company: tuple[str, str], name: str) -> None:
    org, key = company
    await shoot(browser, stack, name, PAGES[name].format(key=key), org=org)
