"""The demo's meters: a limit fills up, is told of, refuses what goes beyond it, and the exported file agrees with the sums."""

import csv
import io
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import grpc

from clawplane.deployment.v1 import quota_pb2, quota_service_pb2, quota_service_pb2_grpc
from services.demo_stack import DemoError, until
from services.kit import ids

if TYPE_CHECKING:
    from services.demo import Demo

_LIMIT = 20_000
_BAR = 24


async def run(demo: "Demo", channel: grpc.aio.Channel) -> None:
    """All of it, in an organization of its own."""
    quotas = quota_service_pb2_grpc.QuotaServiceStub(channel)
    eve = await demo.person("Eve")
    org_id = (await demo.json(demo.http.get("/v1/access:whoAmI", headers=eve)))["orgId"]
    limit = quota_pb2.Quota(
        org_id=org_id, scope=quota_pb2.QUOTA_SCOPE_ORGANIZATION, period=quota_pb2.QUOTA_PERIOD_DAY, unit=quota_pb2.QUOTA_UNIT_TOKENS,
        amount=str(_LIMIT),
    )  # fmt: skip
    await quotas.SetQuota(quota_service_pb2.SetQuotaRequest(quota=limit), metadata=demo.operator)
    demo.say(f"an operator limited Eve's organization to {_LIMIT:,} tokens a day")
    for tokens in (4_000, 7_000, 5_000):
        await _report(demo, eve, tokens)
        meter = await _meter(demo, eve)
        demo.say(f"meter: {_drawn(int(meter.get('percent', 0)))} {int(meter['used']):,} of {_LIMIT:,} tokens")
    told = await until("the notices", lambda: _noticed(demo, eve))
    demo.check(told == [50, 75], f"noticed once each: {told[0]} % and {told[1]} % of the day's tokens are used up")
    await _reserve(demo, eve)
    await _export(demo, eve)


async def _report(demo: "Demo", who: dict[str, str], tokens: int) -> None:
    """Usage in two events, as a batch."""
    one = {"provider": "anthropic", "model": "claude-opus-4.5", "tokensIn": tokens // 2, "latencyMs": 800}
    events = [one | {"id": str(ids.uuid7())} for _ in range(2)]
    answer = await demo.json(demo.http.post("/v1/usage:batch", json={"events": events}, headers=who))
    if answer.get("accepted") != 2:
        raise DemoError(f"a batch of two events was answered with {answer}")


async def _meter(demo: "Demo", who: dict[str, str]) -> dict[str, Any]:
    answer = await demo.json(demo.http.get("/v1/quotas:check", headers=who))
    found = [one for one in answer["quotas"] if one["period"] == "QUOTA_PERIOD_DAY"]
    return dict(found[0])


async def _noticed(demo: "Demo", who: dict[str, str]) -> list[int] | None:
    """The parts of the limit that were noticed, once both are."""
    answer = await demo.json(demo.http.get("/v1/quotas:notices", headers=who))
    told = sorted(one["percent"] for one in answer.get("notices", []) if one["period"] == "QUOTA_PERIOD_DAY")
    return told if len(told) >= 2 else None


async def _reserve(demo: "Demo", who: dict[str, str]) -> None:
    """A call that fits is held and settled; one that does not is refused before it is made."""
    wish = {"provider": "anthropic", "model": "claude-opus-4.5", "tokensIn": 1000, "tokensOut": 1000}
    held = await demo.json(demo.http.post("/v1/usageReservations", json=wish, headers=who))
    demo.say(f"reserved {held['tokensHeld']} tokens ({held['costHeld']} {held['currency'].upper()}) for a call: {held['id']}")
    used = {"tokensIn": 900, "tokensOut": 300}
    settled = await demo.json(demo.http.post(f"/v1/usageReservations/{held['id']}:settle", json=used, headers=who))
    demo.say(f"settled by what it used: {settled['event']['tokensTotal']} tokens, {settled['event']['cost']} USD; the rest is free again")
    refused = await demo.http.post("/v1/usageReservations", json=wish | {"tokensOut": 9000}, headers=who)
    retry = refused.headers.get("retry-after", "")
    demo.check(refused.status_code == 429 and retry.isdigit(), f"a call that could use 10,000 more is refused: 429, Retry-After: {retry} s")
    demo.say(f"its words: [dim]{refused.json()['error']['message']}[/]")


async def _export(demo: "Demo", who: dict[str, str]) -> None:
    """The file, row by row, beside the sums."""
    answer = await demo.http.get("/v1/usage:export", params={"format": "csv"}, headers=who)
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    total = (await demo.json(demo.http.get("/v1/usage:summarize", headers=who)))["total"]
    file = (len(rows), sum(int(row["tokens_total"]) for row in rows), sum((Decimal(row["cost"]) for row in rows), Decimal(0)))
    sums = (int(total["events"]), int(total["tokensTotal"]), Decimal(total["cost"]))
    demo.check(file == sums, f"the exported CSV agrees with the summary: {file[0]} events, {file[1]:,} tokens, {file[2].normalize():f} USD")


def _drawn(percent: int) -> str:
    full = min(_BAR, _BAR * percent // 100)
    return f"{'█' * full}{'░' * (_BAR - full)} {percent:3d} %"
