"""HTTP and JSON to gRPC and back."""

from typing import Any

import pytest
from gateway_fakes import DEPLOYMENT_ID, Stack

pytestmark = pytest.mark.asyncio


def violations(answer: Any) -> dict[str, str]:
    """Field -> description of a 400."""
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["code"], error["status"]) == (400, "INVALID_ARGUMENT")
    bad = next(detail for detail in error["details"] if detail["@type"].endswith("google.rpc.BadRequest"))
    info = next(detail for detail in error["details"] if detail["@type"].endswith("google.rpc.ErrorInfo"))
    assert (info["reason"], info["domain"]) == ("INVALID_FIELD", "clawplane")
    return {one["field"]: one["description"] for one in bad["fieldViolations"]}


async def test_contract_routes(stack: Stack) -> None:
    got = await stack.client.get(f"/v1/deployments/{DEPLOYMENT_ID}")
    assert got.status_code == 200
    assert got.headers["content-type"] == "application/json"
    body = got.json()
    assert (body["id"], body["priceMinor"], body["state"], body["errorMessage"]) == (DEPLOYMENT_ID, "2900", "STATE_ACTIVE", "")
    retried = await stack.client.post(f"/v1/deployments/{DEPLOYMENT_ID}:retry")
    assert retried.json()["errorMessage"] == "retried"
    found = await stack.client.get("/v1/users:lookup", params={"email": "a+b@example.test"})
    assert found.json()["email"] == "a+b@example.test"
    query = {"email_verified": "true", "identity.provider": "clerk", "identity.subject": "user_1"}
    made = await stack.client.post("/v1/users", params=query, json={"email": "x@example.test"})
    assert (made.json()["email"], made.json()["emailVerified"], made.json()["username"]) == ("x@example.test", True, "user_1")
    ordered = await stack.client.post("/v1/deployments", json={"model": "m", "channel": "CHANNEL_WEB"})
    assert (ordered.json()["model"], ordered.json()["channel"]) == ("m", "CHANNEL_WEB")


async def test_oneof_in_query(stack: Stack) -> None:
    answer = await stack.client.get("/v1/users:lookup", params={"email": "a@example.test", "username": "a"})
    assert "excludes email" in violations(answer)["username"]


async def test_query_types(stack: Stack) -> None:
    query = [
        ("thing.fullName", "Größe"),
        ("thing.count", "9007199254740993"),
        ("thing.flag", "true"),
        ("thing.color", "COLOR_RED"),
        ("thing.colors", "1"),
        ("thing.colors", "COLOR_RED"),
        ("thing.made_at", "2026-01-31T12:00:00+01:00"),
        ("thing.tags", "a"),
        ("thing.tags", "b"),
        ("thing.part.size", "-3"),
        ("thing.maybe", "0"),
        ("thing.wait", "1.5s"),
        ("thing.ratio", "1e3"),
        ("thing.raw", "_-8"),
        ("updateMask", "fullName,part.size"),
    ]
    body = (await stack.client.get("/v1/echo", params=query)).json()
    thing = body["thing"]
    assert (thing["fullName"], thing["count"], thing["flag"], thing["color"]) == ("Größe", "9007199254740993", True, "COLOR_RED")
    assert (thing["colors"], thing["madeAt"], thing["tags"]) == (["COLOR_RED", "COLOR_RED"], "2026-01-31T11:00:00Z", ["a", "b"])
    assert (thing["part"]["size"], thing["maybe"], thing["wait"], thing["ratio"], thing["raw"]) == (-3, 0, "1.500s", 1000.0, "/+8=")
    assert body["updateMask"] == "fullName,part.size"


