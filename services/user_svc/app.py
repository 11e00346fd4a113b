"""The user service: what it serves and what runs beside."""

from datetime import timedelta

from clawplane.user.v1 import (
    access_service_pb2_grpc,
    api_key_service_pb2_grpc,
    audit_service_pb2_grpc,
    change_service_pb2_grpc,
    claw_key_service_pb2_grpc,
    entitlement_service_pb2_grpc,
    invitation_service_pb2_grpc,
    mailbox_service_pb2_grpc,
    member_service_pb2_grpc,
    oauth_service_pb2_grpc,
    organization_service_pb2_grpc,
    session_service_pb2_grpc,
    sign_in_link_service_pb2_grpc,
    sign_in_service_pb2_grpc,
    subscription_service_pb2_grpc,
    user_service_pb2_grpc,
    webhook_service_pb2_grpc,
)
from services.kit import audit_sealer, idempotency, known_keys, partitions, purge, vault
from services.kit.auth import Authenticator
from services.kit.call import Kit
from services.kit.columns import now
from services.kit.db import ALL, Database
from services.kit.feed import remembered_access
from services.kit.holders import Holder
from services.kit.loops import Loop
from services.kit.sealed import Blind, Hashed, Sealed, Store
from services.kit.server import App
from services.user_svc.access.service import AccessService, resolver
from services.user_svc.api_keys import repository as api_keys
from services.user_svc.api_keys.models import ApiKeySecret
from services.user_svc.api_keys.service import ApiKeyService
from services.user_svc.api_keys.verify import Verifier
from services.user_svc.attempts.models import Attempt
from services.user_svc.audit.service import AuditService
from services.user_svc.base import AuditEvent, AuditHead, IdempotencyKey, KeyHolder, SecretCanary
from services.user_svc.changes import feed
from services.user_svc.changes import repository as changes
from services.user_svc.changes.service import ChangeService
from services.user_svc.claw_keys.service import ClawKeyService
from services.user_svc.codes import repository as codes
from services.user_svc.codes.models import OneTimeCode
from services.user_svc.entitlements.service import EntitlementService
from services.user_svc.invitations.models import Invitation
from services.user_svc.invitations.service import InvitationService
from services.user_svc.mail import repository as mail
from services.user_svc.mail.models import MailMessage
from services.user_svc.mail.sender import Sender
from services.user_svc.mail.service import MailboxService
from services.user_svc.members.service import MemberService
from services.user_svc.oauth.models import OAuthState
from services.user_svc.oauth.service import OAuthService
from services.user_svc.organizations.service import OrganizationService
from services.user_svc.passwords.hashing import Hasher
from services.user_svc.sessions.models import Session
from services.user_svc.sessions.service import SessionService
from services.user_svc.sessions.validate import Validator
from services.user_svc.settings import UserSettings
from services.user_svc.sign_in.limits import Limits
from services.user_svc.sign_in.post import Post
from services.user_svc.sign_in.service import SignInService
from services.user_svc.sign_in.start import Starter
from services.user_svc.sign_in_links.models import SignInLink
from services.user_svc.sign_in_links.service import SignInLinkService
from services.user_svc.subscriptions.service import SubscriptionService
from services.user_svc.users import repository
from services.user_svc.users.service import UserService
from services.user_svc.webhooks.service import WebhookService

PARTITIONED = {"audit_events": "created_at"}

KEPT = {
    IdempotencyKey: timedelta(0), Session: timedelta(0), SignInLink: timedelta(0), MailMessage: timedelta(0),
    OneTimeCode: timedelta(0), Attempt: timedelta(0), OAuthState: timedelta(0), Invitation: timedelta(days=30),
    ApiKeySecret: timedelta(days=400),
}  # fmt: skip
"""How long rows stay after they have ended."""

SEALED = [
    Sealed(IdempotencyKey.answer_sealed, lambda row: idempotency.place(row.key)), Sealed(MailMessage.text_sealed, mail.place),
    Sealed(OneTimeCode.details_sealed, codes.place),
]  # fmt: skip
BLIND: list[Blind] = []
HASHED = [Hashed(ApiKeySecret.digest, ApiKeySecret.digest_key_id)]
"""What is under keys, so that a rotation finds it."""


