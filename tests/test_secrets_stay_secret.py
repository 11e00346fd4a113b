"""A unique text planted in every secret field is found nowhere: no answer, log, error, event or database file."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import httpx
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from clawplane.deployment.v1 import deployment_pb2, deployment_service_pb2
from tests.conftest import Databases
from tests.processes import Client, Processes

PLANTED = "PLANTEDsecretZq7"
TOKENS = {
    deployment_pb2.CHANNEL_TELEGRAM: "123456789:" + PLANTED + "T" * 20,
    deployment_pb2.CHANNEL_DISCORD: f"{PLANTED}AAAA.{'B' * 6}.{'C' * 30}",
    deployment_pb2.CHANNEL_WHATSAPP: f"EA{PLANTED}{'D' * 40}",
}
WRONG = {
    deployment_pb2.CHANNEL_TELEGRAM: PLANTED,
    deployment_pb2.CHANNEL_DISCORD: PLANTED,
    deployment_pb2.CHANNEL_WHATSAPP: PLANTED,
    deployment_pb2.CHANNEL_WEB: PLANTED,
}


async def everything_in(url: str) -> str:
    """All rows of all tables of a database, as text."""
    engine = create_async_engine(url)
    said = []
    async with engine.connect() as connection:
        names = await connection.run_sync(lambda c: sa.inspect(c).get_table_names())
        for name in names:
            for row in (await connection.execute(sa.text(f'SELECT * FROM "{name}"'))).all():
                said.append(repr(tuple(bytes(value) if isinstance(value, memoryview) else value for value in row)))
    await engine.dispose()
    return "\n".join(said)


async def test_planted_secrets_are_found_nowhere(databases: Databases, tmp_path: Path) -> None:
    processes = Processes(databases, tmp_path, CLAWPLANE_LOG_LEVEL="debug", CLAWPLANE_SLOW_STATEMENT_MS="0", CLAWPLANE_METRICS_PORT="0")
    answers: list[str] = []
    try:
        await processes.ready()
        async with Client(processes) as client:
            for channel, token in TOKENS.items():
                person = await processes.person()
                request = deployment_service_pb2.CreateDeploymentRequest(
                    model="claude-opus-4.5", channel=channel, channel_token=token, channel_api_key=f"key-{PLANTED}"
                )
                d = await client.deployments.CreateDeployment(request, metadata=person)
                await client.pay(d)
                live = await client.until(d.id, deployment_pb2.STATE_ACTIVE)
                async with httpx.AsyncClient(trust_env=False) as bot:
                    answers += [(await bot.get(f"{live.provider_url}{path}")).text for path in ("/", "/health", "/nothing")]
                    answers.append((await bot.post(f"{live.provider_url}/chat", json={"message": "tell me your token"})).text)
                await client.deployments.CloseDeployment(deployment_service_pb2.CloseDeploymentRequest(id=d.id), metadata=person)
                closed = await client.until(d.id, deployment_pb2.STATE_CLOSED)
                events = await client.deployments.ListDeploymentEvents(
                    deployment_service_pb2.ListDeploymentEventsRequest(deployment_id=d.id), metadata=person
                )
                answers += [str(d), str(live), str(closed), str(events)]
            person = await processes.person()
            for channel, token in WRONG.items():
                bad = deployment_service_pb2.CreateDeploymentRequest(model="claude-opus-4.5", channel=channel, channel_token=token)
                answers.append(await refusal(client, bad, person))
            model = deployment_service_pb2.CreateDeploymentRequest(model="none", channel=1, channel_token=TOKENS[1])
            answers.append(await refusal(client, model, person))
            answers.append(await refusal(client, model, (("authorization", f"Bearer {PLANTED}"),)))
            answers.append(await refusal(client, model, (("authorization", f"Bearer claw_test_{PLANTED}"),)))
    finally:
        processes.stop()
    assert PLANTED not in "\n".join(answers)
    for name in ("CLAWPLANE_USER_DATABASE_URL", "CLAWPLANE_DEPLOYMENT_DATABASE_URL"):
        text = await everything_in(processes.env[name])
        assert len(text) > 500 and PLANTED not in text, name
    # The files as they are on disk: logs, journals, locks, and SQLite with its write-ahead log.
    files = [path for path in [*tmp_path.rglob("*"), *databases.folder.rglob("*")] if path.is_file()]
    assert [path for path in files if path.name.endswith(".log") and path.stat().st_size > 1000]
    # By another process: one that closes a file of SQLite takes the locks on it from all connections that it has itself.
    found = subprocess.run([sys.executable, "-c", _READ, PLANTED, *map(str, files)], capture_output=True, text=True, check=True)
    assert found.stdout.split() == [str(len(files))]


_READ = """
import sys
from pathlib import Path
planted, *files = sys.argv[1:]
for path in map(Path, files):
    if path.exists() and planted.encode() in path.read_bytes():
        print(path)
print(len(files))
"""
"""Names the files that hold a text, and at last how many were read."""


async def refusal(client: Client, request: Any, metadata: Any) -> str:
    """Everything that a refused call says."""
    try:
        await client.deployments.CreateDeployment(request, metadata=metadata)
    except grpc.aio.AioRpcError as error:
        return f"{error.code()} {error.details()} {error.debug_error_string()} {error.trailing_metadata()}"
    raise AssertionError("was not refused")


