"""A month of work for the pages to show: bots in every state, usage of several models, providers that fail."""

import random
import uuid
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from clawplane.deployment.v1 import deployment_pb2, provider_pb2, quota_pb2, quota_service_pb2, usage_event_pb2, usage_service_pb2
from clawplane.user.v1 import (
    api_key_pb2,
    api_key_service_pb2,
    invitation_service_pb2,
    member_service_pb2,
    organization_pb2,
    organization_service_pb2,
    user_pb2,
    user_service_pb2,
)
from services.deployment_svc.deployments.models import Deployment, DeploymentEvent
from services.deployment_svc.providers.models import Provider, ProviderOutcome
from services.kit import ids
from services.kit.columns import now
from services.kit.db import ALL, Database
from services.kit.devkeys import settings_for
from services.kit.settings import KitSettings
from services.user_svc.organizations.models import Membership
from tests.harness import Person, Stack
from tests.usage_rows import row, store

MODELS = {"claude-opus-4.5": "anthropic", "gpt-3.2": "openai", "gemini-3-flash": "google", "minimax-m2.5": "minimax"}
_PROVIDERS = {
    "akash1q8s0kz7v4n2e6f3d5j9xw": (412, 61, 60, 1, 0, ""),
    "akash1t3m5y8r2c6u9a4l7h0pgx": (388, 44, 41, 2, 1, "The bot did not answer within 10 minutes of its lease."),
    "akash1w7d9f2k5s8z3v6b0n4mqe": (205, 19, 14, 5, 2, "The lease was closed by the provider."),
    "akash1x2c4v6b8n0m1a3s5d7fgh": (97, 0, 0, 0, 0, ""),
}


def database(stack: Stack, service: str) -> Database:
    """A service's database, opened apart from the service."""
    return Database(stack.urls.get(service) or f"sqlite+aiosqlite:///{stack.data_dir / f'{service}.db'}", KitSettings(**settings_for(stack.keys, service)), "test")  # type: ignore[arg-type]


async def plant(stack: Stack, operator: Person) -> None:
    """Everything; what can be made by an RPC is made by one."""
    for name in ("ada.lovelace", "grace.hopper", "alan.turing", "katherine.johnson", "linus.pauling"):
        wish = user_pb2.User(email=f"{name}@example.com", full_name=name.replace(".", " ").title())
        made = await stack.users.CreateUser(user_service_pb2.CreateUserRequest(user=wish, email_verified=name < "h"), metadata=stack.operator)
        if name.startswith("alan"):
            off = user_service_pb2.UpdateUserAccountRequest(id=made.id, is_active=False)
            await stack.users.UpdateUserAccount(off, metadata=stack.operator)
    db = database(stack, "deployment_svc")
    async with db.transaction(ALL) as session:
        planted = _deployments(session, operator)
        _providers(session, planted)
    await db.close()
    await _usage(stack, operator, planted)


