"""The ``clawplane`` command."""

import asyncio
import os
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import grpc
import psutil
import typer
import uvloop
from pydantic import ValidationError
from rich.console import Console

from services import cli_audit, cli_prices, cli_usage, embedded, keys_cli
from services.deployment_svc.settings import DeploymentSettings
from services.kit import telemetry
from services.kit.secrets import SecretError
from services.kit.settings import KitSettings
from services.kit.tokens import TokenSigner
from services.user_svc.settings import UserSettings

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
app.add_typer(cli_audit.app, name="audit")
app.add_typer(cli_usage.app, name="usage")
app.add_typer(cli_prices.app, name="prices")
out, err = Console(highlight=False), Console(stderr=True, highlight=False)

app.add_typer(keys_cli.app, name="keys")

Host = Annotated[str, typer.Option(help="Address to listen on.", envvar="CLAWPLANE_HOST")]
DataDir = Annotated[Path | None, typer.Option(help="Where the embedded default keeps its files. [default: .clawplane]")]


class Part(StrEnum):
    """What can run as a process of its own."""

    user = "user"
    deployment = "deployment"
    gateway = "gateway"


_PORTS = {Part.user: 50051, Part.deployment: 50052, Part.gateway: 8080}


@app.command()
def up(
    host: Host = "127.0.0.1",
    grpc_port: Annotated[int, typer.Option(envvar="CLAWPLANE_GRPC_PORT")] = 50051,
    http_port: Annotated[int, typer.Option(envvar="CLAWPLANE_HTTP_PORT")] = 8080,
    data_dir: DataDir = None,
) -> None:
    """Run everything in one process on SQLite: both services, the gateway, local bots, a sandbox checkout."""

    def announce(target: str, url: str, link: str) -> None:
        took = time.time() - psutil.Process().create_time()
        out.print(f"\n[bold]Clawplane is up[/] [dim]({took:.1f} s)[/]")
        if link:
            out.print(f"  sign in  {link}", soft_wrap=True)
            again = f"{os.path.relpath(sys.argv[0])} sign-in" if Path(sys.argv[0]).name == "clawplane" else "clawplane sign-in"
            out.print(f"           [dim]opens the dashboard, once, within 10 minutes; for another: [bold]{again}[/][/]", soft_wrap=True)
        out.print(f"  gateway  {url}  [dim](its API: {url}/docs)[/]", soft_wrap=True)
        out.print(f"  gRPC     {target}  [dim](grpcurl -plaintext {target} list)[/]", soft_wrap=True)
        out.print("  try      [bold]make demo[/] in another shell; stop with Ctrl-C\n")

    _run(embedded.up(host, grpc_port, http_port, data_dir, announce))


@app.command()
def sign_in(data_dir: DataDir = None) -> None:
    """Print a one-time link to the dashboard of the running `up`. It signs its operator in, once, within 10 minutes."""
    from services.demo_stack import running_on

    async def link() -> str:
        running = await running_on(folder)
        return await embedded.sign_in_url(running.user, running.http, folder) if running else ""

    folder = data_dir or KitSettings().data_dir
    found = _run(link())
    if not found:
        err.print(f"[red]nothing runs on {folder}: start it with `clawplane up`[/]")
        raise typer.Exit(1)
    print(found)


@app.command()
def serve(
    part: Part,
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 means the part's usual one: 50051, 50052, 8080.")] = 0,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Processes that share the port; about one a core. SIGHUP replaces them.")] = 1,
) -> None:
    """Run one service alone, set up by CLAWPLANE_* in the environment. Migrates its database first."""
    if workers > 1:
        raise typer.Exit(_run(embedded.serve_many(part.value, host, port or _PORTS[part], workers)))
    _run(embedded.serve(part.value, host, port or _PORTS[part]))


@app.command()
def migrate(part: Annotated[Part | None, typer.Argument(help="Only this service; both when left out.")] = None) -> None:
    """Bring the databases up to date."""
    if part is Part.gateway:
        err.print("[red]the gateway has no database[/]")
        raise typer.Exit(2)
    user = embedded.load_settings(UserSettings) if part in (None, Part.user) else None
    deployment = embedded.load_settings(DeploymentSettings) if part in (None, Part.deployment) else None
    _run(embedded.migrate_all(user, deployment))
    out.print("databases are up to date")


