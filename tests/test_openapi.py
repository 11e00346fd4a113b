"""The document says everything that the gateway serves, and what it says cannot break the gateway."""

import asyncio
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from gateway.httprule import bindings, services
from gateway.openapi.comments import comments
from gateway.openapi.document import document
from tests.harness import Metadata, Stack

SCHEMATHESIS = str(Path(sys.executable).parent / "schemathesis")


async def break_it(url: str, who: Metadata, *options: str) -> str:
    """What Schemathesis prints, which must find nothing. Watches never end: they are left out."""
    ((_, credential),) = who
    # It keeps what it found in the folder where it runs.
    folder = tempfile.mkdtemp(prefix="clawplane-schemathesis-")
    process = await asyncio.create_subprocess_exec(
        SCHEMATHESIS, "run", f"{url}/openapi.json", "--checks", "not_a_server_error", "--exclude-path-regex", ":watch$",
        "--header", f"Authorization: {credential}", "--no-color", "--warnings", "off", "--request-timeout", "20", *options,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, cwd=folder,
    )  # fmt: skip
    said, _ = await process.communicate()
    text = said.decode()
    assert process.returncode == 0, text[-4000:]
    generated = re.search(r"(\d[\d,]*) generated, (\d[\d,]*) passed", text)
    assert generated, text[-2000:]
    return generated[0]


def test_every_route_is_in_it_and_everything_is_explained() -> None:
    found = document()
    wanted = {binding.http_method for service in services() for binding in bindings(service)}
    count = sum(len(list(bindings(service))) for service in services())
    assert wanted == {"GET", "POST", "PATCH", "DELETE"} and count == sum(len(methods) for methods in found["paths"].values())
    for path, methods in found["paths"].items():
        for method, operation in methods.items():
            assert operation["summary"] and operation["description"], (path, method)
            names = {parameter["name"] for parameter in operation["parameters"] if parameter["in"] == "path"}
            assert names == set(re.findall(r"\{(\w+)\}", path)), path
            assert all(parameter["description"] for parameter in operation["parameters"]), (path, method)
    for name, schema in found["components"]["schemas"].items():
        assert schema.get("description") or name == "Error", name
        assert all(one.get("description") for one in schema.get("properties", {}).values() if name != "Error"), name
    assert len({operation["operationId"] for methods in found["paths"].values() for operation in methods.values()}) == count
    assert comments()["clawplane.deployment.v1.State.STATE_ACTIVE"]


def test_limits_and_directions_are_in_it() -> None:
    found = document()
    create = found["paths"]["/v1/deployments"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert create["properties"]["model"]["maxLength"] == 100 and "model" in create["required"]
    deployment: dict[str, Any] = found["components"]["schemas"]["deployment.Deployment"]["properties"]
    assert deployment["state"]["readOnly"] and deployment["createdAt"]["format"] == "date-time"
    batch = found["components"]["schemas"]["deployment.UsageEvent"]["properties"]
    assert batch["metadata"]["maxProperties"] == 20 and batch["tokensIn"]["maximum"] == 1_000_000_000
    (segment,) = [one for one in found["paths"]["/v1/users/{user_id}"]["patch"]["parameters"] if one["in"] == "path"]
    assert segment["required"] and "readOnly" not in segment["schema"]
    assert found["paths"]["/v1/deployments/{id}:watch"]["get"]["responses"]["200"]["content"]["text/event-stream"]["x-event"]


@pytest.mark.any_engine
async def test_it_is_served_and_shown_without_anything_from_elsewhere(stack: Stack) -> None:
    answer = await stack.http.get("/openapi.json")
    assert answer.json() == document() and answer.headers["content-type"] == "application/json"
    page = await stack.http.get("/docs")
    assert page.status_code == 200 and "script" not in page.headers["content-security-policy"] and "<script" not in page.text
    assert not re.findall(r"(?:src|href)=\"(?:https?:)?//", page.text)
    for methods in document()["paths"].values():
        for operation in methods.values():
            assert f'id="{operation["operationId"]}"' in page.text
    sheet = await stack.http.get("/static/docs.css")
    assert sheet.status_code == 200 and "url(" not in sheet.text


@pytest.mark.timeout(300)
@pytest.mark.parametrize("databases", ["postgres"], indirect=True)
async def test_nothing_that_fits_or_breaks_it_makes_a_server_error(stack: Stack) -> None:
    # Values at and beyond every limit; ten minutes of random ones are a matter of `make soak`.
    print(await break_it(stack.url, stack.operator, "--phases", "coverage"))
