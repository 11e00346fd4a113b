"""A victim with a row of every kind, strangers of every kind, and what the databases hold."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import grpc
import sqlalchemy as sa
from google.protobuf.descriptor import MethodDescriptor
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from clawplane.deployment.v1 import blacklist_service_pb2, usage_event_pb2, usage_service_pb2
from clawplane.user.v1 import user_pb2, user_service_pb2
from clawplane.user.v1.organization_pb2 import Role
from services.deployment_svc.base import Base as DeploymentBase
from services.deployment_svc.base import WebhookEvent as DeploymentWebhook
from services.deployment_svc.claw_keys import repository as claw_keys
from services.deployment_svc.deployments.models import Deployment
from services.kit import ids, vault
from services.kit.columns import Identifier, Tenant
from services.kit.db import ALL, Database
from services.kit.devkeys import settings_for
from services.kit.settings import KitSettings
from services.user_svc.base import Base as UserBase
from services.user_svc.base import WebhookEvent as UserWebhook
from services.user_svc.organizations.models import Membership
from tests.harness import Metadata, Person, Stack, running
from tests.valid import Maker, Request

BASES = {"user_svc": UserBase, "deployment_svc": DeploymentBase}
LOOPS_OWN = {"feed_cursors"}
"""Tables that hold where a loop is, and nothing of any tenant."""
LOOPS_TOUCH = {"due_at", "lease_until", "lease_token"}


@dataclass(frozen=True)
class Answer:
    """What a caller gets: a code, and the whole response or error as bytes."""

    code: grpc.StatusCode
    raw: bytes
    permission: str = ""
    """The permission that the error names."""


@dataclass
class Victim:
    """A tenant whose rows nobody else may see or change."""

    person: Person
    rows: dict[str, list[dict[str, Any]]]
    """Every row of his, by table."""

    def values(self, name: str) -> list[str]:
        """The texts in the columns of a name."""
        found = (row.get(name) for rows in self.rows.values() for row in rows)
        return list(dict.fromkeys(value for value in found if isinstance(value, str) and value))

    def row(self, prefix: str) -> str:
        """An id of a kind; "" for a kind that has no table yet."""
        kind = next((table for base in BASES.values() for table in base.metadata.tables.values() if prefix_of(table) == prefix), None)
        if kind is None:
            return ""
        rows = self.rows.get(kind.name)
        assert rows, f"the victim has no row in {kind.name} ({prefix}_...): make one in Scene.plant of tests/tenancy.py"
        return str(rows[0]["id"])

    @property
    def maker(self) -> Maker:
        """Makes requests about this victim."""
        return Maker(self.row, self.values)

    @cached_property
    def marks(self) -> set[bytes]:
        """The ids of his rows, and his address: whoever reads one of them reads what is his."""
        own = {str(row["id"])[-32:].encode() for rows in self.rows.values() for row in rows if "id" in row}
        return own | {self.person.user.email.encode(), self.person.org_id.encode()}


def prefix_of(table: Any) -> str:
    """The prefix of a table's identifiers; "" when its rows have none."""
    column = table.c.get("id")
    return column.type.prefix if column is not None and column.primary_key and isinstance(column.type, Identifier) else ""


def is_personal(prefix: str) -> bool:
    """Whether rows of a kind belong to a person and not to an organization: the organization's members may not read them."""
    for base in BASES.values():
        for mapper in base.registry.mappers:
            if prefix_of(mapper.local_table) == prefix:
                return prefix != "org" and not issubclass(mapper.class_, Tenant)
    return False


