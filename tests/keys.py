"""What the tests of keys share: a running stack on a ring file, secrets of every kind, and the command."""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from clawplane.deployment.v1.deployment_pb2 import CHANNEL_TELEGRAM, STATE_CANCELED
from services.deployment_svc import app as deployment_app
from services.deployment_svc.deployments import secrets
from services.deployment_svc.deployments.models import Deployment
from services.deployment_svc.settings import DeploymentSettings
from services.kit import devkeys, ids, vault
from services.kit.columns import now
from services.kit.db import ALL
from services.kit.keyring import Ring, RingFile
from services.kit.sealed import Sealed, Store
from services.kit.secrets import SecretBox
from services.user_svc import app as user_app
from services.user_svc.settings import UserSettings
from tests.conftest import Databases
from tests.harness import Stack, clean_env, running

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Keys:
    """A folder with a ring, and the databases whose secrets are under it."""

    folder: Path
    urls: dict[str, str]

    def __post_init__(self) -> None:
        made = devkeys.settings_for(devkeys.load_or_make(self.folder), "cli") | {"data_dir": self.folder, "key_ring": self.ring_path}
        self.user = UserSettings(**(made | {"user_database_url": self.urls["user_svc"]}))  # type: ignore[arg-type]
        self.deployment = DeploymentSettings(**(made | {"deployment_database_url": self.urls["deployment_svc"]}))  # type: ignore[arg-type]
        self.file = RingFile(self.ring_path)
        self.box = vault.open_box(self.user)
        self.stores = [user_app.store(self.user), deployment_app.store(self.deployment)]
        self.plain: dict[tuple[str, str], str] = {}
        """(table.column, place) -> what was planted there."""

    @property
    def ring_path(self) -> Path:
        """Where the embedded default has it."""
        return self.folder / devkeys.RING

    @property
    def ring(self) -> Ring:
        """As it is now."""
        return self.file.load()

    def fresh_box(self) -> SecretBox:
        """What a process that starts now has."""
        return vault.open_box(self.user)

    def env(self, **more: str) -> dict[str, str]:
        """For the command."""
        places = {f"CLAWPLANE_{name.removesuffix('_svc').upper()}_DATABASE_URL": url for name, url in self.urls.items()}
        return clean_env() | {"CLAWPLANE_DATA_DIR": str(self.folder), "CLAWPLANE_LOG_LEVEL": "warning"} | places | more

    async def start(self, *words: str, **env: str) -> asyncio.subprocess.Process:
        """`clawplane keys ...` in a process of its own."""
        pipe = asyncio.subprocess.PIPE
        return await asyncio.create_subprocess_exec(
            sys.executable, "-m", "services.cli", "keys", *words, cwd=ROOT, env=self.env(**env), stdout=pipe, stderr=asyncio.subprocess.STDOUT
        )

    async def command(self, *words: str, **env: str) -> tuple[int, str]:
        """Its exit status and what it said, on one line."""
        process = await self.start(*words, **env)
        said, _ = await process.communicate()
        assert process.returncode is not None
        return process.returncode, " ".join(said.decode().split())

    async def plant(self, org_id: str, user_id: str, count: int) -> None:
        """Bots that nobody runs, with a secret in every column, and answers that hold one."""
        async with self.stores[1].db.transaction(ALL) as session:
            for number in range(count):
                id_, token = ids.new("dep"), f"{ids.uuid7().hex}:token"
                key_id, print_ = next(iter(secrets.fingerprints(self.box, user_id, "claude-opus-4.5", CHANNEL_TELEGRAM, token).items()))
                row: dict[str, Any] = {"channel_token": token, "channel_api_key": f"api-{number}", "manifest": f"manifest-{number}"}
                session.add(Deployment(
                    id=id_, org_id=org_id, user_id=user_id, email="", model="claude-opus-4.5", channel=CHANNEL_TELEGRAM, state=STATE_CANCELED,
                    fingerprint=print_, fingerprint_key_id=key_id, payment_provider="sandbox", price_minor=0, currency="usd", livemode=False,
                    **{f"{name}_sealed": secrets.seal(self.box, id_, name, text) for name, text in row.items()},
                ))  # fmt: skip
                self.plain |= {(f"deployments.{name}_sealed", secrets.place(id_, name)): text for name, text in row.items()}
        for store in self.stores:
            await self._plant_answers(store, max(1, count // 10))

    async def _plant_answers(self, store: Store, count: int) -> None:
        one = next(one for one in store.kept if isinstance(one, Sealed) and one.name == "idempotency_keys.answer_sealed")
        async with store.db.transaction(ALL) as session:
            for _ in range(count):
                row = one.column.class_(key=ids.uuid7().bytes * 2, request=b"r" * 32, expires_at=now() + timedelta(hours=1))
                place, text = one.place(row), ids.uuid7().hex
                row.answer_sealed = self.box.seal(text, place)
                session.add(row)
                self.plain[one.name, place] = text

    async def read_everything(self, box: SecretBox) -> int:
        """Opens every secret there is, with a service's box: what was planted must come out. How many there are."""
        seen = {}
        for store in self.stores:
            for one in (one for one in store.kept if isinstance(one, Sealed)):
                async with store.db.read(ALL) as session:
                    for row in await session.scalars(sa.select(one.column.class_).where(one.column.is_not(None))):
                        seen[one.name, one.place(row)] = box.open(getattr(row, one.column.key), one.place(row))
        wrong = {where for where, text in self.plain.items() if seen.get(where) != text}
        assert not wrong, (len(wrong), len(seen))
        return len(seen)

    async def count(self, key_id: str) -> int:
        """How many rows are under a key."""
        return sum([await store.count(one, one.under(key_id)) for store in self.stores for one in store.kept])

    async def everywhere(self, text: str) -> list[str]:
        """Columns of any table that hold a text, whatever they are declared as."""
        found = []
        for store in self.stores:
            tables: sa.MetaData = store.canary.metadata
            async with store.db.engine.connect() as connection:
                for table in tables.sorted_tables:
                    for row in (await connection.execute(sa.select(table))).mappings():
                        found += [f"{table.name}.{name}" for name, value in row.items() if text in str(value)]
        return found

    async def close(self) -> None:
        """Closes the pools."""
        for store in self.stores:
            await store.db.close()


def boxes_of(stack: Stack) -> list[SecretBox]:
    """The boxes of the services that run."""
    assert stack.stack.grpc is not None
    return [app.kit.box for app in stack.stack.grpc.apps if app.kit.box]


@asynccontextmanager
async def stack_on_ring(databases: Databases, folder: Path, market_url: str, ring: Path | None = None) -> AsyncIterator[tuple[Stack, Keys]]:
    """A running stack that follows the folder's ring, or a copy of its own."""
    keys = Keys(folder, databases.make())
    path = ring or keys.ring_path
    if ring:
        ring.write_bytes(keys.ring_path.read_bytes())
        ring.chmod(0o600)
    options: dict[str, Any] = {"driver": "tests.simulators.market:MarketDriver", "driver_options": {"url": market_url}, "key_ring": path, "lock_timeout_s": 30}
    try:
        async with running(folder, keys.urls, deployment=options, user={"key_ring": path}) as stack:
            yield stack, keys
    finally:
        await keys.close()