async def company(stack: Stack, owner: Person) -> tuple[str, str]:
    """An organization with members, open invitations and keys, which the person owns. Returns the ids of it and of a key that was rotated."""
    made = await stack.organizations.CreateOrganization(
        organization_service_pb2.CreateOrganizationRequest(organization=organization_pb2.Organization(name="Northwind Labs")), metadata=owner.metadata
    )
    inside = (*owner.metadata, ("clawplane-org", made.id))
    names = ("Ada Lovelace", "Grace Hopper", "Katherine Johnson", "Linus Pauling")
    roles = (organization_pb2.ROLE_ADMIN, organization_pb2.ROLE_DEVELOPER, organization_pb2.ROLE_DEVELOPER, organization_pb2.ROLE_VIEWER)
    wishes = [user_pb2.User(email=f"{name.split()[0].lower()}@northwind.example", full_name=name) for name in names]
    people = [
        await stack.users.CreateUser(user_service_pb2.CreateUserRequest(user=wish, email_verified=True), metadata=stack.operator)
        for wish in wishes
    ]
    db = database(stack, "user_svc")
    async with db.transaction(ALL) as session:
        for number, (person, role) in enumerate(zip(people, roles, strict=True)):
            joined = now() - timedelta(days=60 - 14 * number)
            session.add(Membership(id=ids.new("mem"), org_id=made.id, user_id=person.id, role=role, created_at=joined, updated_at=joined))
    await db.close()
    raised = member_service_pb2.UpdateMemberRequest(user_id=people[2].id, role=organization_pb2.ROLE_VIEWER)
    await stack.members.UpdateMember(raised, metadata=inside)
    for address, role in (("alan@northwind.example", organization_pb2.ROLE_DEVELOPER), ("auditor@example.com", organization_pb2.ROLE_VIEWER)):
        await stack.invitations.CreateInvitation(invitation_service_pb2.CreateInvitationRequest(email=address, role=role), metadata=inside)
    return made.id, await _keys(stack, inside)


async def _keys(stack: Stack, inside: Any) -> str:
    few, many_ = ["deployments.get", "deployments.list"], ["deployments.get", "deployments.list", "models.call", "usage.read", "usage.record"]
    made = []
    for name, permissions, rate, days in (("Nightly report", few, "", 90), ("Support desk proxy", many_, "600/minute", 365), ("Grace's laptop", few, "60/minute", 0)):
        key = api_key_pb2.ApiKey(name=name, environment=api_key_pb2.API_KEY_ENVIRONMENT_LIVE, permissions=permissions, rate=rate)
        if days:
            key.expires_at.FromDatetime(now() + timedelta(days=days))
        made.append((await stack.api_keys.CreateApiKey(api_key_service_pb2.CreateApiKeyRequest(api_key=key), metadata=inside)).api_key.id)
    rotate = api_key_service_pb2.RotateApiKeyRequest(id=made[1], request_id=str(uuid.uuid4()))
    rotate.grace.seconds = 3600
    await stack.api_keys.RotateApiKey(rotate, metadata=inside)
    revoke = api_key_service_pb2.RevokeApiKeyRequest(id=made[2], reason="The laptop was lost")
    await stack.api_keys.RevokeApiKey(revoke, metadata=inside)
    return str(made[1])


def _deployments(session: AsyncSession, operator: Person) -> list[str]:
    states = [
        (deployment_pb2.STATE_FAILED, "Support desk", "no provider made an offer within the window, 3 attempts", deployment_pb2.CHANNEL_TELEGRAM, 26),
        (deployment_pb2.STATE_SUSPENDED, "Night watch", "", deployment_pb2.CHANNEL_DISCORD, 20),
        (deployment_pb2.STATE_CLOSED, "Launch party", "", deployment_pb2.CHANNEL_WEB, 600),
        (deployment_pb2.STATE_EXPIRED, "", "", deployment_pb2.CHANNEL_WHATSAPP, 300),
        (deployment_pb2.STATE_CANCELED, "", "", deployment_pb2.CHANNEL_TELEGRAM, 90),
    ]
    made = []
    for number, (state, name, message, channel, hours) in enumerate(states):
        d = _row(operator, now() - timedelta(hours=hours), list(MODELS)[number % len(MODELS)], state=state, display_name=name, error_message=message, channel=channel)
        session.add(d)
        session.add(DeploymentEvent(org_id=operator.org_id, deployment_id=d.id, kind="ordered", state=deployment_pb2.STATE_PENDING, message="ordered"))
        made.append(d.id)
    return made


def _row(person: Person, at: datetime, model: str, **values: Any) -> Deployment:
    return Deployment(
        id=ids.new("dep"), org_id=person.org_id, user_id=person.user.id, email=person.user.email, model=model, fingerprint=ids.uuid7().bytes * 2,
        payment_provider="sandbox", price_minor=2900, currency="usd", livemode=False, created_at=at, updated_at=at, **values,
    )  # fmt: skip


