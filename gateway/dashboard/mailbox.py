"""The mailbox of an installation that sends no mail: what would have gone out, with its codes, for whoever develops there."""

from collections.abc import Callable, Sequence

import grpc
from starlette.responses import Response

from clawplane.user.v1 import mailbox_service_pb2
from gateway.dashboard.render import render
from gateway.dashboard.visit import Visit
from gateway.errors import from_rpc

_PAGE_SIZE = 20


class Mailbox:
    """Reads with the gateway's own credential: whoever signs in needs the code before there is any other."""

    def __init__(self, service_metadata: Callable[[], Sequence[tuple[str, str]]]) -> None:
        self._service_metadata = service_metadata

    async def show(self, visit: Visit) -> Response:
        """The mail, newest first, to everybody or to one address."""
        address = visit.query.get("to", "").strip()[:254]
        request = mailbox_service_pb2.ListMailMessagesRequest(
            page_size=_PAGE_SIZE, page_token=visit.query.get("page_token", ""), to_address=address
        )
        metadata = (*self._service_metadata(), ("x-request-id", visit.http.scope["state"]["request_id"]))
        try:
            found = await visit.services.mailbox.ListMailMessages(request, metadata=metadata, timeout=visit.services.timeout_s)
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error) from None
        return render("mailbox.html", visit, page="", messages=found.mail_messages, next_page=found.next_page_token, address=address)
