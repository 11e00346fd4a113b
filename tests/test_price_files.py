"""Price books as files: what is written is read again, what is wrong is said by entry and field; and the command line."""

import asyncio
import re
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import grpc_testing
import pytest
import pytest_asyncio
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from clawplane.deployment.v1 import price_service_pb2 as pb
from clawplane.deployment.v1 import usage_service_pb2 as usage
from services import cli_prices, embedded
from services.cli import app as cli
from services.deployment_svc.prices import price_file, rules, seed
from services.deployment_svc.prices.models import Price
from services.deployment_svc.prices.price_file import PriceFileError
from services.deployment_svc.prices.repository import Prices
from services.deployment_svc.settings import DeploymentSettings
from services.kit.db import Database
from tests.conftest import Databases
from tests.harness import Person, Stack
from tests.recount import recount
from tests.test_prices import NOW, START, create, listed, price, provider, refused, take, use


def shown(rows: list[Price]) -> list[tuple[Any, ...]]:
    """What matters of prices."""
    return sorted((*rules.key_of(row), row.effective_from, row.effective_to or NOW, *(getattr(row, name) for name in rules.AMOUNTS)) for row in rows)


def entry(**more: Any) -> dict[str, Any]:
    """One entry of a file."""
    return {"provider": "p", "model": "m", "tokens_in": "1", "tokens_out": "2", **more}


def test_the_bundled_file_is_sound() -> None:
    text = seed._BUNDLED.read_text()
    made = rules.plan(price_file.read(text), (), "usd", START)
    assert {(row.provider, row.model, row.effective_from) for row in made.new} >= {("anthropic", "claude-opus-4.5*", START)}


amounts = st.decimals(0, 999_999, places=6).map(lambda value: format(value, "f"))
entries = st.builds(
    entry, provider=st.sampled_from(("p", "q")), model=st.sampled_from(("m", "m*", "n")), above_tokens_in=st.sampled_from((0, 0, 200_000)),
    effective_from=st.integers(0, 8).map(lambda day: (NOW + timedelta(days=day, microseconds=day)).isoformat()),
    tokens_in=amounts, tokens_out=amounts, tokens_cached=st.none() | amounts, tokens_reasoning=st.none() | amounts,
    markup=st.none() | st.integers(0, 99_999).map(lambda value: format(Decimal(value) / 10_000, "f")),
)  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(st.lists(entries, max_size=6, unique_by=lambda one: (one["provider"], one["model"], one["above_tokens_in"], one["effective_from"])))
def test_what_is_written_is_read_again(book: list[dict[str, Any]]) -> None:
    made = rules.plan(price_file.read(yaml.safe_dump({"prices": book})), (), "usd", NOW)
    assert len(made.new) == len(book)
    text = price_file.write(made.new)
    assert shown(rules.plan(price_file.read(text), (), "usd", NOW).new) == shown(made.new)
    again = rules.plan(price_file.read(text), made.new, "usd", NOW)
    assert (again.new, again.unchanged) == ([], len(book))
    # As the file says it as well, in which ends are left to those that take over.
    assert rules.plan(price_file.read(yaml.safe_dump({"prices": book})), made.new, "usd", NOW).unchanged == len(book)


def test_tiers_within_an_entry() -> None:
    text = """
    prices:
      - {provider: p, model: m*, tokens_in: "3", tokens_out: 15, markup: "0.1", effective_from: 2026-01-01, tiers: [
          {above_tokens_in: 200000, tokens_in: "6", tokens_out: "22.5", tokens_cached: "0.6"}, {above_tokens_in: 500000, tokens_in: "9", tokens_out: "30"}]}
    """
    found = rules.plan(price_file.read(text), (), "usd", NOW).new
    assert [(row.above_tokens_in, row.tokens_in, row.tokens_out, row.tokens_cached, row.markup) for row in found] == [
        (0, 3, 15, 3, Decimal("0.1")), (200_000, 6, Decimal("22.5"), Decimal("0.6"), Decimal("0.1")), (500_000, 9, 30, 9, Decimal("0.1")),
    ]  # fmt: skip
    assert {row.effective_from for row in found} == {datetime(2026, 1, 1, tzinfo=UTC)}


