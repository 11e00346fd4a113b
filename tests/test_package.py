"""What others get: the wheel in an empty environment, and reflection for those without stubs."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import free_port

pytestmark = pytest.mark.package
ROOT = Path(__file__).resolve().parent.parent

CLIENT = """
import sys
import grpc
from clawplane.deployment.v1 import deployment_service_pb2 as pb
from clawplane.deployment.v1 import deployment_service_pb2_grpc as rpc
from clawplane_client import UsageRecorder

target, token, deployment_id = sys.argv[1:]
with grpc.insecure_channel(target) as channel:
    stub = rpc.DeploymentServiceStub(channel)
    found = stub.GetDeployment(pb.GetDeploymentRequest(id=deployment_id), metadata=[("authorization", f"Bearer {token}")])
    print(found.id, pb.GetDeploymentRequest.DESCRIPTOR.file.package)
with UsageRecorder(target, token) as usage:
    usage.record(provider="anthropic", model="claude-opus-4.5", tokens_in=10, deployment_id=found.id)
print(usage.stats.accepted)
"""


def run(*command: str, **more: object) -> str:
    """Output of a command that must succeed."""
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300, **more)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{command[:3]}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return str(done.stdout)


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str, str, str]]:
    """A running ``clawplane up``: (gRPC target, operator token, a person's token, a deployment's id)."""
    import httpx

    folder = tmp_path_factory.mktemp("up")
    grpc_port, http_port = str(free_port()), str(free_port())
    command = [sys.executable, "-m", "services.cli", "up", "--data-dir", str(folder), "--grpc-port", grpc_port, "--http-port", http_port]
    started = time.monotonic()
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    try:
        while not (folder / "up.json").exists():
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() - started < 30
            time.sleep(0.02)
        print(f"\nup was serving after {time.monotonic() - started:.2f} s")
        keys = json.loads((folder / "keys.json").read_text())
        operator, base = keys["operator_token"], f"http://127.0.0.1:{http_port}"
        with httpx.Client(base_url=base, trust_env=False) as http:
            header = {"authorization": f"Bearer {operator}"}
            user = http.post("/v1/users", json={"email": "ann@example.com"}, headers=header).json()
            token = run(sys.executable, "-m", "services.cli", "token", "--user", user["id"], "--data-dir", str(folder), cwd=ROOT).strip()
            body = {"model": "claude-opus-4.5", "channel": "CHANNEL_WEB"}
            made = http.post("/v1/deployments", json=body, headers={"authorization": f"Bearer {token}"}).json()
        yield f"127.0.0.1:{grpc_port}", operator, token, made["id"]
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


@pytest.mark.timeout(300)
def test_ten_lines_with_the_wheel(up: tuple[str, str, str, str], tmp_path: Path) -> None:
    target, _, token, deployment_id = up
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(ROOT), str(ROOT / "clients" / "python"))
    wheels = [str(next(tmp_path.glob(f"{name}-*.whl"))) for name in ("clawplane", "clawplane_client")]
    run(sys.executable, "-m", "venv", str(tmp_path / "empty"))
    python = str(tmp_path / "empty" / "bin" / "python")
    # The stubs need the three packages that they import, in the versions of the wheel's own pins; nothing of this checkout.
    run(python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--require-hashes", "-r", str(ROOT / "requirements.txt"))
    run(python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", *wheels)
    (tmp_path / "client.py").write_text(CLIENT)
    said = run(python, str(tmp_path / "client.py"), target, token, deployment_id, cwd=tmp_path, env={"PATH": os.environ["PATH"]})
    assert said.split() == [deployment_id, "clawplane.deployment.v1", "1"]
    print(f"the wheel's client got {deployment_id}, and counted what it cost")


def test_reflection_lists_every_service_and_calls_one(up: tuple[str, str, str, str], tmp_path: Path) -> None:
    import grpc
    from google.protobuf import descriptor_pool
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    target, operator, _, deployment_id = up
    with grpc.insecure_channel(target) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        answer = next(iter(stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))))
        listed = {service.name for service in answer.list_services_response.service}
    pool = descriptor_pool.Default()
    for package in ("user", "deployment"):
        for path in (ROOT / "proto" / "clawplane" / package / "v1").glob("*_service.proto"):
            file = pool.FindFileByName(f"clawplane/{package}/v1/{path.name}")
            assert {service.full_name for service in file.services_by_name.values()} <= listed
    buf = str(Path(sys.executable).parent / "buf")
    said = run(
        buf, "curl", "--http2-prior-knowledge", "--protocol", "grpc", "-H", f"authorization: Bearer {operator}",
        "-d", json.dumps({"id": deployment_id}), f"http://{target}/clawplane.deployment.v1.DeploymentService/GetDeployment",
        cwd=tmp_path,
    )  # fmt: skip
    assert json.loads(said)["id"] == deployment_id
    print(f"buf curl got {deployment_id} by reflection; {len(listed)} services are listed")
