"""Reservations of one process: what many callers want becomes one commit."""

from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime, timedelta

import structlog
from sqlalchemy.ext.asyncio import AsyncSession

from clawplane.user.v1.entitlement_service_pb2 import Entitlements
from services.deployment_svc.prices.book import PriceBook
from services.deployment_svc.quotas.rules import Who, entitled
from services.deployment_svc.usage.ledger import Ledger
from services.deployment_svc.usage_reservations import repository
from services.deployment_svc.usage_reservations.repository import Row
from services.deployment_svc.usage_reservations.rules import Settled, Used, Wish
from services.kit import ids
from services.kit.call import Call
from services.kit.coalesce import Batcher
from services.kit.columns import now
from services.kit.db import ALL, Database
from services.kit.errors import Error

log = structlog.get_logger()
_TOGETHER = 100
"""So many in one commit: each locks its organization, and PostgreSQL has room for some thousands of locks in all."""
_ABANDONED = 200
_REMEMBERED = timedelta(days=1)
"""How long it is known that something was released."""


class Reservations:
    """Grants, renews and settles."""

    def __init__(self, db: Database, ledger: Ledger, entitlements: Callable[[str], Awaitable[Entitlements]], call_s: float) -> None:
        """``call_s``: seconds that a call of the model endpoint holds before it has to be renewed."""
        self.db, self.ledger, self.entitlements, self.call_s = db, ledger, entitlements, call_s
        self._grant: Batcher[Wish, Row] = Batcher(self._grant_many, _TOGETHER)
        self._settle: Batcher[Used, Settled] = Batcher(self.settle_many, _TOGETHER)
        self._forgot: datetime | None = None

    async def wish(
        self, who: Who, provider: str, model: str, tokens_in: int, tokens_out: int, lifetime_s: float, *, settles_itself: bool = False
    ) -> Wish:
        """What is to be granted."""
        paid_for = entitled(await self.entitlements(who.org_id))
        return Wish(
            ids.new("call"), who, provider, model, tokens_in, tokens_out, timedelta(seconds=lifetime_s), settles_itself, paid_for
        )  # fmt: skip

    async def grant(self, wish: Wish, call: Call) -> Row:
        """The reservation; raises why not. A call with a request id claims it in the same transaction."""
        if call.claim is None:
            return await self._grant(wish)

        async def work(session: AsyncSession, book: PriceBook) -> Row:
            (answer,) = await repository.grant(session, [wish], book)
            if isinstance(answer, Error):
                raise answer
            call.audit(wish.id)
            return answer

        return await self.ledger.run(work, call.run)

    async def _grant_many(self, wishes: list[Wish]) -> list[Row | Error]:
        return await self.ledger.run(lambda session, book: repository.grant(session, wishes, book))

    async def settle(self, used: Used) -> Settled:
        """Settles one reservation, in a commit with others."""
        return await self._settle(used)

    async def settle_many(self, used: Sequence[Used]) -> list[Settled | Error]:
        """Settles reservations in one commit."""
        answers = await self.ledger.run(lambda session, book: repository.settle(session, used, book))
        self.ledger.touched.update(one.event.org_id for one in answers if isinstance(one, Settled))
        return answers

    async def renew_many(self, call_ids: Sequence[str]) -> list[bool]:
        """Keeps calls of the model endpoint open: for each, whether it was."""
        renewed = await self.db.run(lambda session: repository.renew_calls(session, call_ids, self.call_s), ALL)
        return [call_id in renewed for call_id in call_ids]

    async def tick(self) -> bool:
        """Settles what nobody has settled, and forgets what was released; True when there may be more."""
        rows = await self.ledger.run(lambda session, book: repository.settle_abandoned(session, book, _ABANDONED))
        if rows:
            self.ledger.touched.update(row["org_id"] for row in rows)
            log.warning("model_calls.abandoned", calls=len(rows))
        at = now()
        if self._forgot is None or at - self._forgot > _REMEMBERED / 24:
            await self.db.run(lambda session: repository.forget_released(session, at - _REMEMBERED), ALL)
            self._forgot = at
        return len(rows) == _ABANDONED
