"""``clawplane usage``: looks whether the sums of the ledger are what its events make."""

import time
from pathlib import Path
from typing import Annotated

import typer
import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from sqlalchemy.engine import make_url

from services import embedded
from services.deployment_svc.settings import DeploymentSettings
from services.deployment_svc.usage import check as recount
from services.kit import telemetry
from services.kit.db import Database
from services.kit.ids import to_uuid

app = typer.Typer(no_args_is_help=True, help="The ledger of usage.")
out, err = Console(highlight=False, soft_wrap=True), Console(stderr=True, highlight=False)
_LONGEST_S = 3600.0


@app.callback()
def _group() -> None:
    """The ledger of usage."""


@app.command()
def check(
    repair: Annotated[
        bool, typer.Option("--repair", help="Mend what is wrong; usage waits meanwhile, an organization's month at a time.")
    ] = False,
    org: Annotated[str, typer.Option(help="Only this organization, org_...")] = "",
    data_dir: Annotated[Path | None, typer.Option(help="Where the embedded default keeps its files. [default: .clawplane]")] = None,
) -> None:
    """Recount roll-ups and counters against the events, while everything runs. Exit status 0: all agree, or were mended; 1: some do not."""
    if org:
        to_uuid(org, "org")
    telemetry.configure_logs("error")
    where = make_url(DeploymentSettings(**({"data_dir": data_dir} if data_dir else {})).database_url)  # type: ignore[arg-type]
    if where.get_backend_name() == "sqlite" and not Path(where.database or "").exists():
        raise ValueError(f"there is no database {where.database}: name its folder by --data-dir, or its URL as for the services")
    found = uvloop.run(_check(repair, org, data_dir))
    if found and not repair:
        err.print(f"[red]{found} found[/]; --repair mends them")
        raise typer.Exit(1)
    out.print(f"[green]{found} mended[/]" if found else "[green]all agree[/]")


async def _check(repair: bool, org: str, data_dir: Path | None) -> int:
    settings = embedded.load_settings(DeploymentSettings, data_dir)
    db = Database(settings.database_url, settings.model_copy(update={"statement_timeout_s": _LONGEST_S}), "deployment_svc")
    found, started = 0, time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        todo = [one for one in await recount.months(db, settings.usage_retention_days) if org in ("", one[0])]
        with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
            task = progress.add_task("organizations' months", total=len(todo))
            for org_id, month in todo:
                async for difference in recount.check(db, org_id, month, repair=repair):
                    out.print(str(difference), markup=False)
                    found += 1
                progress.advance(task)
    finally:
        await db.close()
    if todo:
        err.print(f"{len(todo)} organizations' months in {time.monotonic() - started:.1f} s")
    return found
