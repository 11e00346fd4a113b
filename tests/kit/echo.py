"""A small service with one RPC of each kind, for tests of what the kit puts around RPCs."""

import contextlib
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from buf.validate import validate_pb2
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from sqlalchemy import MetaData, String, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from clawplane.options.v1 import options_pb2
from services.kit import devkeys, ids, vault
from services.kit.audit import AuditHeadRow, AuditRow, indexes
from services.kit.auth import FORWARD, Access, Authenticator, Caller
from services.kit.call import Call, Kit
from services.kit.client import CLIENT_IP, FORWARDED
from services.kit.columns import NAMING, Leased, Tenant, Versioned, identifier
from services.kit.db import Database
from services.kit.idempotency import IdempotencyKeyRow
from services.kit.server import App, Server
from services.kit.settings import KitSettings
from services.kit.tokens import TokenSigner
from services.kit.vault import CanaryRow
from tests.harness import UNLIMITED, Metadata, free_port


class Base(DeclarativeBase):
    """Tables of these tests."""

    metadata = MetaData(naming_convention=NAMING)


class Note(Versioned, Tenant, Leased, Base):
    """A row of an organization."""

    __tablename__ = "notes"
    __table_args__ = (UniqueConstraint("org_id", "name"),)

    id: Mapped[str] = identifier("agnt")
    name: Mapped[str] = mapped_column(String(100))
    tag: Mapped[str | None] = mapped_column(String(100), unique=True)
    hidden: Mapped[str] = mapped_column(String(100), default="")


class AuditEvent(AuditRow, Base):
    """Who did what."""

    __tablename__ = "audit_events"
    __table_args__ = indexes()


class AuditHead(AuditHeadRow, Base):
    """How far they are sealed."""

    __tablename__ = "audit_heads"


class IdempotencyKey(IdempotencyKeyRow, Base):
    """Answers that may be asked for again."""

    __tablename__ = "idempotency_keys"


class Canary(CanaryRow, Base):
    """Tells a wrong key."""

    __tablename__ = "secret_canaries"


def _rpc(name: str, audience: str, permission: str, options: str = "", *, streams: bool = False, answer: str = "Answer", rate: str = "") -> str:
    rule = f'[clawplane.options.v1.rule] {{ audience: {audience} permission: "{permission}" rate: "{rate}" }}' if audience else ""
    return (
        f'method {{ name: "{name}" input_type: ".kit_echo.Request" output_type: ".kit_echo.{answer}" '
        f"server_streaming: {str(streams).lower()} options {{ {rule} {options} }} }}"
    )


