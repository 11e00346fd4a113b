"""The stubs that pages call."""

from collections.abc import Mapping

import grpc

from clawplane.deployment.v1 import audit_service_pb2_grpc as deployment_audit
from clawplane.deployment.v1 import (
    blacklist_service_pb2_grpc,
    deployment_service_pb2_grpc,
    model_call_service_pb2_grpc,
    price_service_pb2_grpc,
    provider_service_pb2_grpc,
    quota_service_pb2_grpc,
    usage_service_pb2_grpc,
)
from clawplane.deployment.v1 import webhook_service_pb2_grpc as payment_webhooks
from clawplane.user.v1 import (
    access_service_pb2_grpc,
    api_key_service_pb2_grpc,
    entitlement_service_pb2_grpc,
    invitation_service_pb2_grpc,
    mailbox_service_pb2_grpc,
    member_service_pb2_grpc,
    oauth_service_pb2_grpc,
    organization_service_pb2_grpc,
    session_service_pb2_grpc,
    sign_in_link_service_pb2_grpc,
    sign_in_service_pb2_grpc,
    user_service_pb2_grpc,
)
from clawplane.user.v1 import audit_service_pb2_grpc as user_audit
from clawplane.user.v1 import webhook_service_pb2_grpc as user_webhooks

USER, DEPLOYMENT = "clawplane.user.v1", "clawplane.deployment.v1"


class Services:
    """All of them, of both services."""

    def __init__(self, channels: Mapping[str, grpc.aio.Channel], timeout_s: float) -> None:
        users, deployments = channels[USER], channels[DEPLOYMENT]
        self.timeout_s = timeout_s
        self.access = access_service_pb2_grpc.AccessServiceStub(users)
        self.api_keys = api_key_service_pb2_grpc.ApiKeyServiceStub(users)
        self.entitlements = entitlement_service_pb2_grpc.EntitlementServiceStub(users)
        self.invitations = invitation_service_pb2_grpc.InvitationServiceStub(users)
        self.mailbox = mailbox_service_pb2_grpc.MailboxServiceStub(users)
        self.members = member_service_pb2_grpc.MemberServiceStub(users)
        self.oauth = oauth_service_pb2_grpc.OAuthServiceStub(users)
        self.organizations = organization_service_pb2_grpc.OrganizationServiceStub(users)
        self.sessions = session_service_pb2_grpc.SessionServiceStub(users)
        self.sign_in = sign_in_service_pb2_grpc.SignInServiceStub(users)
        self.sign_in_links = sign_in_link_service_pb2_grpc.SignInLinkServiceStub(users)
        self.users = user_service_pb2_grpc.UserServiceStub(users)
        self.user_audit = user_audit.AuditServiceStub(users)
        self.user_webhooks = user_webhooks.WebhookServiceStub(users)
        self.deployments = deployment_service_pb2_grpc.DeploymentServiceStub(deployments)
        self.models = model_call_service_pb2_grpc.ModelCallServiceStub(deployments)
        self.usage = usage_service_pb2_grpc.UsageServiceStub(deployments)
        self.quotas = quota_service_pb2_grpc.QuotaServiceStub(deployments)
        self.prices = price_service_pb2_grpc.PriceServiceStub(deployments)
        self.providers = provider_service_pb2_grpc.ProviderServiceStub(deployments)
        self.blacklist = blacklist_service_pb2_grpc.BlacklistServiceStub(deployments)
        self.deployment_audit = deployment_audit.AuditServiceStub(deployments)
        self.payment_webhooks = payment_webhooks.WebhookServiceStub(deployments)
