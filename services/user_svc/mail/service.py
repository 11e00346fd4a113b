"""MailboxService: what would have been sent, for development."""

from clawplane.user.v1 import mail_message_pb2, mailbox_service_pb2, mailbox_service_pb2_grpc
from services.kit.call import Call
from services.kit.proto import to_proto
from services.kit.secrets import SecretBox
from services.kit.standard import list_page
from services.user_svc.mail import repository
from services.user_svc.mail.models import MailMessage


class MailboxService(mailbox_service_pb2_grpc.MailboxServiceServicer):
    """See proto/clawplane/user/v1/mailbox_service.proto."""

    def __init__(self, box: SecretBox) -> None:
        self.box = box

    async def ListMailMessages(
        self, request: mailbox_service_pb2.ListMailMessagesRequest, call: Call
    ) -> mailbox_service_pb2.ListMailMessagesResponse:
        def message_of(row: MailMessage) -> mail_message_pb2.MailMessage:
            message = to_proto(row, mail_message_pb2.MailMessage)
            message.text = repository.text_of(self.box, row)
            return message

        statement = repository.newest(request.to_address)
        return await list_page(call, request, mailbox_service_pb2.ListMailMessagesResponse, statement, MailMessage.id, message_of)
