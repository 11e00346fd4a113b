"""``clawplane prices``: the price book as a file, in and out; and stored usage priced anew."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer
from google.protobuf.timestamp_pb2 import Timestamp
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from clawplane.deployment.v1 import price_service_pb2, price_service_pb2_grpc, usage_service_pb2, usage_service_pb2_grpc
from services import embedded
from services.kit.settings import KitSettings
from services.kit.tokens import TokenSigner

app = typer.Typer(no_args_is_help=True, help="The price book, and stored usage priced anew.")
out, err = Console(highlight=False, soft_wrap=True), Console(stderr=True, highlight=False, soft_wrap=True)
_TIMEOUT_S, _PAUSE_S, _TRIES = 120, 1.0, 30
_GOES_ON = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNAUTHENTICATED}
"""What ends a stream between whose messages nothing is wrong: a service that is replaced, and a token whose time is over."""

_WHERE = "host:port of the deployment service. [default: the one of `up`, or 127.0.0.1:50052]"
Target = Annotated[str, typer.Option(envvar="CLAWPLANE_DEPLOYMENT_TARGET", help=_WHERE)]
DataDir = Annotated[Path | None, typer.Option(help="Where the embedded default keeps its files. [default: .clawplane]")]
Time = Annotated[datetime | None, typer.Option(formats=["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%M:%SZ"], help="UTC.")]


@dataclass(frozen=True)
class _Service:
    """The deployment service, called as the platform."""

    channel: grpc.Channel
    signer: TokenSigner

    def metadata(self, permission: str) -> tuple[tuple[str, str], ...]:
        """A new credential."""
        return (("authorization", f"Bearer {self.signer.sign([permission])}"),)


@contextmanager
def _service(target: str, data_dir: Path | None) -> Iterator[_Service]:
    """Says what it answers in one line, with exit status 1."""
    settings = embedded.load_settings(KitSettings, data_dir)
    with grpc.insecure_channel(target or _running(settings), options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            yield _Service(channel, TokenSigner(settings))
        except grpc.RpcError as error:
            err.print(f"[red]{error.code().name}:[/]", escape(error.details() or ""))
            raise typer.Exit(1) from None


def _running(settings: KitSettings) -> str:
    try:
        return str(json.loads((settings.data_dir / "up.json").read_text())["grpc"])
    except (OSError, ValueError, KeyError):
        return "127.0.0.1:50052"


def _stamp(when: datetime | None) -> Timestamp | None:
    if when is None:
        return None
    stamp = Timestamp()
    stamp.FromDatetime(when)
    return stamp


@app.command("import")
def import_(
    file: Annotated[str, typer.Argument(help="YAML, as `clawplane prices export` writes it; - reads standard input.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
    target: Target = "",
    data_dir: DataDir = None,
) -> None:
    """Take prices in from a file, all or none. What the book has already stays as it is."""
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        err.print(f"[red]{escape(file)} cannot be read:[/] {type(error).__name__}")
        raise typer.Exit(2) from None
    request = price_service_pb2.ImportPricesRequest(yaml=text, validate_only=dry_run)
    with _service(target, data_dir) as service:
        stub = price_service_pb2_grpc.PriceServiceStub(service.channel)
        done = stub.ImportPrices(request, metadata=service.metadata("prices.write"), timeout=_TIMEOUT_S)
    out.print(f"{done.created} {'would be added' if dry_run else 'added'}, {done.unchanged} were there already")


@app.command()
def export(
    at: Time = None,
    target: Target = "",
    data_dir: DataDir = None,
) -> None:
    """Print the price book as YAML; with --at only what counts at a time."""
    request = price_service_pb2.ExportPricesRequest(effective_at=_stamp(at))
    with _service(target, data_dir) as service:
        stub = price_service_pb2_grpc.PriceServiceStub(service.channel)
        typer.echo(stub.ExportPrices(request, metadata=service.metadata("prices.read"), timeout=_TIMEOUT_S).yaml, nl=False)


@app.command()
def recost(  # noqa: PLR0917 - typer calls it by name
    apply: Annotated[bool, typer.Option("--apply", help="Change what differs; else it is only told.")] = False,
    org: Annotated[str, typer.Option(help="Only this organization's, org_...")] = "",
    provider: Annotated[str, typer.Option(help="Only those of this provider of models.")] = "",
    model: Annotated[str, typer.Option(help="Only those of this model.")] = "",
    start: Time = None,
    end: Time = None,
    unpriced: Annotated[bool, typer.Option("--unpriced", help="Only those without a price so far.")] = False,
    target: Target = "",
    data_dir: DataDir = None,
) -> None:
    """Compute the cost of stored usage anew from the price book as it is now. Stopped at any point, run it again."""
    request = usage_service_pb2.RecostUsageRequest(
        org_id=org, provider=provider, model=model, unpriced_only=unpriced, apply=apply,
        start=_stamp(start), end=_stamp(end),
    )  # fmt: skip
    total = _Total()
    with _service(target, data_dir) as service, _bar() as show:
        for _ in _recosted(service, request, total):
            show(total)
    out.print(f"{total}{'' if apply else '; --apply changes it' if total.changed else ''}")


@dataclass
class _Total:
    """What streams have told together: each counts from where it began."""

    said: list[usage_service_pb2.RecostUsageResponse] = field(default_factory=list)
    """The last message of each."""

    @property
    def changed(self) -> int:
        """Events that change."""
        return sum(one.changed for one in self.said)

    def __str__(self) -> str:
        seen, unpriced = sum(one.seen for one in self.said), sum(one.unpriced for one in self.said)
        before, after = (sum((Decimal(getattr(one, name)) for one in self.said), Decimal(0)) for name in ("cost_before", "cost_after"))
        return f"{self.changed} of {seen} events, cost {before.normalize():f} -> {after.normalize():f}; {unpriced} without a price"


def _recosted(service: _Service, request: usage_service_pb2.RecostUsageRequest, total: _Total) -> Iterator[None]:
    """Beats until it is done. A stream that was cut off is gone on with where it was."""
    stub, tries = usage_service_pb2_grpc.UsageServiceStub(service.channel), 0
    while True:
        earlier = list(total.said)
        try:
            for progress in stub.RecostUsage(request, metadata=service.metadata("usage.recost")):
                total.said, tries = [*earlier, progress], 0
                request.after_position = progress.position
                yield
            return
        except grpc.RpcError as error:
            tries += 1
            if error.code() not in _GOES_ON or not request.after_position or tries > _TRIES:
                raise
            time.sleep(_PAUSE_S)


@contextmanager
def _bar() -> Iterator[Any]:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        # Nobody knows how many there are before all have been seen.
        task = bar.add_task("looking", total=None)
        yield lambda total: bar.update(task, description=str(total))
