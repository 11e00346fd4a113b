"""The model endpoint: ``POST /v1/chat/completions`` and ``GET /v1/models``, in OpenAI's shape.

A call is opened in the deployment service before a provider is asked, and settled after, so that each is counted exactly once whatever
breaks in between: the provider, the caller, this process.
"""

from collections.abc import Callable, Sequence

import grpc
import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from clawplane.deployment.v1 import model_call_pb2, model_call_service_pb2, model_call_service_pb2_grpc
from gateway.errors import ApiError, from_rpc
from gateway.models import openai
from gateway.models.ask import Asker
from gateway.models.exchange import Client, Exchange
from gateway.models.openai import OpenAiError, Wish
from gateway.models.renew import Renewer
from gateway.models.settle import Settler
from gateway.models.upstreams import Upstream, find
from gateway.transcode import forwarded_metadata


class Endpoint:
    """The routes, and the connections to the providers."""

    def __init__(
        self, upstreams: Sequence[Upstream], channel: grpc.aio.Channel, service_metadata: Callable[[], Sequence[tuple[str, str]]],
        timeout_s: float, upstream_timeout_s: float,
    ) -> None:  # fmt: skip
        self._upstreams, self._timeout_s = list(upstreams), timeout_s
        self._stub = model_call_service_pb2_grpc.ModelCallServiceStub(channel)
        self.settler, self.renewer = Settler(channel, service_metadata), Renewer(channel, service_metadata)
        self.asker = Asker(upstream_timeout_s)

    def routes(self) -> list[BaseRoute]:
        """Where the endpoint is served."""
        return [Route("/v1/chat/completions", Completions(self), methods=["POST"]), Route("/v1/models", self.models, methods=["GET"])]

    async def models(self, http: Request) -> Response:
        """The models that can be asked for."""
        try:
            request = model_call_service_pb2.GetModelCatalogRequest()
            found = await self._stub.GetModelCatalog(request, metadata=forwarded_metadata(http), timeout=self._timeout_s)
        except (ApiError, grpc.aio.AioRpcError) as error:
            return _refusal(error).response()
        served = [(model, find(self._upstreams, model)) for model in found.models]
        data = [{"id": model, "object": "model", "created": 0, "owned_by": one.provider} for model, one in served if one is not None]
        return Response(orjson.dumps({"object": "list", "data": data}), media_type="application/json")

    async def open(self, http: Request, wish: Wish, upstream: Upstream) -> model_call_pb2.ModelCall:
        """Opens the call; OpenAiError when it must not be made."""
        request = model_call_service_pb2.OpenModelCallRequest(
            provider=upstream.provider, model=wish.model, tokens_in_estimate=wish.tokens_in, max_tokens=wish.max_tokens
        )
        try:
            return await self._stub.OpenModelCall(request, metadata=forwarded_metadata(http), timeout=self._timeout_s)
        except (ApiError, grpc.aio.AioRpcError) as error:
            raise _refusal(error) from None

    def upstream_of(self, wish: Wish) -> Upstream:
        """The provider of the wished model."""
        upstream = find(self._upstreams, wish.model)
        if upstream is None:
            raise OpenAiError(404, f"the model {wish.model[:128]!r} is not offered here", code="model_not_found", param="model")
        return upstream

    async def close(self) -> None:
        """Ends what is open."""
        await self.settler.drain(5)
        await self.renewer.close()
        await self.asker.close()


class Completions:
    """``POST /v1/chat/completions``, one object for all requests: an ASGI application, since a stream goes on when its caller has left."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        http = Request(scope, receive)
        try:
            wish = openai.parse(await http.body())
            upstream = self.endpoint.upstream_of(wish)
            call = await self.endpoint.open(http, wish, upstream)
        except OpenAiError as error:
            await error.response()(scope, receive, send)
            return
        await Exchange(self.endpoint.asker, self.endpoint.settler, self.endpoint.renewer, wish, upstream, call, Client(send)).run()


def _refusal(error: ApiError | grpc.aio.AioRpcError) -> OpenAiError:
    return openai.from_api_error(error if isinstance(error, ApiError) else from_rpc(error))
