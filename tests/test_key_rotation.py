"""The key that wraps all secrets is rotated while everything runs: nothing is unreadable for a moment, whatever dies in between."""

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import sqlalchemy as sa

from clawplane.deployment.v1 import deployment_pb2, deployment_service_pb2, deployment_service_pb2_grpc
from services import embedded
from services.deployment_svc.app import create_app as create_deployment
from services.deployment_svc.deployments import secrets
from services.deployment_svc.deployments.models import Deployment
from services.kit import rotation
from services.kit.db import ALL
from services.kit.holders import Holder
from services.kit.keyring import Ring, RingFile
from services.kit.secrets import SecretBox, SecretError
from tests.conftest import Databases
from tests.harness import Metadata, Person, eventually, free_port
from tests.keys import ROOT, Keys, boxes_of, stack_on_ring
from tests.processes import Client, Processes
from tests.simulators.market import MarketSimulator

QUIET = rotation.Progress(lambda _: None, lambda _: None, lambda _: None)
CALLS = 50
HMAC_KEY = b"h" * 32


async def rotate(keys: Keys, *, drop_old: bool = False, wait_s: float = 30) -> rotation.Result:
    """As the command does, in this process."""
    return await rotation.Rotation(keys.stores, keys.fresh_box(), RingFile(keys.ring_path), QUIET, wait_s).run(drop_old=drop_old)


@contextlib.asynccontextmanager
async def beside(work: Any) -> AsyncIterator[None]:
    """Does something again and again while the block runs, and at least once; its failure is the block's."""
    stop = asyncio.Event()

    async def again() -> None:
        while True:
            await work()
            if stop.is_set():
                return
            await asyncio.sleep(0.1)

    task = asyncio.create_task(again())
    try:
        yield
    finally:
        stop.set()
        await task


def find(person: Person, d: deployment_pb2.Deployment, token: str) -> deployment_service_pb2.FindPendingDuplicateRequest:
    """The question whether a wish is open."""
    return deployment_service_pb2.FindPendingDuplicateRequest(model=d.model, channel=d.channel, channel_token=token)


@pytest.mark.parametrize("databases", ["postgres"], indirect=True)
async def test_rotation_under_traffic(databases: Databases, market: MarketSimulator, tmp_path: Path) -> None:
    async with stack_on_ring(databases, tmp_path, market.url) as (stack, keys):
        person = await stack.person()
        token = "1234567:" + "W" * 35
        wish = await stack.order(person, token)
        await keys.plant(person.org_id, person.user.id, 120)
        (old,) = keys.ring.ids
        before = await rows(keys)

        async def use() -> None:
            again, live = await stack.order(person, token), await stack.order(await stack.person())
            assert again.id == wish.id and live.id
            found = await stack.deployments.FindPendingDuplicate(find(person, wish, token), metadata=person.metadata)
            assert found.id == wish.id
            for box in boxes_of(stack):
                await keys.read_everything(box)

        async with beside(use):
            status, said = await keys.command("rotate")
        assert status == 0 and "no other key is needed" in said, said
        new = keys.ring.current.id
        assert keys.ring.ids == [old, new] and f"still on the ring: {old}" in said
        assert await keys.count(old) == await keys.count("") == 0 and await keys.count(new) > 480
        assert await keys.everywhere(f"v1.{old}.") == ["secret_canaries.sealed"] * 2
        # To an owner, nothing has happened.
        after = await rows(keys)
        assert {id_: after[id_] for id_ in before} == before

        async with beside(use):
            dropped = await rotate(keys, drop_old=True)
        assert dropped.dropped == [old] and keys.ring.ids == [new]
        status, said = await keys.command("status")
        assert status == 0 and f"process {os.getpid()}" in said and f"seals with {new}" in said and "goes on" not in said, said
        assert keys.fresh_box().ring.ids == [new]
        assert await keys.read_everything(keys.fresh_box()) > 380
        await use()


async def rows(keys: Keys) -> dict[str, Any]:
    """What an owner could notice of each bot."""
    async with keys.stores[1].db.read(ALL) as session:
        return {id_: rest for id_, *rest in await session.execute(sa.select(Deployment.id, Deployment.version, Deployment.updated_at))}


