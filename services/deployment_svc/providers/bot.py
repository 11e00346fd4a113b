"""The small bot that the local driver runs: a chat against a simulated model, its usage reported with its own key.

Standard library only, so that it starts in a blink. Run as ``python -I bot.py <folder>``; what it may know comes as one JSON line on
standard input: start_id, deployment_id, model, channel, claw_key, channel_token, channel_api_key, usage_url, journal.
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
_MAX_PAUSE_S = 10.0
_REFUSED_FOR_GOOD = (400, 413, 422)
"""Statuses that say the event itself is wrong. Any other may be a gateway's or a key's passing trouble."""
_PROVIDERS = {"claude": "anthropic", "gpt": "openai", "gemini": "google", "minimax": "minimax"}


def uuid7() -> str:
    """A UUID of version 7 as text: its time is the event's time."""
    raw = bytearray((time.time_ns() // 1_000_000).to_bytes(6, "big") + os.urandom(10))
    raw[6] = 0x70 | raw[6] & 0x0F
    raw[8] = 0x80 | raw[8] & 0x3F
    text = raw.hex()
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


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


class Reporter:
    """Reports usage. An event is on disk before its reply leaves, and is sent under the same id until it is taken."""

    def __init__(self, url: str, key: str, journal: Path) -> None:
        self._url, self._key, self._path = f"{url.rstrip('/')}/v1/usage", key, journal
        self._lock, self._wake, self._stop = threading.Lock(), threading.Event(), False
        self._events = self._load()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _load(self) -> list[dict[str, Any]]:
        try:
            lines = self._path.read_text().splitlines()
        except FileNotFoundError:
            return []
        events = []
        for line in lines:
            try:
                events.append(json.loads(line))
            except ValueError:
                continue  # The last line of a life that ended while it wrote.
        return events

    def add(self, event: dict[str, Any]) -> None:
        """Keeps an event until it was taken."""
        with self._lock:
            self._events.append(event)
            with self._path.open("a") as file:
                file.write(json.dumps(event) + "\n")
                file.flush()
                os.fsync(file.fileno())
        self._wake.set()

    def _run(self) -> None:
        pause = 0.2
        while not self._stop:
            self._wake.wait(timeout=None if not self._events else pause)
            self._wake.clear()
            try:
                done = self.flush()
            except OSError as error:
                print(f"the journal cannot be written: {error}", flush=True)
                done = False
            pause = 0.2 if done else min(_MAX_PAUSE_S, pause * 2)

    def flush(self) -> bool:
        """Sends what is kept, oldest first; False when something has to wait."""
        while True:
            with self._lock:
                if not self._events:
                    return True
                event = self._events[0]
            if not self._send(event):
                return False
            with self._lock:
                self._events = [kept for kept in self._events if kept["id"] != event["id"]]
                self._store()

    def _store(self) -> None:
        if self._events:
            write_atomically(self._path, "".join(json.dumps(event) + "\n" for event in self._events))
        else:
            self._path.unlink(missing_ok=True)

    def _send(self, event: dict[str, Any]) -> bool:
        """True when the event is done with: taken, or refused for good."""
        request = urllib.request.Request(
            self._url, json.dumps(event).encode(), {"content-type": "application/json", "authorization": f"Bearer {self._key}"}
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=5):
                return True
        except urllib.error.HTTPError as error:
            error.close()
            if error.code not in _REFUSED_FOR_GOOD:
                return False
            print(f"usage event {event['id']} was refused with {error.code}", flush=True)
            return True
        except (OSError, ValueError, http.client.HTTPException):
            return False

    def close(self) -> None:
        """One last try, for at most a second."""
        self._stop = True
        last = threading.Thread(target=self.flush, daemon=True)
        last.start()
        last.join(1)


def simulated_model(model: str, message: str) -> str:
    """A pleasant answer that is always the same for the same words."""
    words = message.split()
    topic = " ".join(words[:12]) + ("..." if len(words) > 12 else "")
    if message.rstrip().endswith("?"):
        return f'You asked "{topic}" - a good question. I am a simulated {model}, so take this as proof that I am awake.'
    return f'I read "{topic}" ({len(words)} words). I am a simulated {model}; ask me anything.'


def tokens(text: str) -> int:
    """About one token for four characters, and at least one."""
    return max(1, len(text) // 4)


def handler_for(given: dict[str, Any], reporter: Reporter) -> type[BaseHTTPRequestHandler]:
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
            started = time.monotonic()
            reply = simulated_model(given["model"], message)
            used = {"tokens_in": tokens(message), "tokens_out": tokens(reply)}
            reporter.add(
                {
                    "id": uuid7(), "provider": _provider(given["model"]), "model": given["model"], "type": "USAGE_TYPE_CHAT",
                    "tokensIn": used["tokens_in"], "tokensOut": used["tokens_out"],
                    "latencyMs": int((time.monotonic() - started) * 1000),
                }
            )  # fmt: skip
            self._answer(200, {"reply": reply, "usage": used})

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


def _provider(model: str) -> str:
    return next((name for start, name in _PROVIDERS.items() if model.startswith(start)), "akashml")


_PAGE = """<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Bot</title>
<style>body{font:16px/1.5 system-ui;max-width:40rem;margin:2rem auto;padding:0 1rem}#log{white-space:pre-wrap}input{width:100%}</style>
<h1>A bot on MODEL</h1><div id="log" role="log"></div>
<form><label>Say something <input name="m" autocomplete="off" autofocus></label></form>
<script>document.forms[0].onsubmit=async e=>{e.preventDefault();const f=e.target.m,log=document.getElementById('log');
log.append('You: '+f.value+'\\n');const r=await fetch('/chat',{method:'POST',body:JSON.stringify({message:f.value})});
log.append('Bot: '+((await r.json()).reply||'?')+'\\n\\n');f.value=''}</script>"""


def main() -> None:
    """Runs until SIGTERM."""
    folder = Path(sys.argv[1])
    given = json.loads(sys.stdin.readline())
    take_lock(folder)
    reporter = Reporter(given["usage_url"], given["claw_key"], Path(given["journal"]))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_for(given, reporter))
    server.daemon_threads = True
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    fact = {"pid": os.getpid(), "port": server.server_address[1], "start_id": given["start_id"]}
    write_atomically(folder / "bot.json", json.dumps(fact))
    server.serve_forever(poll_interval=0.1)
    reporter.close()


if __name__ == "__main__":
    main()
