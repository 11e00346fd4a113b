"""What a handler gets: who calls, and how to reach the database as the caller."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any, TypeAlias

from buf.validate import validate_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message_factory import GetMessageClass
from sqlalchemy.ext.asyncio import AsyncSession

from clawplane.audit.v1.audit_event_pb2 import AuditOutcome
from clawplane.errors.v1.errors_pb2 import ErrorReason
from clawplane.options.v1 import options_pb2
from services.kit import errors, rates, telemetry
from services.kit.audit import Log, Note, Trail
from services.kit.audit_chain import Chain
from services.kit.auth import UNKNOWN, Authenticator, Caller
from services.kit.client import Client, client_of
from services.kit.db import ALL, Database
from services.kit.limits import Guesses, Limiter
from services.kit.proto import any_field
from services.kit.secrets import SecretBox
from services.kit.settings import KitSettings
from services.kit.standing import Word

_NO_SIDE_EFFECTS = 1
_RECHECK_S = 0.8
_MOST_ID = 64
_PREFIX, _COUNTER = os.urandom(6).hex(), count(1)
Metadata: TypeAlias = "Mapping[str, str | bytes]"


@dataclass
class Kit:
    """What every RPC of one service shares."""

    name: str
    settings: KitSettings
    db: Database
    authenticator: Authenticator
    audit_model: Any
    """The service's own AuditEvent, a subclass of AuditRow."""
    answers: Any = None
    """The service's own IdempotencyKey; without one, request ids are refused at start."""
    box: SecretBox | None = None
    in_flight: int = 0
    """Unary calls being handled."""
    taken_in: int = 0
    """Unary calls so far."""
    draining: bool = False
    turns_away: bool = False
    """Whether no new call is let in: while a server stops whose transport does not see to that."""
    streams: "set[asyncio.Task[Any]]" = field(default_factory=set)

    def __post_init__(self) -> None:
        self.limiter = Limiter(self.settings, self.name)
        self.guesses = Guesses()
        self.audit = Log(self.audit_model, Chain.of(self.settings, self.name)) if self.audit_model is not None else None
        telemetry.IN_FLIGHT.labels(self.name).set_function(lambda: self.in_flight)

    async def caller(self, plan: "Plan", metadata: Metadata) -> Caller:
        """Who calls an RPC: an operator among the users acts for the platform where the RPC is the platform's own."""
        caller = await self.authenticator.caller(metadata)
        return caller.on_platform() if plan.audience == options_pb2.AUDIENCE_PLATFORM else caller

    def known_caller(self, plan: "Plan", metadata: Metadata) -> Caller | None:
        """The same without waiting, where it is remembered."""
        caller = self.authenticator.known(metadata)
        return caller.on_platform() if caller is not None and plan.audience == options_pb2.AUDIENCE_PLATFORM else caller


@dataclass(frozen=True)
class Plan:
    """What is known of an RPC before the first call."""

    method: str
    """Full name with slashes, as gRPC says it."""
    permission: str
    audience: int
    is_read: bool
    audited: bool
    fresh: bool
    """Whether it asks for a fresh sign-in."""
    rate: str
    """How often one caller may call it: "10/minute"; empty for no limit of its own."""
    request: Descriptor
    answer: Any
    """The class of the answer."""
    takes_request_id: bool
    answer_is_secret: bool
    """Whether a field of the answer is marked ``debug_redact``."""
    has_rules: bool
    """Whether anything in the request is bound by a rule of protovalidate."""

    @classmethod
    def of(cls, descriptor: MethodDescriptor) -> "Plan":
        """From the method's descriptor; ValueError for a method without a complete rule."""
        options = descriptor.GetOptions()
        rule = options.Extensions[options_pb2.rule]
        public = rule.audience == options_pb2.AUDIENCE_PUBLIC
        if rule.audience == options_pb2.AUDIENCE_UNSPECIFIED or public == bool(rule.permission):
            raise ValueError(f"{descriptor.full_name} has no complete rule (clawplane.options.v1.rule)")
        if rule.rate:
            try:
                rates.parse(rule.rate)
            except ValueError as error:
                raise ValueError(f"{descriptor.full_name}: {error}") from None
        is_read = options.idempotency_level == _NO_SIDE_EFFECTS
        secret = any_field(descriptor.output_type, lambda field: field.GetOptions().debug_redact)
        service = descriptor.containing_service
        return cls(
            f"/{service.full_name}/{descriptor.name}", rule.permission, rule.audience, is_read,
            (not is_read or secret or rule.audited) and not rule.unaudited,
            rule.fresh, rule.rate,
            descriptor.input_type, GetMessageClass(descriptor.output_type),
            not is_read and "request_id" in descriptor.input_type.fields_by_name,
            secret,
            any_field(descriptor.input_type, _has_rule),
        )  # fmt: skip


