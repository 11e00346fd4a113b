"""How often somebody may ask for codes, try them and try passwords. Counted in the database: when it does not answer, nobody signs in."""

from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy.ext.asyncio import AsyncSession

from services.kit.db import ALL, Database
from services.kit.errors import Exhausted
from services.kit.secrets import SecretBox
from services.user_svc.attempts import repository
from services.user_svc.attempts.repository import Limit
from services.user_svc.codes.models import Purpose
from services.user_svc.settings import UserSettings

CODES, LOCK = timedelta(minutes=10), timedelta(minutes=15)
_ASKED = Limit("code_asked", 5, CODES)
_TRIED = Limit("code_tried", 3, CODES)
_PASSWORD = Limit("password", 5, LOCK)
_PASSWORD_ANYWHERE = Limit("password_anywhere", 50, LOCK)

Hit = tuple[Limit, tuple[str, ...]]


@dataclass(frozen=True)
class Limits:
    """The counters of signing in. An address has its counters whether it has an account or not."""

    db: Database
    box: SecretBox
    settings: UserSettings

    async def asked(self, purpose: Purpose, address: str, network: str) -> None:
        """Counts a wish for a code; Exhausted when there were too many."""
        if not await self._hit(self._of_network("codes_asked", network), (_ASKED, (purpose, address))):
            raise Exhausted("too many codes were asked for; wait ten minutes", retry_after_s=CODES.total_seconds())

    async def tried(self, purpose: Purpose, address: str, network: str) -> bool:
        """Counts a guess of a code, before anybody looks whether it is right; False when there were too many."""
        return await self._hit(self._of_network("codes_tried", network), (_TRIED, (purpose, address)))

    async def code_was_right(self, session: AsyncSession, purpose: Purpose, address: str, network: str) -> None:
        """Whoever reads the address's mail gets all tries back."""
        await repository.clear(session, _TRIED, self._subject(_TRIED, (purpose, address)))
        await self._give_back(session, self._of_network("codes_tried", network))

    async def password_tried(self, address: str, network: str) -> bool:
        """Counts a guess of a password, before it is looked at; False while the address is locked on this network, or everywhere."""
        return await self._hit(
            self._of_network("passwords_tried", network), (_PASSWORD, (address, network)), (_PASSWORD_ANYWHERE, (address,))
        )  # fmt: skip

    async def password_was_right(self, session: AsyncSession, address: str, network: str) -> None:
        """Only failures count. What was tried on other networks stays counted: it was somebody else."""
        await repository.clear(session, _PASSWORD, self._subject(_PASSWORD, (address, network)))
        await self._give_back(session, (_PASSWORD_ANYWHERE, (address,)))
        await self._give_back(session, self._of_network("passwords_tried", network))

    def _of_network(self, kind: str, network: str) -> Hit:
        return Limit(kind, self.settings.sign_ins_per_network, LOCK, extends=False), (network,)

    async def _hit(self, *hits: Hit) -> bool:
        """Counts all in their order, as far as they let through. In a transaction of its own: a failure is counted too."""

        async def work(session: AsyncSession) -> bool:
            for limit, subject in hits:
                if not await repository.hit(session, limit, self._subject(limit, subject)):
                    return False
            return True

        return await self.db.run(work, ALL)

    async def _give_back(self, session: AsyncSession, hit: Hit) -> None:
        await repository.give_back(session, hit[0], self._subject(*hit))

    def _subject(self, limit: Limit, subject: tuple[str, ...]) -> bytes:
        return self.box.digest(f"attempts/{limit.kind}", *subject)
