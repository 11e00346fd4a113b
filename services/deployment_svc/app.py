"""The deployment service: what it serves and what runs beside."""

import importlib
from datetime import timedelta
from functools import partial
from typing import Any

from clawplane.deployment.v1 import (
    audit_service_pb2_grpc,
    blacklist_service_pb2_grpc,
    deployment_service_pb2_grpc,
    model_call_service_pb2_grpc,
    payment_service_pb2_grpc,
    price_service_pb2_grpc,
    provider_service_pb2_grpc,
    quota_service_pb2_grpc,
    sandbox_service_pb2_grpc,
    usage_reservation_service_pb2_grpc,
    usage_service_pb2_grpc,
    webhook_service_pb2_grpc,
)
from services.deployment_svc.audit.service import AuditService
from services.deployment_svc.base import AuditEvent, AuditHead, IdempotencyKey, KeyHolder, SecretCanary
from services.deployment_svc.blacklist.models import BlacklistEntry
from services.deployment_svc.blacklist.service import BlacklistService
from services.deployment_svc.claw_keys import repository as claw_keys
from services.deployment_svc.deployments import repository as deployments
from services.deployment_svc.deployments import secrets
from services.deployment_svc.deployments.create import Creator
from services.deployment_svc.deployments.models import Deployment
from services.deployment_svc.deployments.orphans import Orphans
from services.deployment_svc.deployments.reaper import Reaper
from services.deployment_svc.deployments.reconcile import Reconciler
from services.deployment_svc.deployments.service import DeploymentService
from services.deployment_svc.deployments.spend_cap import SpendCap
from services.deployment_svc.deployments.steps import Steps
from services.deployment_svc.markets.akash import AkashDriver
from services.deployment_svc.markets.console import Console
from services.deployment_svc.markets.driver import Driver
from services.deployment_svc.markets.local import LocalDriver
from services.deployment_svc.model_calls.service import ModelCallService
from services.deployment_svc.organizations.reconcile import OrganizationReconciler
from services.deployment_svc.payments.checkout import Checkout
from services.deployment_svc.payments.links import Links
from services.deployment_svc.payments.polar import PolarCheckout
from services.deployment_svc.payments.reconcile import PaymentChecker
from services.deployment_svc.payments.service import PaymentService
from services.deployment_svc.prices import seed
from services.deployment_svc.prices.repository import Prices
from services.deployment_svc.prices.service import PriceService
from services.deployment_svc.providers.models import ProviderOutcome
from services.deployment_svc.providers.service import ProviderService
from services.deployment_svc.quotas.service import QuotaService
from services.deployment_svc.quotas.watch import Watcher
from services.deployment_svc.sandbox.checkout import SandboxCheckout
from services.deployment_svc.sandbox.service import SandboxService
from services.deployment_svc.settings import DeploymentSettings
from services.deployment_svc.usage import retention
from services.deployment_svc.usage.ledger import Ledger
from services.deployment_svc.usage.service import UsageService
from services.deployment_svc.usage_reservations.engine import Reservations
from services.deployment_svc.usage_reservations.models import UsageReservation
from services.deployment_svc.usage_reservations.service import UsageReservationService
from services.deployment_svc.users import PERMISSIONS, Users, entitlements_changed, keys_changed
from services.deployment_svc.webhooks.service import WebhookService
from services.kit import audit_sealer, clients, idempotency, known_keys, partitions, purge, vault
from services.kit.auth import Authenticator
from services.kit.call import Kit
from services.kit.db import Database
from services.kit.feed import Follower, Remembered, remembered_access, remembered_sessions
from services.kit.holders import Holder
from services.kit.loops import Loop
from services.kit.sealed import Blind, Hashed, Sealed, Store
from services.kit.secrets import SecretBox
from services.kit.server import App
from services.kit.tokens import TokenSigner

PARTITIONED = {"usage_events": "month", "audit_events": "created_at"}

KEPT = {IdempotencyKey: timedelta(0), BlacklistEntry: timedelta(days=90), ProviderOutcome: timedelta(0)}
"""How long rows stay after they have ended."""

