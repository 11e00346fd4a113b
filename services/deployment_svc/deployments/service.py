"""DeploymentService: order, read, watch, change and end bots."""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from clawplane.deployment.v1 import deployment_pb2, deployment_service_pb2, deployment_service_pb2_grpc
from services.deployment_svc.deployments import change, events, repository, secrets, state
from services.deployment_svc.deployments.close import close
from services.deployment_svc.deployments.create import Creator
from services.deployment_svc.deployments.models import Deployment, DeploymentEvent
from services.deployment_svc.payments.links import Links
from services.kit.call import Call
from services.kit.coalesce import Loader
from services.kit.errors import Conflict, InvalidArgument, InvalidState
from services.kit.proto import to_proto
from services.kit.standard import list_page


def to_message(d: Deployment) -> deployment_pb2.Deployment:
    """The deployment as its owner sees it."""
    message = to_proto(d, deployment_pb2.Deployment)
    message.status = state.status_of(d.state)
    return message


def to_event(event: DeploymentEvent) -> deployment_pb2.DeploymentEvent:
    """An event as its owner sees it."""
    return to_proto(event, deployment_pb2.DeploymentEvent)


def to_response(event: DeploymentEvent | None, d: Deployment) -> deployment_service_pb2.WatchDeploymentResponse:
    """One answer of a watch."""
    response = deployment_service_pb2.WatchDeploymentResponse(deployment=to_message(d))
    if event is not None:
        response.event.CopyFrom(to_event(event))
    return response


