"""The local driver alone: real processes, adopted, never doubled, and nothing left behind."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import psutil
import pytest
import pytest_asyncio

from services.deployment_svc.markets.driver import Order, ProviderError, Secrets, Spec
from services.deployment_svc.markets.local import PRICES, LocalDriver
from tests.harness import eventually

SPEC = Spec("clawplane-dep_1", "dep_1", "org_1", "claude-opus-4.5", "telegram")
SECRETS = Secrets("PLANTED-KEY", "PLANTED-TOKEN", "PLANTED-API")


@pytest_asyncio.fixture
async def driver(tmp_path: Path) -> AsyncIterator[LocalDriver]:
    """A driver with nothing yet."""
    made = LocalDriver(tmp_path, "http://127.0.0.1:9")
    yield made
    await made.stop_all()
    await made.shutdown()


def bots(folder: Path) -> list[psutil.Process]:
    """The living processes of a driver's bots."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if words and words[-1].startswith(str(folder)) and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


async def start(driver: LocalDriver, spec: Spec = SPEC, start_id: str = "start-1") -> Order:
    """An order whose bot was started."""
    order = await driver.create(spec, SECRETS, start_id)
    offer = (await driver.offers(order))[0]
    await driver.lease(order, offer)
    return order


async def phase(driver: LocalDriver, order: Order) -> str:
    """What it says of an order."""
    return (await driver.observe(order.id)).phase


async def test_the_life_of_an_order(driver: LocalDriver, tmp_path: Path) -> None:
    assert await driver.find(SPEC.name) == []
    order = await driver.create(SPEC, SECRETS, "start-1")
    assert await driver.find(SPEC.name) == [order.id] and await driver.find(f"{SPEC.name}2") == []
    assert await phase(driver, order) == "ordered" and not bots(tmp_path)
    offers = await driver.offers(order)
    assert {offer.provider: offer.price for offer in offers} == PRICES
    lease = await driver.lease(order, offers[1])
    seen = await driver.observe(order.id)
    assert (seen.phase, seen.lease_id, seen.provider, seen.start_id) == ("ready", lease.id, offers[1].provider, "start-1")
    async with httpx.AsyncClient(trust_env=False) as http:
        health = (await http.get(f"{seen.url}/health")).json()
        assert (health["status"], health["deployment_id"], health["start_id"]) == ("ok", "dep_1", "start-1")
        # Once more starts nothing more.
        assert await driver.lease(order, offers[0]) == lease
        assert len(bots(tmp_path)) == 1
        await driver.close(order.id)
        with pytest.raises(httpx.ConnectError):
            await http.get(f"{seen.url}/health")
    assert await phase(driver, order) == "absent" and not bots(tmp_path)
    assert not list(tmp_path.glob("ord-*")) and await driver.find(SPEC.name) == []
    await driver.close(order.id)


async def test_ten_leases_at_once_from_two_drivers_start_one_process(driver: LocalDriver, tmp_path: Path) -> None:
    other = LocalDriver(tmp_path, "http://127.0.0.1:9")
    order = await driver.create(SPEC, SECRETS, "start-1")
    offer = (await driver.offers(order))[0]
    leases = await asyncio.gather(*(one.lease(order, offer) for _ in range(5) for one in (driver, other)))
    assert len({lease.id for lease in leases}) == 1 and len(bots(tmp_path)) == 1
    # The one that did not start it knows as much, and ends it as well.
    assert (await other.observe(order.id)).phase == (await driver.observe(order.id)).phase == "ready"
    await asyncio.gather(*(one.close(order.id) for one in (driver, other, driver, other)))
    assert not bots(tmp_path) and not list(tmp_path.glob("ord-*"))
    await other.shutdown()


async def test_a_killed_bot_is_lost_and_a_new_order_takes_its_place(driver: LocalDriver, tmp_path: Path) -> None:
    order = await start(driver)
    (bot,) = bots(tmp_path)
    bot.kill()

    async def lost() -> bool:
        return await phase(driver, order) == "lost"

    await eventually(lost)
    assert "ended" in (await driver.observe(order.id)).reason
    await driver.close(order.id)
    again = await start(driver, start_id="start-2")
    assert (await driver.observe(again.id)).start_id == "start-2" and len(bots(tmp_path)) == 1


async def test_a_bot_that_hangs_is_lost_and_can_still_be_closed(driver: LocalDriver, tmp_path: Path) -> None:
    order = await start(driver)
    (bot,) = bots(tmp_path)
    bot.suspend()

    async def lost() -> bool:
        return await phase(driver, order) == "lost"

    await eventually(lost, 30)
    await driver.close(order.id)
    assert not bots(tmp_path) and not list(tmp_path.glob("ord-*"))


async def test_a_recycled_pid_is_left_alone(driver: LocalDriver, tmp_path: Path) -> None:
    order = await start(driver)
    (bot,) = bots(tmp_path)
    bot.kill()
    bot.wait(5)
    # Another process has the number now: this one.
    (tmp_path / order.id / "lock").write_text(str(os.getpid()))
    assert await phase(driver, order) == "lost"
    await driver.close(order.id)
    assert psutil.Process().is_running()


async def test_secrets_go_through_a_pipe_only(driver: LocalDriver, tmp_path: Path) -> None:
    order = await start(driver)
    (bot,) = bots(tmp_path)
    assert "PLANTED" not in " ".join(bot.cmdline()) and "PLANTED" not in str(bot.environ())
    assert (tmp_path / order.id).stat().st_mode & 0o077 == 0
    for path in (tmp_path / order.id).iterdir():
        assert b"PLANTED" not in path.read_bytes(), path.name


async def test_stopping_all_keeps_the_orders(driver: LocalDriver, tmp_path: Path) -> None:
    orders = [await start(driver, Spec(f"clawplane-dep_{n}", f"dep_{n}", "org_1", "m", "web")) for n in range(3)]
    await driver.stop_all()
    assert not bots(tmp_path)
    assert [await phase(driver, order) for order in orders] == ["lost"] * 3
    assert await driver.find("clawplane-dep_1") == [orders[1].id]


async def test_a_bot_ends_when_asked(driver: LocalDriver, tmp_path: Path) -> None:
    await start(driver)
    (bot,) = bots(tmp_path)
    bot.send_signal(signal.SIGTERM)
    await asyncio.to_thread(bot.wait, 5)


@pytest.mark.parametrize("order_id", ["../../etc", "ord-", "", "ord-" + "0" * 31 + "/", "ord-" + "G" * 32])
async def test_names_that_are_no_orders(driver: LocalDriver, order_id: str) -> None:
    for call in (driver.observe(order_id), driver.close(order_id), driver.offers(Order(order_id, SPEC.name))):
        with pytest.raises(ProviderError) as refused:
            await call
        assert refused.value.blame == "request"


async def test_an_order_that_is_gone(driver: LocalDriver) -> None:
    gone = Order("ord-" + "0" * 32, SPEC.name)
    assert await phase(driver, gone) == "absent"
    await driver.close(gone.id)
    offer = (await driver.offers(await driver.create(SPEC, SECRETS, "start-1")))[0]
    for call in (driver.offers(gone), driver.lease(gone, offer)):
        with pytest.raises(ProviderError, match="no order"):
            await call


async def test_what_a_crash_left_half_made_is_swept(driver: LocalDriver, tmp_path: Path) -> None:
    young, old = tmp_path / f"ord-{'1' * 32}", tmp_path / f"ord-{'2' * 32}"
    for folder in (young, old):
        folder.mkdir()
    os.utime(old, (1, 1))
    assert await driver.find(SPEC.name) == []
    assert young.exists() and not old.exists()