def _has_rule(field: FieldDescriptor) -> bool:
    message, oneof = field.containing_type, field.containing_oneof
    return (
        field.GetOptions().HasExtension(validate_pb2.field)
        or (message is not None and message.GetOptions().HasExtension(validate_pb2.message))
        or (oneof is not None and oneof.GetOptions().HasExtension(validate_pb2.oneof))
    )


class Call:
    """One call, as a handler sees it."""

    __slots__ = (
        "_client", "_request_id", "_trail", "caller", "claim", "claimed", "context", "kit", "metadata", "plan", "repeats", "started",
        "word",
    )  # fmt: skip

    def __init__(self, kit: Kit, plan: Plan, metadata: Metadata, context: Any) -> None:
        self.started = time.perf_counter()
        self.kit, self.plan, self.metadata, self.context = kit, plan, metadata, context
        self.caller = UNKNOWN
        """Who calls; UNKNOWN until the credential was found to hold."""
        self._trail: Trail | None = None
        self._client: Client | None = None
        self._request_id = ""
        self.claim: Callable[[str], Any] | None = None
        """Makes the row that claims the request id, from the resource's id."""
        self.claimed = False
        self.repeats = False
        """Whether the answer is the stored one of an earlier call."""
        self.word: Word | None = None
        """See ``stands_by``."""

    @property
    def request_id(self) -> str:
        """What the call is called in logs and the audit: the caller's own name for it, else a new one, made when it is first asked for."""
        if not self._request_id:
            value = self.metadata.get("x-request-id")
            own = isinstance(value, str) and 0 < len(value) <= _MOST_ID and value.isascii() and value.isprintable()
            self._request_id = str(value) if own else f"{_PREFIX}-{next(_COUNTER)}"
        return self._request_id

    @property
    def trail(self) -> Trail:
        """What is to be audited; made when it is first asked for."""
        if self._trail is None:
            self._trail = Trail()
        return self._trail

    @property
    def org_id(self) -> str:
        """The organization that the call acts in; InvalidState for services and operators, who act in none."""
        if not self.caller.org_id:
            raise errors.InvalidState(
                "this call acts within an organization: use a token that acts for a user",
                reason=ErrorReason.ERROR_REASON_USER_REQUIRED,
            )
        return self.caller.org_id

    @property
    def client(self) -> Client:
        """Where the call comes from; found out when it is first asked for."""
        if self._client is None:
            self._client = client_of(self.context.peer() or "", self.metadata, self.kit.authenticator)
        return self._client

    def audit(
        self, resource_id: str, *, org_id: str = "", before: Any = None, after: Any = None, project_id: str | None = None, subject: str = ""
    ) -> None:
        """What the audit row of this call says beside who and what. ``before`` and ``after`` must hold no secret (``audit.diff`` sees to
        that). ``subject`` is for public RPCs: who the caller turned out to be."""
        self.trail.own = Note(resource_id, org_id, before, after, project_id, subject)

    def audit_elsewhere(self, org_id: str, resource_id: str, *, before: Any = None, after: Any = None) -> None:
        """One more row, for another organization in which this unit of work changes something."""
        self.trail.elsewhere.append(Note(resource_id, org_id, before, after))

    @property
    def owes_audit(self) -> bool:
        """Whether the call is to be audited and nothing that it did has carried its row so far."""
        return self.plan.audited and not self.trail.is_written

    async def write_audit(self) -> None:
        """The row of a call that wrote nothing else: of a read, or of a change that was made before."""
        async with self.kit.db.transaction(ALL) as session:
            await self._audit_into(session, [self.trail.own])
        self.trail.is_written = True

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncSession]:
        """A unit of work of the caller's organization; the first one of a writing RPC carries the audit row."""
        self.trail.elsewhere.clear()
        async with self.kit.db.transaction(self.caller.tenant) as session:
            yield session
            await self._write_along(session)
        self._done()

    def stands_by(self, word: Word) -> None:
        """The answer may be given again to every caller who sends the same bytes, without the handler, each time that its word holds.
        For reads of the platform alone, whose answers are the same for all who may ask."""
        if not self.plan.is_read or self.plan.audited or self.plan.audience != options_pb2.AUDIENCE_PLATFORM:
            raise ValueError(f"an answer of {self.plan.method} cannot stand: it is no unaudited read of the platform")
        self.word = word

    def sees(self, org_id: str) -> bool:
        """Whether the caller's tenant is this organization, or all of them. For rows that no session has filtered."""
        return self.caller.tenant in (ALL, org_id)

    def permit(self) -> None:
        """PermissionDenied when the caller lacks what the RPC asks for."""
        if self.plan.audience == options_pb2.AUDIENCE_PLATFORM and not self.caller.is_platform:
            raise errors.PermissionDenied(self.plan.permission)
        if not self.caller.may(self.plan.permission):
            raise errors.PermissionDenied(self.plan.permission)
        if self.plan.fresh and not self.caller.is_platform and self.caller.fresh_until < time.time():
            raise errors.StepUpRequired()

    async def ticks(self, every_s: float) -> AsyncIterator[None]:
        """The beats of a stream. Once a second it is checked again that the caller may: what was taken away ends the stream."""
        checked = time.monotonic()
        while True:
            yield
            await asyncio.sleep(every_s)
            if time.monotonic() - checked >= _RECHECK_S:
                caller = await self.kit.caller(self.plan, self.metadata)
                if caller.tenant != self.caller.tenant:
                    raise errors.Unauthenticated()
                self.caller, checked = caller, time.monotonic()
                self.permit()

    def read(self) -> Any:
        """A session for reading as the caller."""
        return self.kit.db.read(self.caller.tenant)

    async def run(self, work: Callable[[AsyncSession], Awaitable[Any]], tenant: str = "") -> Any:
        """As ``transaction``, repeated when two units of work clash; ``work`` may run several times. ``tenant`` is for public RPCs, whose
        caller is known only once the work has found out; elsewhere it is the caller's."""

        async def audited(session: AsyncSession) -> Any:
            self.trail.elsewhere.clear()
            result = await work(session)
            await self._write_along(session)
            return result

        result = await self.kit.db.run(audited, tenant or self.caller.tenant)
        self._done()
        return result

    def _done(self) -> None:
        self.trail.is_written = True
        self.trail.elsewhere.clear()
        self.claimed = self.claim is not None

    async def _write_along(self, session: AsyncSession) -> None:
        """What a transaction of a call carries beside its change: the first one the audit row and the claim of the request id."""
        trail = self.trail
        if self.claim is not None and not self.claimed:
            session.add(self.claim(trail.own.resource_id))
        notes = [trail.own, *trail.elsewhere] if self.owes_audit else trail.elsewhere
        if notes:
            await self._audit_into(session, notes)

    async def _audit_into(self, session: AsyncSession, notes: list[Note]) -> None:
        assert self.kit.audit is not None
        outcome = AuditOutcome.AUDIT_OUTCOME_READ if self.plan.is_read else AuditOutcome.AUDIT_OUTCOME_DONE
        common: dict[str, Any] = {"method": self.plan.method, "request_id": self.request_id, "ip": self.client.ip}
        common["outcome"] = AuditOutcome.AUDIT_OUTCOME_REPEATED if self.repeats else outcome
        await self.kit.audit.write(session, notes, self.caller, **common)