BAD_QUERIES = [
    ("nope=1", "nope"),
    ("thing.nope=1", "thing.nope"),
    ("thing=1", "thing"),
    ("thing.flag=True", "thing.flag"),
    ("thing.flag=1", "thing.flag"),
    ("thing.flag=", "thing.flag"),
    ("thing.count=1.5", "thing.count"),
    ("thing.count=9223372036854775808", "thing.count"),
    ("thing.small=2147483648", "thing.small"),
    ("thing.unsigned=-1", "thing.unsigned"),
    ("thing.count=1&thing.count=2", "thing.count"),
    ("thing.color=red", "thing.color"),
    ("thing.color=", "thing.color"),
    ("thing.made_at=yesterday", "thing.made_at"),
    ("thing.labels=x", "thing.labels"),
    ("thing.parts.name=x", "thing.parts.name"),
    ("thing.extra=x", "thing.extra"),
    ("thing.ratio=nan", "thing.ratio"),
    ("thing.raw=%25", "thing.raw"),
    ("thing.one=a&thing.two=b", "thing.two"),
    ("note=%ff", "query"),
    ("&".join("names=x" for _ in range(501)), "query"),
    ("update_mask=a,,b", "update_mask"),
]
BAD_BODIES = [
    (b"{", "body"),
    (b"[]", "body"),
    (b'"x"', "body"),
    (b"null", "body"),
    (b"\xff{}", "body"),
    (b'{"note": "\\ud800"}', "body"),
    (b'{"note": NaN}', "body"),
    (b'{"thing": {"ratio": 1e999}}', "body"),
    (b'{"thing": {"count": ' + b"9" * 5000 + b"}}", "body"),
    (b"[" * 100_000, "body"),
    (b'{"thing": {"extra": ' + b'{"a":' * 40 + b"1" + b"}" * 40 + b"}}", "body"),
    (b'{"note": "a", "note": "b"}', "note"),
    (b'{"thing": {"id": "a", "id": "a"}}', "id"),
    (b'{"thing": {"fullName": "a", "full_name": "a"}}', "thing.full_name"),
    (b'{"nope": 1}', "nope"),
    (b'{"thing": {"nope": 1}}', "thing.nope"),
    (b'{"thing": 1}', "thing"),
    (b'{"note": 1}', "note"),
    (b'{"thing": {"flag": "true"}}', "thing.flag"),
    (b'{"thing": {"flag": 1}}', "thing.flag"),
    (b'{"thing": {"count": true}}', "thing.count"),
    (b'{"thing": {"count": 1.5}}', "thing.count"),
    (b'{"thing": {"small": 1e10}}', "thing.small"),
    (b'{"thing": {"color": "RED"}}', "thing.color"),
    (b'{"thing": {"color": {}}}', "thing.color"),
    (b'{"thing": {"tags": "a"}}', "thing.tags"),
    (b'{"thing": {"tags": [1]}}', "thing.tags[0]"),
    (b'{"thing": {"tags": [null]}}', "thing.tags[0]"),
    (b'{"thing": {"parts": [{"size": 1}, {"size": "x"}]}}', "thing.parts[1].size"),
    (b'{"thing": {"labels": {"k": 1}}}', 'thing.labels["k"]'),
    (b'{"thing": {"labels": []}}', "thing.labels"),
    (b'{"thing": {"extra": []}}', "thing.extra"),
    (b'{"thing": {"made_at": 5}}', "thing.made_at"),
    (b'{"thing": {"made_at": "2026-13-01T00:00:00Z"}}', "thing.made_at"),
    (b'{"thing": {"raw": "*"}}', "thing.raw"),
    (b'{"thing": {"one": "a", "two": "b"}}', "thing.two"),
    (b'{"thing": {"maybe": "x"}}', "thing.maybe"),
]


async def test_bad_query(stack: Stack) -> None:
    for query, field in BAD_QUERIES:
        assert field in violations(await stack.client.get(f"/v1/echo?{query}")), query[:100]


async def test_bad_body(stack: Stack) -> None:
    for body, field in BAD_BODIES:
        assert field in violations(await stack.client.post("/v1/echo", content=body)), body[:100]


