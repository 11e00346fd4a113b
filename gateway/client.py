"""For whom the gateway calls: what it tells the services beside the visitor's own credential."""

import re
from collections.abc import Callable, Sequence

from starlette.requests import Request

from services.kit.client import CLIENT_AGENT, CLIENT_IP, FORWARDED

_NOT_PRINTABLE = re.compile(r"[^\x20-\x7e]")
_MOST_AGENT = 200


class Forwarder:
    """Says where a request came from, in the gateway's own name: the services believe nobody else."""

    def __init__(self, service_metadata: Callable[[], Sequence[tuple[str, str]]]) -> None:
        self._service_metadata = service_metadata

    def __call__(self, http: Request) -> list[tuple[str, str]]:
        """Metadata to add to a forwarded call. The address is that of the connection, or what a trusted proxy says (uvicorn sees to it)."""
        token = dict(self._service_metadata()).get("authorization", "").removeprefix("Bearer ")
        agent = _NOT_PRINTABLE.sub("", http.headers.get("user-agent", ""))[:_MOST_AGENT]
        return [(FORWARDED, token), (CLIENT_IP, http.client.host if http.client else ""), (CLIENT_AGENT, agent)]
