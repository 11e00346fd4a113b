"""The loop that makes what runs equal what was ordered: one step at a time, each written down before the next."""

import asyncio
from collections.abc import Callable
from datetime import datetime, timedelta

import structlog
from sqlalchemy import update

from services.deployment_svc.deployments import state
from services.deployment_svc.deployments.models import Deployment
from services.deployment_svc.deployments.state import Step, next_step
from services.deployment_svc.deployments.steps import Lost, Steps
from services.kit.columns import now
from services.kit.db import ALL
from services.kit.loops import claim, held

log = structlog.get_logger()
_MAX_STEPS = 50


class Reconciler:
    """Ticks of the provisioning loop. Works on up to ``concurrency`` deployments at once, each leased to this process."""

    def __init__(self, steps: Steps, wake: Callable[[], None]) -> None:
        self.steps, self.db, self.settings = steps, steps.db, steps.settings
        self._wake = wake
        self._running: set[asyncio.Task[None]] = set()

    async def tick(self) -> bool:
        """Claims due deployments and starts working on them; True when there may be more right now."""
        free = self.settings.concurrency - len(self._running)
        if free <= 0:
            return False
        rows = await claim(self.db, Deployment, limit=free, lease_s=self.settings.lease_s)
        for row in rows:
            task = asyncio.create_task(self._work(row), name=f"reconcile:{row.id}")
            self._running.add(task)
            task.add_done_callback(self._done)
        return len(rows) == free

    def _done(self, task: "asyncio.Task[None]") -> None:
        self._running.discard(task)
        if not task.cancelled() and task.exception() is not None:
            # Its lease runs out, and then it is taken up again.
            log.error("reconcile.not_released", task=task.get_name(), exc_info=task.exception())
        self._wake()

    async def drain(self) -> None:
        """Waits for the steps in hand; what is not done is taken up by the next process when the lease ends."""
        if self._running:
            _, late = await asyncio.wait(self._running, timeout=self.settings.drain_timeout_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    async def _work(self, row: Deployment) -> None:
        """Takes steps until one has to wait. Whatever happens, the row is due again at some time."""
        token = row.lease_token or ""
        seen, due = row.version, now() + timedelta(seconds=self.settings.backoff_s)
        try:
            async with held(self.db, row, self.settings.lease_s):
                row, due = await self._advance(row, token)
                seen = row.version
        except Lost:
            return
        except asyncio.CancelledError:
            due = now()
            raise
        except Exception as error:
            log.error("reconcile.failed", deployment_id=row.id, exc_info=error)
        finally:
            await asyncio.shield(self._release(row.id, token, seen, due))

    async def _advance(self, row: Deployment, token: str) -> tuple[Deployment, datetime]:
        for _ in range(_MAX_STEPS):
            step = next_step(row)
            if step is Step.NOTHING:
                break
            try:
                row, wait_s = await asyncio.wait_for(self.steps.take(step, row, token), self.settings.step_timeout_s * 2)
            except Lost:
                raise
            except Exception as error:
                row, wait_s = await self.steps.failed(step, row, token, error)
            overtaken = row.state == state.CLOSING and step is not Step.CLOSE
            if wait_s > 0 and not overtaken:
                return row, now() + timedelta(seconds=wait_s)
        return row, now()

    async def _release(self, deployment_id: str, token: str, seen: int, due: datetime) -> None:
        """Gives the row back. Outside the version, since nothing that an owner sees changes."""
        async with self.db.transaction(ALL) as session:
            row = await session.get(Deployment, deployment_id, with_for_update=True)
            if row is None or row.lease_token != token:
                return
            # Somebody changed the wish while we worked: it is due now, whatever the last step wanted.
            due_at = None if next_step(row) is Step.NOTHING else due if row.version == seen else now()
            await session.execute(
                update(Deployment)
                .where(Deployment.id == deployment_id)
                .values(lease_until=None, lease_token=None, due_at=due_at, updated_at=Deployment.updated_at)
                .execution_options(synchronize_session=False)
            )
