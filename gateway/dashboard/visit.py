"""One request of a visitor: who it is, what the form said, and the services as seen with the visitor's own credential."""

import asyncio
import hashlib
import hmac
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl

import grpc
from google.rpc import code_pb2, error_details_pb2
from starlette.requests import Request

from clawplane.deployment.v1 import (
    blacklist_service_pb2_grpc,
    deployment_service_pb2_grpc,
    model_call_service_pb2_grpc,
    provider_service_pb2_grpc,
    usage_service_pb2_grpc,
)
from clawplane.deployment.v1 import webhook_service_pb2_grpc as payment_webhooks
from clawplane.errors.v1 import errors_pb2
from clawplane.user.v1 import (
    access_service_pb2,
    access_service_pb2_grpc,
    entitlement_service_pb2_grpc,
    session_service_pb2_grpc,
    sign_in_link_service_pb2_grpc,
    user_service_pb2_grpc,
)
from clawplane.user.v1 import webhook_service_pb2_grpc as user_webhooks
from gateway.errors import ApiError, from_rpc, make_status

USER, DEPLOYMENT = "clawplane.user.v1", "clawplane.deployment.v1"
Metadata = tuple[tuple[str, str], ...]


class Services:
    """The stubs that pages call."""

    def __init__(self, channels: Mapping[str, grpc.aio.Channel], timeout_s: float) -> None:
        users, deployments = channels[USER], channels[DEPLOYMENT]
        self.timeout_s = timeout_s
        self.access = access_service_pb2_grpc.AccessServiceStub(users)
        self.entitlements = entitlement_service_pb2_grpc.EntitlementServiceStub(users)
        self.sessions = session_service_pb2_grpc.SessionServiceStub(users)
        self.sign_in_links = sign_in_link_service_pb2_grpc.SignInLinkServiceStub(users)
        self.users = user_service_pb2_grpc.UserServiceStub(users)
        self.user_webhooks = user_webhooks.WebhookServiceStub(users)
        self.deployments = deployment_service_pb2_grpc.DeploymentServiceStub(deployments)
        self.models = model_call_service_pb2_grpc.ModelCallServiceStub(deployments)
        self.usage = usage_service_pb2_grpc.UsageServiceStub(deployments)
        self.providers = provider_service_pb2_grpc.ProviderServiceStub(deployments)
        self.blacklist = blacklist_service_pb2_grpc.BlacklistServiceStub(deployments)
        self.payment_webhooks = payment_webhooks.WebhookServiceStub(deployments)


@dataclass
class Visit:
    """A request, and whose it is."""

    http: Request
    services: Services
    token: str = ""
    """Of the visitor's session; empty when there is none."""
    who: access_service_pb2.Access = field(default_factory=access_service_pb2.Access)
    form: dict[str, str] = field(default_factory=dict)
    """What was sent by POST; of a name that comes several times, the last."""
    repeated: dict[str, list[str]] = field(default_factory=dict)
    """The same, with all values."""
    problem: str = ""
    """What went wrong with what was sent, for the head of the page."""
    problems: dict[str, str] = field(default_factory=dict)
    """The same by field."""

    @property
    def metadata(self) -> Metadata:
        """The visitor's credential and the request's id."""
        own = (("authorization", f"Bearer {self.token}"),) if self.token else ()
        return (*own, ("x-request-id", self.http.scope["state"]["request_id"]), *self.http.app.state.forward(self.http))

    @property
    def csrf(self) -> str:
        """What a form of this visitor must send along: nobody can make it who does not know the session's token."""
        return hmac.new(self.token.encode(), b"csrf", hashlib.sha256).hexdigest()

    @property
    def query(self) -> Mapping[str, str]:
        """The query of the address."""
        return self.http.query_params

    async def call(self, rpc: Any, request: Any) -> Any:
        """An RPC with the visitor's credential; ApiError when it fails."""
        try:
            return await rpc(request, metadata=self.metadata, timeout=self.services.timeout_s)
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error) from None

    async def calls(self, *pending: Awaitable[Any]) -> Any:
        """Several at once; the first failure is raised."""
        return await asyncio.gather(*pending)

    async def read_form(self) -> None:
        """Reads what was posted."""
        try:
            pairs = parse_qsl((await self.http.body()).decode(), keep_blank_values=True, max_num_fields=200)
        except ValueError:
            pairs = []
        for name, value in pairs:
            self.repeated.setdefault(name, []).append(value)
        self.form = {name: values[-1].strip() for name, values in self.repeated.items()}

    def check_csrf(self) -> None:
        """PERMISSION_DENIED for a form that is not this visitor's."""
        if not hmac.compare_digest(self.form.get("csrf", "").encode(), self.csrf.encode()):
            message = "This form is of another visit. Open the page again and repeat what you did."
            raise ApiError(make_status(code_pb2.PERMISSION_DENIED, message, errors_pb2.ERROR_REASON_PERMISSION_DENIED))

    def blame(self, error: ApiError) -> None:
        """Puts an error's words where the form shows them."""
        self.problems = violations(error)
        self.problem = "" if self.problems else error.status.message


def violations(error: ApiError) -> dict[str, str]:
    """The fields that an error names, by name."""
    found: dict[str, str] = {}
    bad = error_details_pb2.BadRequest()
    for detail in error.status.details:
        if detail.Is(bad.DESCRIPTOR) and detail.Unpack(bad):
            found |= {item.field: item.description for item in bad.field_violations}
    return found
