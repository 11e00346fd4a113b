"""A victim with a row of every kind, strangers of every kind, and what the databases hold."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import grpc
import sqlalchemy as sa
from google.protobuf.descriptor import MethodDescriptor
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from clawplane.audit.v1.audit_event_pb2 import AUDIT_OUTCOME_READ
from clawplane.deployment.v1 import (
    blacklist_service_pb2,
    deployment_pb2,
    deployment_service_pb2,
    model_call_service_pb2,
    price_pb2,
    price_service_pb2,
    quota_pb2,
    quota_service_pb2,
    usage_event_pb2,
    usage_reservation_service_pb2,
    usage_service_pb2,
)
from clawplane.user.v1 import api_key_service_pb2, invitation_service_pb2, user_pb2, user_service_pb2
from clawplane.user.v1.organization_pb2 import Role
from services.deployment_svc.base import Base as DeploymentBase
from services.deployment_svc.deployments.models import Deployment
from services.deployment_svc.payments.models import PaymentSession
from services.deployment_svc.usage.models import UsageEvent
from services.kit import ids, keys
from services.kit.columns import Identifier, Tenant, now
from services.kit.db import ALL, Database
from services.kit.devkeys import settings_for
from services.kit.settings import KitSettings
from services.user_svc.api_keys.models import ApiKey
from services.user_svc.base import Base as UserBase
from services.user_svc.invitations import repository as invitations
from services.user_svc.invitations.models import Invitation
from services.user_svc.organizations.models import Membership
from services.user_svc.organizations.roles import OF_PEOPLE_ALONE, PERMISSIONS
from services.user_svc.sessions import repository as sessions
from services.user_svc.sessions.models import Session
from services.user_svc.users.models import User
from tests.harness import Metadata, Person, Stack, eventually, running
from tests.valid import LISTED, Maker, Request

BASES = {"user_svc": UserBase, "deployment_svc": DeploymentBase}
NOBODYS = {"feed_cursors", "key_holders", "mail_messages", "attempts", "one_time_codes", "audit_heads"}
"""Tables that hold where a loop is, what it has to send, or hashes alone, and nothing that a tenant can ask for."""
IDLE = timedelta(days=3)
QUIET_S = 0.25
"""A stream that says nothing for so long has let the caller in."""
SPARE = 4
"""So many victims are made at once: most of it is waiting for their bots."""
LOOPS_TOUCH = {"due_at", "lease_until", "lease_token", "last_seen_at", "last_used_at", "seal_number", "seal"}
FOR_KEYS = PERMISSIONS[Role.ROLE_OWNER] - OF_PEOPLE_ALONE
"""All that a key can be given."""
WEAK = "entitlements.get"
"""All that the victim's other keys may do."""


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
    rows: dict[Any, list[dict[str, Any]]]
    """Every row that is his or mentions what is his, by table."""
    tokens: tuple[str, ...] = ()
    """Of his session, and of an invitation that he got."""
    key: str = ""
    """Of his API key."""

    def values(self, name: str) -> list[Any]:
        """The texts and numbers in the columns of a name; of a token, which no column holds, the text itself; of an event of usage its id."""
        if name == "token":
            return list(self.tokens)
        if name == "event_id":
            return [row["id"] for row in self.rows.get(UsageEvent.__table__, [])]
        found = (row.get(name) for rows in self.rows.values() for row in rows)
        return list(dict.fromkeys(value for value in found if isinstance(value, str | int) and value))

    def row(self, prefix: str, service: str) -> str:
        """An id of a kind, of the service's own table where both have one; "" for a kind that has no table yet."""
        bases = [BASES[service], *BASES.values()]
        kind = next((table for base in bases for table in base.metadata.tables.values() if prefix_of(table) == prefix), None)
        if kind is None:
            return ""
        rows = self.rows.get(kind)
        assert rows, f"the victim has no row in {kind.name} ({prefix}_...): make one in Scene.plant of tests/tenancy.py"
        return str(rows[0]["id"])

    def requests(self, method: MethodDescriptor) -> list[Request]:
        """Every form of a request, about this victim."""
        service = f"{method.full_name.split('.')[1]}_svc"
        return Maker(method, lambda prefix: self.row(prefix, service), self.values).requests()

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
    spare: list[Victim] = field(default_factory=list)

    async def set_up(self) -> None:
        """The victim, and everybody who tries."""
        self.engines = {name: create_async_engine(url) for name, url in self.stack.urls.items()}
        self.settings = KitSettings(**settings_for(self.stack.keys, "deployment_svc"))  # type: ignore[arg-type]
        self.host = await self._bystander()
        self.stranger, self.guest = await self._bystander(), await self._bystander()
        for person in (self.stranger, self.guest):
            await self.stack.order(person)
        self.claw_key = await self.stack.claw_key(await self.stack.order(self.stranger))
        self.strangers_key = self.bearer((await self.stack.key(self.stranger, *FOR_KEYS)).key)
        self.victim = await self.plant()
        # Of the victim himself, were they not over.
        self.over = [await self._ended(revoked_at=now()), await self._ended(expires_at=now()), await self._ended(last_seen_at=now() - IDLE)]
        self.weak_key, *ended = [await self._keys_of_victim(number) for number in range(3)]
        self.over += ended
        self.elsewhere = self.at(self.guest.metadata, self.guest.org_id)
        people = {Role.ROLE_VIEWER: self.guest, Role.ROLE_DEVELOPER: await self._bystander(), Role.ROLE_ADMIN: await self._bystander()}
        self.members = {role: await self.join(self.victim, role, person) for role, person in people.items()}

    async def _bystander(self) -> Person:
        person = await self.stack.person()
        self.bystanders |= {person.user.id[-32:], person.org_id[-32:]}
        return person

    async def join(self, victim: Victim, role: int, person: Person | None = None) -> Metadata:
        """Somebody's credential in the victim's organization, with a role there."""
        person = person or await self._bystander()
        db = Database(self.stack.urls["user_svc"], self.settings, "test")
        async with db.transaction(ALL) as session:
            session.add(Membership(org_id=victim.person.org_id, user_id=person.user.id, role=role))
        await db.close()
        return self.at(person.metadata, victim.person.org_id)

    async def _keys_of_victim(self, number: int) -> Metadata:
        """A key with one permission, which is expired when it is the second, and revoked when it is the third."""
        made = await self.stack.key(self.victim.person, WEAK)
        if number == 1:
            async with self.engines["user_svc"].begin() as connection:
                ended = sa.update(ApiKey).where(ApiKey.id == made.api_key.id).values(expires_at=now() - timedelta(seconds=1))
                await connection.execute(ended)
        if number == 2:
            revoke = api_key_service_pb2.RevokeApiKeyRequest(id=made.api_key.id)
            await self.stack.api_keys.RevokeApiKey(revoke, metadata=self.victim.person.metadata)
        return self.bearer(made.key)

    @staticmethod
    def bearer(text: str) -> Metadata:
        """Metadata with a credential."""
        return (("authorization", f"Bearer {text}"),)

    @staticmethod
    def at(metadata: Metadata, org_id: str) -> Metadata:
        """The same caller in another organization."""
        return (*metadata, ("clawplane-org", org_id))

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
        # Before a bot has one, so that it is the first.
        key = await stack.key(person, "usage.read")
        d = await self.order(person, "claude-opus-4.5")
        assert (await stack.sandbox_act(d, "pay")).status_code == 200
        await stack.until(d.id, deployment_pb2.STATE_ACTIVE)
        # A wish that is not paid yet.
        await self._at_polar(await self.order(person, LISTED["model"]), f"checkout-{tag}")
        event = usage_event_pb2.UsageEvent(id=str(ids.uuid7()), provider="openai", model="gpt-3.2", tokens_in=1, deployment_id=d.id)
        await stack.usage.RecordUsage(usage_service_pb2.RecordUsageRequest(event=event), metadata=person.metadata)
        await self._limited(person)
        # The first one is the victim's own to settle; that of the endpoint is not.
        held = usage_reservation_service_pb2.ReserveUsageRequest(provider="openai", model="gpt-3.2", tokens_in=1)
        await stack.reservations.ReserveUsage(held, metadata=person.metadata)
        opened = model_call_service_pb2.OpenModelCallRequest(provider="openai", model="gpt-3.2", tokens_in_estimate=1, max_tokens=1)
        await stack.model_calls.OpenModelCall(opened, metadata=person.metadata)
        said = user_service_pb2.SyncClerkUserRequest(external_id=tag, clerk_user_id=f"clerk_{tag}", email=user.email, full_name="Victim")
        said.occurred_at.GetCurrentTime()
        await stack.users.SyncClerkUser(said, metadata=stack.operator)
        excluded = blacklist_service_pb2.AddBlacklistEntryRequest(provider_address=f"provider-{tag}", reason=f"asked for by {user.email}")
        await stack.blacklist.AddBlacklistEntry(excluded, metadata=stack.operator)
        price = price_pb2.Price(provider="openai", model=user.email, tokens_in="1", tokens_out="1")
        await stack.prices.CreatePrice(price_service_pb2.CreatePriceRequest(price=price), metadata=stack.operator)
        asked = invitation_service_pb2.CreateInvitationRequest(email=f"{tag}@guest.example", role=Role.ROLE_VIEWER)
        await stack.invitations.CreateInvitation(asked, metadata=person.metadata)
        tokens = (await self._signed_in(person), await self._invited(person))
        return Victim(person, await self._rows_of(person), tokens, key.key)

    async def _limited(self, person: Person) -> None:
        """A limit that is used up, and what is told of that."""
        limit = quota_pb2.Quota(
            org_id=person.org_id, scope=quota_pb2.QUOTA_SCOPE_ORGANIZATION, period=quota_pb2.QUOTA_PERIOD_MONTH,
            unit=quota_pb2.QUOTA_UNIT_TOKENS, amount="1", soft=True,
        )  # fmt: skip
        await self.stack.quotas.SetQuota(quota_service_pb2.SetQuotaRequest(quota=limit), metadata=self.stack.operator)

        async def told() -> bool:
            asked = quota_service_pb2.ListQuotaNoticesRequest()
            return len((await self.stack.quotas.ListQuotaNotices(asked, metadata=person.metadata)).notices) == 3

        await eventually(told)

    async def _invited(self, person: Person) -> str:
        """The token of an invitation into somebody else's organization."""
        db = Database(self.stack.urls["user_svc"], self.settings, "test")
        async with db.transaction(ALL) as session:
            row = Invitation(org_id=self.host.org_id, invited_by=self.host.user.id, email=person.user.email, role=Role.ROLE_VIEWER)
            token = invitations.issue(row, invitations.LIFETIME, "test")
            session.add(row)
        await db.close()
        return token

    async def _ended(self, **values: Any) -> Metadata:
        """The credential of a session of the victim's that has ended."""
        token = await self._signed_in(self.victim.person)
        key = keys.parse(token, "sess", "ses")
        assert key is not None
        async with self.engines["user_svc"].begin() as connection:
            await connection.execute(sa.update(Session).where(Session.id == key.id).values(**values))
        return self.bearer(token)

    async def sacrifice(self) -> Victim:
        """A victim that a test may change."""
        if not self.spare:
            self.spare = await asyncio.gather(*(self.plant(sacrificed=True) for _ in range(SPARE)))
        return self.spare.pop()

    async def _signed_in(self, person: Person) -> str:
        """The token of a new session."""
        db = Database(self.stack.urls["user_svc"], self.settings, "test")
        async with db.transaction(ALL) as session:
            _, token = sessions.start(session, await session.get_one(User, person.user.id), "test")
        await db.close()
        return token

    async def _at_polar(self, d: deployment_pb2.Deployment, checkout_id: str) -> None:
        """A page at another provider, which this stack does not talk to."""
        db = Database(self.stack.urls["deployment_svc"], self.settings, "test")
        async with db.transaction(d.org_id) as session:
            (await session.get_one(Deployment, d.id)).polar_id = checkout_id
            session.add(
                PaymentSession(
                    deployment_id=d.id, provider="polar", external_id=checkout_id, link_number=99, status="expired", amount_minor=1,
                    currency="usd", created_at=now(), updated_at=now(),
                )
            )  # fmt: skip
        await db.close()

    async def order(self, person: Person, model: str) -> deployment_pb2.Deployment:
        """Orders a bot that talks on the web, which needs no token."""
        request = deployment_service_pb2.CreateDeploymentRequest(model=model, channel=deployment_pb2.CHANNEL_WEB)
        d: deployment_pb2.Deployment = await self.stack.deployments.CreateDeployment(request, metadata=person.metadata)
        return d

    async def _rows_of(self, person: Person) -> dict[Any, list[dict[str, Any]]]:
        everything = [(table, row, repr(row)) for table, row in await self._everything()]
        marks = {person.org_id, person.user.id, person.user.email}
        # What belongs to him, then what only mentions a thing of his, as the event of a provider does.
        marks |= {str(row["id"]) for _, row, text in everything if "id" in row and any(mark in text for mark in marks)}
        found: dict[Any, list[dict[str, Any]]] = {}
        for table, row, text in everything:
            if any(mark in text for mark in marks):
                found.setdefault(table, []).append(row)
        return found

    async def _everything(self) -> list[tuple[Any, dict[str, Any]]]:
        found = []
        for service, base in BASES.items():
            async with self.engines[service].connect() as connection:
                for table in base.metadata.sorted_tables:
                    rows = await connection.execute(sa.select(table).order_by(*table.primary_key))
                    found += [(table, dict(row._mapping)) for row in rows]
        return found

    async def snapshot(self) -> set[str]:
        """Every row but those of the bystanders, and of the organizations that they have made."""
        kept, everything = set(), await self._everything()
        memberships = [row for table, row in everything if table is Membership.__table__]
        theirs = {row["org_id"][-32:] for row in memberships if row["role"] == Role.ROLE_OWNER and row["user_id"][-32:] in self.bystanders}
        for table, row in everything:
            owner = [row["org_id"]] if "org_id" in row else row.values()
            if table.name in NOBODYS or {value[-32:] for value in owner if isinstance(value, str)} & (self.bystanders | theirs):
                continue
            # What is over is purged at any moment.
            if row.get("expires_at") is not None and row["expires_at"] <= now():
                continue
            # What somebody did with what is his own, wherever he acted, and that a member has read what he may.
            own = table.name == "audit_events" and {row["subject"][-32:], row["resource_id"][-32:]} <= self.bystanders
            if own or (table.name == "audit_events" and row["outcome"] == AUDIT_OUTCOME_READ):
                continue
            kept.add(f"{table.name} { {name: value for name, value in row.items() if name not in LOOPS_TOUCH} }")
        return kept

    async def audit_rows(self, method: MethodDescriptor, request_id: str) -> list[dict[str, Any]]:
        """What the audit log has of a call."""
        service = f"{method.full_name.split('.')[1]}_svc"
        table = BASES[service].metadata.tables["audit_events"]
        async with self.engines[service].connect() as connection:
            return [dict(row._mapping) for row in await connection.execute(sa.select(table).where(table.c.request_id == request_id))]

    async def ask(
        self, method: MethodDescriptor, request: Request, metadata: Metadata, quiet_s: float = QUIET_S, request_id: str = "tenancy"
    ) -> Answer:
        """Calls an RPC; of a stream, only the first message counts."""
        path, raw = f"/{method.containing_service.full_name}/{method.name}", request.message.SerializeToString()
        metadata = (*metadata, ("x-request-id", request_id))
        # What ends by itself says at least that.
        quiet_s = 20 if method.name.startswith("Export") else quiet_s
        kind = self.stack.channel.unary_stream if method.server_streaming else self.stack.channel.unary_unary
        call: Any = kind(path, lambda data: data, lambda data: data)(raw, metadata=metadata, timeout=20)
        try:
            response = await asyncio.wait_for(call.read(), quiet_s) if method.server_streaming else await call
            return Answer(grpc.StatusCode.OK, response if isinstance(response, bytes) else b"")
        except TimeoutError:
            return Answer(grpc.StatusCode.OK, b"")
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
    options = {"driver": "tests.simulators.market:MarketDriver", "driver_options": {"url": market_url}, "watch_s": 3600, "poll_s": 0.3, "limits_s": 0.2}
    async with running(folder, urls, deployment=options | {"audit_seal_s": 3600}, user={"audit_seal_s": 3600}) as stack:
        scene = Scene(stack)
        await scene.set_up()
        try:
            yield scene
        finally:
            for engine in scene.engines.values():
                await engine.dispose()
