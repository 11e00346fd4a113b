"""Whether a form was sent from our own page."""

from urllib.parse import urlsplit

from google.rpc import code_pb2
from starlette.requests import Request

from clawplane.errors.v1 import errors_pb2
from gateway.errors import ApiError, make_status


def origin_of(url: str) -> str:
    """``scheme://host[:port]`` of a URL."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}".lower()


def refuse_strangers(http: Request, public_origin: str) -> None:
    """Forms of other sites must not press our buttons: PERMISSION_DENIED. Tools send neither header."""
    site = http.headers.get("sec-fetch-site", "same-origin")
    origin = http.headers.get("origin")
    own = {public_origin, f"{http.url.scheme}://{http.headers.get('host', '')}".lower()}
    if site not in ("same-origin", "none") or (origin is not None and origin.lower() not in own):
        message = "The request comes from another site."
        raise ApiError(make_status(code_pb2.PERMISSION_DENIED, message, errors_pb2.ERROR_REASON_PERMISSION_DENIED))