async def test_all_violations_at_once(stack: Stack) -> None:
    answer = await stack.client.post("/v1/echo", json={"nope": 1, "note": 2, "thing": {"flag": 3}})
    assert set(violations(answer)) == {"nope", "note", "thing.flag"}


async def test_good_body(stack: Stack) -> None:
    thing = {
        "full_name": "a",
        "count": "12",
        "small": 2.0,
        "color": 1,
        "colors": ["COLOR_RED"],
        "parts": [{"name": "p"}],
        "labels": {"k": "v"},
        "extra": {"a": [1, None, {"b": "c"}]},
        "madeAt": "2026-01-31T12:00:00Z",
        "flag": None,
    }
    answer = await stack.client.post("/v1/echo", json={"thing": thing, "note": "\u0000ok"})
    assert answer.status_code == 200, answer.text
    got = answer.json()["thing"]
    assert (got["fullName"], got["count"], got["small"], got["color"]) == ("a", "12", 2, "COLOR_RED")
    assert (got["parts"], got["labels"], got["extra"]) == ([{"name": "p", "size": 0}], {"k": "v"}, {"a": [1, None, {"b": "c"}]})
    assert "madeAt" in got and got["flag"] is False


async def test_path_and_body(stack: Stack) -> None:
    same = await stack.client.post("/v1/echo/x:make", json={"thing": {"id": "x", "fullName": "n"}})
    assert same.json()["thing"]["id"] == "x"
    other = await stack.client.post("/v1/echo/x:make", json={"thing": {"id": "y"}})
    assert "differs" in violations(other)["thing.id"]
    empty = await stack.client.post("/v1/echo/x:make", json={"thing": {"id": ""}})
    assert "differs" in violations(empty)["thing.id"]
    query = await stack.client.get("/v1/echo/x", params={"thing.id": "y"})
    assert "path" in violations(query)["thing.id"]
    assert "body" in violations(await stack.client.post("/v1/echo?note=x", json={}))["note"]
    assert "body" in violations(await stack.client.put("/v1/echo/x?thing.count=1", json={}))["thing.count"]
    assert "no body" in violations(await stack.client.request("GET", "/v1/echo", json={"note": "a"}))["body"]
    read = await stack.client.get("/v1/echo/a%20%C3%BC:read")
    assert read.json()["thing"]["id"] == "a ü"
    assert "path" in violations(await stack.client.get("/v1/echo/%ff"))


async def test_update_mask(stack: Stack) -> None:
    body = {"id": "x", "fullName": "n", "part": {"size": 1}, "tags": [], "labels": {"a": "b"}, "extra": {"k": 1}, "etag": "e"}
    derived = await stack.client.patch("/v1/echo/x", json=body)
    assert derived.json()["updateMask"] == "fullName,part.size,tags,labels,extra"
    given = await stack.client.patch("/v1/echo/x?update_mask=full_name", json=body)
    assert given.json()["updateMask"] == "fullName"
    replaced = await stack.client.put("/v1/echo/x?note=n", json=body)
    assert (replaced.json()["thing"]["id"], replaced.json()["note"], "updateMask" in replaced.json()) == ("x", "n", False)
    deleted = await stack.client.delete("/v1/echo/x")
    assert deleted.json()["thing"]["id"] == "x"
    names = await stack.client.post("/v1/echo:names", json=["a", "b"])
    assert names.json()["names"] == ["a", "b"]


async def test_literal_wins(stack: Stack) -> None:
    assert "thing" not in (await stack.client.get("/v1/echo/fixed")).json()


async def test_content_type(stack: Stack) -> None:
    form = await stack.client.post("/v1/echo", data={"note": "a"})
    assert form.status_code == 415
    zipped = await stack.client.post("/v1/echo", content=b"{}", headers={"content-encoding": "gzip"})
    assert zipped.status_code == 415
