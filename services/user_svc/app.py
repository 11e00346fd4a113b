"""The user service: what it serves and what runs beside."""

from datetime import timedelta

from clawplane.user.v1 import (
    access_service_pb2_grpc,
    change_service_pb2_grpc,
    entitlement_service_pb2_grpc,
    session_service_pb2_grpc,
    sign_in_link_service_pb2_grpc,
    subscription_service_pb2_grpc,
    user_service_pb2_grpc,
    webhook_service_pb2_grpc,
)
from services.kit import partitions, purge, vault
from services.kit.auth import Authenticator
from services.kit.call import Kit
from services.kit.columns import now
from services.kit.db import ALL, Database
from services.kit.feed import remembered_access, remembered_sessions
from services.kit.loops import Loop
from services.kit.server import App
from services.user_svc.access.service import AccessService, resolver
from services.user_svc.base import AuditEvent, IdempotencyKey, SecretCanary
from services.user_svc.changes import feed
from services.user_svc.changes import repository as changes
from services.user_svc.changes.service import ChangeService
from services.user_svc.entitlements.service import EntitlementService
from services.user_svc.sessions import repository as sessions
from services.user_svc.sessions.models import Session
from services.user_svc.sessions.service import SessionService
from services.user_svc.settings import UserSettings
from services.user_svc.sign_in_links.models import SignInLink
from services.user_svc.sign_in_links.service import SignInLinkService
from services.user_svc.subscriptions.service import SubscriptionService
from services.user_svc.users import repository
from services.user_svc.users.service import UserService
from services.user_svc.webhooks.service import WebhookService

PARTITIONED = {"audit_events": "created_at"}

KEPT = {IdempotencyKey: timedelta(0), Session: timedelta(0), SignInLink: timedelta(0)}
"""How long rows stay after they have ended."""


def create_app(settings: UserSettings) -> App:
    """The table of contents of the user service."""
    db = Database(settings.database_url, settings, "user_svc")
    box = vault.open_box(settings)
    follower = feed.follower(db)
    access = remembered_access(follower, resolver(db))
    resolve_session = remembered_sessions(follower, sessions.resolver(db))
    kit = Kit("user_svc", settings, db, Authenticator(settings, access, resolve_session=resolve_session), AuditEvent, IdempotencyKey, box)

    async def purge_changes() -> bool:
        async with db.transaction(ALL) as session:
            await changes.purge(session, now() - timedelta(days=settings.changes_kept_days))
        return False

    subscriptions = SubscriptionService(settings)
    users = UserService(settings, repository.loader(db))
    links = SignInLinkService(settings, users)
    add_links = [(sign_in_link_service_pb2_grpc.add_SignInLinkServiceServicer_to_server, links)]
    return App(
        kit=kit,
        services=[
            (user_service_pb2_grpc.add_UserServiceServicer_to_server, users),
            (subscription_service_pb2_grpc.add_SubscriptionServiceServicer_to_server, subscriptions),
            (webhook_service_pb2_grpc.add_WebhookServiceServicer_to_server, WebhookService(users, subscriptions)),
            (access_service_pb2_grpc.add_AccessServiceServicer_to_server, AccessService()),
            (change_service_pb2_grpc.add_ChangeServiceServicer_to_server, ChangeService()),
            (entitlement_service_pb2_grpc.add_EntitlementServiceServicer_to_server, EntitlementService(settings)),
            (session_service_pb2_grpc.add_SessionServiceServicer_to_server, SessionService()),
            *(add_links if settings.sign_in_links else []),
        ],
        loops=[Loop("purge-changes", purge_changes, 3600), partitions.keeper(db, PARTITIONED), purge.purger(db, KEPT)],
        starters=[lambda: vault.check_keys(db, box, SecretCanary), lambda: partitions.ensure(db, PARTITIONED), follower.start],
        closers=[follower.stop],
    )