class DeploymentService(deployment_service_pb2_grpc.DeploymentServiceServicer):
    """See proto/clawplane/deployment/v1/deployment_service.proto."""

    def __init__(self, creator: Creator, links: Links, load: Loader[Any], wake: Callable[[], None]) -> None:
        self.creator, self.links, self.load, self.wake = creator, links, load, wake

    async def CreateDeployment(self, request: deployment_service_pb2.CreateDeploymentRequest, call: Call) -> deployment_pb2.Deployment:
        return to_message(await self.creator.create(request, call))

    async def GetDeployment(self, request: deployment_service_pb2.GetDeploymentRequest, call: Call) -> deployment_pb2.Deployment:
        return to_message(repository.visible(await self.load(request.id), call))

    async def ListDeployments(
        self, request: deployment_service_pb2.ListDeploymentsRequest, call: Call
    ) -> deployment_service_pb2.ListDeploymentsResponse:
        if request.show_deleted and not call.caller.is_platform:
            raise InvalidArgument("show_deleted", "is for services and operators")
        statement = select(Deployment)
        if not request.show_deleted:
            statement = statement.where(Deployment.deleted_at.is_(None))
        if request.states:
            statement = statement.where(Deployment.state.in_(list(request.states)))
        if request.model:
            statement = statement.where(Deployment.model == request.model)
        if request.channel:
            statement = statement.where(Deployment.channel == request.channel)
        answer = deployment_service_pb2.ListDeploymentsResponse
        return await list_page(call, request, answer, statement, Deployment.id, to_message)

    async def SummarizeDeployments(
        self, request: deployment_service_pb2.SummarizeDeploymentsRequest, call: Call
    ) -> deployment_service_pb2.SummarizeDeploymentsResponse:
        async with call.read() as session:
            counts = sorted((await repository.count_by_state(session)).items())
        return deployment_service_pb2.SummarizeDeploymentsResponse(
            counts=[deployment_service_pb2.StateCount(state=state, count=count) for state, count in counts],  # type: ignore[arg-type]
            total=sum(count for _, count in counts),
        )

    async def RetryDeployment(self, request: deployment_service_pb2.RetryDeploymentRequest, call: Call) -> deployment_pb2.Deployment:
        async def work(session: AsyncSession) -> Deployment:
            d = await change.own(session, call, request.id)
            if d.state != state.FAILED or d.payment_id is None:
                name = repository.state_name(d.state)
                what = "is not paid" if d.state == state.FAILED else f"is {name}"
                raise InvalidState(f"only a paid deployment that FAILED can be retried; this one {what}", state=name)
            await change.set_state(session, d, state.DEPLOYING, "retried by the owner")
            return d

        return await self._changed(call, work)

    async def CloseDeployment(self, request: deployment_service_pb2.CloseDeploymentRequest, call: Call) -> deployment_pb2.Deployment:
        async def end(session: AsyncSession, d: Deployment) -> None:
            await close(session, d, "closed by the owner")

        return await self._end(request.id, call, end)

    async def CancelDeployment(self, request: deployment_service_pb2.CancelDeploymentRequest, call: Call) -> deployment_pb2.Deployment:
        return await self._end(request.id, call, change.cancel)

    async def _end(
        self, deployment_id: str, call: Call, end: Callable[[AsyncSession, Deployment], Awaitable[None]]
    ) -> deployment_pb2.Deployment:
        """Closes the payment page first, outside any transaction."""
        async with call.read() as session:
            d = await session.get(Deployment, deployment_id)
        d = repository.visible(d, call)
        if d.state == state.PENDING:
            d = await self.links.close(d.id)
            if d.state == state.DEPLOYING:
                # The page was paid in the same moment: a payment is never thrown away by a click on "cancel".
                self.wake()
                return to_message(d)
        pending_page = d.link_number

        async def work(session: AsyncSession) -> Deployment:
            row = await change.own(session, call, deployment_id)
            if row.state == state.PENDING and row.link_number != pending_page:
                raise Conflict("a new payment page was opened meanwhile; try again", retry_after_s=0.2)
            await end(session, row)
            return row

        return await self._changed(call, work)

    async def UpdateDeployment(self, request: deployment_service_pb2.UpdateDeploymentRequest, call: Call) -> deployment_pb2.Deployment:
        return await self._changed(call, lambda session: change.update(session, call, request, self.creator.settings))

    async def DeleteDeployment(self, request: deployment_service_pb2.DeleteDeploymentRequest, call: Call) -> deployment_pb2.Deployment:
        async def work(session: AsyncSession) -> Deployment:
            d = await change.own(session, call, request.id)
            await change.delete(session, d)
            return d

        return await self._changed(call, work)

    async def RotateClawKey(self, request: deployment_service_pb2.RotateClawKeyRequest, call: Call) -> deployment_pb2.Deployment:
        async def work(session: AsyncSession) -> Deployment:
            d = await change.own(session, call, request.id)
            change.rotate(session, d)
            return d

        return await self._changed(call, work)

    async def UpdateDeploymentStatus(
        self, request: deployment_service_pb2.UpdateDeploymentStatusRequest, call: Call
    ) -> deployment_pb2.Deployment:
        async def work(session: AsyncSession) -> Deployment:
            d = await change.own(session, call, request.id)
            before = repository.state_name(d.state)
            await change.set_state(session, d, request.state, request.message)
            call.audit(d.id, org_id=d.org_id, before={"state": before}, after={"state": repository.state_name(d.state)})
            return d

        return await self._changed(call, work)

    async def _changed(self, call: Call, work: Callable[[AsyncSession], Awaitable[Deployment]]) -> deployment_pb2.Deployment:
        d: Deployment = await call.run(work)
        self.wake()
        return to_message(d)

    async def LookupDeployment(self, request: deployment_service_pb2.LookupDeploymentRequest, call: Call) -> deployment_pb2.Deployment:
        async with call.read() as session:
            d = await change.look_up(session, request)
        return to_message(repository.visible(d, call))

    async def FindPendingDuplicate(
        self, request: deployment_service_pb2.FindPendingDuplicateRequest, call: Call
    ) -> deployment_pb2.Deployment:
        _ = call.org_id
        prints = secrets.fingerprints(self.creator.box, call.caller.user_id, request.model, request.channel, request.channel_token)
        async with call.read() as session:
            d = await repository.pending_wish(session, prints.values())
        return to_message(repository.visible(d, call))

    async def WatchDeployment(
        self, request: deployment_service_pb2.WatchDeploymentRequest, call: Call
    ) -> AsyncIterator[deployment_service_pb2.WatchDeploymentResponse]:
        happening = events.watch(call, self.creator.settings.watch_poll_s, deployment_id=request.id, after=request.after_event_id)
        async for event, d in happening:
            yield to_response(event, d)

    async def WatchDeployments(
        self, request: deployment_service_pb2.WatchDeploymentsRequest, call: Call
    ) -> AsyncIterator[deployment_service_pb2.WatchDeploymentResponse]:
        async for event, d in events.watch(call, self.creator.settings.watch_poll_s, after=request.after_event_id):
            yield to_response(event, d)

    async def ListDeploymentEvents(
        self, request: deployment_service_pb2.ListDeploymentEventsRequest, call: Call
    ) -> deployment_service_pb2.ListDeploymentEventsResponse:
        async with call.read() as session:
            repository.visible(await session.get(Deployment, request.deployment_id), call)
        statement = select(DeploymentEvent).where(DeploymentEvent.deployment_id == request.deployment_id)
        answer = deployment_service_pb2.ListDeploymentEventsResponse
        return await list_page(call, request, answer, statement, DeploymentEvent.id, to_event, descending=False)
