"""The floors: a server whose only RPC does nothing, bare (grpc.aio alone) or wrapped (everything that the kit puts around an RPC).

``python -m bench.echo bare|wrapped PORT DATA_DIR``
"""

import math
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import uvloop
from google.protobuf import descriptor_pb2, descriptor_pool, empty_pb2, text_format

from clawplane.options.v1 import options_pb2
from services import embedded
from services.kit import devkeys, ids, telemetry
from services.kit.auth import Access, Authenticator
from services.kit.call import Kit
from services.kit.db import Database
from services.kit.feed import Follower, remembered_access
from services.kit.server import App, Server
from services.kit.settings import KitSettings

SERVICE = "bench_echo.EchoService"
METHOD = f"/{SERVICE}/Empty"
_FILE = """
name: "bench_echo.proto" package: "bench_echo" syntax: "proto3"
dependency: ["google/protobuf/empty.proto", "clawplane/options/v1/options.proto"]
service { name: "EchoService"
  method { name: "Empty" input_type: ".google.protobuf.Empty" output_type: ".google.protobuf.Empty"
    options { idempotency_level: NO_SIDE_EFFECTS
              [clawplane.options.v1.rule] { audience: AUDIENCE_ORGANIZATION permission: "bench.empty" } } } }
"""
assert options_pb2.rule  # text_format finds the extension by name
descriptor_pool.Default().AddSerializedFile(text_format.Parse(_FILE, descriptor_pb2.FileDescriptorProto()).SerializeToString())

_ANSWER = empty_pb2.Empty()
_OPTIONS = [("grpc.so_reuseport", 1)]


async def _empty(request: empty_pb2.Empty, call: Any) -> empty_pb2.Empty:
    return _ANSWER


def add_to_server(server: Any) -> None:
    """What protoc would make."""
    handler = grpc.unary_unary_rpc_method_handler(_empty, empty_pb2.Empty.FromString, empty_pb2.Empty.SerializeToString)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Empty": handler}),))
    server.add_registered_method_handlers(SERVICE, {"Empty": handler})


async def _access(user_id: str, org_id: str) -> Access:
    return Access(user_id, org_id or ids.lowest("org"), frozenset({"bench.empty"}))


def _nothing(seq: int) -> AsyncIterator[Any]:
    raise NotImplementedError


def wrapped_kit(data_dir: Path) -> Kit:
    """A kit whose callers are people, remembered as they are on a warm service."""
    settings = KitSettings(**(devkeys.settings_for(devkeys.load_or_make(data_dir), "cli") | {"rate_limit": "100000000/minute"}))  # type: ignore[arg-type]

    follower = Follower(_nothing)
    follower._heard = math.inf
    db = Database(f"sqlite+aiosqlite:///{data_dir / 'echo.db'}", settings, "echo")
    return Kit("echo", settings, db, Authenticator(settings, remembered_access(follower, _access)), None)


async def _serve(kind: str, port: int, data_dir: Path) -> None:
    stop = embedded.stop_event()
    if kind == "wrapped":
        server = Server([App(wrapped_kit(data_dir), [(lambda _, registrar: add_to_server(registrar), None)])], "127.0.0.1", port)
        await server.start()
        await stop.wait()
        await server.drain()
        return
    bare = grpc.aio.server(options=_OPTIONS)
    add_to_server(bare)
    bare.add_insecure_port(f"127.0.0.1:{port}")
    await bare.start()
    await stop.wait()
    await bare.stop(1)


def main() -> None:
    """Runs one of the two servers until SIGTERM."""
    telemetry.configure_logs("warning")
    kind, port, data_dir = sys.argv[1:]
    uvloop.run(_serve(kind, int(port), Path(data_dir)))


if __name__ == "__main__":
    main()
