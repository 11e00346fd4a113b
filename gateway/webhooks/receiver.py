"""Takes webhooks: verify the raw bytes, translate, call the owner; 2xx only after the owner answered."""

import abc
import time
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import structlog
from google.rpc import code_pb2
from starlette.requests import Request
from starlette.responses import Response

from clawplane.deployment.v1 import payment_pb2, payment_service_pb2, payment_service_pb2_grpc
from clawplane.errors.v1 import errors_pb2
from clawplane.user.v1 import (
    subscription_service_pb2,
    subscription_service_pb2_grpc,
    user_service_pb2,
    user_service_pb2_grpc,
    webhook_service_pb2,
    webhook_service_pb2_grpc,
)
from gateway import strictjson
from gateway.errors import ApiError, code_of, from_rpc, invalid, make_status
from gateway.settings import GatewaySettings
from gateway.webhooks import clerk, polar, standard, stripe
from gateway.webhooks.event import BadEvent, BadSignature, Ignore

RETRY_AFTER_S = 5
log = structlog.get_logger("gateway.webhooks")

# The provider is told the truth about what it sent (400, 404: it tries again later, too). All else is ours, and passes.
_CALLERS_FAULT = (code_pb2.INVALID_ARGUMENT, code_pb2.NOT_FOUND)
_BROKEN = (code_pb2.INTERNAL, code_pb2.UNKNOWN, code_pb2.DATA_LOSS, code_pb2.UNIMPLEMENTED)

Metadata = Sequence[tuple[str, str]]
ServiceMetadata = Callable[[], Sequence[tuple[str, str]]]


class Receiver(abc.ABC):
    """The endpoint ``POST /webhooks/<source>``: what is the same for every sender."""

    source: str
    signature_header: str
    ignored: Any
    """The class of the request by which the owner stores what nobody handles."""
    owner: Any
    """The stub that takes it."""

    def __init__(self, settings: GatewaySettings, service_metadata: ServiceMetadata) -> None:
        self._tolerance_s, self._timeout_s = settings.webhook_tolerance_s, settings.webhook_timeout_s
        self._service_metadata = service_metadata

    async def receive(self, http: Request) -> Response:
        """200 once the owner has the event; ApiError otherwise."""
        payload = await http.body()
        try:
            provider, meaning = self.read(http, payload)
        except BadSignature as error:
            log.warning("webhook_refused", source=self.source, reason=str(error))
            raise invalid([(self.signature_header, str(error))]) from None
        except BadEvent as error:
            log.warning("webhook_malformed", source=self.source, reason=str(error))
            raise invalid([("event", str(error))]) from None
        metadata = (*self._service_metadata(), ("x-request-id", http.scope["state"]["request_id"]))
        try:
            if isinstance(meaning, Ignore):
                await self._ignore(provider, meaning, metadata)
                log.info("webhook_ignored", source=provider, event_id=meaning.external_id, type=meaning.type, reason=meaning.reason)
            else:
                said = await self.apply(meaning, metadata)
                log.info("webhook_applied", source=provider, **said)
        except grpc.aio.AioRpcError as error:
            raise refusal(error, self.source) from None
        return Response(b'{"received":true}', media_type="application/json")

    @abc.abstractmethod
    def read(self, http: Request, payload: bytes) -> tuple[str, Any]:
        """(who signed it, what it means); BadSignature or BadEvent."""

    @abc.abstractmethod
    async def apply(self, meaning: Any, metadata: Metadata) -> dict[str, Any]:
        """Has an event applied; what to log of it."""

    async def _ignore(self, provider: str, event: Ignore, metadata: Metadata) -> None:
        request = self.ignored(source=provider, external_id=event.external_id, type=event.type, reason=event.reason[:500])
        await self.owner.IgnoreWebhookEvent(request, metadata=metadata, timeout=self._timeout_s)


class StripeReceiver(Receiver):
    """Stripe's events; also takes what the sandbox signs, while it is enabled."""

    source, signature_header, ignored = "stripe", "stripe-signature", payment_service_pb2.IgnoreWebhookEventRequest

    def __init__(self, settings: GatewaySettings, channel: grpc.aio.Channel, service_metadata: ServiceMetadata) -> None:
        super().__init__(settings, service_metadata)
        self.owner = payment_service_pb2_grpc.PaymentServiceStub(channel)
        keys = [("stripe", secret) for secret in settings.stripe_webhook_secrets]
        if settings.sandbox_enabled:
            keys.append(("sandbox", settings.sandbox_webhook_secret))
        self._secrets = [stripe.Secret(provider, key.get_secret_value().encode()) for provider, key in keys]

    def read(self, http: Request, payload: bytes) -> tuple[str, Any]:
        signature = http.headers.get(self.signature_header)
        provider = stripe.verify(payload, signature, self._secrets, time.time(), self._tolerance_s)
        return provider, stripe.translate(strictjson.load(payload), provider)

    async def apply(self, meaning: payment_pb2.PaymentEvent, metadata: Metadata) -> dict[str, Any]:
        return await apply_payment(self.owner, meaning, metadata, self._timeout_s)


