"""The one wrapper around every RPC. ``_guard`` shows the order of everything that happens to a call."""

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from itertools import count
from typing import Any, TypeAlias

import grpc
import protovalidate
import structlog
from google.protobuf import descriptor_pool
from google.protobuf.message import DecodeError, Message
from grpc_status import rpc_status

from clawplane.errors.v1.errors_pb2 import ErrorReason
from clawplane.options.v1 import options_pb2
from services.kit import errors, idempotency, telemetry, texts
from services.kit.auth import PUBLIC, Caller
from services.kit.call import Call, Kit, Plan

log = structlog.get_logger()
_PREFIX, _COUNTER = os.urandom(6).hex(), count(1)
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Metadata: TypeAlias = "Mapping[str, str | bytes]"


class Registrar:
    """Stands in for a server in ``add_XServicer_to_server`` and registers every handler wrapped."""

    def __init__(self, server: grpc.aio.Server, kit: Kit) -> None:
        self.server, self.kit = server, kit
        self.services: list[str] = []

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """The generated code calls this first; the wrapped handlers follow in the other call."""

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Handler]) -> None:
        """Wraps and registers."""
        descriptor = descriptor_pool.Default().FindServiceByName(service)
        wrapped = {name: wrap(handler, Plan.of(descriptor.methods_by_name[name]), self.kit) for name, handler in handlers.items()}
        self.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, wrapped),))
        self.server.add_registered_method_handlers(service, wrapped)
        self.services.append(service)


@dataclass(frozen=True)
class _Malformed:
    """Stands for a request that cannot be taken as it is, until the wrapper can answer properly."""

    field: str
    problem: str


def wrap(handler: Handler, plan: Plan, kit: Kit) -> Handler:
    """The handler with everything that each RPC needs around it."""
    if plan.takes_request_id and (kit.answers is None or (plan.answer_is_secret and kit.box is None)):
        raise ValueError(f"{plan.method} takes a request_id, but {kit.name} has no table of answers, or no box for secret ones")
    deserialize, kind = handler.request_deserializer, plan.request
    assert deserialize is not None

    def tolerant(raw: bytes) -> Any:
        try:
            request = deserialize(raw)
        except (DecodeError, UnicodeDecodeError):
            field = texts.field_not_utf8(raw, kind)
            return _Malformed(field, "is not valid UTF-8") if field else _Malformed("", "the request is not valid protobuf")
        # Few requests hold the byte at all, so few are searched for it.
        field = texts.field_with_nul(request) if b"\0" in raw else ""
        return _Malformed(field, "must not hold the character U+0000") if field else request

    if handler.unary_unary is not None:
        return grpc.unary_unary_rpc_method_handler(_unary(handler.unary_unary, plan, kit), tolerant, handler.response_serializer)
    if handler.unary_stream is not None:
        return grpc.unary_stream_rpc_method_handler(_stream(handler.unary_stream, plan, kit), tolerant, handler.response_serializer)
    raise ValueError(f"{plan.method}: streams of requests are not supported; take a repeated field")


async def _guard(kit: Kit, plan: Plan, request: Any, context: Any, metadata: Metadata, request_id: str) -> Call:
    """Everything that must hold before a handler runs, in order."""
    if kit.turns_away:
        raise _stopping()
    if kit.in_flight > kit.settings.max_concurrent_calls:
        raise errors.Unavailable("the server is at its limit of calls", 0.2, reason=ErrorReason.ERROR_REASON_UNAVAILABLE)
    public = plan.audience == options_pb2.AUDIENCE_PUBLIC
    caller = PUBLIC if public else await kit.caller(plan, metadata)
    call = Call(kit, plan, caller, request_id, context)
    if not public:
        call.permit()
        if not caller.is_platform and (wait_s := kit.limit.hit(caller.subject)):
            raise errors.Exhausted("too many calls", retry_after_s=max(0.1, wait_s))
    if isinstance(request, _Malformed):
        raise errors.InvalidArgument(request.field, request.problem)
    if plan.has_rules and (violations := protovalidate.collect_violations(request)):
        raise errors.InvalidFields([violation(item) for item in violations])
    return call


def violation(found: Any) -> errors.Violation:
    """A broken rule as (field path, what is wrong)."""
    proto = found.proto
    path = "".join(
        f".{element.field_name}" + (f"[{element.subscript.value}]" if element.subscript is not None else "")
        for element in (proto.field.elements if proto.field is not None else ())
    ).lstrip(".")
    message = proto.message or proto.rule_id
    if not path and ": " in message:
        # Rules over a whole message name the field they are about in their text.
        path, _, message = message.partition(": ")
    return path, message


