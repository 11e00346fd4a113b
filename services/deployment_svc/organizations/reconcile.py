"""Closes what deleted organizations run, also when they were deleted while this service was down."""

from collections.abc import Callable

import grpc
import structlog
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from clawplane.user.v1.change_service_pb2 import ChangeKind
from services.deployment_svc.deployments import repository, state
from services.deployment_svc.deployments.close import close
from services.deployment_svc.deployments.models import Deployment
from services.deployment_svc.organizations.models import FeedCursor
from services.deployment_svc.payments.links import Links
from services.deployment_svc.users import Users
from services.kit.db import ALL, Database
from services.kit.errors import Error, NotFound

log = structlog.get_logger()
_NAME = "users"
_OPEN = (state.PENDING, state.EXPIRED, *state.LIVE)


class OrganizationReconciler:
    """Ticks of the loop that follows deletions of organizations from a cursor in the database."""

    def __init__(self, db: Database, users: Users, links: Links, wake: Callable[[], None]) -> None:
        self.db, self.users, self.links, self.wake = db, users, links, wake

    async def tick(self) -> bool:
        """Follows the feed until it breaks; whatever was done is remembered."""
        async with self.db.read(ALL) as session:
            cursor = await session.get(FeedCursor, _NAME)
        if cursor is None:
            await self._read_anew()
            return True
        try:
            async for message in self.users.watch(cursor.seq):
                if message.HasField("change"):
                    if message.change.kind == ChangeKind.CHANGE_KIND_ORGANIZATION_DELETED:
                        await self._close_all(message.change.org_id)
                    await self._remember(message.seq)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.OUT_OF_RANGE:
                await self._read_anew()
                return True
            log.warning("organizations.feed_interrupted", code=error.code().name)
        return False

    async def _read_anew(self) -> None:
        """Looks at every organization that runs something, after noting from where to follow."""
        seq = 0
        async for message in self.users.watch(-1):
            seq = message.seq
            break
        async with self.db.read(ALL) as session:
            organizations = (await session.scalars(select(Deployment.org_id).where(Deployment.state.in_(_OPEN)).distinct())).all()
        for org_id in organizations:
            try:
                await self.users.entitlements(org_id)
            except NotFound:
                await self._close_all(org_id)
        await self._remember(seq, anew=True)

    async def _close_all(self, org_id: str) -> None:
        async with self.db.read(org_id) as session:
            ids = (await session.scalars(select(Deployment.id).where(Deployment.state.in_(_OPEN)))).all()
        for deployment_id in ids:
            try:
                await self.links.close(deployment_id)
            except Error as error:
                # The page stays open at the provider; a payment for what is given up is listed as due for refund.
                log.warning("organizations.page_not_closed", deployment_id=deployment_id, error=error.message)

            async def work(session: AsyncSession, deployment_id: str = deployment_id) -> None:
                d = await repository.locked(session, deployment_id)
                if d is not None:
                    await close(session, d, "the organization was deleted")

            await self.db.run(work, ALL)
        self.wake()

    async def _remember(self, seq: int, *, anew: bool = False) -> None:
        async with self.db.transaction(ALL) as session:
            cursor = await session.get(FeedCursor, _NAME, with_for_update=True)
            if cursor is None:
                session.add(FeedCursor(name=_NAME, seq=seq))
            else:
                # Read anew, the numbers may start lower: the user service was set up again from a copy.
                cursor.seq = seq if anew else max(cursor.seq, seq)