@app.command()
def token(
    user: Annotated[str, typer.Option(help="Act for this user: an id (usr_...) or an e-mail address.")] = "",
    org: Annotated[str, typer.Option(help="Act in this organization of the user. [default: the personal one]")] = "",
    permission: Annotated[list[str] | None, typer.Option(help="Only this permission; repeat for more. [default: all]")] = None,
    ttl_s: Annotated[int, typer.Option(min=1, max=900, help="Seconds that the token lives.")] = 900,
    target: Annotated[str, typer.Option(help="host:port of the user service, to look up an e-mail address.")] = "127.0.0.1:50051",
    data_dir: DataDir = None,
) -> None:
    """Print a service token, or one that acts for a person. Send it as "authorization: Bearer <token>"."""
    signer = TokenSigner(embedded.load_settings(KitSettings, data_dir))
    user_id = user
    if user and not user.startswith("usr_"):
        user_id = _look_up(user, target, signer)
    out.print(signer.sign(permission or ["*"], user=user_id, org=org, lifetime_s=ttl_s), soft_wrap=True)


def _look_up(email: str, target: str, signer: TokenSigner) -> str:
    from clawplane.user.v1 import user_service_pb2, user_service_pb2_grpc

    with grpc.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)]) as channel:
        stub = user_service_pb2_grpc.UserServiceStub(channel)
        metadata = (("authorization", f"Bearer {signer.sign(['users.lookup'], lifetime_s=60)}"),)
        try:
            found = stub.LookupUser(user_service_pb2.LookupUserRequest(email=email), metadata=metadata, timeout=5)
        except grpc.RpcError as error:
            err.print(f"[red]{email}: {error.details()}[/]")
            raise typer.Exit(1) from None
    return str(found.id)


@app.command()
def demo(
    url: Annotated[str, typer.Option(help="The gateway of a stack whose keys are in the environment. [default: the one of `up`]")] = "",
    user_target: Annotated[str, typer.Option(envvar="CLAWPLANE_USER_TARGET", help="With --url: the user service.")] = "127.0.0.1:50051",
    deployment_target: Annotated[
        str, typer.Option(envvar="CLAWPLANE_DEPLOYMENT_TARGET", help="With --url: the deployment service.")
    ] = "127.0.0.1:50052",
    akash_simulator: Annotated[
        bool, typer.Option("--akash-simulator", help="On a stack of its own, with simulators of Akash, which fails, and Polar.")
    ] = False,
    data_dir: DataDir = None,
) -> None:
    """Run the whole loop against the running stack (or one of its own): sign in, order, pay, live, invite, keys, chat, usage, close."""
    from services.demo import run_demo
    from services.demo_stack import Where

    folder = data_dir or KitSettings().data_dir
    where = Where(user_target, deployment_target, url, folder, is_here=False) if url else folder
    raise typer.Exit(asyncio.run(run_demo(where, out, on_akash=akash_simulator)))


@app.command()
def health(target: Annotated[str, typer.Argument(help="host:port of a gRPC service, or a URL of the gateway (/readyz).")]) -> None:
    """Ask a process whether it serves; the exit status is 0 when it does. For health checks."""
    from services.kit.clients import ask_health

    said = ask_health(target)
    out.print(said)
    raise typer.Exit(0 if said == "serving" else 1)


def _run(work: Any) -> Any:
    settings = KitSettings()
    telemetry.configure_logs(settings.log_level, pretty=sys.stderr.isatty())
    try:
        return uvloop.run(work)
    except (embedded.StartError, SecretError) as error:
        err.print(f"[red]{error}[/]")
        raise typer.Exit(1) from None


def main() -> None:
    """Entry point: what is set wrongly is said in one line a setting, without its value."""
    try:
        app()
    except ValidationError as error:
        for problem in error.errors(include_input=False, include_url=False):
            name = "_".join(str(part) for part in problem["loc"]).upper()
            err.print(f"[red]{'CLAWPLANE_' + name + ': ' if name else ''}{problem['msg'].removeprefix('Value error, ')}[/]")
        raise SystemExit(2) from None
    except ValueError as error:
        err.print(f"[red]{error}[/]")
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