class PolarReceiver(Receiver):
    """Polar's events: checkouts and orders go to the deployment service, customers and subscriptions to the user service."""

    source, signature_header, ignored = "polar", "webhook-signature", payment_service_pb2.IgnoreWebhookEventRequest

    def __init__(
        self, settings: GatewaySettings, channel: grpc.aio.Channel, users: grpc.aio.Channel, service_metadata: ServiceMetadata
    ) -> None:
        super().__init__(settings, service_metadata)
        self.owner = payment_service_pb2_grpc.PaymentServiceStub(channel)
        self._subscriptions = subscription_service_pb2_grpc.SubscriptionServiceStub(users)
        # Polar signs with the secret's own bytes, not with what they would be in base64.
        self._keys = [secret.get_secret_value().encode() for secret in settings.polar_webhook_secrets]
        self._livemode = not settings.polar_sandbox

    def read(self, http: Request, payload: bytes) -> tuple[str, Any]:
        now = time.time()
        message_id = standard.verify("webhook", payload, http.headers, self._keys, now, self._tolerance_s)
        return self.source, polar.translate(strictjson.load(payload), message_id, now, livemode=self._livemode)

    async def apply(self, meaning: Any, metadata: Metadata) -> dict[str, Any]:
        if isinstance(meaning, payment_pb2.PaymentEvent):
            return await apply_payment(self.owner, meaning, metadata, self._timeout_s)
        of_customer = isinstance(meaning, subscription_service_pb2.ApplyCustomerEventRequest)
        call: Any = self._subscriptions.ApplyCustomerEvent if of_customer else self._subscriptions.ApplySubscriptionEvent
        reply = await call(meaning, metadata=metadata, timeout=self._timeout_s)
        return {"user_id": reply.user_id, "duplicate": reply.duplicate, "outcome": reply.outcome}


class ClerkReceiver(Receiver):
    """Clerk's events of users."""

    source, signature_header, ignored = "clerk", "svix-signature", webhook_service_pb2.IgnoreWebhookEventRequest

    def __init__(self, settings: GatewaySettings, channel: grpc.aio.Channel, service_metadata: ServiceMetadata) -> None:
        super().__init__(settings, service_metadata)
        self._users = user_service_pb2_grpc.UserServiceStub(channel)
        self.owner = webhook_service_pb2_grpc.WebhookServiceStub(channel)
        self._keys = [clerk.key_of(secret.get_secret_value()) for secret in settings.clerk_webhook_secrets]

    def read(self, http: Request, payload: bytes) -> tuple[str, Any]:
        now = time.time()
        message_id = standard.verify("svix", payload, http.headers, self._keys, now, self._tolerance_s)
        return self.source, clerk.translate(strictjson.load(payload), message_id, int(now))

    async def apply(self, meaning: user_service_pb2.SyncClerkUserRequest, metadata: Metadata) -> dict[str, Any]:
        reply = await self._users.SyncClerkUser(meaning, metadata=metadata, timeout=self._timeout_s)
        return {"user_id": reply.user_id, "duplicate": reply.duplicate, "outcome": reply.outcome}


async def apply_payment(owner: Any, event: payment_pb2.PaymentEvent, metadata: Metadata, timeout_s: float) -> dict[str, Any]:
    """Has a payment event applied; what to log of it."""
    request = payment_service_pb2.ApplyPaymentEventRequest(event=event)
    reply = await owner.ApplyPaymentEvent(request, metadata=metadata, timeout=timeout_s)
    return {"deployment_id": reply.deployment_id, "duplicate": reply.duplicate, "outcome": reply.outcome}


def refusal(error: grpc.aio.AioRpcError, source: str) -> ApiError:
    """The answer for a webhook whose RPC failed: never 2xx, so that the provider tries again; 503 whatever may pass by itself."""
    code = code_of(error)
    if code in _CALLERS_FAULT:
        return from_rpc(error)
    log.error("webhook_failed", source=source, code=error.code().name)
    if code in _BROKEN:
        return ApiError(make_status(code_pb2.INTERNAL, "The event could not be applied.", errors_pb2.ERROR_REASON_INTERNAL))
    status = make_status(code_pb2.UNAVAILABLE, "The event could not be applied now.", errors_pb2.ERROR_REASON_UNAVAILABLE)
    return ApiError(status, headers={"Retry-After": str(RETRY_AFTER_S)})
