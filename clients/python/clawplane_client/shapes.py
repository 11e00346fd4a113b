"""The usage in the answers of providers, as OpenAI and Anthropic shape them. Pure: answers are read, never changed, and never raise."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_MOST = 1_000_000_000


@dataclass(frozen=True)
class Usage:
    """What a provider has counted, in the ledger's terms."""

    tokens_in: int
    """Tokens read, ``tokens_cached`` among them."""
    tokens_out: int
    """Tokens written, ``tokens_reasoning`` among them."""
    tokens_cached: int = 0
    """Tokens read from the provider's cache."""
    tokens_reasoning: int = 0
    """Tokens spent on reasoning."""
    model: str = ""
    """The model as the answer names it; "" when it names none."""


def usage_from_openai(response: Any) -> Usage | None:
    """The usage of a chat completion, an embedding or an answer of the Responses API, as a dict or an object of an SDK; of a stream, that
    of its last chunk (``stream_options={"include_usage": True}``) or of its event ``response.completed``.

    None when there is none, or none that can be one: a count that is missing, negative, no whole number, or above a thousand million.
    """
    if _get(response, "usage") is None and _get(response, "response") is not None:
        response = _get(response, "response")
    usage = _get(response, "usage")
    if _get(usage, "prompt_tokens") is not None:
        # An embedding writes nothing, and says so by leaving it out.
        tokens_in, tokens_out = _count(usage, "prompt_tokens"), _count(usage, "completion_tokens", 0)
        read, written = "prompt_tokens_details", "completion_tokens_details"
    else:
        tokens_in, tokens_out = _count(usage, "input_tokens"), _count(usage, "output_tokens")
        read, written = "input_tokens_details", "output_tokens_details"
    cached = _count(_get(usage, read), "cached_tokens", 0)
    reasoning = _count(_get(usage, written), "reasoning_tokens", 0)
    return _usage(response, tokens_in, tokens_out, cached, reasoning)


def usage_from_anthropic(response: Any) -> Usage | None:
    """The usage of a message, as a dict or an object of an SDK; of a stream, that of the message which the SDK puts together.

    Anthropic's ``input_tokens`` are only those that no cache had to do with: ``tokens_in`` are these, those written to the cache and those
    read from it; ``tokens_cached`` are those read. None as with ``usage_from_openai``.
    """
    usage = _get(response, "usage")
    fresh, tokens_out = _count(usage, "input_tokens"), _count(usage, "output_tokens")
    written, read = _count(usage, "cache_creation_input_tokens", 0), _count(usage, "cache_read_input_tokens", 0)
    if fresh is None or written is None or read is None:
        return None
    return _usage(response, fresh + written + read, tokens_out, read, 0)


def _usage(response: Any, tokens_in: int | None, tokens_out: int | None, cached: int | None, reasoning: int | None) -> Usage | None:
    if tokens_in is None or tokens_out is None or cached is None or reasoning is None or tokens_in > _MOST:
        return None
    model = _get(response, "model")
    # Some providers count parts that are more than the whole, which the ledger refuses.
    return Usage(tokens_in, tokens_out, min(cached, tokens_in), min(reasoning, tokens_out), model if isinstance(model, str) else "")


def _count(of: Any, name: str, missing: int | None = None) -> int | None:
    value = _get(of, name)
    if value is None:
        return missing
    return int(value) if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST else None


def _get(of: Any, name: str) -> Any:
    try:
        return of.get(name) if isinstance(of, Mapping) else getattr(of, name, None)
    except Exception:
        # Properties and mappings of strangers may raise whatever they like.
        return None
