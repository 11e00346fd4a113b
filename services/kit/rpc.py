"""The one wrapper around every RPC. ``_guard`` shows the order of everything that happens to a call."""

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import aclosing
from dataclasses import replace
from itertools import count
from typing import Any, TypeAlias

import grpc
import structlog
from google.protobuf import descriptor_pool
from grpc_status import rpc_status

from clawplane.errors.v1.errors_pb2 import ErrorReason
from clawplane.options.v1 import options_pb2
from services.kit import errors, idempotency, rates, telemetry
from services.kit.auth import PUBLIC, Caller
from services.kit.call import Call, Kit, Plan
from services.kit.client import client_of
from services.kit.intake import Intake
from services.kit.standing import Standing
from services.kit.table import Handler, Table, metadata_of

log = structlog.get_logger()
_DOTS_OF_TOKEN = 2
_PREFIX, _COUNTER = os.urandom(6).hex(), count(1)
Metadata: TypeAlias = "Mapping[str, str | bytes]"


class Registrar:
    """Stands in for a server in ``add_XServicer_to_server`` and puts every handler, wrapped, into the table of methods."""

    def __init__(self, table: Table, kit: Kit) -> None:
        self.table, self.kit = table, kit
        self.services: list[str] = []

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """The generated code calls this first; the wrapped handlers follow in the other call."""

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Handler]) -> None:
        """Wraps and adds."""
        descriptor = descriptor_pool.Default().FindServiceByName(service)
        wrapped = {name: wrap(handler, Plan.of(descriptor.methods_by_name[name]), self.kit) for name, handler in handlers.items()}
        self.table.add_registered_method_handlers(service, wrapped)
        self.services.append(service)


def wrap(handler: Handler, plan: Plan, kit: Kit) -> Handler:
    """The handler with everything that each RPC needs around it."""
    if plan.takes_request_id and (kit.answers is None or (plan.answer_is_secret and kit.box is None)):
        raise ValueError(f"{plan.method} takes a request_id, but {kit.name} has no table of answers, or no box for secret ones")
    if plan.rate:
        plan = replace(plan, rate=rates.times(plan.rate, kit.settings.method_rates_factor))
    assert handler.request_deserializer is not None
    intake = Intake(plan, handler.request_deserializer)
    # No deserializer: what strangers send is not even decoded. No serializer where an answer may be known as bytes.
    if handler.unary_unary is not None:
        assert handler.response_serializer is not None
        return grpc.unary_unary_rpc_method_handler(_unary(handler.unary_unary, plan, intake, handler.response_serializer, kit))
    if handler.unary_stream is not None:
        return grpc.unary_stream_rpc_method_handler(_stream(handler.unary_stream, plan, intake, kit), None, handler.response_serializer)
    raise ValueError(f"{plan.method}: streams of requests are not supported; take a repeated field")


async def _guard(kit: Kit, plan: Plan, context: Any, metadata: Metadata, request_id: str) -> Call:
    """Everything that must hold before a request is looked at, in order."""
    if kit.turns_away:
        raise _stopping()
    if kit.in_flight > kit.settings.max_concurrent_calls:
        raise errors.Unavailable("the server is at its limit of calls", 0.2, reason=ErrorReason.ERROR_REASON_UNAVAILABLE)
    if plan.audience == options_pb2.AUDIENCE_PUBLIC:
        call = Call(kit, plan, PUBLIC, request_id, context)
    else:
        call = Call(kit, plan, await _caller(kit, plan, context, metadata), request_id, context)
        call.permit()
    for subject, rate in _counted(call):
        wait_s = kit.limiter.hit_here(subject, rate) if kit.limiter.shared is None else await kit.limiter.hit(subject, rate)
        if wait_s:
            raise _too_many("calls", wait_s, rate)
    return call


