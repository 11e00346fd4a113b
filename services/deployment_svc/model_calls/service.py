"""ModelCallService: what the model endpoint asks before and after each call."""

from collections.abc import Awaitable, Callable
from datetime import timedelta
from decimal import Decimal
from typing import Any

import structlog

from clawplane.deployment.v1 import model_call_pb2, model_call_service_pb2, model_call_service_pb2_grpc
from clawplane.errors.v1.errors_pb2 import ErrorReason
from clawplane.user.v1.entitlement_service_pb2 import Entitlements
from services.deployment_svc.model_calls import repository
from services.deployment_svc.settings import DeploymentSettings
from services.deployment_svc.usage.prices import PriceBook
from services.kit import ids
from services.kit.call import Call
from services.kit.coalesce import Batcher
from services.kit.columns import now
from services.kit.db import ALL, Database
from services.kit.errors import InvalidArgument

log = structlog.get_logger()
_MINOR = Decimal(100)
_BATCH = 200


class ModelCallService(model_call_service_pb2_grpc.ModelCallServiceServicer):
    """See proto/clawplane/deployment/v1/model_call_service.proto."""

    def __init__(
        self, db: Database, settings: DeploymentSettings, prices: PriceBook, entitlements: Callable[[str], Awaitable[Entitlements]]
    ) -> None:
        self.db, self.settings, self.prices, self.entitlements = db, settings, prices, entitlements
        self._open = Batcher(self._open_many)

    async def OpenModelCall(self, request: model_call_service_pb2.OpenModelCallRequest, call: Call) -> model_call_pb2.ModelCall:
        limit = self.settings.model_max_tokens
        if request.model not in self.settings.models:
            raise InvalidArgument("model", f"must be one of {', '.join(self.settings.models)}")
        if request.max_tokens > limit:
            raise InvalidArgument("max_tokens", f"must be at most {limit}")
        tokens_out = request.max_tokens or limit
        cost = self.prices.cost(request.provider, request.model, request.tokens_in_estimate, 0, tokens_out)
        if cost is None:
            raise InvalidArgument("model", "has no price yet, so it cannot be called", ErrorReason.ERROR_REASON_NO_PRICE)
        entitlements = await self.entitlements(call.org_id)
        # 0 is the tier's word for without limit.
        granted = entitlements.monthly_credit_minor / _MINOR if entitlements.monthly_credit_minor else None
        at, caller = now(), call.caller
        row: dict[str, Any] = {
            "id": ids.new("call"), "org_id": call.org_id, "user_id": caller.user_id or None, "api_key_id": caller.key_id or None,
            "deployment_id": caller.deployment_id or None, "provider": request.provider, "model": request.model,
            "tokens_in_estimate": request.tokens_in_estimate, "max_tokens": tokens_out, "cost_estimate": cost,
            "currency": self.prices.currency, "expires_at": at + timedelta(seconds=self.settings.model_call_s),
            "created_at": at, "updated_at": at,
        }  # fmt: skip
        await self._open((row, granted))
        said: dict[str, Any] = {name: row[name] or "" for name in ("id", "org_id", "deployment_id", "provider", "model", "currency")}
        message = model_call_pb2.ModelCall(
            **said, tokens_in_estimate=request.tokens_in_estimate, max_tokens=tokens_out, cost_estimate=f"{cost.normalize():f}"
        )
        message.created_at.FromDatetime(at)
        message.expires_at.FromDatetime(row["expires_at"])
        return message

    async def _open_many(self, wishes: list[repository.Wish]) -> list[Any]:
        return await self.db.run(lambda session: repository.open_calls(session, wishes), ALL)

    async def BatchSettleModelCalls(
        self, request: model_call_service_pb2.BatchSettleModelCallsRequest, call: Call
    ) -> model_call_service_pb2.BatchSettleModelCallsResponse:
        settled = await self.db.run(lambda session: repository.settle(session, request.usages, self.prices), ALL)
        return model_call_service_pb2.BatchSettleModelCallsResponse(settled=settled)

    async def settle_abandoned(self) -> bool:
        """A tick of the loop over calls that nobody has settled; True when there may be more."""
        count = await self.db.run(lambda session: repository.settle_abandoned(session, self.prices, _BATCH), ALL)
        if count:
            log.warning("model_calls.abandoned", calls=count)
        return count == _BATCH

    async def GetModelCatalog(
        self, request: model_call_service_pb2.GetModelCatalogRequest, call: Call
    ) -> model_call_service_pb2.ModelCatalog:
        return model_call_service_pb2.ModelCatalog(models=sorted(self.settings.models))
