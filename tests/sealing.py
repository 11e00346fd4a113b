"""A sealer as a process of its own, which a test can kill: ``python -m tests.sealing <database>`` seals without a pause, until it is ended."""

import asyncio
import sys

from services.kit import telemetry
from services.kit.audit import Log
from services.kit.audit_chain import Chain
from services.kit.audit_sealer import Sealer
from services.kit.db import Database
from services.kit.settings import KitSettings
from services.user_svc.base import AuditEvent, AuditHead
from tests.audit import KEY


async def seal(url: str) -> None:
    """For ever."""
    db = Database(url, KitSettings(), "user_svc")
    sealer = Sealer(db, Log(AuditEvent, Chain(KEY, "user_svc")), AuditHead)
    await db.connect()
    print("sealing", flush=True)
    while True:
        await sealer.tick()
        await asyncio.sleep(0.001)


if __name__ == "__main__":
    telemetry.configure_logs("info")
    asyncio.run(seal(sys.argv[1]))
