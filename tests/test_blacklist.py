"""The provider blacklist: added, checked, listed, in force at once, over at its time."""

import asyncio
import secrets
import time

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from clawplane.deployment.v1 import blacklist_service_pb2 as pb
from clawplane.deployment.v1 import deployment_pb2
from tests.harness import Person, Stack
from tests.simulators.market import MarketSimulator


def provider() -> str:
    """An address that no other test uses."""
    return f"akash1{secrets.token_hex(8)}"


async def check(stack: Stack, address: str) -> pb.CheckProviderResponse:
    """Whether it is on the list."""
    return await stack.blacklist.CheckProvider(pb.CheckProviderRequest(provider_address=address), metadata=stack.operator)


async def test_add_check_and_remove(stack: Stack) -> None:
    address = provider()
    assert not (await check(stack, address)).blacklisted
    entry = await stack.blacklist.AddBlacklistEntry(pb.AddBlacklistEntryRequest(provider_address=address), metadata=stack.operator)
    assert entry.reason == "Provider blacklisted" and not entry.HasField("expires_at")
    found = await check(stack, address)
    assert found.blacklisted and found.entry == entry
    # Again is an update, not a second row.
    entry = await stack.blacklist.AddBlacklistEntry(
        pb.AddBlacklistEntryRequest(provider_address=address, reason="loses leases"), metadata=stack.operator
    )
    assert (await check(stack, address)).entry.reason == "loses leases"
    for _ in range(2):
        await stack.blacklist.RemoveBlacklistEntry(pb.RemoveBlacklistEntryRequest(provider_address=address), metadata=stack.operator)
    assert not (await check(stack, address)).blacklisted


async def test_an_entry_ends_at_its_time(stack: Stack) -> None:
    address = provider()
    until = Timestamp()
    until.FromNanoseconds(int((time.time() + 1.2) * 1e9))
    await stack.blacklist.AddBlacklistEntry(pb.AddBlacklistEntryRequest(provider_address=address, expires_at=until), metadata=stack.operator)
    assert (await check(stack, address)).blacklisted
    await asyncio.sleep(1.5)
    assert not (await check(stack, address)).blacklisted
    listed = await stack.blacklist.ListBlacklistEntries(pb.ListBlacklistEntriesRequest(page_size=100), metadata=stack.operator)
    assert address not in {entry.provider_address for entry in listed.entries}


async def test_the_list_comes_in_pages(stack: Stack) -> None:
    addresses = sorted(provider() for _ in range(5))
    await asyncio.gather(*(
        stack.blacklist.AddBlacklistEntry(pb.AddBlacklistEntryRequest(provider_address=one), metadata=stack.operator) for one in addresses
    ))  # fmt: skip
    seen, token = [], ""
    while True:
        answer = await stack.blacklist.ListBlacklistEntries(pb.ListBlacklistEntriesRequest(page_size=2, page_token=token), metadata=stack.operator)
        assert len(answer.entries) <= 2
        seen += [entry.provider_address for entry in answer.entries]
        token = answer.next_page_token
        if not token:
            break
    assert seen == sorted(set(seen)) and set(addresses) <= set(seen)


async def test_ten_at_once_make_one_entry(stack: Stack) -> None:
    address = provider()
    await asyncio.gather(*(
        stack.blacklist.AddBlacklistEntry(pb.AddBlacklistEntryRequest(provider_address=address, reason=str(n)), metadata=stack.operator)
        for n in range(10)
    ))  # fmt: skip
    assert (await check(stack, address)).entry.reason in {str(n) for n in range(10)}


async def test_only_operators_change_it(stack: Stack, person: Person) -> None:
    for call in (
        stack.blacklist.AddBlacklistEntry(pb.AddBlacklistEntryRequest(provider_address=provider()), metadata=person.metadata),
        stack.blacklist.RemoveBlacklistEntry(pb.RemoveBlacklistEntryRequest(provider_address=provider()), metadata=person.metadata),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call
        assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_a_blacklisted_provider_is_not_chosen(stack: Stack, person: Person, market: MarketSimulator) -> None:
    async with asyncio.timeout(30):
        first = await stack.live(person)
        request = pb.AddBlacklistEntryRequest(provider_address=first.provider)
        await stack.blacklist.AddBlacklistEntry(request, metadata=stack.operator)
        try:
            second = await stack.live(person, "223456789:" + "B" * 35)
            assert second.provider and second.provider != first.provider
        finally:
            await stack.blacklist.RemoveBlacklistEntry(
                pb.RemoveBlacklistEntryRequest(provider_address=first.provider), metadata=stack.operator
            )


async def test_when_all_bidders_are_blacklisted_it_says_so(stack: Stack, person: Person) -> None:
    names = [f"p{n}" for n in range(1, 6)]
    try:
        for name in names:
            await stack.blacklist.AddBlacklistEntry(pb.AddBlacklistEntryRequest(provider_address=name), metadata=stack.operator)
        d = await stack.order(person)
        await stack.sandbox_act(d, "pay")
        failed = await stack.until(d.id, deployment_pb2.STATE_FAILED, timeout_s=30)
        assert failed.error_message.endswith("all 5 bidders are blacklisted")
    finally:
        for name in names:
            await stack.blacklist.RemoveBlacklistEntry(pb.RemoveBlacklistEntryRequest(provider_address=name), metadata=stack.operator)


async def test_get_check_many_and_the_ended_ones(stack: Stack) -> None:
    ended, lasting, free = provider(), provider(), provider()
    until = Timestamp()
    until.FromNanoseconds(int((time.time() + 0.6) * 1e9))
    await stack.blacklist.AddBlacklistEntry(pb.AddBlacklistEntryRequest(provider_address=ended, expires_at=until), metadata=stack.operator)
    await stack.blacklist.AddBlacklistEntry(pb.AddBlacklistEntryRequest(provider_address=lasting), metadata=stack.operator)
    await asyncio.sleep(0.8)
    request = pb.CheckProvidersRequest(provider_addresses=[ended, lasting, free, lasting])
    found = await stack.blacklist.CheckProviders(request, metadata=stack.operator)
    assert [entry.provider_address for entry in found.entries] == [lasting]
    entry = await stack.blacklist.GetBlacklistEntry(pb.GetBlacklistEntryRequest(provider_address=ended), metadata=stack.operator)
    assert entry.HasField("expires_at")
    listed = await stack.blacklist.ListBlacklistEntries(pb.ListBlacklistEntriesRequest(page_size=250, show_expired=True), metadata=stack.operator)
    assert {ended, lasting} <= {one.provider_address for one in listed.entries}
    with pytest.raises(grpc.aio.AioRpcError) as unknown:
        await stack.blacklist.GetBlacklistEntry(pb.GetBlacklistEntryRequest(provider_address=free), metadata=stack.operator)
    assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