@dataclass
class Scene:
    """A stack of its own, so that nothing moves but what the test moves."""

    stack: Stack
    engines: dict[str, AsyncEngine] = field(default_factory=dict)
    bystanders: set[str] = field(default_factory=set)
    """Hexadecimal ids of organizations and users whose own rows may change."""

    async def set_up(self) -> None:
        """The victim, and everybody who tries."""
        self.engines = {name: create_async_engine(url) for name, url in self.stack.urls.items()}
        self.settings = KitSettings(**settings_for(self.stack.keys, "deployment_svc"))  # type: ignore[arg-type]
        self.stranger, self.guest = await self.stack.person(), await self.stack.person()
        for person in (self.stranger, self.guest):
            self.bystanders |= {person.user.id[-32:], person.org_id[-32:]}
        self.claw_key = await self._claw_key(await self.stack.order(self.stranger))
        self.victim = await self.plant()
        db = Database(self.stack.urls["user_svc"], self.settings, "test")
        async with db.transaction(ALL) as session:
            session.add(Membership(org_id=self.victim.person.org_id, user_id=self.guest.user.id, role=Role.ROLE_VIEWER))
        await db.close()
        self.elsewhere = self.at(self.guest.metadata, self.guest.org_id)
        self.viewer = self.at(self.guest.metadata, self.victim.person.org_id)

    @staticmethod
    def at(metadata: Metadata, org_id: str) -> Metadata:
        """The same caller in another organization."""
        return (*metadata, ("clawplane-org", org_id))

    async def _claw_key(self, d: Any) -> Metadata:
        db = Database(self.stack.urls["deployment_svc"], self.settings, "test")
        async with db.transaction(ALL) as session:
            key = claw_keys.mint(session, await session.get_one(Deployment, d.id), vault.open_box(self.settings), "test")
        await db.close()
        return (("authorization", f"Bearer {key.text}"),)

    async def plant(self, *, sacrificed: bool = False) -> Victim:
        """A tenant with a row of every kind that a request can name, made as people make them."""
        tag, stack = ids.uuid7().hex, self.stack
        create = user_service_pb2.CreateUserRequest(
            user=user_pb2.User(email=f"{tag}@victim.example", full_name="Victim"),
            identity=user_pb2.Identity(provider="clerk", subject=f"clerk_{tag}"),
        )
        user = await stack.users.CreateUser(create, metadata=stack.operator)
        account = user_service_pb2.UpdateUserAccountRequest(id=user.id, polar_customer_id=f"polar_{tag}", stripe_customer_id=f"cus_{tag}")
        user = await stack.users.UpdateUserAccount(account, metadata=stack.operator)
        person = Person(user, stack.token_for(user.id))
        if sacrificed:
            self.bystanders |= {user.id[-32:], user.personal_org_id[-32:]}
        d = await stack.live(person, f"{int(tag[:8], 16) % 10**9 + 10**9}:" + tag)
        event = usage_event_pb2.UsageEvent(id=str(ids.uuid7()), provider="openai", model="gpt-3.2", tokens_in=1, deployment_id=d.id)
        await stack.usage.RecordUsage(usage_service_pb2.RecordUsageRequest(event=event), metadata=person.metadata)
        # Platform rows that mention the victim, as operators see them.
        add = blacklist_service_pb2.AddBlacklistEntryRequest(provider_address=f"provider-{tag}", reason=person.org_id)
        await stack.blacklist.AddBlacklistEntry(add, metadata=stack.operator)
        event_id = ids.new("whe")
        for service, model in (("user_svc", UserWebhook), ("deployment_svc", DeploymentWebhook)):
            db = Database(stack.urls[service], self.settings, "test")
            async with db.transaction(ALL) as session:
                session.add(model(id=event_id, source="test", external_id=person.org_id, type="x", status="ignored", reason="planted"))
            await db.close()
        return Victim(person, await self._rows_of(person))

    async def _rows_of(self, person: Person) -> dict[str, list[dict[str, Any]]]:
        found = {}
        for table, row in await self._everything():
            if person.org_id in row.values() or person.user.id in row.values():
                found.setdefault(table, []).append(row)
        return found

    async def _everything(self) -> list[tuple[str, dict[str, Any]]]:
        found = []
        for service, base in BASES.items():
            async with self.engines[service].connect() as connection:
                for table in base.metadata.sorted_tables:
                    rows = await connection.execute(sa.select(table).order_by(*table.primary_key))
                    found += [(table.name, dict(row._mapping)) for row in rows]
        return found

    async def snapshot(self) -> set[str]:
        """Every row but those of the bystanders."""
        kept = set()
        for table, row in await self._everything():
            owner = [row["org_id"]] if "org_id" in row else row.values()
            if table in LOOPS_OWN or {value[-32:] for value in owner if isinstance(value, str)} & self.bystanders:
                continue
            kept.add(f"{table} { {name: value for name, value in row.items() if name not in LOOPS_TOUCH} }")
        return kept

    async def ask(self, method: MethodDescriptor, request: Request, metadata: Metadata) -> Answer:
        """Calls an RPC; of a stream, only the first message counts."""
        path, raw = f"/{method.containing_service.full_name}/{method.name}", request.message.SerializeToString()
        metadata = (*metadata, ("x-request-id", "tenancy"))
        kind = self.stack.channel.unary_stream if method.server_streaming else self.stack.channel.unary_unary
        call: Any = kind(path, lambda data: data, lambda data: data)(raw, metadata=metadata, timeout=20)
        try:
            response = await call.read() if method.server_streaming else await call
            return Answer(grpc.StatusCode.OK, response if isinstance(response, bytes) else b"")
        except grpc.aio.AioRpcError as error:
            status = rpc_status.from_call(error)  # type: ignore[arg-type]
            assert status is not None, error
            info = error_details_pb2.ErrorInfo()
            for detail in status.details:
                detail.Unpack(info)
            return Answer(error.code(), status.SerializeToString(deterministic=True), info.metadata.get("permission", ""))
        finally:
            if method.server_streaming:
                call.cancel()


@asynccontextmanager
async def scene_on(folder: Path, urls: dict[str, str], market_url: str) -> AsyncIterator[Scene]:
    """A scene on empty databases; running bots are looked at so seldom that no loop writes meanwhile."""
    options = {"driver": "tests.simulators.market:MarketDriver", "driver_options": {"url": market_url}, "watch_s": 3600}
    async with running(folder, urls, deployment=options) as stack:
        scene = Scene(stack)
        await scene.set_up()
        try:
            yield scene
        finally:
            for engine in scene.engines.values():
                await engine.dispose()
