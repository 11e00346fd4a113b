"""Logs: lines of JSON, and no text of an exception in any of them."""

import json
import subprocess
import sys
from pathlib import Path

from services.kit import devkeys, telemetry
from services.kit.settings import KitSettings

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import asyncio, logging, structlog
from services.kit import telemetry

telemetry.configure_logs("info")
log = structlog.get_logger()
log.debug("not.said")
log.info("plain", count=1, text='a "quote" \\n and a line', name="ü")

def fails():
    raise ValueError("PLANTED")

try:
    fails()
except ValueError as error:
    log.error("by.object", exc_info=error)
    log.error("by.flag", exc_info=True)
    logging.getLogger("library").error("it %s", "broke", exc_info=True)
logging.getLogger("library").warning("first line\\nPLANTED in the second")
logging.getLogger("library").info("not said")

async def forgotten():
    asyncio.get_running_loop().create_task(asyncio.to_thread(fails))
    await asyncio.sleep(0.1)

asyncio.run(forgotten())
"""


def test_every_line_is_json_and_holds_no_exceptions_text() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
    assert "PLANTED" not in done.stderr + done.stdout
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    events = {line["event"]: line for line in lines}
    assert set(events) == {"plain", "by.object", "by.flag", "it broke", "first line", "Task exception was never retrieved"}
    assert events["plain"] | {"timestamp": ""} == {
        "event": "plain", "count": 1, "text": 'a "quote" \n and a line', "name": "ü", "level": "info", "timestamp": "",
    }  # fmt: skip
    for name in ("by.object", "by.flag", "it broke"):
        assert events[name]["exception"] == "ValueError" and events[name]["trace"][-1].endswith(":fails")
    assert all(line["level"] and line["timestamp"].endswith(("Z", "+00:00")) for line in lines)


def test_pool_metrics_have_their_names() -> None:
    names = {metric.name for metric in telemetry.REGISTRY.collect()}
    assert {"clawplane_db_pool_in_use", "clawplane_db_pool_waiting", "clawplane_db_pool_timeouts", "clawplane_rpc_calls"} <= names


def test_settings_show_no_key(tmp_path: Path) -> None:
    keys = devkeys.load_or_make(tmp_path)
    assert devkeys.load_or_make(tmp_path) == keys and (tmp_path / "keys.json").stat().st_mode & 0o777 == 0o600
    settings = KitSettings(**devkeys.settings_for(keys, "cli"))  # type: ignore[arg-type]
    shown = repr(settings) + str(settings) + settings.model_dump_json()
    for name in ("seed_cli", "operator_token", "hmac_key"):
        assert keys[name] not in shown
    assert json.loads(keys["encryption_keys"])["dev1"] not in shown