_KILLS_ITSELF = """
import os, signal, sys
from services import cli
from services.kit import rotation

left = int(sys.argv.pop(1))
renew = rotation.renew

async def counted(store, one, box, advance):
    def advanced(count):
        global left
        left -= count
        if left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
    if not left:
        advanced(0)
    return await renew(store, one, box, advanced)

rotation.renew = counted
cli.main()
"""
"""The command, which dies as by kill -9 after it has committed so many rows, or just before the first: whoever looks from outside may
come too late."""


@pytest.mark.parametrize("databases", ["sqlite"], indirect=True)
async def test_killed_at_any_point_it_goes_on(databases: Databases, market: MarketSimulator, tmp_path: Path) -> None:
    async with stack_on_ring(databases, tmp_path, market.url) as (stack, keys):
        person = await stack.person()
        await keys.plant(person.org_id, person.user.id, 250)
        (old,) = keys.ring.ids
        new = ""
        for rows_done in (0, 100, 250):
            command = [sys.executable, "-c", _KILLS_ITSELF, str(rows_done), "keys", "rotate"]
            killed = await asyncio.to_thread(subprocess.run, command, cwd=ROOT, env=keys.env(), capture_output=True, timeout=100, check=False)
            assert killed.returncode == -9, killed.stderr
            assert rows_done <= await keys.count(keys.ring.ids[-1]) < rows_done + 500
            # The same new key each time, and everything readable by those who run and those who start.
            new = new or keys.ring.ids[-1]
            assert keys.ring.ids == [old, new] and keys.ring.rotating
            for box in (*boxes_of(stack), keys.fresh_box()):
                await keys.read_everything(box)
        status, said = await keys.command("rotate", "--drop-old")
        assert status == 0 and "no other key is needed" in said and f"forgotten: {old}" in said, said
        assert keys.ring.ids == [new] and not keys.ring.rotating
        assert await keys.everywhere(f"v1.{old}.") == ["secret_canaries.sealed"] * 2
        await keys.read_everything(keys.fresh_box())


class Dead(BaseException):
    """The process is gone."""


@pytest.mark.parametrize("databases", ["postgres"], indirect=True)
async def test_it_may_die_before_and_after_each_of_its_steps(databases: Databases, market: MarketSimulator, tmp_path: Path) -> None:
    """As kill -9, at every point where something has been written."""
    async with stack_on_ring(databases, tmp_path, market.url) as (stack, keys):
        person = await stack.person()
        wish = await stack.order(person)
        await keys.plant(person.org_id, person.user.id, 5)
        (old,) = keys.ring.ids
        made, left = set(), 0
        for deadline in range(1, 100):
            left = deadline

            def step() -> None:
                nonlocal left
                left -= 1
                if not left:
                    raise Dead

            file = RingFile(keys.ring_path)
            change, box = file.change, keys.fresh_box()

            def changed(how: Any, change: Any = change) -> Ring:
                step()
                result: Ring = change(how)
                step()
                return result

            file.change = changed  # type: ignore[method-assign]
            stores = [replace(store, db=_Dying(store.db, step)) for store in keys.stores]
            with contextlib.suppress(Dead):
                await rotation.Rotation(stores, box, file, QUIET, 20).run(drop_old=True)
            made |= set(keys.ring.ids)
            await keys.read_everything(keys.fresh_box())
            assert (await stack.order(person)).id == wish.id
            if not keys.ring.rotating and old not in keys.ring.ids:
                break
        assert not keys.ring.rotating and deadline > 15, "it never came to its end"
        assert len(made) == 2 and made - {old} == set(keys.ring.ids)
        assert await keys.count(keys.ring.current.id) == sum(
            [await store.count(one, one.column.is_not(None)) for store in keys.stores for one in store.kept]
        )


class _Dying:
    """A database whose user dies before or after a transaction."""

    def __init__(self, db: Any, step: Any) -> None:
        self._db, self._step = db, step

    def __getattr__(self, name: str) -> Any:
        return getattr(self._db, name)

    async def run(self, work: Any, tenant: str) -> Any:
        self._step()
        result = await self._db.run(work, tenant)
        self._step()
        return result

    @contextlib.asynccontextmanager
    async def transaction(self, tenant: str) -> AsyncIterator[Any]:
        async with self._db.transaction(tenant) as session:
            yield session
        self._step()


