"""Keys of the embedded default: made at the first start, kept in the data directory, readable by the owner alone."""

import base64
import fcntl
import hmac
import os
import secrets
from collections.abc import Callable
from pathlib import Path

import orjson

from services.kit.tokens import public_key

SERVICES = ("user_svc", "deployment_svc", "gateway", "cli")
"""Who signs tokens."""
RING = "keyring.json"
"""The file beside them in which the encryption key is followed and rotated."""


def load_or_make(data_dir: Path) -> dict[str, str]:
    """The keys as settings: name without CLAWPLANE_ -> value. Two processes that start at once agree on one file."""
    path = data_dir / "keys.json"
    if not path.exists():
        data_dir.mkdir(parents=True, exist_ok=True)
        draft = _draft(data_dir, make("dev1"))
        try:
            os.link(draft, path)
        except FileExistsError:
            pass
        finally:
            draft.unlink()
    keys: dict[str, str] = orjson.loads(path.read_bytes())
    return keys if keys.keys() >= _ADDED.keys() else _complete(path)


def _complete(path: Path) -> dict[str, str]:
    """Adds the keys that came after the file was made. One process at a time, and readers see the old file or the new one."""
    with (path.parent / "keys.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        keys: dict[str, str] = orjson.loads(path.read_bytes())
        missing = {name: made() for name, made in _ADDED.items() if name not in keys}
        if missing:
            os.replace(_draft(path.parent, keys | missing), path)
        return keys | missing


def _draft(data_dir: Path, keys: dict[str, str]) -> Path:
    """A whole file of keys under another name."""
    draft = data_dir / f"keys.{os.getpid()}.{secrets.token_hex(4)}"
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(orjson.dumps(keys, option=orjson.OPT_INDENT_2))
        file.flush()
        os.fsync(file.fileno())
    return draft


def make(key_id: str) -> dict[str, str]:
    """Fresh keys, in the form of the file. ``key_id`` names the encryption key."""
    seeds = {name: os.urandom(32) for name in SERVICES}
    result = {f"seed_{name}": _text(seed) for name, seed in seeds.items()}
    result["service_public_keys"] = orjson.dumps({name: _text(public_key(seed)) for name, seed in seeds.items()}).decode()
    result["operator_token"] = f"clawop_{secrets.token_urlsafe(32)}"
    result["encryption_keys"] = orjson.dumps({key_id: _text(os.urandom(32))}).decode()
    result["encryption_key_id"] = key_id
    result["hmac_key"] = _text(os.urandom(32))
    result["sandbox_webhook_secret"] = f"whsec_{secrets.token_urlsafe(32)}"
    return result | {name: made() for name, made in _ADDED.items()}


def settings_for(keys: dict[str, str], service: str) -> dict[str, object]:
    """The keyword arguments of one process's settings; other processes' seeds are left out."""
    return {
        "service_name": service,
        "service_private_key": keys[f"seed_{service}"],
        "service_public_keys": orjson.loads(keys["service_public_keys"]),
        "operator_token": keys["operator_token"],
        "encryption_keys": orjson.loads(keys["encryption_keys"]),
        "encryption_key_id": keys["encryption_key_id"],
        "hmac_key": keys["hmac_key"],
        "audit_key": keys["audit_key"],
        "sandbox_webhook_secret": keys["sandbox_webhook_secret"],
        "clerk_webhook_secrets": [clerk_webhook_secret(keys)],
    }


def clerk_webhook_secret(keys: dict[str, str]) -> str:
    """What signs the webhooks that stand in for Clerk's."""
    return f"whsec_{_text(hmac.new(keys['hmac_key'].encode(), b'clerk webhooks', 'sha256').digest())}"


def _text(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


_ADDED: dict[str, Callable[[], str]] = {"audit_key": lambda: _text(os.urandom(32))}
"""Keys that files of earlier versions lack, and how each is made."""
