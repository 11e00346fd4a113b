"""The main job: ordered, paid, live, counted, closed."""



from clawplane.deployment.v1 import deployment_pb2, deployment_service_pb2
from tests.harness import Person, Stack


async def test_a_paid_bot_goes_live_and_is_closed(stack: Stack, person: Person) -> None:
    d = await stack.order(person)
    assert d.state == deployment_pb2.STATE_PENDING
    assert d.payment_url.startswith(stack.url)
    again = await stack.order(person)
    assert (again.id, again.payment_url) == (d.id, d.payment_url)

    answer = await stack.sandbox_act(d, "pay")
    assert answer.status_code == 200, answer.text
    live = await stack.until(d.id, deployment_pb2.STATE_ACTIVE)
    assert live.provider and live.provider_url and live.observed_generation == live.generation
    assert not live.payment_url

    request = deployment_service_pb2.CloseDeploymentRequest(id=d.id)
    closing = await stack.deployments.CloseDeployment(request, metadata=person.metadata)
    assert closing.state == deployment_pb2.STATE_CLOSING
    await stack.until(d.id, deployment_pb2.STATE_CLOSED)
    events = await stack.deployments.ListDeploymentEvents(
        deployment_service_pb2.ListDeploymentEventsRequest(deployment_id=d.id), metadata=person.metadata
    )
    kinds = [event.kind for event in events.events if event.kind.startswith("state.")]
    assert kinds == ["state.pending", "state.deploying", "state.active", "state.closing", "state.closed"]