SEALED = [
    Sealed(Deployment.channel_token_sealed, lambda row: secrets.place(row.id, "channel_token")),
    Sealed(Deployment.channel_api_key_sealed, lambda row: secrets.place(row.id, "channel_api_key")),
    Sealed(Deployment.manifest_sealed, lambda row: secrets.place(row.id, "manifest")),
    Sealed(IdempotencyKey.answer_sealed, lambda row: idempotency.place(row.key)),
]
BLIND = [Blind(Deployment.fingerprint, Deployment.fingerprint_key_id, secrets.fingerprint_again)]
HASHED: list[Hashed] = []
"""What is under keys, so that a rotation finds it."""


def store(settings: DeploymentSettings) -> Store:
    """What `clawplane keys` works on."""
    return Store(Database(settings.database_url, settings, "deployment_svc"), KeyHolder, SecretCanary, [*SEALED, *BLIND], HASHED)


def create_app(settings: DeploymentSettings) -> App:
    """The table of contents of the deployment service."""
    db = Database(settings.database_url, settings, "deployment_svc")
    box = vault.open_box(settings)
    holder = Holder(db, box, KeyHolder, SecretCanary)
    to_users = clients.channel(settings.user_target)
    users = Users(to_users, clients.ServiceCredential(TokenSigner(settings), PERMISSIONS))
    follower = Follower(users.watch)
    entitlements = Remembered(follower, users.entitlements, entitlements_changed)
    links = Links(db, settings, _checkouts(db, settings))
    driver = _driver(settings)
    checker = PaymentChecker(links)
    reconciler = Reconciler(Steps(db, settings, box, driver, users), lambda: provisioning.wake())  # noqa: PLW0108 - it is made below

    provisioning = Loop("provisioning", reconciler.tick, settings.poll_s)
    kit, uses = _kit(settings, db, box, users, follower)
    sealer = audit_sealer.of(kit, AuditHead)
    prices = Prices(db, settings.usage_currency)
    ledger = Ledger(db, prices, settings.usage_waiting, batched=settings.usage_batched)
    reservations = Reservations(db, ledger, entitlements, settings.model_call_s)
    organizations = OrganizationReconciler(db, users, links, provisioning.wake)
    partition = partial(partitions.ensure, db, PARTITIONED)
    kept = KEPT | {UsageReservation: timedelta(days=settings.usage_late_days)}
    add_sandbox = [(sandbox_service_pb2_grpc.add_SandboxServiceServicer_to_server, SandboxService())]
    return App(
        kit=kit,
        services=[
            (
                deployment_service_pb2_grpc.add_DeploymentServiceServicer_to_server,
                DeploymentService(Creator(settings, box, links, entitlements), links, deployments.loader(db), provisioning.wake),
            ),
            (payment_service_pb2_grpc.add_PaymentServiceServicer_to_server, PaymentService(settings, provisioning.wake)),
            (webhook_service_pb2_grpc.add_WebhookServiceServicer_to_server, WebhookService(settings, provisioning.wake)),
            (blacklist_service_pb2_grpc.add_BlacklistServiceServicer_to_server, BlacklistService()),
            (provider_service_pb2_grpc.add_ProviderServiceServicer_to_server, ProviderService(settings)),
            (usage_service_pb2_grpc.add_UsageServiceServicer_to_server, UsageService(ledger, settings)),
            (price_service_pb2_grpc.add_PriceServiceServicer_to_server, PriceService(prices)),
            (quota_service_pb2_grpc.add_QuotaServiceServicer_to_server, QuotaService(db, ledger, entitlements)),
            (usage_reservation_service_pb2_grpc.add_UsageReservationServiceServicer_to_server, UsageReservationService(reservations)),
            (audit_service_pb2_grpc.add_AuditServiceServicer_to_server, AuditService()),
            (model_call_service_pb2_grpc.add_ModelCallServiceServicer_to_server, ModelCallService(reservations, settings)),
            *(add_sandbox if settings.sandbox_enabled else []),
        ],
        loops=[
            provisioning,
            # Nothing wakes it, and nothing is due to the second.
            Loop("payment-checks", checker.tick, max(settings.poll_s, min(settings.payment_check_s, settings.refund_check_s) / 100)),
            Loop("reaper", Reaper(db, settings).tick, settings.reap_s),
            Loop("orphans", Orphans(db, settings, driver).tick, settings.sweep_s),
            Loop("organizations", organizations.tick, settings.poll_s, endless=True),
            Loop("reservations", reservations.tick, min(10, settings.model_call_s / 10)),
            Loop("limits", Watcher(db, ledger, entitlements).tick, settings.limits_s),
            Loop("spend-caps", SpendCap(db, settings.usage_currency, provisioning.wake).tick, settings.limits_s),
            sealer.loop(), retention.keeper(db, settings.usage_retention_days),
            partitions.keeper(db, PARTITIONED), purge.purger(db, kept), idempotency.forgetter(db, IdempotencyKey),
            Loop("key-uses", uses.flush, known_keys.FLUSH_S), holder.loop,
        ],
        starters=[holder.join, lambda: seed.fill(prices, settings.prices_file), partition, sealer.adopt, follower.start],
        closers=[follower.stop, reconciler.drain, sealer.finish, driver.shutdown, uses.flush_all, to_users.close, holder.leave],
    )


