"""The one wrapper around every RPC. ``_guard`` shows the order of everything that happens to a call."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import grpc
import structlog
from google.protobuf import descriptor_pool
from grpc_status import rpc_status

from clawplane.errors.v1.errors_pb2 import ErrorReason
from clawplane.options.v1 import options_pb2
from services.kit import errors, idempotency, rates, telemetry
from services.kit.auth import PUBLIC, Caller
from services.kit.call import Call, Kit, Plan
from services.kit.intake import Intake
from services.kit.standing import Standing
from services.kit.table import Handler, Table, metadata_of

log = structlog.get_logger()
_DOTS_OF_TOKEN = 2


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
    # No deserializer: what strangers send is not even decoded. No serializer of one answer: it may be known as bytes.
    if handler.unary_unary is not None:
        assert handler.response_serializer is not None
        return grpc.unary_unary_rpc_method_handler(_unary(handler.unary_unary, plan, intake, handler.response_serializer, kit))
    if handler.unary_stream is not None:
        return grpc.unary_stream_rpc_method_handler(_stream(handler.unary_stream, plan, intake, kit), None, handler.response_serializer)
    raise ValueError(f"{plan.method}: streams of requests are not supported; take a repeated field")


async def _guard(call: Call) -> None:
    """Everything that must hold before a request is looked at, in order."""
    kit, plan = call.kit, call.plan
    if kit.turns_away:
        raise _stopping()
    if kit.in_flight > kit.settings.max_concurrent_calls:
        raise errors.Unavailable("the server is at its limit of calls", 0.2, reason=ErrorReason.ERROR_REASON_UNAVAILABLE)
    if plan.audience == options_pb2.AUDIENCE_PUBLIC:
        call.caller = PUBLIC
    else:
        call.caller = kit.known_caller(plan, call.metadata) or await _caller(call)
        call.permit()
    for subject, rate in _counted(call):
        wait_s = kit.limiter.hit_here(subject, rate) if kit.limiter.shared is None else await kit.limiter.hit(subject, rate)
        if wait_s:
            raise _too_many("calls", wait_s, rate)


async def _caller(call: Call) -> Caller:
    """Who calls. A network that sends too many credentials that do not hold may for a while only use those that have held before."""
    kit = call.kit

    def network() -> str:
        return call.client.network

    rate, credential = kit.settings.failed_rate_limit, call.metadata.get("authorization", "")
    # Nobody guesses a signature: a signed token is always looked at, so that no network keeps our own processes out.
    signed = isinstance(credential, str) and credential.count(".") == _DOTS_OF_TOKEN
    if not signed and (wait_s := kit.guesses.wait_s(credential, network)):
        raise _too_many("credentials that do not hold", wait_s, rate)
    try:
        caller = await kit.caller(call.plan, call.metadata)
    except errors.Unauthenticated:
        if credential and (wait_s := await kit.limiter.hit(f"{'token' if signed else 'guess'}:{network()}", rate)):
            if signed:
                raise _too_many("tokens that do not hold", wait_s, rate) from None
            kit.guesses.refuse(network(), wait_s)
        raise
    if not signed:
        kit.guesses.held(credential)
    return caller


def _counted(call: Call) -> Sequence[tuple[str, str]]:
    """What a call counts for, as (subject, rate). The platform's own calls are made for everybody, so nobody's rate is theirs."""
    plan, caller = call.plan, call.caller
    if caller.is_platform:
        return ()
    if caller is PUBLIC:
        subject = f"network:{call.client.network}"
        counted = [(subject, call.kit.settings.public_rate_limit)]
    else:
        subject = caller.subject
        counted = [(subject, call.kit.settings.rate_limit)]
        if caller.rate:
            counted.append((f"key:{caller.key_id}", caller.rate))
    if plan.rate:
        counted.append((f"{plan.method}:{subject}", plan.rate))
    return counted


def _too_many(what: str, wait_s: float, rate: str) -> errors.Error:
    return errors.Exhausted(f"too many {what}; the limit is {rate}", retry_after_s=max(0.1, wait_s), limit=rate)


def _unary(handler: Any, plan: Plan, intake: Intake, pack: Callable[[Any], bytes], kit: Kit) -> Any:
    meter, standing = telemetry.meter(plan.method), Standing()

    async def unary(raw: bytes, context: Any) -> Any:
        call = Call(kit, plan, metadata_of(context), context)
        kit.in_flight += 1
        kit.taken_in += 1
        failure: errors.Error | None = None
        try:
            await _guard(call)
            response = standing.again(raw)
            if response is None:
                request = intake.take(raw)
                repeatable = plan.takes_request_id and request.request_id
                message = await (idempotency.once(call, request, handler) if repeatable else handler(request, call))
                if call.owes_audit:
                    await call.write_audit()
                response = pack(message)
                if call.word is not None:
                    standing.keep(raw, response, call.word)
        except grpc.aio.AbortError:
            raise
        except asyncio.CancelledError:
            _report(meter, call, "CANCELLED")
            raise
        except Exception as error:
            failure = _failure(error, call)
        finally:
            kit.in_flight -= 1
        if failure is not None:
            _report(meter, call, failure.code.name)
            await _abort(call, failure)
        _report(meter, call, "OK")
        if not plan.is_read or plan.audited:
            # Of any other read that went well nothing stays that the id would name.
            context.set_trailing_metadata((("x-request-id", call.request_id),))
        return response

    return unary


def _stream(handler: Any, plan: Plan, intake: Intake, kit: Kit) -> Any:
    meter = telemetry.meter(plan.method)

    async def stream(raw: bytes, context: Any) -> AsyncIterator[Any]:
        call = Call(kit, plan, metadata_of(context), context)
        failure: errors.Error | None = None
        task = asyncio.current_task()
        assert task is not None
        kit.streams.add(task)
        try:
            await _guard(call)
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
                _report(meter, call, "CANCELLED")
                raise
            task.uncancel()
            failure = _stopping()
        except Exception as error:
            failure = _failure(error, call)
        finally:
            kit.streams.discard(task)
        if failure is not None:
            _report(meter, call, failure.code.name)
            await _abort(call, failure)
        _report(meter, call, "OK")
        context.set_trailing_metadata((("x-request-id", call.request_id),))

    return stream


def _stopping() -> errors.Error:
    return errors.Unavailable("the server is stopping; resume elsewhere", 0, reason=ErrorReason.ERROR_REASON_UNAVAILABLE)


async def _abort(call: Call, failure: errors.Error) -> None:
    status = rpc_status.to_status(errors.to_status(failure, call.request_id))
    await call.context.abort(status.code, status.details, (*status.trailing_metadata, ("x-request-id", call.request_id)))


def _failure(error: Exception, call: Call) -> errors.Error:
    failure = errors.from_exception(error)
    if failure.code is grpc.StatusCode.INTERNAL:
        log.error("rpc.defect", method=call.plan.method, request_id=call.request_id, exc_info=error)
    return failure


def _report(meter: telemetry.Meter, call: Call, code: str) -> None:
    elapsed = time.perf_counter() - call.started
    meter.count(code, elapsed)
    # A read that went well says nothing that the metrics do not say.
    debugs = call.plan.is_read and code == "OK"
    if telemetry.level() > (logging.DEBUG if debugs else logging.INFO):
        return
    say, caller = log.debug if debugs else log.info, call.caller
    ms = round(elapsed * 1000, 1)
    say("rpc", method=call.plan.method, code=code, ms=ms, request_id=call.request_id, subject=caller.subject, org=caller.org_id)