ONE = "provider: p, model: m, tokens_in: '1', tokens_out: '1'"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prices: [{provider: p, model: m, tokens_in: 0.5, tokens_out: '1'}]", "entry 1: tokens_in: is not exact without quotes"),
        (f"prices: [{{{ONE}}}, {{{ONE}, effective_from: 2026-01-01, markup: 1.5}}]", "entry 2: markup: is not exact without quotes"),
        (f"prices: [{{{ONE}, price: '1'}}]", "entry 1: price: is no field here"),
        (f"prices: [{{{ONE}, id: x}}]", "entry 1: id: is no field here"),
        (f"prices: [{{{ONE}, tiers: [{{tokens_in: '1', tokens_out: '1'}}]}}]", "entry 1, tier 1: above_tokens_in: is needed"),
        (f"prices: [{{{ONE}, tiers: [{{above_tokens_in: 9, tokens_in: '1'}}]}}]", "entry 1, tier 1: tokens_out: "),
        (f"prices: [{{{ONE}, tiers: [{{above_tokens_in: 9, tokens_in: '1', tokens_out: '1', model: x}}]}}]", "entry 1, tier 1: model: is no field"),
        (f"prices: [{{{ONE}, tiers: {{}}}}]", "entry 1: tiers: must be a list"),
        (f"prices: [{{{ONE}}}, {{{ONE}}}]", "entry 2: effective_from: entry 1 is for the same"),
        (f"prices: [{{{ONE}, currency: eur}}]", "entry 1: currency: must be that of the ledger"),
        (f"prices: [{{{ONE}, effective_from: soon}}]", "entry 1: effective_from: must be a time"),
        (f"prices: [{{{ONE}, effective_from: 7}}]", "entry 1: effective_from: must be a time"),
        (f"prices: [{{{ONE}, effective_from: 2026-02-30}}]", "is not valid YAML"),
        (f"prices: [{{{ONE}, effective_from: 2026-02-02, effective_to: 2026-01-01}}]", "entry 1: effective_to: must be after"),
        (f"prices: [{{{ONE}, effective_to: 2026-01-01}}]", "entry 1: effective_to: must be after"),
        (f"prices: [{{{ONE}, above_tokens_in: '5'}}]", "entry 1: above_tokens_in: must be a whole number"),
        (f"prices: [{{{ONE}, above_tokens_in: true}}]", "entry 1: above_tokens_in: must be a whole number"),
        (f"prices: [{{{ONE}, above_tokens_in: {10**30}}}]", "entry 1: above_tokens_in: is too great"),
        ("prices: [{provider: p, model: 4.5, tokens_in: '1', tokens_out: '1'}]", "entry 1: model: must be a text"),
        ("prices: [{model: m, tokens_in: '1', tokens_out: '1'}]", "entry 1: provider: "),
        ("prices: [{provider: p, model: m, tokens_in: -1, tokens_out: '1'}]", "entry 1: tokens_in: "),
        ("prices: [{provider: p, model: m, tokens_in: true, tokens_out: '1'}]", "entry 1: tokens_in: must be a text"),
        ("prices: [{provider: p, model: m, tokens_in: '1', tokens_in: '2', tokens_out: '1'}]", "line 1: tokens_in is given twice"),
        ("prices: [text]", "entry 1: must be a mapping"),
        (f"prices: [{{{ONE}}}]\nmore: 1", 'must have the one key "prices"'),
        ("prices: {}", 'must have the one key "prices"'),
        ("- 1", 'must have the one key "prices"'),
        ("a: &a [1]\nprices: [*a, *a]", "line 2: aliases are not taken"),
        ("prices: [\n{", "line 2: "),
        ("prices: " + "[" * 2000, "is not valid YAML"),
        ("prices: [!!python/object/apply:os.getcwd []]", "line 1: could not determine a constructor"),
        ("? [a]\n: 1", "line 1: "),
        ("prices: !!map [1]", "line 1: "),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_file_is_said(text: str, said: str) -> None:
    with pytest.raises(PriceFileError) as refusal:
        rules.plan(price_file.read(text), (), "usd", NOW)
    assert said in str(refusal.value), refusal.value


def test_a_file_has_its_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(price_file, "MOST", 3)
    tiers = "[{above_tokens_in: 1, tokens_in: '1', tokens_out: '1'}, {above_tokens_in: 2, tokens_in: '1', tokens_out: '1'}]"
    assert len(price_file.read(f"prices: [{{{ONE}, tiers: {tiers}}}]")) == 3
    with pytest.raises(PriceFileError, match="more than 3 prices"):
        price_file.read(f"prices: [{{{ONE}, tiers: {tiers}}}, {{{ONE}}}]")


