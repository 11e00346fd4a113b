"""A real browser against a real stack. Without a browser these tests are skipped, unless BROWSER_REQUIRED says that they must run."""

import importlib.util
import os
import shutil
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from clawplane.user.v1 import user_service_pb2
from tests.browser import history
from tests.harness import Person, Stack, running
from tests.simulators.oauth import OAuthSimulator

# The other tests need no driver of browsers, and must not fail for the lack of one.
collect_ignore = [] if importlib.util.find_spec("playwright") or os.environ.get("BROWSER_REQUIRED") else ["test_browser.py", "test_identity.py", "test_usage.py"]
SCREENSHOTS = Path(__file__).resolve().parents[2] / "docs" / "screenshots"
WIDE, NARROW = {"width": 1280, "height": 800}, {"width": 380, "height": 800}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks all of them."""
    for item in items:
        if "/browser/" in str(item.path):
            item.add_marker(pytest.mark.browser)
            item.add_marker(pytest.mark.timeout(240))


@dataclass
class Browser:
    """A running Chromium, and what its pages complained of."""

    chromium: Any
    complaints: list[str]
    windows: dict[tuple[str, bool], Any] = field(default_factory=dict)
    """Those that tests share to look at pages: by organization, and whether signed out."""

    async def window(self, stack: Stack, *, dark: bool = False, narrow: bool = False, script: bool = True) -> Any:
        """A page in a window of its own, where nobody has signed in."""
        made = await self.chromium.new_context(
            viewport=NARROW if narrow else WIDE, color_scheme="dark" if dark else "light", java_script_enabled=script, base_url=stack.url,
            permissions=["clipboard-read", "clipboard-write"],
        )  # fmt: skip
        made.set_default_timeout(20_000)
        page = await made.new_page()
        self.listen(page)
        return page

    async def context(self, stack: Stack, *, dark: bool = False, narrow: bool = False, script: bool = True, org: str = "") -> Any:
        """The same, signed in by a fresh link as a person would. ``org``: the organization to act in; empty for the personal one."""
        page = await self.window(stack, dark=dark, narrow=narrow, script=script)
        await page.goto(f"/dashboard/sign-in?token={await stack.link()}")
        await page.get_by_role("button", name="Sign in").click()
        await page.wait_for_url("**/dashboard")
        if org:
            await page.context.add_cookies([{"name": "clawplane-org", "value": org, "url": stack.url}])
        return page

    def listen(self, page: Any) -> None:
        """Keeps what a page says of scripts that fail and of what its policy has blocked."""
        page.on("pageerror", lambda error: self.complaints.append(f"{page.url}: {error}"))
        page.on("console", lambda said: self.complaints.append(f"{page.url}: {said.text}") if said.type == "error" else None)


@pytest.fixture(autouse=True)
def quiet(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each test answers for its own pages: nothing that the policy blocks, no script that fails. What a form is refused with is no such thing."""
    found: Browser = request.getfixturevalue("browser")
    found.complaints.clear()
    yield
    complaints = [text for text in found.complaints if "status of 4" not in text]
    assert not complaints


@pytest_asyncio.fixture(scope="session")
async def browser() -> AsyncIterator[Browser]:
    """Debian's Chromium, or whichever is installed."""
    from playwright.async_api import async_playwright

    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        (pytest.fail if os.environ.get("BROWSER_REQUIRED") else pytest.skip)("there is no Chromium on this machine: install Debian's `chromium`")
    async with async_playwright() as playwright:
        chromium = await playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield Browser(chromium, [])
        await chromium.close()


@pytest.fixture(scope="session")
def elsewhere() -> Iterator[OAuthSimulator]:
    """Google, Microsoft and GitHub, in a process of their own."""
    with OAuthSimulator() as simulator:
        yield simulator


@pytest_asyncio.fixture(scope="session")
async def stack(tmp_path_factory: pytest.TempPathFactory, elsewhere: OAuthSimulator) -> AsyncIterator[Stack]:
    """A stack as `up` runs it: SQLite, the sandbox's checkout, local bots; slow enough at its work to be watched."""
    options = {"watch_poll_s": 0.2, "driver": "local"}
    async with running(tmp_path_factory.mktemp("browser"), deployment=options, user=elsewhere.settings()) as started:
        await elsewhere.post("/control/register", {"redirect_uri": f"{started.url}/dashboard/oauth/callback"})
        yield started


@pytest_asyncio.fixture(scope="session")
async def operator(stack: Stack) -> Person:
    """The operator, with a month of work behind."""
    signed_in = await stack.sign_in()
    business = user_service_pb2.UpdateUserAccountRequest(id=signed_in.user.id, tier="business")
    await stack.users.UpdateUserAccount(business, metadata=stack.operator)
    await history.plant(stack, signed_in)
    return signed_in


@pytest_asyncio.fixture(scope="session")
async def company(stack: Stack, operator: Person) -> tuple[str, str]:
    """An organization of the operator, and one of its keys."""
    return await history.company(stack, operator)
