"""JSON without the leniency of parsers: no duplicate keys, no NaN, no lone surrogates, bounded depth."""

import json
import math
from typing import Any, NoReturn

from gateway.errors import ApiError, invalid

# A level of JSON is up to three levels of google.protobuf.Struct, and protobuf reads 100.
MAX_DEPTH = 28


class _DuplicateKey(ValueError):
    pass


def load(raw: bytes) -> Any:
    """JSON text to Python values; ApiError (400) that names the place, "body" when there is none better."""
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_pairs, parse_constant=_constant)
    except UnicodeDecodeError as error:
        raise _bad("body", f"is not UTF-8: byte {error.start} is invalid") from None
    except _DuplicateKey as error:
        raise _bad(str(error), "is given more than once") from None
    except json.JSONDecodeError as error:
        raise _bad("body", f"is malformed JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise _bad("body", f"is nested deeper than {MAX_DEPTH} levels") from None
    except ValueError:
        raise _bad("body", "is malformed JSON: a number is out of range") from None
    _check(value)
    return value


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _DuplicateKey(printable(key))
            seen.add(key)
    return result


def _constant(name: str) -> NoReturn:
    raise json.JSONDecodeError(f"{name} is no JSON number", name, 0)


def _check(root: Any) -> None:
    stack: list[tuple[Any, int]] = [(root, 1)]
    while stack:
        value, depth = stack.pop()
        if isinstance(value, str):
            _check_text(value)
        elif isinstance(value, float):
            if not math.isfinite(value):
                raise _bad("body", "holds a number that is out of range")
        elif isinstance(value, dict | list):
            if depth > MAX_DEPTH:
                raise _bad("body", f"is nested deeper than {MAX_DEPTH} levels")
            if isinstance(value, dict):
                for key in value:
                    _check_text(key)
            stack.extend((child, depth + 1) for child in (value.values() if isinstance(value, dict) else value))


def _check_text(text: str) -> None:
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise _bad("body", "holds half of a surrogate pair, which is no text") from None


def printable(text: str) -> str:
    """Text of a caller as a field name for errors: short, and valid UTF-8."""
    return text[:100].encode("utf-8", "replace").decode("utf-8")


def _bad(field: str, description: str) -> ApiError:
    return invalid([(field, description)])