def store(settings: UserSettings) -> Store:
    """What `clawplane keys` works on."""
    return Store(Database(settings.database_url, settings, "user_svc"), KeyHolder, SecretCanary, [*SEALED, *BLIND], HASHED)


def create_app(settings: UserSettings) -> App:
    """The table of contents of the user service."""
    db = Database(settings.database_url, settings, "user_svc")
    box = vault.open_box(settings)
    holder = Holder(db, box, KeyHolder, SecretCanary)
    tail = feed.Tail(db)
    follower = feed.follower(tail)
    access = remembered_access(follower, resolver(db))
    sessions = Validator(db, follower, settings.session_idle_s)
    find_key = api_keys.finder(db, box)
    known = known_keys.remembered_keys(follower, find_key, api_keys.concerned)
    uses = known_keys.Uses(api_keys.use_writer(db))
    of_keys = dict.fromkeys((known_keys.PEOPLE, known_keys.BOTS), known_keys.resolver(known, uses))
    kit = Kit("user_svc", settings, db, Authenticator(settings, access, of_keys, sessions.resolve), AuditEvent, IdempotencyKey, box)

    sealer = audit_sealer.of(kit, AuditHead)

    async def purge_changes() -> bool:
        async with db.transaction(ALL) as session:
            await changes.purge(session, now() - timedelta(days=settings.changes_kept_days))
        return False

    subscriptions = SubscriptionService(settings)
    users = UserService(settings, repository.loader(db))
    hasher, starter = Hasher(settings), Starter(settings)
    keys = ApiKeyService(box, Verifier(find_key, known, uses, kit.limiter.hit))
    links = SignInLinkService(settings, users, starter)
    sign_in = SignInService(settings, users, box, Limits(db, box, settings), hasher, Post(settings, box), starter)
    add_links = [(sign_in_link_service_pb2_grpc.add_SignInLinkServiceServicer_to_server, links)]
    add_mailbox = [(mailbox_service_pb2_grpc.add_MailboxServiceServicer_to_server, MailboxService(box))]
    return App(
        kit=kit,
        services=[
            (user_service_pb2_grpc.add_UserServiceServicer_to_server, users),
            (subscription_service_pb2_grpc.add_SubscriptionServiceServicer_to_server, subscriptions),
            (webhook_service_pb2_grpc.add_WebhookServiceServicer_to_server, WebhookService(users, subscriptions)),
            (access_service_pb2_grpc.add_AccessServiceServicer_to_server, AccessService()),
            (change_service_pb2_grpc.add_ChangeServiceServicer_to_server, ChangeService(tail)),
            (entitlement_service_pb2_grpc.add_EntitlementServiceServicer_to_server, EntitlementService(settings)),
            (organization_service_pb2_grpc.add_OrganizationServiceServicer_to_server, OrganizationService(settings)),
            (member_service_pb2_grpc.add_MemberServiceServicer_to_server, MemberService(settings)),
            (invitation_service_pb2_grpc.add_InvitationServiceServicer_to_server, InvitationService(settings, box)),
            (session_service_pb2_grpc.add_SessionServiceServicer_to_server, SessionService(sessions)),
            (sign_in_service_pb2_grpc.add_SignInServiceServicer_to_server, sign_in),
            (oauth_service_pb2_grpc.add_OAuthServiceServicer_to_server, OAuthService(settings, users, box, starter)),
            (api_key_service_pb2_grpc.add_ApiKeyServiceServicer_to_server, keys),
            (claw_key_service_pb2_grpc.add_ClawKeyServiceServicer_to_server, ClawKeyService(box, settings.key_environment)),
            (audit_service_pb2_grpc.add_AuditServiceServicer_to_server, AuditService()),
            *(add_links if settings.sign_in_links else []),
            *(add_mailbox if settings.mail_mode == "console" else []),
        ],
        loops=[
            sealer.loop(), Loop("purge-changes", purge_changes, 3600), partitions.keeper(db, PARTITIONED), purge.purger(db, KEPT),
            idempotency.forgetter(db, IdempotencyKey), Loop("key-uses", uses.flush, known_keys.FLUSH_S),
            Sender(db, box, settings).loop(), sessions.loop(), holder.loop,
        ],
        starters=[holder.join, lambda: partitions.ensure(db, PARTITIONED), sealer.adopt, follower.start],
        closers=[follower.stop, tail.close, hasher.close, sealer.finish, uses.flush_all, holder.leave],
    )