def _kit(
    settings: DeploymentSettings, db: Database, box: SecretBox, users: Users, follower: Follower
) -> tuple[Kit, known_keys.Uses]:
    """What every RPC shares, and the uses of keys that the user service is still to be told."""
    access = remembered_access(follower, users.access)
    known, uses = known_keys.remembered_keys(follower, users.key, keys_changed), known_keys.Uses(users.keys_used)
    of_bots = claw_keys.resolver(known, uses, claw_keys.old_resolver(db, box, access))
    of_keys = {known_keys.PEOPLE: known_keys.resolver(known, uses), known_keys.BOTS: of_bots}
    authenticator = Authenticator(settings, access, of_keys, remembered_sessions(follower, users.session))
    return Kit("deployment_svc", settings, db, authenticator, AuditEvent, IdempotencyKey, box), uses


def _checkouts(db: Database, settings: DeploymentSettings) -> dict[str, Checkout]:
    """The payment providers that this process can talk to; rows keep the one that they were made with."""
    checkouts: dict[str, Checkout] = {}
    if settings.sandbox_enabled:
        checkouts["sandbox"] = SandboxCheckout(db, settings)
    if settings.stripe_api_key.get_secret_value() or settings.payment_provider == "stripe":
        # The library takes a fifth of a second to load, which the embedded default need not pay.
        from services.deployment_svc.payments.stripe import StripeCheckout

        checkouts["stripe"] = StripeCheckout(settings)
    if settings.polar_product_id or settings.payment_provider == "polar":
        checkouts["polar"] = PolarCheckout(settings)
    return checkouts


def _driver(settings: DeploymentSettings) -> Driver:
    model_url = settings.model_url or f"{settings.public_url}/v1"
    if settings.driver == "local":
        return LocalDriver(settings.data_dir / "local", model_url, dict(settings.local_providers))
    if settings.driver == "akash":
        return _akash(settings, model_url)
    module, _, name = settings.driver.partition(":")
    factory: Any = getattr(importlib.import_module(module), name or "create", None)
    if factory is None:
        raise ValueError('CLAWPLANE_DRIVER must be "local", "akash" or "package.module:factory"')
    driver: Driver = factory(**settings.driver_options)
    return driver


def _akash(settings: DeploymentSettings, model_url: str) -> Driver:
    assert settings.akash_bot is not None
    console = Console(settings.akash_api_base, settings.akash_api_key.get_secret_value(), settings.step_timeout_s)
    return AkashDriver(
        console, settings.akash_bot, model_url, block_s=settings.akash_block_s, deposit_usd=settings.akash_deposit_usd,
        health_path=settings.akash_health_path,
    )  # fmt: skip
