"""Changes of a deployment, each within the caller's transaction: what its owner may wish, and what an operator may set."""

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from clawplane.deployment.v1 import deployment_service_pb2 as rpc
from clawplane.deployment.v1.deployment_pb2 import Deployment as Message
from services.deployment_svc.deployments import repository, spend_cap, state
from services.deployment_svc.deployments.close import close
from services.deployment_svc.deployments.models import Deployment
from services.deployment_svc.payments.models import Payment, PaymentSession
from services.deployment_svc.settings import DeploymentSettings
from services.kit.audit import diff
from services.kit.call import Call
from services.kit.columns import now
from services.kit.errors import Conflict, InvalidArgument, InvalidState
from services.kit.proto import assign, to_proto

_ENDED = (state.CLOSED, state.CANCELED, state.EXPIRED)


async def own(session: AsyncSession, call: Call, deployment_id: str) -> Deployment:
    """The deployment, locked; NotFound when the caller may not know of it."""
    d = repository.visible(await repository.locked(session, deployment_id), call)
    call.audit(d.id, org_id=d.org_id)
    return d


async def update(session: AsyncSession, call: Call, request: rpc.UpdateDeploymentRequest, settings: DeploymentSettings) -> Deployment:
    """Name at once; another model restarts what runs."""
    wish = request.deployment
    d = await own(session, call, wish.id)
    if wish.etag and wish.etag != str(d.version):
        raise Conflict("the deployment was changed by someone else; read it again and repeat")
    before = to_proto(d, Message)
    assign(d, wish, request.update_mask)
    call.audit(d.id, org_id=d.org_id, **diff(before, to_proto(d, Message)))
    if d.model == before.model:
        return d
    if d.model not in settings.models:
        raise InvalidArgument("deployment.model", f"must be one of {', '.join(settings.models)}")
    if d.state not in state.LIVE:
        name = repository.state_name(d.state)
        raise InvalidState(f"the model of a deployment that is {name} cannot be changed: order another one", state=name)
    if d.state in (state.ACTIVE, state.DEPLOYING):
        repository.restart(session, d, f"the model becomes {d.model}")
    return d


def rotate(session: AsyncSession, d: Deployment) -> None:
    """A new start brings a new key; the old one ends once the new bot answers."""
    if d.state != state.ACTIVE:
        name = repository.state_name(d.state)
        raise InvalidState(f"only an ACTIVE bot's key can be rotated; this one is {name}", state=name)
    repository.restart(session, d, "started again with another key")


async def cancel(session: AsyncSession, d: Deployment) -> None:
    """Ends what does not run yet."""
    if d.state not in (state.PENDING, state.EXPIRED, state.CANCELED, state.DEPLOYING, state.CLOSING, state.CLOSED):
        name = repository.state_name(d.state)
        raise InvalidState(f"only what is queued or being brought up can be cancelled; this one is {name}: close it", state=name)
    await close(session, d, "cancelled by the owner")


async def delete(session: AsyncSession, d: Deployment) -> None:
    """Hides what has ended."""
    if d.deleted_at is not None:
        return
    if d.state not in _ENDED:
        name = repository.state_name(d.state)
        raise InvalidState(f"a deployment that is {name} cannot be deleted: close it first", state=name)
    await close(session, d, "deleted by the owner")
    d.deleted_at = now()
    d.channel_token_sealed = d.channel_api_key_sealed = None
    repository.note(session, d, "deleted", "deleted by the owner")


async def set_state(session: AsyncSession, d: Deployment, to: int, message: str) -> None:
    """Moves by hand, with what the loop would have done beside it."""
    if to in (state.ACTIVE, state.CLOSED):
        name = repository.state_name(to)
        raise InvalidArgument("state", f"{name} is what the platform itself has seen: it cannot be set")
    if to == state.CLOSING and d.state in state.LIVE:
        return await close(session, d, message)
    if to == state.SUSPENDED:
        return repository.suspend(session, d, message)
    if to == state.DEPLOYING and d.state in (state.SUSPENDED, state.FAILED):
        await spend_cap.leave_alone(session, d)
        return repository.resume(session, d, message)
    repository.move(session, d, to, message)
    d.error_message = message if to == state.FAILED else ""
    if to == state.FAILED:
        d.undoing = d.order_intended
    return None


async def look_up(session: AsyncSession, request: rpc.LookupDeploymentRequest) -> Deployment | None:
    """By page (current or replaced), payment or lease."""
    by = request.WhichOneof("by") or ""
    value = getattr(request, by)
    if by == "akash_lease_id":
        return await session.scalar(select(Deployment).where(Deployment.akash_lease_id == value))
    model = Payment if by == "stripe_payment_intent_id" else PaymentSession
    providers = ["polar"] if by == "polar_id" else ["stripe", "sandbox"]
    owner = select(model.deployment_id).where(model.external_id == value, model.provider.in_(providers))
    return await session.scalar(select(Deployment).where(Deployment.id.in_(owner)))
