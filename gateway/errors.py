"""Errors as JSON: google.rpc.Status in the form of Google's APIs, ``{"error": {code, status, message, details}}``."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import grpc
import orjson
from google.protobuf import any_pb2, json_format
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, error_details_pb2, status_pb2
from starlette.responses import Response

from clawplane.errors.v1 import errors_pb2

# The import of error_details_pb2 also registers the messages that services put into a status: json_format prints them by name.
DOMAIN = "clawplane"
DETAILS_KEY = "grpc-status-details-bin"
Violation = tuple[str, str]

HTTP_STATUS: Mapping[int, int] = {
    code_pb2.CANCELLED: 499,
    code_pb2.UNKNOWN: 500,
    code_pb2.INVALID_ARGUMENT: 400,
    code_pb2.DEADLINE_EXCEEDED: 504,
    code_pb2.NOT_FOUND: 404,
    code_pb2.ALREADY_EXISTS: 409,
    code_pb2.PERMISSION_DENIED: 403,
    code_pb2.UNAUTHENTICATED: 401,
    code_pb2.RESOURCE_EXHAUSTED: 429,
    code_pb2.FAILED_PRECONDITION: 400,
    code_pb2.ABORTED: 409,
    code_pb2.OUT_OF_RANGE: 400,
    code_pb2.UNIMPLEMENTED: 501,
    code_pb2.INTERNAL: 500,
    code_pb2.UNAVAILABLE: 503,
    code_pb2.DATA_LOSS: 500,
    code_pb2.OK: 500,
}

# Without details such a status was made by gRPC itself: its text holds addresses and Python types, not words for callers.
_PLAIN_TEXT: Mapping[int, str] = {
    code_pb2.CANCELLED: "The call was cancelled.",
    code_pb2.UNKNOWN: "The service failed.",
    code_pb2.INTERNAL: "The service failed.",
    code_pb2.DATA_LOSS: "The service failed.",
    code_pb2.DEADLINE_EXCEEDED: "The service did not answer in time.",
    code_pb2.UNAVAILABLE: "The service cannot be reached now; try again.",
    code_pb2.UNIMPLEMENTED: "The service does not offer this.",
}


class ApiError(Exception):
    """An answer that is an error; `http_status` only where the canonical mapping says something else."""

    def __init__(self, status: status_pb2.Status, http_status: int | None = None, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(status.message)
        self.status = status
        self.http_status = http_status or HTTP_STATUS.get(status.code, 500)
        self.headers = dict(headers or {})


def make_status(
    code: "code_pb2.Code.ValueType",
    message: str,
    reason: "errors_pb2.ErrorReason.ValueType",
    violations: Iterable[Violation] = (),
    **metadata: str,
) -> status_pb2.Status:
    """A status with ErrorInfo, and BadRequest when there are violations as (field, description)."""
    status = status_pb2.Status(code=code, message=message)
    name = errors_pb2.ErrorReason.Name(reason).removeprefix("ERROR_REASON_")
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=name, domain=DOMAIN, metadata=metadata))
    fields = [error_details_pb2.BadRequest.FieldViolation(field=field, description=text) for field, text in violations]
    if fields:
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=fields))
    return status


def invalid(violations: Iterable[Violation], http_status: int | None = None) -> ApiError:
    """INVALID_ARGUMENT that names fields."""
    found = list(violations)
    message = "; ".join(f"{field}: {text}" for field, text in found[:5])
    return ApiError(make_status(code_pb2.INVALID_ARGUMENT, message, errors_pb2.ERROR_REASON_INVALID_FIELD, found[:50]), http_status)


def not_found(message: str = "Nothing is served at this path.") -> ApiError:
    """NOT_FOUND of the gateway's own."""
    return ApiError(make_status(code_pb2.NOT_FOUND, message, errors_pb2.ERROR_REASON_NOT_FOUND))


def method_not_allowed(allow: Iterable[str]) -> ApiError:
    """405 with the methods that are allowed."""
    names = ", ".join(sorted(allow))
    return ApiError(status_pb2.Status(code=code_pb2.UNIMPLEMENTED, message=f"This path takes {names}."), 405, {"Allow": names})


def too_large(limit_bytes: int) -> ApiError:
    """413; the connection closes, since the rest of the body is not read."""
    message = f"The body is larger than {limit_bytes} bytes."
    status = make_status(code_pb2.INVALID_ARGUMENT, message, errors_pb2.ERROR_REASON_TOO_LARGE, limit_bytes=str(limit_bytes))
    return ApiError(status, 413, {"Connection": "close"})


def internal(request_id: str) -> ApiError:
    """500 that tells nothing but the request id."""
    message = f"Internal error; the log knows more under request id {request_id}."
    status = make_status(code_pb2.INTERNAL, message, errors_pb2.ERROR_REASON_INTERNAL)
    status.details.add().Pack(error_details_pb2.RequestInfo(request_id=request_id))
    return ApiError(status)


def code_of(error: grpc.aio.AioRpcError) -> int:
    """The google.rpc.Code of a failed call."""
    return int(error.code().value[0])


def from_rpc(error: grpc.aio.AioRpcError) -> ApiError:
    """The answer for a failed call: its google.rpc.Status when the service sent one, otherwise code and harmless text."""
    status = _sent_status(error)
    if status is None:
        code = code_of(error)
        status = status_pb2.Status(code=code, message=_PLAIN_TEXT.get(code) or error.details() or "")
    headers: dict[str, str] = {}
    retry = error_details_pb2.RetryInfo()
    for detail in status.details:
        if detail.Is(retry.DESCRIPTOR) and detail.Unpack(retry):
            headers["Retry-After"] = str(max(1, math.ceil(retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9)))
    if status.code == code_pb2.UNAUTHENTICATED:
        headers["WWW-Authenticate"] = "Bearer"
    return ApiError(status, headers=headers)


def _sent_status(error: grpc.aio.AioRpcError) -> status_pb2.Status | None:
    for key, value in error.trailing_metadata() or ():
        if key == DETAILS_KEY and isinstance(value, bytes):
            try:
                status = status_pb2.Status.FromString(value)
            except DecodeError:
                return None
            return status if status.code == code_of(error) else None
    return None


def status_json(error: ApiError) -> dict[str, Any]:
    """An error as JSON."""
    code = error.status.code
    return {
        "error": {
            "code": error.http_status,
            "status": code_pb2.Code.Name(code) if code in code_pb2.Code.values() else "UNKNOWN",
            "message": error.status.message,
            "details": [_detail(detail) for detail in error.status.details],
        }
    }


def render(error: ApiError) -> Response:
    """The HTTP answer of an error."""
    return Response(orjson.dumps(status_json(error)), error.http_status, error.headers, "application/json")


def _detail(detail: any_pb2.Any) -> dict[str, Any]:
    try:
        return json_format.MessageToDict(detail)
    except (TypeError, ValueError, DecodeError):  # an Any of a type that only the service knows
        return {"@type": detail.type_url}
