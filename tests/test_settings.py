"""What a process refuses to start with, and how it says so."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from services.deployment_svc.settings import DeploymentSettings

ROOT = Path(__file__).resolve().parent.parent


def start(folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs the command with settings that it must refuse."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("CLAWPLANE_")}
    return subprocess.run(
        [sys.executable, "-m", "services.cli", *arguments],
        cwd=ROOT, env=clean | {"CLAWPLANE_DATA_DIR": str(folder)} | env, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "env", "said"),
    [
        (["serve", "deployment"], {"CLAWPLANE_STRIPE_API_KEY": "sk_live_PLANTED"}, "live Stripe key"),
        (["serve", "deployment"], {"CLAWPLANE_POLAR_ACCESS_TOKEN": "polar_PLANTED", "CLAWPLANE_POLAR_SANDBOX": "false"}, "live Polar token"),
        (["serve", "deployment", "--host", "0.0.0.0"], {}, "CLAWPLANE_SANDBOX_ALLOW_REMOTE"),
        (["serve", "gateway", "--host", "0.0.0.0"], {}, "CLAWPLANE_SANDBOX_ALLOW_REMOTE"),
        (["serve", "deployment"], {"CLAWPLANE_PAYMENT_PROVIDER": "stripe"}, "CLAWPLANE_STRIPE_API_KEY"),
        (["serve", "deployment"], {"CLAWPLANE_PAYMENT_PROVIDER": "paypal-PLANTED"}, "CLAWPLANE_PAYMENT_PROVIDER"),
        (["serve", "user"], {"CLAWPLANE_POOL_SIZE": "PLANTED"}, "CLAWPLANE_POOL_SIZE"),
        (["serve", "user"], {"CLAWPLANE_TRANSPORT": "PLANTED"}, "CLAWPLANE_TRANSPORT"),
        (["serve", "user"], {"CLAWPLANE_RATE_LIMIT": "PLANTED"}, "CLAWPLANE_RATE_LIMIT"),
        (["serve", "user"], {"CLAWPLANE_REDIS_URL": "PLANTED"}, "CLAWPLANE_REDIS_URL"),
        (["serve", "deployment"], {"CLAWPLANE_HMAC_KEY": "PLANTED"}, "CLAWPLANE_HMAC_KEY"),
        (["serve", "deployment"], {"CLAWPLANE_ENVIRONMENT": "production", "CLAWPLANE_SANDBOX_ENABLED": "false"}, "CLAWPLANE_"),
    ],
)
def test_start_is_refused_in_one_line_that_names_the_setting(tmp_path: Path, arguments: list[str], env: dict[str, str], said: str) -> None:
    done = start(tmp_path, *arguments, **env)
    assert done.returncode in (1, 2)
    assert said in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert "PLANTED" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("option", "transport", "said"),
    [("--http-port", "grpcio", "--http-port"), ("--grpc-port", "grpcio", "(gRPC)"), ("--grpc-port", "native", "(gRPC)")],
)
def test_a_taken_port_is_told(tmp_path: Path, option: str, transport: str, said: str) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = start(tmp_path, "up", option, str(taken.getsockname()[1]), CLAWPLANE_TRANSPORT=transport)
    assert done.returncode == 1
    assert said in done.stderr and "Traceback" not in done.stderr


def test_help_teaches(tmp_path: Path) -> None:
    done = start(tmp_path, "--help")
    assert done.returncode == 0
    for command in ("up", "serve", "migrate", "demo", "token"):
        assert command in done.stdout


def test_akash_has_a_pace_of_its_own() -> None:
    given = {"driver": "akash", "akash_api_key": "k", "akash_bot": {"image": "registry.example/bot:1"}, "service_name": "t"}
    slow = DeploymentSettings(**given, ready_timeout_s=7)  # type: ignore[arg-type]
    assert (slow.ready_timeout_s, slow.bid_window_s, slow.watch_s) == (7, 15, 60)
    assert DeploymentSettings(service_name="t").watch_s == 5  # type: ignore[call-arg]
    with pytest.raises(ValidationError, match="CLAWPLANE_AKASH_API_KEY"):
        DeploymentSettings(driver="akash", service_name="t")  # type: ignore[call-arg]
