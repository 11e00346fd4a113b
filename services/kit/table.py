"""The methods of a server, by their full names."""

from contextvars import ContextVar
from typing import Any, TypeAlias

import grpc

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_handed: ContextVar[Any] = ContextVar("metadata", default=None)


def metadata_of(context: Any) -> "dict[str, str | bytes]":
    """The metadata of a call, as its handler takes them first of all. gRPC makes them anew at each asking, and has made them to find the
    handler: in the same task, so what it handed over then is this call's."""
    handed = _handed.get()
    if handed is None:
        return dict(context.invocation_metadata() or ())
    # Once: what the handler starts inherits its context, and may be the way of another call.
    _handed.set(None)
    return dict(handed)


class Table(grpc.GenericRpcHandler):
    """Stands in for a server in ``add_XServicer_to_server``, and answers for all methods as one handler.

    gRPC waits for each method that is registered apart, which costs every call of the process 40 to 80 microseconds with a hundred of
    them. The native transport finds registered methods for nothing, and leaves what is behind a handler to grpcio.
    """

    def __init__(self) -> None:
        self._services: dict[str, dict[str, Handler]] = {}
        self._methods: dict[str, Handler] = {}

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """Generated code calls this first; the same handlers follow in the other call."""

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Handler]) -> None:
        """Adds the methods of a service."""
        self._services[service] = handlers
        self._methods |= {f"/{service}/{name}": handler for name, handler in handlers.items()}

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> "Handler | None":
        """The handler of a call; None for a method that there is not."""
        _handed.set(handler_call_details.invocation_metadata)
        return self._methods.get(handler_call_details.method)

    def serve(self, server: grpc.aio.Server, *, registered: bool) -> None:
        """Makes a server, before it starts, serve these methods."""
        if registered:
            for service, handlers in self._services.items():
                server.add_registered_method_handlers(service, handlers)
        else:
            server.add_generic_rpc_handlers((self,))