async def _caller(kit: Kit, plan: Plan, context: Any, metadata: Metadata) -> Caller:
    """Who calls. A network that sends too many credentials that do not hold may for a while only use those that have held before."""

    def network() -> str:
        return client_of(context.peer() or "", metadata, kit.authenticator).network

    rate, credential = kit.settings.failed_rate_limit, metadata.get("authorization", "")
    # Nobody guesses a signature: a signed token is always looked at, so that no network keeps our own processes out.
    signed = isinstance(credential, str) and credential.count(".") == _DOTS_OF_TOKEN
    if not signed and (wait_s := kit.guesses.wait_s(credential, network)):
        raise _too_many("credentials that do not hold", wait_s, rate)
    try:
        caller = await kit.caller(plan, metadata)
    except errors.Unauthenticated:
        if credential and (wait_s := await kit.limiter.hit(f"{'token' if signed else 'guess'}:{network()}", rate)):
            if signed:
                raise _too_many("tokens that do not hold", wait_s, rate) from None
            kit.guesses.refuse(network(), wait_s)
        raise
    if not signed:
        kit.guesses.held(credential)
    return caller


def _counted(call: Call) -> Iterator[tuple[str, str]]:
    """What a call counts for, as (subject, rate). The platform's own calls are made for everybody, so nobody's rate is theirs."""
    plan, caller = call.plan, call.caller
    if caller.is_platform:
        return
    if caller is PUBLIC:
        subject = f"network:{call.client.network}"
        yield subject, call.kit.settings.public_rate_limit
    else:
        subject = caller.subject
        yield subject, call.kit.settings.rate_limit
        if caller.rate:
            yield f"key:{caller.key_id}", caller.rate
    if plan.rate:
        yield f"{plan.method}:{subject}", plan.rate


def _too_many(what: str, wait_s: float, rate: str) -> errors.Error:
    return errors.Exhausted(f"too many {what}; the limit is {rate}", retry_after_s=max(0.1, wait_s), limit=rate)


def _unary(handler: Any, plan: Plan, intake: Intake, pack: Callable[[Any], bytes], kit: Kit) -> Any:
    meter, standing = telemetry.meter(plan.method), Standing()

    async def unary(raw: bytes, context: Any) -> Any:
        started = time.perf_counter()
        metadata = metadata_of(context)
        request_id = _request_id(metadata)
        kit.in_flight += 1
        kit.taken_in += 1
        failure: errors.Error | None = None
        caller: Caller | None = None
        try:
            call = await _guard(kit, plan, context, metadata, request_id)
            caller = call.caller
            response = standing.again(raw)
            if response is None:
                request = intake.take(raw)
                repeatable = plan.takes_request_id and request.request_id
                response = pack(await (idempotency.once(call, request, handler) if repeatable else handler(request, call)))
                if call.owes_audit:
                    await call.write_audit()
                if call.stands is not None:
                    standing.keep(raw, response, call.stands)
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


def _stream(handler: Any, plan: Plan, intake: Intake, kit: Kit) -> Any:
    meter = telemetry.meter(plan.method)

    async def stream(raw: bytes, context: Any) -> AsyncIterator[Any]:
        started = time.perf_counter()
        metadata = metadata_of(context)
        request_id = _request_id(metadata)
        failure: errors.Error | None = None
        caller: Caller | None = None
        task = asyncio.current_task()
        assert task is not None
        kit.streams.add(task)
        try:
            call = await _guard(kit, plan, context, metadata, request_id)
            caller = call.caller
            request = intake.take(raw)
            async with aclosing(handler(request, call)) as messages:
                async for message in messages:
                    if call.owes_audit:
                        await call.write_audit()
                    yield message
            if call.owes_audit:
                await call.write_audit()
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
    debugs = plan.is_read and code == "OK"
    if telemetry.level() > (logging.DEBUG if debugs else logging.INFO):
        return
    say = log.debug if debugs else log.info
    subject, org = (caller.subject, caller.org_id) if caller is not None else ("", "")
    say("rpc", method=plan.method, code=code, ms=round(elapsed * 1000, 1), request_id=request_id, subject=subject, org=org)