_READS = "idempotency_level: NO_SIDE_EFFECTS"
_FILE = f"""
name: "kit_echo.proto" package: "kit_echo" syntax: "proto3"
dependency: ["buf/validate/validate.proto", "clawplane/options/v1/options.proto"]
message_type {{ name: "Inner" field {{ name: "text" number: 1 label: LABEL_OPTIONAL type: TYPE_STRING }} }}
message_type {{ name: "Request"
  field {{ name: "text" number: 1 label: LABEL_OPTIONAL type: TYPE_STRING
           options {{ [buf.validate.field] {{ string {{ max_len: 100 }} }} }} }}
  field {{ name: "inner" number: 2 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".kit_echo.Inner" }}
  field {{ name: "many" number: 3 label: LABEL_REPEATED type: TYPE_MESSAGE type_name: ".kit_echo.Inner" }}
  field {{ name: "words" number: 20 label: LABEL_REPEATED type: TYPE_STRING }}
  field {{ name: "request_id" number: 6 label: LABEL_OPTIONAL type: TYPE_STRING }}
  field {{ name: "page_size" number: 4 label: LABEL_OPTIONAL type: TYPE_INT32 }}
  field {{ name: "page_token" number: 5 label: LABEL_OPTIONAL type: TYPE_STRING }} }}
message_type {{ name: "Answer" field {{ name: "text" number: 1 label: LABEL_OPTIONAL type: TYPE_STRING }} }}
message_type {{ name: "SecretAnswer"
  field {{ name: "text" number: 1 label: LABEL_OPTIONAL type: TYPE_STRING }}
  field {{ name: "secret" number: 2 label: LABEL_OPTIONAL type: TYPE_STRING options {{ debug_redact: true }} }} }}
service {{ name: "EchoService"
  {_rpc("Mint", "AUDIENCE_ORGANIZATION", "echo.write", answer="SecretAnswer")}
  {_rpc("Show", "AUDIENCE_ORGANIZATION", "echo.read", _READS, answer="SecretAnswer")}
  {_rpc("Write", "AUDIENCE_ORGANIZATION", "echo.write")}
  {_rpc("Read", "AUDIENCE_ORGANIZATION", "echo.read", _READS)}
  {_rpc("Manage", "AUDIENCE_PLATFORM", "echo.manage")}
  {_rpc("Weigh", "AUDIENCE_PLATFORM", "echo.weigh", _READS)}
  {_rpc("Open", "AUDIENCE_PUBLIC", "", _READS)}
  {_rpc("Rare", "AUDIENCE_ORGANIZATION", "echo.read", _READS, rate="2/hour")}
  {_rpc("RareOpen", "AUDIENCE_PUBLIC", "", _READS, rate="2/hour")}
  {_rpc("Watch", "AUDIENCE_ORGANIZATION", "echo.read", _READS, streams=True)} }}
service {{ name: "NoRuleService" {_rpc("Write", "", "")} }}
service {{ name: "BadRateService" {_rpc("Write", "AUDIENCE_ORGANIZATION", "echo.write", rate="often")} }}
"""
assert options_pb2.rule and validate_pb2.field  # text_format finds the extensions by name
descriptor_pool.Default().AddSerializedFile(text_format.Parse(_FILE, descriptor_pb2.FileDescriptorProto()).SerializeToString())
DESCRIPTOR = descriptor_pool.Default().FindFileByName("kit_echo.proto")
Request: Any = message_factory.GetMessageClass(DESCRIPTOR.message_types_by_name["Request"])
Answer: Any = message_factory.GetMessageClass(DESCRIPTOR.message_types_by_name["Answer"])
SecretAnswer: Any = message_factory.GetMessageClass(DESCRIPTOR.message_types_by_name["SecretAnswer"])
SERVICE = "kit_echo.EchoService"

Handler = Callable[[Any, Call], Any]


class EchoService:
    """Does what a test puts into ``on``; else answers with the text."""

    def __init__(self) -> None:
        self.on: dict[str, Handler] = {}

    def unary(self, name: str) -> Callable[[Any, Call], Awaitable[Any]]:
        """The RPC of a name."""

        async def rpc(request: Any, call: Call) -> Any:
            handler = self.on.get(name)
            return (await handler(request, call)) if handler else Answer(text=request.text)

        return rpc

    async def watch(self, request: Any, call: Call) -> AsyncIterator[Any]:
        """The stream."""
        async for answer in self.on["Watch"](request, call):
            yield answer


def add_to_server(service: EchoService, server: Any, name: str = SERVICE) -> None:
    """What protoc would make."""
    decode, encode = Request.FromString, lambda answer: answer.SerializeToString()
    handlers = {
        method.name: grpc.unary_stream_rpc_method_handler(service.watch, decode, encode)
        if method.server_streaming
        else grpc.unary_unary_rpc_method_handler(service.unary(method.name), decode, encode)
        for method in DESCRIPTOR.services_by_name[name.split(".")[1]].methods
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))
    server.add_registered_method_handlers(name, handlers)