@pytest.mark.parametrize("databases", ["sqlite"], indirect=True)
async def test_a_process_that_does_not_follow_is_named(databases: Databases, market: MarketSimulator, tmp_path: Path) -> None:
    """It has a copy of the ring, as on another machine."""
    copy = tmp_path / "copy.json"
    async with stack_on_ring(databases, tmp_path, market.url, ring=copy) as (stack, keys):
        person = await stack.person()
        await keys.plant(person.org_id, person.user.id, 3)
        (old,) = keys.ring.ids
        with pytest.raises(rotation.RotationError, match=f"process {os.getpid()} on {socket.gethostname()}.* has not reported the key"):
            await rotate(keys, wait_s=2)
        new = keys.ring.ids[-1]
        # Nothing is under the new key, and who knows only the old one may still start.
        assert keys.ring.current.id == old and await keys.everywhere(f"v1.{new}.") == []
        assert (await stack.order(person)).id
        shutil.copy2(keys.ring_path, copy)
        # It reports the key, and is then shown the switch a moment later than the command wants it.
        again = asyncio.create_task(rotate(keys))
        await eventually(lambda: asyncio.sleep(0, keys.ring.current.id == new), 60)
        shutil.copy2(keys.ring_path, copy)
        assert (await again).current == new and keys.ring.ids == [old, new]
        await keys.read_everything(boxes_of(stack)[1])


@pytest.mark.parametrize("databases", ["postgres"], indirect=True)
async def test_who_was_away_is_refused_with_the_old_ring(databases: Databases, market: MarketSimulator, tmp_path: Path) -> None:
    old_ring = tmp_path / "old.json"
    async with stack_on_ring(databases, tmp_path, market.url) as (stack, keys):
        person = await stack.person()
        await keys.plant(person.org_id, person.user.id, 3)
        shutil.copy2(keys.ring_path, old_ring)
        secret = keys.box.seal("x", "nowhere")
        with pytest.raises(rotation.RotationError, match="rotate first"):
            await rotation.Rotation(keys.stores, keys.box, keys.file, QUIET).require(2)
        await rotate(keys)
        await rotation.Rotation(keys.stores, keys.fresh_box(), keys.file, QUIET).require(2)
        assert keys.ring.minimum_version == 2
        await keys.read_everything(boxes_of(stack)[0])
        # What is below the minimum does not open, here and in those who run.
        await eventually(lambda: asyncio.sleep(0, all(box.ring.minimum_version == 2 for box in boxes_of(stack))))
        for box in (*boxes_of(stack), keys.fresh_box()):
            with pytest.raises(SecretError, match="version 1, below the required 2"):
                box.open(secret, "nowhere")
        # Without the new key it may not start, nor may it with both when it would seal with the old one.
        command = [sys.executable, "-m", "services.cli", "serve", "user", "--port", str(free_port())]
        env = keys.env(CLAWPLANE_KEY_RING=str(old_ring))
        late = await asyncio.to_thread(subprocess.run, command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=100, check=False)
        assert late.returncode == 1 and "give it the ring of the others" in " ".join(late.stderr.split()), late.stderr
        both = Ring.of({key.id: key.key for key in keys.ring.keys}, keys.ring.ids[0])
        store = keys.stores[0]
        with pytest.raises(SecretError, match="was retired"):
            await Holder(store.db, SecretBox(both, {"": HMAC_KEY}), store.holder, store.canary).join()


@pytest.mark.parametrize("databases", ["sqlite"], indirect=True)
async def test_rows_that_do_not_open_are_named_and_keep_their_key(databases: Databases, market: MarketSimulator, tmp_path: Path) -> None:
    async with stack_on_ring(databases, tmp_path, market.url) as (stack, keys):
        person = await stack.person()
        await keys.plant(person.org_id, person.user.id, 3)
        wish = await stack.order(person)
        moved = sa.update(Deployment).where(Deployment.id == wish.id).values(channel_api_key_sealed=keys.box.seal("x", "elsewhere"))
        async with keys.stores[1].db.transaction(ALL) as session:
            await session.execute(moved)
        with pytest.raises(rotation.RotationError, match=f"1 rows cannot be opened.*deployments.channel_api_key_sealed of {wish.id}"):
            await rotation.Rotation(keys.stores, keys.box, keys.file, QUIET, 20).run(drop_old=True)
        assert len(keys.ring.ids) == 2 and keys.ring.rotating
        with pytest.raises(ValueError, match="another rotation is running"):
            with keys.file.rotation():
                await rotation.Rotation(keys.stores, keys.box, RingFile(keys.ring_path), QUIET, 20).run(drop_old=True)


