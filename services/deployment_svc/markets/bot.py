"""The small bot that the local driver runs: a chat with the model that was ordered, by the platform's model endpoint and the bot's own key.

Standard library only, so that it starts in a blink. Run as ``python -I bot.py <folder>``; what it may know comes as one JSON line on
standard input: start_id, deployment_id, model, channel, base_url, api_key, channel_token, channel_api_key.
"""

import fcntl
import html
import http.client
import json
import os
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

EXIT_HELD = 3
"""Another bot runs in this folder."""
_MAX_BODY = 64 * 1024
_LOCK_WAIT_S = 2.0
_MODEL_TIMEOUT_S = 120.0


def take_lock(folder: Path) -> int:
    """Holds the folder for as long as this process lives; exits when another bot does."""
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + _LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            # The driver's look whether a bot is alive holds the lock for a moment.
            if time.monotonic() > deadline:
                sys.exit(EXIT_HELD)
            time.sleep(0.02)
    os.ftruncate(descriptor, 0)
    os.write(descriptor, str(os.getpid()).encode())
    return descriptor


def write_atomically(path: Path, content: str) -> None:
    """The whole content or none of it, whatever happens."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with draft.open("w") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


class ModelError(Exception):
    """The model did not answer; the text may be shown."""


def ask_model(given: dict[str, Any], message: str) -> dict[str, Any]:
    """One question to the platform's model endpoint, which does the metering: {"reply": text, "usage": tokens as the endpoint says}."""
    body = {"model": given["model"], "messages": [{"role": "user", "content": message}]}
    headers = {"content-type": "application/json", "authorization": f"Bearer {given['api_key']}"}
    request = urllib.request.Request(f"{given['base_url'].rstrip('/')}/chat/completions", json.dumps(body).encode(), headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=_MODEL_TIMEOUT_S) as answer:
            said = json.load(answer)
        return {"reply": said["choices"][0]["message"]["content"], "usage": said["usage"]}
    except urllib.error.HTTPError as error:
        with error:
            raise ModelError(_words_of(error.read(_MAX_BODY)) or f"the model endpoint answered {error.code}") from None
    except (OSError, ValueError, KeyError, IndexError, TypeError, http.client.HTTPException):
        raise ModelError("the model endpoint does not answer as expected") from None


def _words_of(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return ""


def handler_for(given: dict[str, Any]) -> type[BaseHTTPRequestHandler]:
    """The HTTP side of a bot."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            """Requests are not logged: they hold what people say."""

        def do_GET(self) -> None:
            if self.path == "/health":
                shown = {name: given[name] for name in ("start_id", "deployment_id", "model", "channel")}
                self._answer(200, {"status": "ok"} | shown)
            elif self.path == "/":
                self._answer(200, _PAGE.replace("MODEL", html.escape(given["model"])), "text/html; charset=utf-8")
            else:
                self._error(404, "path", "there is nothing here; try /health, / or POST /chat")

        def do_POST(self) -> None:
            if self.path != "/chat":
                self._error(404, "path", "there is nothing here; try POST /chat")
                return
            message = self._message()
            if message is None:
                return
            try:
                self._answer(200, ask_model(given, message))
            except ModelError as error:
                self._error(502, "model", str(error))

        def _message(self) -> str | None:
            """The message of a chat request, or None when an error was answered."""
            length = self.headers.get("content-length", "")
            if not length.isdigit():
                self._error(411, "content-length", "is needed")
                return None
            if int(length) > _MAX_BODY:
                self._error(413, "body", f"is more than {_MAX_BODY} bytes")
                return None
            try:
                message = json.loads(self.rfile.read(int(length)))["message"]
            except (ValueError, KeyError, TypeError, RecursionError):
                message = None
            if not isinstance(message, str) or not message.strip():
                self._error(400, "message", 'send JSON as {"message": "..."}')
                return None
            return message

        def _error(self, status: int, field: str, text: str) -> None:
            self.close_connection = True
            self._answer(status, {"error": {"code": status, "field": field, "message": text}})

        def _answer(self, status: int, body: dict[str, Any] | str, kind: str = "application/json") -> None:
            raw = (body if isinstance(body, str) else json.dumps(body)).encode()
            self.send_response(status)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(raw)))
            if self.close_connection:
                self.send_header("connection", "close")
            self.end_headers()
            self.wfile.write(raw)

    return Handler


_PAGE = """<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Bot</title>
<style>body{font:16px/1.5 system-ui;max-width:40rem;margin:2rem auto;padding:0 1rem}#log{white-space:pre-wrap}input{width:100%}</style>
<h1>A bot on MODEL</h1><div id="log" role="log"></div>
<form><label>Say something <input name="m" autocomplete="off" autofocus></label></form>
<script>document.forms[0].onsubmit=async e=>{e.preventDefault();const f=e.target.m,log=document.getElementById('log');
log.append('You: '+f.value+'\\n');const r=await fetch('/chat',{method:'POST',body:JSON.stringify({message:f.value})});
const a=await r.json();log.append('Bot: '+(a.reply||a.error.message)+'\\n\\n');f.value=''}</script>"""


def main() -> None:
    """Runs until SIGTERM."""
    folder = Path(sys.argv[1])
    given = json.loads(sys.stdin.readline())
    take_lock(folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_for(given))
    server.daemon_threads = True
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    fact = {"pid": os.getpid(), "port": server.server_address[1], "start_id": given["start_id"]}
    write_atomically(folder / "bot.json", json.dumps(fact))
    server.serve_forever(poll_interval=0.1)


if __name__ == "__main__":
    main()