async def test_a_file_is_taken_in_as_a_whole(stack: Stack, person: Person) -> None:
    of = provider()

    def file(*more: str) -> str:
        return f"prices: [{{provider: {of}, model: m*, tokens_in: '1', tokens_out: '2'}}, {', '.join(f'{{provider: {of}, {one}}}' for one in more)}]"

    old = "model: n, tokens_in: '3', tokens_out: '4', effective_from: 2026-01-01"
    assert await take(stack, file(old), validate_only=True) == (2, 0) and not await listed(stack, of)
    text = await refused(take(stack, file(old, "model: o, tokens_in: 0.1, tokens_out: '1'")), grpc.StatusCode.INVALID_ARGUMENT, "yaml")
    assert "entry 3: tokens_in" in text and not await listed(stack, of)
    assert await take(stack, file(old)) == (2, 0)
    assert (await use(stack, person, of)).cost == "1"
    # Again is nothing; the first has no beginning, and counts already.
    assert await take(stack, file(old)) == (0, 2)
    changed = "model: n, tokens_in: '5', tokens_out: '4', effective_from: 2026-01-01"
    text = await refused(take(stack, file(changed)), grpc.StatusCode.INVALID_ARGUMENT, "yaml")
    assert "entry 2: tokens_in: the book has 3 from 2026-01-01" in text
    # Another amount from now on takes over; the same file once more changes nothing.
    dearer = file(old).replace("tokens_in: '1'", "tokens_in: '9'")
    assert await take(stack, dearer) == (1, 1) and await take(stack, dearer) == (0, 2)
    assert (await use(stack, person, of)).cost == "9"
    ends = file("model: n, tokens_in: '3', tokens_out: '4', effective_from: 2026-01-01, effective_to: 2026-02-01")
    assert "entry 2: effective_to" in await refused(take(stack, ends), grpc.StatusCode.INVALID_ARGUMENT, "yaml")
    both = await asyncio.gather(*(take(stack, file("model: z, tokens_in: '1', tokens_out: '1'")) for _ in range(4)))
    # The first entry is back at what it was, by one of them.
    assert sorted(both) == [(0, 2), (0, 2), (0, 2), (2, 0)]


async def test_the_book_comes_back_as_it_went_out(stack: Stack) -> None:
    of = provider()
    await create(stack, price(of, effective_from=START, tokens_cached="0.000001", markup="0.2"))
    await create(stack, price(of, tokens_in="10", above_tokens_in=200_000, effective_from=START + timedelta(microseconds=1)))
    await create(stack, price(of, tokens_in="100"))
    out = await stack.prices.ExportPrices(pb.ExportPricesRequest(), metadata=stack.operator)
    book = yaml.safe_load(out.yaml)["prices"]
    assert len([one for one in book if one["provider"] == of]) == 3
    assert await take(stack, out.yaml) == (0, len(book))
    past = await stack.prices.ExportPrices(pb.ExportPricesRequest(effective_at=datetime.now(UTC) - timedelta(days=1)), metadata=stack.operator)
    assert sorted(one["tokens_in"] for one in yaml.safe_load(past.yaml)["prices"] if one["provider"] == of) == ["1", "10"]


