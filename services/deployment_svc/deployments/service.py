"""DeploymentService: order, read, retry and close bots."""

from collections.abc import Callable

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from clawplane.deployment.v1 import deployment_pb2, deployment_service_pb2, deployment_service_pb2_grpc
from services.deployment_svc.deployments import repository, state
from services.deployment_svc.deployments.close import close
from services.deployment_svc.deployments.create import Creator
from services.deployment_svc.deployments.models import Deployment, DeploymentEvent
from services.deployment_svc.payments.links import Links
from services.kit.call import Call
from services.kit.errors import Conflict, InvalidState, NotFound
from services.kit.paging import page
from services.kit.proto import to_proto


def to_message(d: Deployment) -> deployment_pb2.Deployment:
    """The deployment as its owner sees it."""
    message = to_proto(d, deployment_pb2.Deployment)
    message.status = state.status_of(d.state)
    return message


class DeploymentService(deployment_service_pb2_grpc.DeploymentServiceServicer):
    """See proto/clawplane/deployment/v1/deployment_service.proto."""

    def __init__(self, creator: Creator, links: Links, wake: Callable[[], None]) -> None:
        self.creator, self.links, self.wake = creator, links, wake

    async def CreateDeployment(
        self, request: deployment_service_pb2.CreateDeploymentRequest, call: Call
    ) -> deployment_pb2.Deployment:
        return to_message(await self.creator.create(request, call))

    async def GetDeployment(self, request: deployment_service_pb2.GetDeploymentRequest, call: Call) -> deployment_pb2.Deployment:
        async with call.read() as session:
            d = await session.get(Deployment, request.id)
        if d is None:
            raise NotFound("deployment")
        return to_message(d)

    async def ListDeployments(
        self, request: deployment_service_pb2.ListDeploymentsRequest, call: Call
    ) -> deployment_service_pb2.ListDeploymentsResponse:
        statement = select(Deployment)
        if request.states:
            statement = statement.where(Deployment.state.in_(list(request.states)))
        async with call.read() as session:
            rows, token = await page(session, statement, Deployment.id, request)
        return deployment_service_pb2.ListDeploymentsResponse(deployments=[to_message(d) for d in rows], next_page_token=token)

    async def RetryDeployment(
        self, request: deployment_service_pb2.RetryDeploymentRequest, call: Call
    ) -> deployment_pb2.Deployment:
        async def work(session: AsyncSession) -> Deployment:
            d = await repository.locked(session, request.id)
            if d is None:
                raise NotFound("deployment")
            if d.state != state.FAILED or d.payment_id is None:
                what = "is not paid" if d.state == state.FAILED else f"is {repository.state_name(d.state)}"
                raise InvalidState(
                    f"only a paid deployment that FAILED can be retried; this one {what}", state=repository.state_name(d.state)
                )
            d.attempts, d.attempting_since, d.tried_providers = 0, None, []
            d.generation += 1
            d.error_message = ""
            repository.move(session, d, state.DEPLOYING, "retried by the owner")
            call.audit(d.id, org_id=d.org_id)
            return d

        d: Deployment = await call.run(work)
        self.wake()
        return to_message(d)

    async def CloseDeployment(
        self, request: deployment_service_pb2.CloseDeploymentRequest, call: Call
    ) -> deployment_pb2.Deployment:
        async with call.read() as session:
            d = await session.get(Deployment, request.id)
        if d is None:
            raise NotFound("deployment")
        if d.state == state.PENDING:
            d = await self.links.close(d.id)
            if d.state == state.DEPLOYING:
                # The page was paid in the same moment: a payment is never thrown away by a click on "cancel".
                self.wake()
                return to_message(d)
        pending_page = d.link_number

        async def work(session: AsyncSession) -> Deployment:
            row = await repository.locked(session, request.id)
            assert row is not None
            if row.state == state.PENDING and row.link_number != pending_page:
                raise Conflict("a new payment page was opened meanwhile; try again", retry_after_s=0.2)
            call.audit(row.id, org_id=row.org_id)
            await close(session, row, "closed by the owner")
            return row

        d = await call.run(work)
        self.wake()
        return to_message(d)

    async def ListDeploymentEvents(
        self, request: deployment_service_pb2.ListDeploymentEventsRequest, call: Call
    ) -> deployment_service_pb2.ListDeploymentEventsResponse:
        async with call.read() as session:
            if await session.get(Deployment, request.deployment_id) is None:
                raise NotFound("deployment")
            statement = select(DeploymentEvent).where(DeploymentEvent.deployment_id == request.deployment_id)
            rows, token = await page(session, statement, DeploymentEvent.id, request, descending=False)
        events = [to_proto(row, deployment_pb2.DeploymentEvent) for row in rows]
        return deployment_service_pb2.ListDeploymentEventsResponse(events=events, next_page_token=token)