async def many(stack: Stack, person: Person, count: int) -> None:
    """As many deployments that have ended, for pages that must stay quick."""
    db = database(stack, "deployment_svc")
    async with db.transaction(ALL) as session:
        for number in range(count):
            state = (deployment_pb2.STATE_CLOSED, deployment_pb2.STATE_ACTIVE, deployment_pb2.STATE_FAILED)[number % 3]
            session.add(_row(person, now() - timedelta(minutes=number), "gpt-3.2", state=state, channel=deployment_pb2.CHANNEL_WEB, display_name=f"bot {number}"))
    await db.close()


def _providers(session: AsyncSession, deployments: list[str]) -> None:
    for number, (address, (offers, leases, readies, failures, losses, failure)) in enumerate(_PROVIDERS.items()):
        at = now() - timedelta(hours=3 * number + 1)
        session.add(
            Provider(
                address=address, offers=offers, leases=leases, readies=readies, failures=failures, losses=losses, last_offer_at=now(),
                last_ready_at=at if readies else None, last_failure_at=at if failures else None, last_failure=failure,
            )
        )  # fmt: skip
        for back in reversed(range(min(12, readies + failures))):
            good = back >= min(failures, 4)
            session.add(
                ProviderOutcome(
                    provider_address=address, deployment_id=deployments[back % len(deployments)], is_good=good,
                    kind=provider_pb2.OUTCOME_KIND_READY if back % 3 else provider_pb2.OUTCOME_KIND_LEASE, reason="" if good else failure,
                    created_at=now() - timedelta(hours=number + 5 * back), expires_at=now() + timedelta(days=30),
                )
            )  # fmt: skip


async def _usage(stack: Stack, operator: Person, deployments: list[str]) -> None:
    """Two months of it: the last one reported as bots do, the one before put there. One model has no price, and a limit is nearly reached."""
    dice = random.Random(7)
    models = MODELS | {"llama-4-scout": "akashml"}
    events, earlier, today = [], [], 0
    for back in range(58, -1, -1):
        for rank, (model, provider) in enumerate(models.items()):
            for _ in range(dice.randint(1, 6 - rank)):
                tokens = dice.randint(400, 9000) * (2 if back < 9 else 1)
                told: dict[str, Any] = {
                    "provider": provider, "model": model, "tokens_in": tokens, "tokens_out": tokens // 3, "deployment_id": deployments[rank % 2],
                    "latency_ms": int(dice.lognormvariate(6.5 + 0.4 * rank, 0.6)), "status": 1 + (dice.random() < 0.03),
                }  # fmt: skip
                when = now() - timedelta(days=back, minutes=5)
                if back > 29:
                    earlier.append(row(operator.org_id, when, user_id=operator.user.id, cost=Decimal(tokens) / 250_000 if model in MODELS else None, **told))
                    continue
                event = usage_event_pb2.UsageEvent(id=ids.uuid7().hex, **told)
                event.occurred_at.FromDatetime(when)
                events.append(event)
                today += (tokens + tokens // 3) * (when.date() == now().date())
    answer = await stack.usage.BatchRecordUsage(usage_service_pb2.BatchRecordUsageRequest(events=events), metadata=operator.metadata)
    assert answer.accepted == len(events), answer.errors
    await store(stack, earlier)
    limit = quota_pb2.Quota(
        org_id=operator.org_id, scope=quota_pb2.QUOTA_SCOPE_ORGANIZATION, period=quota_pb2.QUOTA_PERIOD_DAY, unit=quota_pb2.QUOTA_UNIT_TOKENS,
        amount=str(max(1, today * 5 // 4)), soft=True,
    )  # fmt: skip
    await stack.quotas.SetQuota(quota_service_pb2.SetQuotaRequest(quota=limit), metadata=stack.operator)