@pytest.mark.parametrize("databases", ["postgres"], indirect=True)
async def test_one_wish_is_one_row_whatever_key_it_is_under(databases: Databases, market: MarketSimulator, tmp_path: Path) -> None:
    """One server writes under the first key, the other under the second, as in the moment of the switch; the index tells neither."""
    ring = tmp_path / "second.json"
    async with stack_on_ring(databases, tmp_path, market.url) as (stack, keys):
        keys.file.change(Ring.with_next)
        await eventually(lambda: asyncio.sleep(0, all(len(box.ring.ids) == 2 for box in boxes_of(stack))))
        RingFile(ring).load_or_make(keys.ring.switched)
        options = {"driver": "tests.simulators.market:MarketDriver", "driver_options": {"url": market.url}, "user_target": stack.target, "lock_timeout_s": 30}
        other = embedded.Stack()
        await other.start_grpc([create_deployment(keys.deployment.model_copy(update={**options, "key_ring": ring}))], "127.0.0.1", port := free_port())
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
            stubs = stack.deployments, deployment_service_pb2_grpc.DeploymentServiceStub(channel)
            for wave in range(4):
                person, token = await stack.person(), f"{wave}234567:" + "R" * 35
                wish = deployment_service_pb2.CreateDeploymentRequest(
                    model="claude-opus-4.5", channel=deployment_pb2.CHANNEL_TELEGRAM, channel_token=token
                )
                if wave < 2:
                    # Each of them makes one, so that the other meets what is under a key that it would not write with.
                    assert (await stubs[wave].CreateDeployment(wish, metadata=person.metadata, timeout=60)).id
                calls = [stubs[n % 2].CreateDeployment(wish, metadata=person.metadata, timeout=60) for n in range(CALLS)]
                assert len({(d.id, d.payment_url) for d in await asyncio.gather(*calls)}) == 1
                for stub in stubs:
                    assert (await stub.FindPendingDuplicate(find(person, await calls[0], token), metadata=person.metadata)).id
            async with keys.stores[1].db.read(ALL) as session:
                used = set(await session.scalars(sa.select(Deployment.fingerprint_key_id)))
        await other.stop()
        assert used <= set(keys.ring.ids) and len(used) == 2


async def patiently(client: Client, person: Metadata) -> deployment_pb2.Deployment:
    """Orders, again when the machine was too busy to answer in time."""
    while True:
        try:
            return await client.order(person)
        except grpc.aio.AioRpcError as error:
            if error.code() != grpc.StatusCode.UNAVAILABLE:
                raise


@pytest.mark.parametrize("databases", ["postgres"], indirect=True)
async def test_fifty_callers_during_a_rotation_make_one_row(databases: Databases, tmp_path: Path) -> None:
    processes = Processes(databases, tmp_path, deployments=2, CLAWPLANE_LOCK_TIMEOUT_S="30")
    env = processes.env
    keys = Keys(tmp_path, {f"{name}_svc": env[f"CLAWPLANE_{name.upper()}_DATABASE_URL"] for name in ("user", "deployment")})
    try:
        await processes.ready()
        person, everyone = await processes.person(), []
        async with Client(processes, 1) as one, Client(processes, 2) as other:
            old = await one.order(person)
            await keys.plant(old.org_id, old.user_id, 150)

            async def use() -> None:
                fresh = await processes.person()
                calls = [patiently((one, other)[n % 2], fresh if n % 4 > 1 else person) for n in range(CALLS)]
                made = await asyncio.gather(*calls)
                assert {d.id for d in made[0::4] + made[1::4]} == {old.id} and len({d.id for d in made[2::4] + made[3::4]}) == 1
                everyone.append(made[2].id)

            async with beside(use):
                status, said = await keys.command("rotate")
            assert status == 0, said
        await keys.read_everything(keys.fresh_box())
        async with keys.stores[1].db.read(ALL) as session:
            pending = (await session.scalars(sa.select(Deployment).where(Deployment.state == deployment_pb2.STATE_PENDING))).all()
        wishes = {(d.org_id, d.user_id, d.model, d.channel, secrets.open_column(keys.fresh_box(), d, "channel_token")) for d in pending}
        assert len(wishes) == len(pending) == 1 + len(set(everyone))
        assert {d.fingerprint_key_id for d in pending} == {keys.ring.current.id}
    finally:
        processes.stop()
        await keys.close()
