"""ModelCallService: what the model endpoint asks before and after each call."""

from typing import Any

from clawplane.deployment.v1 import model_call_pb2, model_call_service_pb2_grpc
from clawplane.deployment.v1 import model_call_service_pb2 as rpc
from services.deployment_svc.quotas.rules import exact
from services.deployment_svc.quotas.service import who_of
from services.deployment_svc.settings import DeploymentSettings
from services.deployment_svc.usage_reservations.engine import Reservations
from services.deployment_svc.usage_reservations.rules import Settled, Used
from services.kit.call import Call
from services.kit.errors import InvalidArgument


class ModelCallService(model_call_service_pb2_grpc.ModelCallServiceServicer):
    """See proto/clawplane/deployment/v1/model_call_service.proto. Its calls are reservations that settle themselves."""

    def __init__(self, reservations: Reservations, settings: DeploymentSettings) -> None:
        self.reservations, self.settings = reservations, settings

    async def OpenModelCall(self, request: rpc.OpenModelCallRequest, call: Call) -> model_call_pb2.ModelCall:
        most = self.settings.model_max_tokens
        if request.model not in self.settings.models:
            raise InvalidArgument("model", f"must be one of {', '.join(self.settings.models)}")
        if request.max_tokens > most:
            raise InvalidArgument("max_tokens", f"must be at most {most}")
        wish = await self.reservations.wish(
            who_of(call), request.provider, request.model, request.tokens_in_estimate, request.max_tokens or most,
            self.settings.model_call_s, settles_itself=True,
        )  # fmt: skip
        row = await self.reservations.grant(wish, call)
        said: dict[str, Any] = {name: row[name] or "" for name in ("id", "org_id", "deployment_id", "provider", "model", "currency")}
        message = model_call_pb2.ModelCall(
            **said, tokens_in_estimate=row["tokens_in"], max_tokens=row["tokens_out"], cost_estimate=exact(row["cost_held"])
        )
        message.created_at.FromDatetime(row["created_at"])
        message.expires_at.FromDatetime(row["expires_at"])
        return message

    async def BatchRenewModelCalls(self, request: rpc.BatchRenewModelCallsRequest, call: Call) -> rpc.BatchRenewModelCallsResponse:
        return rpc.BatchRenewModelCallsResponse(renewed=await self.reservations.renew_many(request.ids))

    async def BatchSettleModelCalls(self, request: rpc.BatchSettleModelCallsRequest, call: Call) -> rpc.BatchSettleModelCallsResponse:
        # The endpoint passes on what providers say; what contradicts itself there is no reason not to count the rest.
        used = [
            Used(
                one.id, one.tokens_in, one.tokens_out, min(one.tokens_cached, one.tokens_in), min(one.tokens_reasoning, one.tokens_out),
                one.status, one.latency_ms, one.estimated,
            )
            for one in request.usages
        ]  # fmt: skip
        answers = await self.reservations.settle_many(used)
        return rpc.BatchSettleModelCallsResponse(settled=[isinstance(one, Settled) and not one.duplicate for one in answers])

    async def GetModelCatalog(self, request: rpc.GetModelCatalogRequest, call: Call) -> rpc.ModelCatalog:
        return rpc.ModelCatalog(models=sorted(self.settings.models))
