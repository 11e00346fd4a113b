"""Errors that a client may see, and the one place where any exception becomes a google.rpc.Status."""

import re
from collections.abc import Sequence

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from sqlalchemy import exc as sa
from sqlalchemy.orm.exc import StaleDataError

from clawplane.errors.v1.errors_pb2 import ErrorReason

DOMAIN = "clawplane"

Violation = tuple[str, str]
"""(field path, what is wrong)."""


class Error(Exception):
    """An answer other than success: a status code, a stable reason, and a text that is safe to show."""

    code = grpc.StatusCode.UNKNOWN
    reason = ErrorReason.ERROR_REASON_UNSPECIFIED

    def __init__(
        self,
        message: str,
        *,
        reason: "ErrorReason.ValueType | None" = None,
        violations: Sequence[Violation] = (),
        retry_after_s: float | None = None,
        **metadata: object,
    ) -> None:
        super().__init__(message)
        self.message = message
        if reason is not None:
            self.reason = reason
        self.violations = violations
        self.retry_after_s = retry_after_s
        self.metadata = {key: str(value) for key, value in metadata.items()}


class InvalidArgument(Error):
    """A field breaks a rule: ``InvalidArgument("page_token", "belongs to another query")``."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    reason = ErrorReason.ERROR_REASON_INVALID_FIELD

    def __init__(self, field: str, problem: str, reason: "ErrorReason.ValueType | None" = None) -> None:
        super().__init__(f"{field}: {problem}" if field else problem, violations=[(field, problem)], reason=reason)


class InvalidFields(Error):
    """Several fields break rules."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    reason = ErrorReason.ERROR_REASON_INVALID_FIELD

    def __init__(self, violations: Sequence[Violation]) -> None:
        text = "; ".join(f"{field}: {problem}" if field else problem for field, problem in violations)
        super().__init__(text, violations=violations)


class Unauthenticated(Error):
    """No credential, or one that does not hold. The text never says which part was wrong."""

    code = grpc.StatusCode.UNAUTHENTICATED
    reason = ErrorReason.ERROR_REASON_UNAUTHENTICATED

    def __init__(self, message: str = "send a valid credential as 'authorization: Bearer ...'") -> None:
        super().__init__(message)


class PermissionDenied(Error):
    """The caller is known, may know of the thing, and lacks the named permission."""

    code = grpc.StatusCode.PERMISSION_DENIED
    reason = ErrorReason.ERROR_REASON_PERMISSION_DENIED

    def __init__(self, permission: str) -> None:
        super().__init__(f"the permission {permission} is needed", permission=permission)


class StepUpRequired(Error):
    """The caller may, but not with a sign-in that is so old, or not with a key."""

    code = grpc.StatusCode.PERMISSION_DENIED
    reason = ErrorReason.ERROR_REASON_STEP_UP_REQUIRED

    def __init__(self) -> None:
        super().__init__("this needs a fresh sign-in of a person: prove once more that it is you, then repeat it")


class SignInFailed(Error):
    """A proof of who somebody is does not hold. It says neither which part was wrong nor whether there is an account."""

    code = grpc.StatusCode.UNAUTHENTICATED
    reason = ErrorReason.ERROR_REASON_SIGN_IN_FAILED

    def __init__(self, *, signed_in: bool = False) -> None:
        """``signed_in``: of a caller whose credential holds, which UNAUTHENTICATED would deny."""
        super().__init__("this did not work: check what you sent; after several tries, wait a quarter of an hour")
        if signed_in:
            self.code = grpc.StatusCode.PERMISSION_DENIED


class NotFound(Error):
    """Does not exist, or is not the caller's: both look the same."""

    code = grpc.StatusCode.NOT_FOUND
    reason = ErrorReason.ERROR_REASON_NOT_FOUND

    def __init__(self, what: str) -> None:
        super().__init__(f"{what} not found")


class AlreadyExists(Error):
    """A unique value is taken. ``metadata`` says what a client may need to go on."""

    code = grpc.StatusCode.ALREADY_EXISTS
    reason = ErrorReason.ERROR_REASON_ALREADY_EXISTS

    def __init__(self, field: str, problem: str = "is already taken", **metadata: object) -> None:
        super().__init__(f"{field} {problem}", violations=[(field, problem)], field=field)
        self.metadata |= {key: str(value) for key, value in metadata.items()}


class Conflict(Error):
    """Somebody else was faster; read again and repeat."""

    code = grpc.StatusCode.ABORTED
    reason = ErrorReason.ERROR_REASON_CONFLICT


