"""docker-compose.yml without Docker: its services as processes, with its commands, its environment and its health checks."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import Databases
from tests.harness import free_port

ROOT = Path(__file__).resolve().parent.parent
FILE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")
CLAWPLANE = str(Path(sys.executable).parent / "clawplane")


def fresh_env() -> dict[str, str]:
    """What ``clawplane keys > .env`` gives."""
    printed = subprocess.run([CLAWPLANE, "keys"], capture_output=True, text=True, check=True).stdout
    found = dict(re.fullmatch(r"(\w+)='(.*)'", line).groups() for line in printed.splitlines())  # type: ignore[union-attr,misc]
    return found  # type: ignore[return-value]


class Compose:
    """The file's services, each under the name it has there. Hosts and ports are this machine's; everything else is the file's."""

    def __init__(self, databases: Databases, folder: Path) -> None:
        self.folder, self.env = folder, fresh_env() | {"CLAWPLANE_KEY_RING": "/keys/ring.json"}
        urls = databases.make()
        # Every other one: the metrics of a service's second worker are at the port after those of its first.
        ports = {port: str((free_port(), free_port())[0]) for port in ("50051", "50052", "8080", "9101", "9102")}
        self.ports = ports
        self._places = {
            f"postgresql://clawplane:{self.env['POSTGRES_PASSWORD']}@postgres:5432/user_svc": urls["user_svc"],
            f"postgresql://clawplane:{self.env['POSTGRES_PASSWORD']}@postgres:5432/deployment_svc": urls["deployment_svc"],
            "http://localhost:8080": f"http://127.0.0.1:{ports['8080']}",
            "user:50051": f"127.0.0.1:{ports['50051']}",
            "deployment:50052": f"127.0.0.1:{ports['50052']}",
            "gateway:8080": f"127.0.0.1:{ports['8080']}",
            "0.0.0.0": "127.0.0.1",
            "/data": str(folder),
            "/keys/": f"{folder}/keys/",
        }
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def text(self, value: str) -> str:
        """A value of the file as Docker would fill it in, at this machine's places."""
        filled = _VARIABLE.sub(lambda found: self.env.get(found[1], found[2] or ""), value)
        for place, here in self._places.items():
            filled = filled.replace(place, here)
        for port, here in self.ports.items():
            filled = re.sub(rf"(?<![\w.]){port}\b(?!\d)|(?<=127\.0\.0\.1:){port}\b", here, filled)
        return filled

    def command(self, words: list[str]) -> list[str]:
        """A command, from this environment's programs."""
        assert words[0] == "clawplane", words
        return [CLAWPLANE, *(self.text(word) for word in words[1:])]

    def environment(self, name: str) -> dict[str, str]:
        """What a service's process sees: nothing of this one's but the way to programs."""
        given = {key: self.text(value) for key, value in FILE["services"][name]["environment"].items()}
        return {"PATH": os.environ["PATH"], "HOME": str(self.folder)} | given

    def run(self, name: str, timeout_s: float = 90) -> "subprocess.CompletedProcess[str]":
        """A service that ends by itself."""
        words = self.command(FILE["services"][name]["command"])
        return subprocess.run(
            words, env=self.environment(name), cwd=self.folder, capture_output=True, text=True, timeout=timeout_s, check=False
        )

    def up(self) -> None:
        """Everything but the profiles, in the order of the conditions."""
        waiting = [name for name, one in FILE["services"].items() if "profiles" not in one and name != "postgres"]
        done = {"postgres"}
        while waiting:
            name = next(name for name in waiting if set(FILE["services"][name]["depends_on"]) <= done)
            waiting.remove(name)
            if "healthcheck" in FILE["services"][name]:
                self._start(name)
            else:
                migrated = self.run(name)
                assert migrated.returncode == 0, migrated.stderr
            done.add(name)

    def _start(self, name: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            words = self.command(FILE["services"][name]["command"])
            self.running[name] = subprocess.Popen(words, env=self.environment(name), cwd=self.folder, stdout=log, stderr=log)
        deadline = time.monotonic() + 40
        while not self.healthy(name):
            assert self.running[name].poll() is None and time.monotonic() < deadline, (self.folder / f"{name}.log").read_text()[-2000:]
            time.sleep(0.2)

    def healthy(self, name: str) -> bool:
        """What the service's own health check says."""
        kind, *words = FILE["services"][name]["healthcheck"]["test"]
        assert kind == "CMD"
        return subprocess.run(self.command(words), capture_output=True, timeout=10, check=False).returncode == 0

    def down(self) -> dict[str, int]:
        """SIGTERM to all; how each ended."""
        for process in self.running.values():
            process.send_signal(signal.SIGTERM)
        ended = {}
        for name, process in self.running.items():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            if process.poll() is None:
                process.kill()
            ended[name] = process.wait()
        return ended
