"""docker-compose.yml and docs/operations.md do what they say: the demo, health checks, and every grpcurl line."""

import json
import re
import secrets
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from services.kit import ids
from tests.compose import FILE, ROOT, Compose, fresh_env
from tests.conftest import Databases

BUF = str(Path(sys.executable).parent / "buf")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("databases", ["postgres"], indirect=True)
def test_the_demo_and_every_line_of_the_guide(databases: Databases, tmp_path: Path) -> None:
    compose = Compose(databases, tmp_path)
    try:
        compose.up()
        the_demo_passes_with_two_workers_a_service(compose)
        every_line_of_the_guide_works(compose)
    finally:
        ended = compose.down()
    assert set(ended.values()) == {0}, ended


def grpcurl(line: str, compose: Compose, variables: dict[str, str]) -> Any:
    """One line of the guide, by way of buf curl: the same call, described by the server's reflection."""
    filled = re.sub(r"\$(\w+)", lambda found: variables[found[1]], line)
    program, plaintext, *words = shlex.split(filled)
    assert (program, plaintext) == ("grpcurl", "-plaintext")
    options = words[:-2]
    target, method = compose.text(words[-2]), words[-1]
    how = ["--http2-prior-knowledge", "--protocol", "grpc"]
    where = ["--list-services", f"http://{target}"] if method == "list" else [f"http://{target}/{method}"]
    done = subprocess.run([BUF, "curl", *how, *options, *where], cwd=compose.folder, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, (line, done.stderr)
    if "/Export" in method:
        # One answer after the other.
        return json.loads("[" + re.sub(r"}\s*{", "},{", done.stdout) + "]")
    return done.stdout.split() if method == "list" else json.loads(done.stdout)


def guide(command: str) -> list[str]:
    """The lines of the guide that start with a command."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", (ROOT / "docs/operations.md").read_text(), re.DOTALL | re.MULTILINE)
    return [line.partition(" #")[0].strip() for block in blocks for line in block.splitlines() if line.startswith(command)]


def the_demo_passes_with_two_workers_a_service(compose: Compose) -> None:
    """The file's own demo, against what runs."""
    for name in ("user", "deployment"):
        deadline = time.monotonic() + 20
        while len(psutil.Process(compose.running[name].pid).children()) < 2:
            assert time.monotonic() < deadline, name
            time.sleep(0.1)
    done = compose.run("demo")
    assert done.returncode == 0 and "nothing answers" in done.stdout and "✗" not in done.stdout, done.stdout + done.stderr
    print(done.stdout)


def live_bot(compose: Compose) -> dict[str, str]:
    """What the guide's lines are about: a bot that runs, its owner, and the event of its payment."""
    operator = {"authorization": f"Bearer {compose.env['CLAWPLANE_OPERATOR_TOKEN']}"}
    with httpx.Client(base_url=compose.text("http://gateway:8080"), trust_env=False, timeout=20) as http:
        user = http.post("/v1/users", json={"email": f"{secrets.token_hex(6)}@example.com"}, headers=operator).json()
        words = compose.command(["clawplane", "token", "--user", user["id"]])
        token = subprocess.run(words, env=compose.environment("demo"), capture_output=True, text=True, check=True).stdout.strip()
        person = {"authorization": f"Bearer {token}"}
        d = http.post("/v1/deployments", json={"model": "claude-opus-4.5", "channel": "CHANNEL_WEB"}, headers=person).json()
        assert http.post(f"{urlsplit(d['paymentUrl']).path}/pay", headers={"accept": "application/json"}).status_code == 200
        deadline = time.monotonic() + 30
        while http.get(f"/v1/deployments/{d['id']}", headers=person).json()["state"] != "STATE_ACTIVE":
            assert time.monotonic() < deadline
            time.sleep(0.2)
        (event,) = [
            one for one in http.get("/v1/webhook-events", headers=operator).json()["events"] if (one["payload"] or {}).get("deploymentId") == d["id"]
        ]  # fmt: skip
        used = {"id": str(ids.uuid7()), "provider": "openai", "model": "gpt-3.2", "tokensIn": 5000}
        assert http.post("/v1/usage", json=used, headers=person).status_code == 200
    return {"USAGE_EVENT": used["id"], "DEPLOYMENT": d["id"], "EVENT": event["id"], "EMAIL": user["email"], "USER_ID": user["id"], "ORG_ID": user["personalOrgId"]}


def every_line_of_the_guide_works(compose: Compose) -> None:
    """Each does what it says, to a bot that runs."""
    variables = live_bot(compose) | {"OPERATOR": compose.env["CLAWPLANE_OPERATOR_TOKEN"]}
    lines = guide("grpcurl")
    answers = {line.rpartition("/")[2]: grpcurl(line, compose, variables) for line in lines if not line.endswith("list")}
    assert len(lines) >= 15 and answers["GetDeployment"]["state"] == "STATE_ACTIVE"
    assert len(answers["ListDeploymentEvents"]["events"]) > 3 and answers["ReplayWebhookEvent"]["reason"] == "already started on this payment"
    assert answers["UpdateDeploymentStatus"]["state"] == "STATE_DEPLOYING" and answers["DeleteUser"]["deletedAt"]
    assert len(answers["ExportAuditEvents"]) > 1 and {"actor", "method", "fields"} <= answers["ListAuditEvents"]["events"][0].keys()
    assert answers["AdjustUsage"]["tokensIn"] == "-1000" and answers["SetQuota"]["suspends"] is True
    served = [grpcurl(line, compose, variables) for line in lines if line.endswith("list")]
    assert "clawplane.user.v1.UserService" in served[0] and "clawplane.deployment.v1.DeploymentService" in served[1]
    for line in guide("clawplane audit"):
        done = subprocess.run(compose.command(shlex.split(line)), env=compose.environment("migrate"), capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0 and "intact" in done.stdout, done.stdout + done.stderr
    for line in guide("clawplane usage"):
        done = subprocess.run(compose.command(shlex.split(line)), env=compose.environment("migrate"), capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0 and "all agree" in done.stdout, done.stdout + done.stderr
    prices(compose)
    for line in guide("clawplane health"):
        assert subprocess.run(compose.command(shlex.split(line)), capture_output=True, timeout=20, check=False).returncode == 0, line
    lines = guide("clawplane keys")
    assert [line.split()[2] for line in lines] == ["status", "rotate", "rotate", "require"]
    for line in lines:
        done = subprocess.run(
            compose.command(shlex.split(line)), env=compose.environment("migrate"), capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, (line, done.stderr)
    wrong = compose.command(["clawplane", "health", "127.0.0.1:1"])
    assert subprocess.run(wrong, capture_output=True, timeout=20, check=False).returncode == 1


def prices(compose: Compose) -> None:
    """The book goes out to a file, comes in again, and stored usage is priced by it."""

    def run(line: str) -> str:
        command = compose.command(shlex.split(line))
        done = subprocess.run(command, env=compose.environment("demo"), capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    lines = guide("clawplane prices")
    book = compose.folder / "prices.yaml"
    (export,) = (line.partition(" >")[0] for line in lines if ">" in line)
    book.write_text(run(export))
    for line in lines:
        if "FILE" in line:
            assert "0 would be added" in run(line.replace("FILE", str(book)))
        elif "recost" in line:
            assert run(line)
    assert [line.split()[2] for line in lines] == ["import", "export", "recost", "recost"]


WISHES = {
    f"CLAWPLANE_{name}"
    for name in (
        "ENCRYPTION_KEY", "HMAC_KEY_ID", "HMAC_KEYS", "KEY_RING", "STRIPE_API_KEY", "POLAR_ACCESS_TOKEN", "POLAR_PRODUCT_ID", "POLAR_TIERS",
        "AKASH_API_KEY", "AKASH_BOT", "MAIL_FROM", "SMTP_HOST", "SMTP_PORT", "SMTP_SECURITY", "SMTP_USERNAME", "SMTP_PASSWORD", "REDIS_URL",
        "SESSION_IDLE_S", "TIERS", "MODELS", "USAGE_CURRENCY", "PRICES_FILE", "USAGE_LATE_DAYS", "USAGE_RETENTION_DAYS", "USAGE_WAITING",
    )
}
"""What a platform may set, and what is not there when it does not."""


def test_the_files_fit_each_other() -> None:
    made = fresh_env()
    created = re.findall(r"CREATE DATABASE (\w+);", FILE["configs"]["databases"]["content"])
    urls = {value.rpartition("/")[2] for one in FILE["services"].values() for name, value in one["environment"].items() if name.endswith("DATABASE_URL")}
    assert set(created) == urls
    for name, one in FILE["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in one.get("ports", ())), name
        missing = set(re.findall(r"\$\{(\w+):-\}", json.dumps(one["environment"]))) - set(made) - WISHES
        assert not missing, (name, missing)
    docker = (ROOT / "Dockerfile").read_text()
    for source in re.findall(r"^COPY (?!--from)(.+) \S+$", docker, re.MULTILINE):
        assert all((ROOT / name).exists() and f"!{name}" in (ROOT / ".dockerignore").read_text() for name in source.split()), source
    assert re.search(r"^USER clawplane$", docker, re.MULTILINE) and "python:3.11" in docker