async def test_only_operators_read_and_write_it(stack: Stack, person: Person) -> None:
    for call in (
        stack.prices.CreatePrice(pb.CreatePriceRequest(price=price("p")), metadata=person.metadata),
        stack.prices.ImportPrices(pb.ImportPricesRequest(yaml="prices: []"), metadata=person.metadata),
        stack.prices.ListPrices(pb.ListPricesRequest(), metadata=person.metadata),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await call
        assert refusal.value.code() is grpc.StatusCode.PERMISSION_DENIED


@pytest_asyncio.fixture
async def empty(databases: Databases) -> AsyncIterator[list[Prices]]:
    """The book of an empty database, as several processes have it."""
    made = DeploymentSettings(deployment_database_url=databases.make()["deployment_svc"])
    await embedded.migrate_all(None, made)
    books = [Prices(Database(made.database_url, made, "test"), "usd") for _ in range(3)]
    yield books
    for one in books:
        await one.db.close()


async def test_an_empty_book_is_filled_once(empty: list[Prices], tmp_path: Path) -> None:
    file = tmp_path / "prices.yaml"
    for text, said in (("prices: [{}]", "entry 1"), (f"prices: [{{{ONE}, currency: eur}}]", "currency")):
        file.write_text(text)
        with pytest.raises(ValueError, match=f"{file} cannot be taken.*{said}"):
            await seed.fill(empty[0], str(file))
    with pytest.raises(ValueError, match="cannot be taken"):
        await seed.fill(empty[0], str(tmp_path / "nowhere"))
    file.write_text(f"prices: [{{{ONE}}}, {{{ONE}, effective_from: 2026-01-01}}]")
    await asyncio.gather(*(seed.fill(one, str(file)) for one in empty))
    assert {one.book.lines for one in empty} == {empty[0].book.lines} and len(empty[0].book.lines) == 2
    found = empty[0].book.find("p", "m", 1, datetime(2010, 1, 1, tzinfo=UTC))
    assert found is not None and found.effective_from == START and found.effective_to == datetime(2026, 1, 1, tzinfo=UTC)
    # Once it holds something, the file is not even looked for.
    await seed.fill(empty[1], str(tmp_path / "nowhere"))
    assert len(empty[1].book.lines) == 2


async def run(stack: Stack, *words: str, given: str | None = None) -> tuple[int, str, str]:
    """(exit status, output, errors) of `clawplane prices`."""
    words = ("prices", *words, "--target", stack.target, "--data-dir", str(stack.data_dir))
    done = await asyncio.to_thread(CliRunner().invoke, cli, words, input=given)
    return done.exit_code, done.stdout, done.stderr


@pytest.mark.any_engine
async def test_by_the_command_line(stack: Stack, person: Person, tmp_path: Path) -> None:
    of = provider()
    file = tmp_path / "prices.yaml"
    file.write_text(f"prices: [{{provider: {of}, model: m*, tokens_in: '1', tokens_out: '2', effective_from: 2020-01-01}}]")
    for _ in range(3):
        await use(stack, person, of, model="m")
    event = await use(stack, person, of, model="x")
    assert event.cost == ""
    status, said, _ = await run(stack, "import", str(file), "--dry-run")
    assert status == 0 and "1 would be added" in said and not await listed(stack, of)
    status, said, _ = await run(stack, "import", "-", given=file.read_text())
    assert status == 0 and "1 added, 0 were there already" in said
    status, exported, _ = await run(stack, "export")
    assert status == 0 and [one["model"] for one in yaml.safe_load(exported)["prices"] if one["provider"] == of] == ["m*"]
    status, said, _ = await run(stack, "import", "-", given="prices: [{}]")
    assert status == 1 and "entry 1" in _
    status, said, _ = await run(stack, "import", str(tmp_path / "nowhere"))
    assert status == 2
    # The three were stored before there was a price.
    status, said, _ = await run(stack, "recost", "--provider", of)
    assert status == 0 and re.search(r"3 of 4 events, cost 0 -> 3;", said) and "1 without a price" in said and "--apply" in said
    status, said, _ = await run(stack, "recost", "--provider", of, "--apply")
    assert status == 0 and re.search(r"3 of 4 events", said) and "--apply" not in said
    status, said, _ = await run(stack, "recost", "--provider", of)
    assert status == 0 and re.search(r"0 of 4 events", said)
    status, said, error = await run(stack, "recost", "--org", "nonsense")
    assert status == 1 and "org_id" in error
    await recount(stack, person.org_id)


def test_a_recost_that_is_cut_off_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_prices, "_PAUSE_S", 0.01)
    service = usage.DESCRIPTOR.services_by_name["UsageService"]
    method = service.methods_by_name["RecostUsage"]
    channel = grpc_testing.channel([service], grpc_testing.strict_real_time())
    signer = SimpleNamespace(sign=lambda permissions: "token")
    total = cli_prices._Total()

    def work() -> str:
        list(cli_prices._recosted(cli_prices._Service(channel, signer), usage.RecostUsageRequest(apply=True), total))  # type: ignore[arg-type]
        return str(total)

    def say(rpc: Any, seen: int, position: str) -> None:
        rpc.send_response(usage.RecostUsageResponse(seen=seen, changed=1, cost_before="1", cost_after="0.5", unpriced=2, position=position))
        # The channel forgets what has not been read when it ends.
        deadline = time.monotonic() + 10
        while not total.said or total.said[-1].position != position:
            assert time.monotonic() < deadline and not said.done()
            time.sleep(0.001)

    with ThreadPoolExecutor() as pool:
        said = pool.submit(work)
        for code, asked, position in ((grpc.StatusCode.UNAVAILABLE, "", "b"), (grpc.StatusCode.UNAUTHENTICATED, "b", "c"), (grpc.StatusCode.OK, "c", "d")):
            _, request, rpc = channel.take_unary_stream(method)
            assert request.after_position == asked and request.apply
            rpc.send_initial_metadata(())
            say(rpc, 250, f"half of {position}")
            say(rpc, 500, position)
            rpc.terminate((), code, "")
        assert said.result(10) == "3 of 1500 events, cost 3 -> 1.5; 6 without a price"
        # What another try does not mend is told, as is what was never begun.
        for code, begun in ((grpc.StatusCode.FAILED_PRECONDITION, True), (grpc.StatusCode.UNAVAILABLE, False)):
            said = pool.submit(work)
            _, _, rpc = channel.take_unary_stream(method)
            rpc.send_initial_metadata(())
            if begun:
                say(rpc, 1, "a")
            rpc.terminate((), code, "")
            with pytest.raises(grpc.RpcError):
                said.result(10)
