"""Takes webhooks: verify the raw bytes, translate, call the owner; 2xx only after the owner answered."""

import time
from collections.abc import Callable, Sequence

import grpc
import structlog
from google.rpc import code_pb2
from starlette.requests import Request
from starlette.responses import Response

from clawplane.deployment.v1 import payment_pb2, payment_service_pb2, payment_service_pb2_grpc
from clawplane.errors.v1 import errors_pb2
from gateway import strictjson
from gateway.errors import ApiError, code_of, from_rpc, invalid, make_status
from gateway.settings import GatewaySettings
from gateway.webhooks import stripe

RETRY_AFTER_S = 5
log = structlog.get_logger("gateway.webhooks")

# The provider is told the truth about what it sent (400, 404: it tries again later, too). All else is ours, and passes.
_CALLERS_FAULT = (code_pb2.INVALID_ARGUMENT, code_pb2.NOT_FOUND)
_BROKEN = (code_pb2.INTERNAL, code_pb2.UNKNOWN, code_pb2.DATA_LOSS, code_pb2.UNIMPLEMENTED)

ServiceMetadata = Callable[[], Sequence[tuple[str, str]]]


class StripeReceiver:
    """The endpoint ``POST /webhooks/stripe``; also takes what the sandbox signs, while it is enabled."""

    def __init__(self, settings: GatewaySettings, channel: grpc.aio.Channel, service_metadata: ServiceMetadata) -> None:
        self._tolerance_s = settings.webhook_tolerance_s
        self._timeout_s = settings.webhook_timeout_s
        self._stub = payment_service_pb2_grpc.PaymentServiceStub(channel)
        self._service_metadata = service_metadata
        keys = [("stripe", secret) for secret in settings.stripe_webhook_secrets]
        if settings.sandbox_enabled:
            keys.append(("sandbox", settings.sandbox_webhook_secret))
        self._secrets = [stripe.Secret(provider, key.get_secret_value().encode()) for provider, key in keys]

    async def receive(self, http: Request) -> Response:
        """200 once the owner has the event; ApiError otherwise."""
        payload = await http.body()
        try:
            signature = http.headers.get("stripe-signature")
            provider = stripe.verify(payload, signature, self._secrets, time.time(), self._tolerance_s)
            meaning = stripe.translate(strictjson.load(payload), provider)
        except stripe.BadSignature as error:
            log.warning("webhook_refused", source="stripe", reason=str(error))
            raise invalid([("stripe-signature", str(error))]) from None
        except stripe.BadEvent as error:
            log.warning("webhook_malformed", source="stripe", reason=str(error))
            raise invalid([("event", str(error))]) from None
        try:
            await self._hand_over(meaning, provider, http.scope["state"]["request_id"])
        except grpc.aio.AioRpcError as error:
            raise refusal(error) from None
        return Response(b'{"received":true}', media_type="application/json")

    async def _hand_over(self, meaning: payment_pb2.PaymentEvent | stripe.Ignore, provider: str, request_id: str) -> None:
        metadata = (*self._service_metadata(), ("x-request-id", request_id))
        if isinstance(meaning, stripe.Ignore):
            ignored = payment_service_pb2.IgnoreWebhookEventRequest(
                source=provider, external_id=meaning.external_id, type=meaning.type, reason=meaning.reason[:500]
            )
            await self._stub.IgnoreWebhookEvent(ignored, metadata=metadata, timeout=self._timeout_s)
            log.info("webhook_ignored", source=provider, event_id=meaning.external_id, type=meaning.type, reason=meaning.reason)
            return
        request = payment_service_pb2.ApplyPaymentEventRequest(event=meaning)
        reply = await self._stub.ApplyPaymentEvent(request, metadata=metadata, timeout=self._timeout_s)
        log.info(
            "webhook_applied", source=provider, deployment_id=reply.deployment_id, duplicate=reply.duplicate, outcome=reply.outcome
        )


def refusal(error: grpc.aio.AioRpcError) -> ApiError:
    """The answer for a webhook whose RPC failed: never 2xx, so that the provider tries again; 503 whatever may pass by itself."""
    code = code_of(error)
    if code in _CALLERS_FAULT:
        return from_rpc(error)
    log.error("webhook_failed", source="stripe", code=error.code().name)
    if code in _BROKEN:
        return ApiError(make_status(code_pb2.INTERNAL, "The event could not be applied.", errors_pb2.ERROR_REASON_INTERNAL))
    status = make_status(code_pb2.UNAVAILABLE, "The event could not be applied now.", errors_pb2.ERROR_REASON_UNAVAILABLE)
    return ApiError(status, headers={"Retry-After": str(RETRY_AFTER_S)})