def _unary(handler: Any, plan: Plan, kit: Kit) -> Any:
    meter = telemetry.meter(plan.method)

    async def unary(request: Message, context: Any) -> Any:
        started = time.perf_counter()
        # gRPC makes it anew at each asking.
        metadata = dict(context.invocation_metadata() or ())
        request_id = _request_id(metadata)
        kit.in_flight += 1
        kit.taken_in += 1
        failure: errors.Error | None = None
        caller: Caller | None = None
        try:
            call = await _guard(kit, plan, request, context, metadata, request_id)
            caller = call.caller
            repeatable = plan.takes_request_id and request.request_id  # type: ignore[attr-defined]
            response = await (idempotency.once(call, request, handler) if repeatable else handler(request, call))
        except grpc.aio.AbortError:
            raise
        except asyncio.CancelledError:
            _report(meter, plan, "CANCELLED", started, request_id, caller)
            raise
        except Exception as error:
            failure = _failure(error, plan, request_id)
        finally:
            kit.in_flight -= 1
        if failure is not None:
            _report(meter, plan, failure.code.name, started, request_id, caller)
            await _abort(context, failure, request_id)
        _report(meter, plan, "OK", started, request_id, caller)
        if not plan.is_read:
            # A read that went well leaves nothing behind that the id would name.
            context.set_trailing_metadata((("x-request-id", request_id),))
        return response

    return unary


def _stream(handler: Any, plan: Plan, kit: Kit) -> Any:
    meter = telemetry.meter(plan.method)

    async def stream(request: Message, context: Any) -> AsyncIterator[Any]:
        started = time.perf_counter()
        # gRPC makes it anew at each asking.
        metadata = dict(context.invocation_metadata() or ())
        request_id = _request_id(metadata)
        failure: errors.Error | None = None
        caller: Caller | None = None
        task = asyncio.current_task()
        assert task is not None
        kit.streams.add(task)
        try:
            call = await _guard(kit, plan, request, context, metadata, request_id)
            caller = call.caller
            async with aclosing(handler(request, call)) as messages:
                async for message in messages:
                    yield message
        except grpc.aio.AbortError:
            raise
        except asyncio.CancelledError:
            if not kit.draining:
                _report(meter, plan, "CANCELLED", started, request_id, caller)
                raise
            task.uncancel()
            failure = _stopping()
        except Exception as error:
            failure = _failure(error, plan, request_id)
        finally:
            kit.streams.discard(task)
        if failure is not None:
            _report(meter, plan, failure.code.name, started, request_id, caller)
            await _abort(context, failure, request_id)
        _report(meter, plan, "OK", started, request_id, caller)
        context.set_trailing_metadata((("x-request-id", request_id),))

    return stream


def _stopping() -> errors.Error:
    return errors.Unavailable("the server is stopping; resume elsewhere", 0, reason=ErrorReason.ERROR_REASON_UNAVAILABLE)


async def _abort(context: Any, failure: errors.Error, request_id: str) -> None:
    status = rpc_status.to_status(errors.to_status(failure, request_id))
    await context.abort(status.code, status.details, (*status.trailing_metadata, ("x-request-id", request_id)))


def _request_id(metadata: Metadata) -> str:
    value = metadata.get("x-request-id")
    if isinstance(value, str) and 0 < len(value) <= 64 and value.isascii() and value.isprintable():
        return value
    return f"{_PREFIX}-{next(_COUNTER)}"


def _failure(error: Exception, plan: Plan, request_id: str) -> errors.Error:
    failure = errors.from_exception(error)
    if failure.code is grpc.StatusCode.INTERNAL:
        log.error("rpc.defect", method=plan.method, request_id=request_id, exc_info=error)
    return failure


def _report(meter: telemetry.Meter, plan: Plan, code: str, started: float, request_id: str, caller: Caller | None) -> None:
    elapsed = time.perf_counter() - started
    meter.count(code, elapsed)
    # A read that went well says nothing that the metrics do not say.
    if code == "OK" and plan.is_read and telemetry.level() > logging.DEBUG:
        return
    say = log.debug if plan.is_read and code == "OK" else log.info
    subject, org = (caller.subject, caller.org_id) if caller is not None else ("", "")
    say("rpc", method=plan.method, code=code, ms=round(elapsed * 1000, 1), request_id=request_id, subject=subject, org=org)
