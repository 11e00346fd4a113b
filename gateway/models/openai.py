"""The shape of OpenAI's API: what a request must be, what of an answer counts, and what errors look like. Pure; knows no network."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson
from google.rpc import code_pb2, error_details_pb2
from starlette.responses import Response

from gateway.errors import ApiError

_CHARS_A_TOKEN = 4
_MOST_CHOICES = 8
DONE = b"[DONE]"


class OpenAiError(Exception):
    """An answer that is an error, as OpenAI's client libraries expect it."""

    def __init__(
        self, status: int, message: str, kind: str = "invalid_request_error", code: str | None = None, param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> Response:
        """The HTTP answer."""
        return Response(orjson.dumps(self.body), self.status, self.headers, "application/json")


@dataclass(frozen=True)
class Wish:
    """A request that can be sent on."""

    body: dict[str, Any]
    model: str
    stream: bool
    wants_usage: bool
    """Whether the caller asked for the usage chunk of a stream; the platform always does."""
    max_tokens: int
    """Most tokens that may come back, over all choices; 0: the caller named none."""
    tokens_in: int
    """Estimate of what is sent."""
    choices: int = 1


@dataclass(frozen=True)
class Usage:
    """What a provider has counted."""

    tokens_in: int
    tokens_out: int
    tokens_cached: int = 0
    tokens_reasoning: int = 0


def parse(raw: bytes) -> Wish:
    """The request in a body; OpenAiError (400) that names the parameter."""
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError:
        raise OpenAiError(400, "the body is not JSON") from None
    if not isinstance(body, dict):
        raise OpenAiError(400, "the body must be a JSON object")
    model = body.get("model")
    if not isinstance(model, str) or not 0 < len(model) <= 128:
        raise _bad("model", "is needed, as text")
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(one, dict) for one in messages):
        raise _bad("messages", "is needed, as a list of objects with role and content")
    stream = body.get("stream") or False
    if not isinstance(stream, bool):
        raise _bad("stream", "must be true or false")
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise _bad("stream_options", "must be an object")
    choices = _whole(body, "n", _MOST_CHOICES) or 1
    limit = max(_whole(body, "max_tokens"), _whole(body, "max_completion_tokens"))
    tokens_in = len(raw) // _CHARS_A_TOKEN + 1
    return Wish(body, model, stream, bool(options.get("include_usage")), limit * choices, tokens_in, choices)


def _whole(body: Mapping[str, Any], name: str, most: int = 10_000_000) -> int:
    value = body.get(name)
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise _bad(name, f"must be a whole number from 1 to {most}")
    return value


def _bad(param: str, problem: str) -> OpenAiError:
    return OpenAiError(400, f"{param}: {problem}", param=param)


def outgoing(wish: Wish, model: str, max_tokens: int, limit_name: str) -> bytes:
    """What is sent upstream: with the provider's own name of the model, a bound on the answer, and the usage asked for. ``limit_name``:
    the parameter that bounds the answer of a caller who does not."""
    body = wish.body | {"model": model}
    if not wish.max_tokens:
        # What is held is for all choices together.
        body[limit_name] = max(1, max_tokens // wish.choices)
    if wish.stream:
        body["stream_options"] = (body.get("stream_options") or {}) | {"include_usage": True}
    return orjson.dumps(body)


def usage_of(said: Any) -> Usage | None:
    """The usage in an answer or a chunk; None when there is none, or none that can be one."""
    usage = said.get("usage") if isinstance(said, dict) else None
    if not isinstance(usage, dict):
        return None
    counts = (
        usage.get("prompt_tokens"), usage.get("completion_tokens"),
        (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
        (usage.get("completion_tokens_details") or {}).get("reasoning_tokens") or 0,
    )  # fmt: skip
    if not all(isinstance(count, int) and 0 <= count <= 1_000_000_000 for count in counts):
        return None
    return Usage(*counts)  # type: ignore[arg-type]


_KINDS: Mapping[int, tuple[int, str, str | None]] = {
    code_pb2.UNAUTHENTICATED: (401, "invalid_request_error", "invalid_api_key"),
    code_pb2.PERMISSION_DENIED: (403, "invalid_request_error", "permission_denied"),
    code_pb2.INVALID_ARGUMENT: (400, "invalid_request_error", None),
    code_pb2.FAILED_PRECONDITION: (400, "invalid_request_error", None),
    code_pb2.RESOURCE_EXHAUSTED: (429, "rate_limit_error", "rate_limit_exceeded"),
}


def from_api_error(error: ApiError) -> OpenAiError:
    """A refusal of ours, in this shape. Used-up credit is 402, since client libraries send a 429 again."""
    status, kind, code = _KINDS.get(error.status.code, (error.http_status, "server_error", None))
    param = None
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    for detail in error.status.details:
        if detail.Is(info.DESCRIPTOR) and detail.Unpack(info) and info.reason == "CREDIT_EXHAUSTED":
            status, kind, code = 402, "insufficient_quota", "insufficient_quota"
        if detail.Is(bad.DESCRIPTOR) and detail.Unpack(bad) and bad.field_violations:
            param = bad.field_violations[0].field
    return OpenAiError(status, error.status.message, kind, code, param, error.headers)