class InvalidState(Error):
    """The resource is in a state that does not allow the call."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = ErrorReason.ERROR_REASON_INVALID_STATE


class OutOfRange(Error):
    """What was asked for is no longer kept."""

    code = grpc.StatusCode.OUT_OF_RANGE


class Exhausted(Error):
    """A limit is reached."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = ErrorReason.ERROR_REASON_RATE_LIMITED


class Unavailable(Error):
    """Something that the call needs does not answer now."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = ErrorReason.ERROR_REASON_DEPENDENCY_UNAVAILABLE

    def __init__(self, message: str, retry_after_s: float = 1, reason: "ErrorReason.ValueType | None" = None) -> None:
        super().__init__(message, retry_after_s=retry_after_s, reason=reason)


class Internal(Error):
    """A defect. The log has the rest, under the request id."""

    code = grpc.StatusCode.INTERNAL
    reason = ErrorReason.ERROR_REASON_INTERNAL

    def __init__(self) -> None:
        super().__init__("internal error; the request id finds it in the log")


_BUSY = {"57014", "53300", "57P01", "57P02", "57P03"}
"""PostgreSQL: a statement took too long, too many connections, stopping, starting."""
_GONE = "08"
"""The class of errors of a connection that has ended; one that ends within a statement is not seen by SQLAlchemy as such."""


def from_exception(error: BaseException) -> Error:
    """The error that a client sees for any exception; Internal for what nobody foresaw."""
    if isinstance(error, Error):
        return error
    if isinstance(error, sa.IntegrityError):
        return _integrity(error)
    if is_retryable(error) or isinstance(error, StaleDataError):
        return Conflict("the resource was changed by someone else; read it again and repeat", retry_after_s=0.1)
    if isinstance(error, sa.TimeoutError):
        return Unavailable("the database is busy", retry_after_s=1)
    if isinstance(error, sa.DBAPIError) and (error.connection_invalidated or _sqlstate(error) in _BUSY or _sqlstate(error)[:2] == _GONE):
        return Unavailable("the database does not answer", retry_after_s=1)
    if isinstance(error, (ConnectionError, TimeoutError)):
        return Unavailable("a system that this call needs does not answer", retry_after_s=1)
    return Internal()


def is_retryable(error: BaseException) -> bool:
    """True for a serialisation failure, deadlock or lock time-out (PostgreSQL) and SQLITE_BUSY: the unit of work may be repeated."""
    if not isinstance(error, sa.DBAPIError):
        return False
    return _sqlstate(error) in {"40001", "40P01", "55P03"} or "database is locked" in str(error.orig)


def _sqlstate(error: sa.DBAPIError) -> str:
    return str(getattr(error.orig, "sqlstate", None) or "")


def _integrity(error: sa.IntegrityError) -> Error:
    text = str(error.orig)
    if _sqlstate(error) == "23505" or "UNIQUE constraint failed" in text:
        return AlreadyExists(_unique_field(error, text))
    return Internal()


def _unique_field(error: sa.IntegrityError, text: str) -> str:
    """The column of a broken unique rule: the last one, since org_id comes first. An index with a name of ours says it itself."""
    cause = getattr(error.orig, "__cause__", None)
    named = re.search(r"\bux_[a-z0-9_]+?__(\w+)", str(getattr(cause, "constraint_name", None) or text))
    if named:
        return named.group(1)
    # PostgreSQL: Key (org_id, name)=(...) already exists. SQLite: UNIQUE constraint failed: notes.org_id, notes.name
    columns = re.match(r"Key \(([\w\", ]+)\)=", str(getattr(cause, "detail", None) or "")) or re.search(r"failed: ([\w., ]+)", text)
    return columns.group(1).split(",")[-1].strip().split(".")[-1].strip('"') if columns else "value"


def to_status(error: Error, request_id: str) -> status_pb2.Status:
    """google.rpc.Status with ErrorInfo, and BadRequest or RetryInfo where they apply."""
    info = error_details_pb2.ErrorInfo(
        reason=ErrorReason.Name(error.reason).removeprefix("ERROR_REASON_"), domain=DOMAIN, metadata=error.metadata
    )
    details: list[any_pb2.Any] = [_pack(info)]
    if error.violations:
        bad = error_details_pb2.BadRequest()
        for field, problem in error.violations:
            bad.field_violations.add(field=field, description=problem)
        details.append(_pack(bad))
    if error.retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(int(error.retry_after_s * 1000))
        details.append(_pack(retry))
    details.append(_pack(error_details_pb2.RequestInfo(request_id=request_id)))
    number = code_pb2.Code.Value(error.code.name)
    return status_pb2.Status(code=number, message=error.message, details=details)


def _pack(message: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed
