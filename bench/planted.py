"""Sessions and API keys, put into the tables as the services would: there are too many to make each by a call."""

import asyncio
import os
from collections.abc import Sequence

from sqlalchemy import insert

from clawplane.user.v1 import user_pb2
from clawplane.user.v1.api_key_pb2 import ApiKeyEnvironment
from services.kit import devkeys, ids, keys, known_keys, vault
from services.kit.columns import now
from services.kit.db import ALL, Database
from services.kit.settings import KitSettings
from services.user_svc.api_keys.models import ApiKey, ApiKeySecret
from services.user_svc.organizations.models import Organization
from services.user_svc.sessions import repository as sessions
from services.user_svc.users.models import User

IN_ALL, ASKED_FOR = 100_000, 10_000
"""How many keys there are, and how many of them are asked for."""
_BATCH = 2_000
assert Organization  # the tables above point at its own


def plant(url: str, made: dict[str, str], people: Sequence[user_pb2.User]) -> tuple[list[str], list[str]]:
    """A token for each of the people, and the texts of the keys that can be asked for; the other keys only fill the table."""
    return asyncio.run(_plant(url, made, people))


async def _plant(url: str, made: dict[str, str], people: Sequence[user_pb2.User]) -> tuple[list[str], list[str]]:
    settings = KitSettings(**devkeys.settings_for(made, "user_svc"))  # type: ignore[arg-type]
    db, box = Database(url, settings, "planted"), vault.open_box(settings)
    async with db.transaction(ALL) as session:
        tokens = [sessions.start(session, await session.get_one(User, user.id), "test")[1] for user in people]
    texts = []
    for start in range(0, IN_ALL, _BATCH):
        rows, secrets = [], []
        for number in range(start, start + _BATCH):
            user, at = people[number % len(people)], now()
            key = keys.mint(known_keys.PEOPLE, "test", known_keys.ID_PREFIX) if number < ASKED_FOR else None
            row = {
                "id": key.id if key else ids.new("key"), "org_id": user.personal_org_id, "user_id": user.id, "name": f"key {number}",
                "environment": ApiKeyEnvironment.API_KEY_ENVIRONMENT_TEST, "permissions": ["models.call", "usage.record"], "metadata_": {},
                "rate": "", "is_active": True, "revoke_reason": "", "created_at": at, "updated_at": at, "version": 1,
            }  # fmt: skip
            rows.append(row)
            digest = key.digest(box) if key else os.urandom(32)
            secret = {"org_id": user.personal_org_id, "id": ids.new("ksec"), "key_id": row["id"], "number": 1}
            secrets.append(secret | {"digest": digest, "digest_key_id": box.hmac_key_id, "created_at": at, "updated_at": at})
            texts += [key.text] if key else []
        async with db.transaction(ALL) as session:
            await session.execute(insert(ApiKey), rows)
            await session.execute(insert(ApiKeySecret), secrets)
    await db.close()
    return tokens, texts