@dataclass
class Echo:
    """The running service, and a client."""

    kit: Kit
    server: Server
    service: EchoService
    channel: grpc.aio.Channel
    keys: dict[str, str]
    people: dict[str, Access]
    keyed: dict[str, Caller]
    """API keys: text to caller."""
    org_id: str = field(default_factory=lambda: ids.new("org"))

    def call(self, name: str, text: str = "", metadata: Metadata | None = None, **fields: Any) -> Any:
        """A call of an RPC as somebody of this organization."""
        make = self.channel.unary_stream if name == "Watch" else self.channel.unary_unary
        rpc: Any = make(f"/{SERVICE}/{name}", Request.SerializeToString, (SecretAnswer if name in {"Mint", "Show"} else Answer).FromString)
        return rpc(Request(text=text, **fields), metadata=self.person() if metadata is None else metadata, timeout=10)

    def raw(self, name: str, payload: bytes, metadata: Metadata | None = None) -> Any:
        """A call with bytes as they are."""
        rpc = self.channel.unary_unary(f"/{SERVICE}/{name}", lambda raw: raw, lambda raw: raw)
        return rpc(payload, metadata=self.person() if metadata is None else metadata, timeout=10)

    def person(self, *permissions: str, org_id: str = "", permitted: bool = True) -> Metadata:
        """Metadata of a new person."""
        user_id, org_id = ids.new("usr"), org_id or self.org_id
        if permitted:
            self.people[user_id] = Access(user_id, org_id, frozenset({"echo.read", "echo.write"}))
        token = TokenSigner(self.kit.settings).sign(permissions or ["*"], user=user_id)
        return (("authorization", f"Bearer {token}"),)

    def key(self, rate: str = "") -> Metadata:
        """Metadata of a new API key."""
        text, key_id = f"key_{secrets.token_hex(8)}", ids.new("key")
        self.keyed[text] = Caller("key", key_id, frozenset({"echo.read"}), self.org_id, key_id=key_id, rate=rate)
        return (("authorization", f"Bearer {text}"),)

    def from_address(self, address: str) -> Metadata:
        """Metadata with which the gateway says where a call comes from."""
        return ((FORWARDED, TokenSigner(self.kit.settings).sign([FORWARD])), (CLIENT_IP, address))

    @property
    def operator(self) -> Metadata:
        return (("authorization", f"Bearer {self.keys['operator_token']}"),)


async def refused(call: Any) -> grpc.aio.AioRpcError:
    """The error of a call, unary or stream, that must fail."""
    try:
        if hasattr(call, "read"):
            while await call.read() is not grpc.aio.EOF:
                pass
        else:
            await call
    except grpc.aio.AioRpcError as error:
        return error
    raise AssertionError("the call went well")


def detail(error: grpc.aio.AioRpcError, kind: Any) -> Any:
    """One detail of an error; an empty message when there is none."""
    found = kind()
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    assert status is not None
    for packed in status.details:
        if packed.Is(kind.DESCRIPTOR):
            packed.Unpack(found)
    return found


def fields_of(error: grpc.aio.AioRpcError) -> list[str]:
    """The fields that an error names."""
    return [violation.field for violation in detail(error, error_details_pb2.BadRequest).field_violations]


async def make_tables(db: Database) -> None:
    """The tables of these tests."""
    async with db.writing.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)


@contextlib.asynccontextmanager
async def running(folder: Path, url: str, **settings: Any) -> AsyncIterator[Echo]:
    """The service on a database, with a client."""
    keys = devkeys.load_or_make(folder)
    made = KitSettings(**(devkeys.settings_for(keys, "cli") | {"data_dir": folder} | UNLIMITED | settings))
    db = Database(url, made, f"echo{secrets.token_hex(3)}")
    await make_tables(db)
    people: dict[str, Access] = {}

    keyed: dict[str, Caller] = {}

    async def key(text: str) -> Caller | None:
        return keyed.get(text)

    async def access(user_id: str, org_id: str) -> Access | None:
        found = people.get(user_id)
        return found if found and org_id in ("", found.org_id) else None

    kit = Kit("echo", made, db, Authenticator(made, access, {"key": key}), AuditEvent, IdempotencyKey, vault.open_box(made))
    service = EchoService()
    server = Server([App(kit, [(add_to_server, service)])], "127.0.0.1", free_port())
    await server.start()
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{server.port}", options=[("grpc.enable_http_proxy", 0)])
    try:
        yield Echo(kit, server, service, channel, keys, people, keyed)
    finally:
        await channel.close()
        if not kit.draining:
            await server.drain()
