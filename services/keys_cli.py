"""``clawplane keys``: print a set of keys, rotate the key that wraps all secrets, see who holds what, forbid old keys."""

import secrets
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

import typer
import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError

from services import embedded
from services.deployment_svc.settings import DeploymentSettings
from services.kit import devkeys, holders, rotation, telemetry, vault
from services.kit.db import ALL
from services.kit.keyring import Ring
from services.kit.sealed import Store
from services.kit.secrets import SecretBox, SecretError
from services.kit.settings import KitSettings
from services.user_svc.settings import UserSettings

app = typer.Typer(help="Print keys; rotate the key that wraps all secrets.", invoke_without_command=True)
out, err = Console(highlight=False), Console(stderr=True, highlight=False)

DataDir = Annotated[Path | None, typer.Option(help="Where the embedded default keeps its files. [default: .clawplane]")]
Wait = Annotated[float, typer.Option(min=1, help="Seconds that the processes have to follow each step.")]
Work = Callable[[list[Store], SecretBox, KitSettings], Awaitable[None]]


@app.callback()
def keys(context: typer.Context) -> None:
    """Print fresh keys, as `clawplane keys new` does; or one of the commands below."""
    if context.invoked_subcommand is None:
        new()


@app.command()
def new() -> None:
    """Print fresh keys for production as lines of an .env file, the file that docker-compose.yml reads. Keep it secret and safe:
    without the encryption keys, no stored secret can be read again."""
    made = devkeys.make(f"k{time.strftime('%Y%m%d')}")
    made["clerk_webhook_secrets"] = f'["{devkeys.clerk_webhook_secret(made)}"]'
    for name, value in made.items():
        print(f"CLAWPLANE_{name.upper()}='{value}'")
    print(f"POSTGRES_PASSWORD='{secrets.token_urlsafe(24)}'")


@app.command()
def rotate(
    drop_old: Annotated[bool, typer.Option("--drop-old", help="Then forget the old keys. After an earlier rotation: only that.")] = False,
    wait_s: Wait = 30,
    data_dir: DataDir = None,
) -> None:
    """Make a new key and bring every secret of both services under it, while they run. Stopped at any point, run it again: it goes on."""

    async def work(stores: list[Store], box: SecretBox, settings: KitSettings) -> None:
        with Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=out, transient=False
        ) as bar:  # fmt: skip
            task = bar.add_task("secrets under the new key", total=None)
            watch = rotation.Progress(
                say=lambda text: bar.console.print(text, soft_wrap=True),
                total=lambda rows: bar.update(task, total=rows),
                advance=lambda rows: bar.advance(task, rows),
            )
            result = await rotation.Rotation(stores, box, vault.ring_file(settings), watch, wait_s).run(drop_old=drop_old)
        out.print(f"[bold]everything is under the key {result.current}: no other key is needed[/]", soft_wrap=True)
        if result.dropped:
            kept = "" if settings.key_ring else ", once you have taken them out of CLAWPLANE_ENCRYPTION_KEYS"
            out.print(f"forgotten: {', '.join(result.dropped)}{kept}", soft_wrap=True)
        elif result.old:
            out.print(f"still on the ring: {', '.join(result.old)}; `clawplane keys rotate --drop-old` forgets them", soft_wrap=True)

    _with_stores(work, data_dir)


@app.command()
def require(
    version: Annotated[int, typer.Argument(min=1, help="As `clawplane keys status` shows it.")],
    wait_s: Wait = 30,
    data_dir: DataDir = None,
) -> None:
    """Refuse secrets under keys below a version from now on, and processes that would seal with one."""

    async def work(stores: list[Store], box: SecretBox, settings: KitSettings) -> None:
        watch = rotation.Progress(out.print, lambda _: None, lambda _: None)
        await rotation.Rotation(stores, box, vault.ring_file(settings), watch, wait_s).require(version)
        out.print(f"keys below version {version} are refused")

    _with_stores(work, data_dir)


@app.command()
def status(data_dir: DataDir = None) -> None:
    """Show the ring, what is under each key, and which processes hold which keys."""

    async def work(stores: list[Store], box: SecretBox, settings: KitSettings) -> None:
        where = f"file {settings.key_ring}" if settings.key_ring else "environment"
        out.print(f"ring: {where}; at least version {box.ring.minimum_version} is required", soft_wrap=True)
        out.print(await _under(stores, box.ring))
        for store in stores:
            async with store.db.read(ALL) as session:
                for one in await holders.live(session, store.holder):
                    out.print(f"{store.db.name}: process {one.pid} on {one.host} seals with {one.current}, holds {', '.join(one.key_ids)}")
        if box.ring.rotating:
            out.print("a rotation has begun and not ended: `clawplane keys rotate` goes on with it")

    _with_stores(work, data_dir)


async def _under(stores: list[Store], ring: Ring) -> Table:
    """How many rows of each column are under which key."""
    shown = Table("", *(f"{key.id}\nversion {key.version}, {key.state}" for key in ring.keys), "others", box=None)
    for store in stores:
        for one in store.kept:
            counts = [await store.count(one, one.under(key.id)) for key in ring.keys]
            others = await store.count(one, one.column.is_not(None)) - sum(counts)
            shown.add_row(f"{store.db.name}.{one.name}", *(str(count) for count in counts), str(others))
        for hashed in store.hashed:
            async with store.db.read(ALL) as session:
                ids = (await session.scalars(select(hashed.key_id).distinct())).all()
            said = [f"{key_id or '(first)'}: {await store.count(hashed, hashed.under(key_id))}" for key_id in sorted(ids)]
            shown.add_row(f"{store.db.name}.{hashed.name}", *([""] * len(ring.keys)), f"HMAC keys: {', '.join(said)}")
    return shown


def _with_stores(work: Work, data_dir: Path | None) -> None:
    """Runs a command on the databases of both services; the exit status is 1 when it says why it cannot."""
    from services.deployment_svc.app import store as deployment_store
    from services.user_svc.app import store as user_store

    telemetry.configure_logs("warning", pretty=True)
    user, deployment = embedded.load_settings(UserSettings, data_dir), embedded.load_settings(DeploymentSettings, data_dir)

    async def run() -> None:
        box = vault.open_box(user)
        stores = [user_store(user), deployment_store(deployment)]
        try:
            for store in stores:
                await store.db.connect()
                async with store.db.read(ALL) as session:
                    # Nothing is planted: that is for who serves, or has asked all who do.
                    await vault.check(session, box, store.canary)
            await work(stores, box, user)
        finally:
            for store in stores:
                await store.db.close()

    try:
        uvloop.run(run())
    except (rotation.RotationError, SecretError) as error:
        _refuse(str(error))
    except (SQLAlchemyError, OSError) as error:
        if any(words in str(error) for words in ("no such table", "no such column", "UndefinedTable", "UndefinedColumn")):
            _refuse("a database is not up to date: run `clawplane migrate` first")
        _refuse(f"a database does not answer ({type(error).__name__}): run this again once it does")


def _refuse(why: str) -> Any:
    err.print(f"[red]{why}[/]", soft_wrap=True)
    raise typer.Exit(1)
