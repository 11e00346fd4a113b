"""``clawplane audit``: looks whether the audit log is what was written."""

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError

from services import embedded
from services.deployment_svc.base import AuditEvent as DeploymentEvent
from services.deployment_svc.base import AuditHead as DeploymentHead
from services.deployment_svc.settings import DeploymentSettings
from services.kit import telemetry
from services.kit.audit_chain import Chain
from services.kit.audit_verify import Summary, Verifier, read_log
from services.kit.db import Database
from services.kit.ids import to_uuid
from services.user_svc.base import AuditEvent as UserEvent
from services.user_svc.base import AuditHead as UserHead
from services.user_svc.settings import UserSettings

app = typer.Typer(no_args_is_help=True, help="The audit log.")
out, err = Console(highlight=False), Console(stderr=True, highlight=False)
_SLOW_S = 1.0
_SERVICES: dict[str, tuple[Any, Any, Any]] = {
    "user_svc": (UserSettings, UserEvent, UserHead),
    "deployment_svc": (DeploymentSettings, DeploymentEvent, DeploymentHead),
}


@app.command()
def verify(
    log: Annotated[list[Path] | None, typer.Option(help="Log of the services; repeat for more. Finds what was set back.")] = None,
    org: Annotated[str, typer.Option(help="Only this organization, org_...")] = "",
    data_dir: Annotated[Path | None, typer.Option(help="Where the embedded default keeps its files. [default: .clawplane]")] = None,
) -> None:
    """Verify the audit logs of both services. Exit status 0: intact; 1: something was found, each thing on a line of its own."""
    if org:
        to_uuid(org, "org")
    telemetry.configure_logs("error")
    found = 0
    for service in _SERVICES:
        found += uvloop.run(_verify(service, log or [], org, data_dir))
    if found:
        err.print(f"[red]{found} found[/]")
        raise typer.Exit(1)
    out.print("[green]intact[/]")


async def _verify(service: str, logs: list[Path], org: str, data_dir: Path | None) -> int:
    """How many problems the log of one service has; each is printed."""
    kind, rows, heads = _SERVICES[service]
    where = make_url(kind(**({"data_dir": data_dir} if data_dir else {})).database_url)
    if where.get_backend_name() == "sqlite" and not Path(where.database or "").exists():
        # Before the keys are asked for: they would be made.
        raise ValueError(f"there is no database {where.database}: name its folder by --data-dir, or its URL as for the services")
    settings = embedded.load_settings(kind, data_dir)
    # A large log is sorted before the first row comes.
    db = Database(settings.database_url, settings.model_copy(update={"statement_timeout_s": 86400.0}), service)
    verifier = Verifier(db, rows, heads, Chain.of(settings, service), read_log(_lines(logs), service), org)
    found = 0
    try:
        await db.connect()
        with _Bar(service, await verifier.count(), verifier.summary) as bar:
            async for problem in verifier.problems():
                found += 1
                bar.print(f"{service}: {problem}")
    except DBAPIError as error:
        err.print(f"[red]{service}: cannot be read: {type(error.orig).__name__}; is the database up to date (clawplane migrate)?[/]")
        found += 1
    finally:
        await db.close()
    s = verifier.summary
    out.print(f"{service}: {s.organizations} organizations, {s.rows} rows, {s.unsealed} of them not sealed yet")
    return found


def _lines(logs: list[Path]) -> Iterator[str]:
    for path in logs:
        with path.open(encoding="utf-8", errors="replace") as file:
            yield from file


class _Bar:
    """Shows how far it is, when it takes long and somebody looks on."""

    def __init__(self, service: str, total: int, summary: Summary) -> None:
        self._service, self._total, self._summary = service, total, summary
        self._stack = ExitStack()

    def __enter__(self) -> "_Bar":
        if sys.stderr.isatty():
            self._stack.enter_context(self._progress())
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def print(self, line: str) -> None:
        """One line above the bar."""
        out.print(line, soft_wrap=True, markup=False)

    def _progress(self) -> "_Following":
        return _Following(self._service, self._total, self._summary)


class _Following(Progress):
    """A bar that looks at the summary by itself, and is there only after a while."""

    def __init__(self, service: str, total: int, summary: Summary) -> None:
        columns = (TextColumn(service), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._summary, self._since = summary, time.monotonic()
        super().__init__(*columns, console=err, transient=True, refresh_per_second=4)
        self._rows = self.add_task(service, total=total)

    def get_renderables(self) -> Any:
        """What is shown now."""
        if hasattr(self, "_rows") and time.monotonic() - self._since > _SLOW_S:
            self.update(self._rows, completed=self._summary.rows, refresh=False)
            yield from super().get_renderables()
