"""What the dashboard keeps in a browser: cookies that no script reads and that no other site sends along with a form."""

from starlette.requests import Request
from starlette.responses import Response

SESSION = "clawplane"
"""The session's token."""
ORG = "clawplane-org"
"""The organization that the visitor has chosen."""
ADDRESS = "clawplane-address"
"""Where a code was sent to."""
SIGN_UP = "clawplane-sign-up"
"""What ties the code of a sign-up to this browser."""
BINDING = "clawplane-oauth"
"""What ties a sign-in at a provider to this browser."""
SHORT_S = 600
"""As long as a code or a sign-in at a provider may take."""
_MOST = 300


class Jar:
    """Reads and sets them. ``secure``: the gateway is reached over TLS."""

    def __init__(self, *, secure: bool) -> None:
        # A browser takes a cookie of this prefix from the host itself alone, and over TLS alone.
        self._prefix, self._secure = ("__Host-" if secure else ""), secure

    def get(self, http: Request, name: str) -> str:
        """The value; empty where there is none, or one that cannot be ours."""
        value = http.cookies.get(self._prefix + name, "")
        return value if len(value) <= _MOST and value.isascii() and value.isprintable() else ""

    def put(self, response: Response, name: str, value: str, max_age_s: int) -> None:
        """Keeps a value for as long."""
        response.set_cookie(
            self._prefix + name, value, max_age=max_age_s, path="/", secure=self._secure, httponly=True, samesite="lax"
        )

    def drop(self, response: Response, *names: str) -> None:
        """Lets the browser forget."""
        for name in names:
            response.delete_cookie(self._prefix + name, path="/", secure=self._secure, httponly=True, samesite="lax")
