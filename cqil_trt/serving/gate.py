"""What every request passes: its id, its key, its type, size and pace, and the log."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import secrets
import time
from dataclasses import dataclass
from typing import Any

from starlette.responses import PlainTextResponse

from cqil_trt.serving import wire
from cqil_trt.serving.answers import Exchange
from cqil_trt.serving.metrics import Metrics
from cqil_trt.serving.refusals import REASONS, Refused, error_response
from cqil_trt.serving.streams import Gone

# Served without an API key: what probes ask, and the page that asks for the key.
_OPEN = frozenset({"/", "/health", "/ready"})
# The log is written this much later: a write wakes its reader, which takes as long as everything else between a
# client's last token and its next request.
_LOG_SECONDS = 0.05
# How long a body may take to arrive.
BODY_SECONDS = 30.0


@dataclass
class Note:
    """What the log says about a request."""

    id: str
    began: float
    status: int = 0
    exchange: Exchange | None = None
    body: bytes | None = None
    failed: bool = False  # after the response had begun


class Gate:
    """Before every request: its id, its key, the type, size and pace of its body; after it: the log."""

    def __init__(self, app: Any, setup: wire.Setup, metrics: Metrics):
        self._app, self._setup, self._metrics = app, setup, metrics
        self._keys = [hashlib.sha256(key.encode()).digest() for key in setup.keys]
        self._gateway_key = None if setup.gateway_key is None else setup.gateway_key.encode()
        self._lines: list[str] = []  # of the log, not yet written

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        note = Note(
            id=given if re.fullmatch(r"[\w.:-]{1,128}", given, re.ASCII) else secrets.token_hex(8),
            began=time.monotonic(),
        )
        scope.setdefault("state", {})["note"] = note
        begun = False

        async def answer(message: Any) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                note.status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", note.id.encode())]
                if note.status == 408:
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        size, complete, late = 0, False, False
        task: Any = asyncio.current_task()

        def expire() -> None:
            nonlocal late
            if not complete:
                late = True
                task.cancel()

        timer = asyncio.get_running_loop().call_later(BODY_SECONDS, expire)
        limit = self._setup.max_body_bytes

        async def limited() -> Any:
            nonlocal size, complete
            try:
                message = await receive()
            except asyncio.CancelledError:
                if late:
                    raise Refused(408, f"the body did not come within {BODY_SECONDS:g} s") from None
                raise
            size += len(message.get("body", b""))
            if not message.get("more_body", False):
                complete = True
                timer.cancel()
            if size > limit:
                raise Refused(413, f"the body is larger than {limit} bytes")
            if self._setup.log_text:
                note.body = (note.body or b"") + message.get("body", b"")
            return message

        try:
            self._check_key(scope["path"], headers)
            kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
            if scope["method"] == "POST" and kind != b"application/json":
                # Any page in a browser may send other types here without asking.
                raise Refused(415, "the request needs Content-Type: application/json")
            length = headers.get(b"content-length", b"0")
            if length.isdigit() and int(length) > limit:
                raise Refused(413, f"the body is larger than {limit} bytes")
            await self._app(scope, limited, answer)
        except Refused as refused:
            if refused.status in REASONS:
                self._metrics.refused(REASONS[refused.status])
            if not begun:
                await error_response(refused)(scope, receive, answer)
        except Gone:
            note.status = 499
        except Exception as error:
            wire.say(f"error: request {note.id}: {type(error).__name__}: {error}")
            if not begun:
                await PlainTextResponse("Internal Server Error", 500)(scope, receive, answer)
        finally:
            timer.cancel()
            self._log(scope, note)

    def _check_key(self, path: str, headers: dict[bytes, bytes]) -> None:
        if self._gateway_key is not None:
            shown = headers.get(wire.GATEWAY_HEADER.encode(), b"")
            if not secrets.compare_digest(shown, self._gateway_key):
                raise Refused(403, "this server is reached through its gateway only")
        if not self._keys or path in _OPEN:
            return
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        digest = hashlib.sha256(token).digest()
        # Every key is compared, and in constant time.
        known = [secrets.compare_digest(digest, key) for key in self._keys]
        if scheme.lower() != b"bearer" or not any(known):
            raise Refused(401, "a valid API key is needed: Authorization: Bearer KEY")

    def _log(self, scope: Any, note: Note) -> None:
        metrics = self._metrics
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "id": note.id,
            "method": scope["method"],
            "path": scope["path"],
            "status": note.status,
            "seconds": round(time.monotonic() - note.began, 6),
        }
        if note.exchange is not None:
            answers = note.exchange.answers
            for answer in answers:
                finish = {"tool_calls": "stop"}.get(answer.reason or "abort", answer.reason or "abort")
                ticket = answer.ticket
                now = time.monotonic()
                prefill = None if ticket.first_at is None else ticket.first_at - (ticket.started_at or ticket.queued_at)
                decode = None if ticket.first_at is None else (ticket.last_at or now) - ticket.first_at
                if note.status >= 500 or note.failed:
                    finish = "error"
                metrics.finished(finish, now - ticket.queued_at, ticket.prompt_tokens, answer.tokens, prefill, decode)
            tickets = [answer.ticket for answer in answers]
            line["prompt_tokens"] = sum(answer.ticket.prompt_tokens for answer in answers)
            line["completion_tokens"] = sum(answer.tokens for answer in answers)
            # Since the request came: when the engine was asked, when it had begun, when its first token was here.
            stages: dict[str, list[float | None]] = {
                "asked_seconds": [ticket.queued_at for ticket in tickets],
                "begun_seconds": [ticket.started_at for ticket in tickets],
                "first_token_seconds": [ticket.first_at for ticket in tickets],
            }
            for name, times in stages.items():
                first = min((at for at in times if at is not None), default=None)
                line[name] = None if first is None else round(first - note.began, 6)
            line["finish"] = [answer.reason or "abort" for answer in answers]
        if note.body is not None:
            line["body"] = note.body.decode(errors="replace")
        if self._setup.log_requests and scope["path"] not in ("/health", "/ready", "/metrics"):
            if not self._lines:
                asyncio.get_running_loop().call_later(_LOG_SECONDS, self.write_log)
            self._lines.append(json.dumps(line, ensure_ascii=False))

    def write_log(self) -> None:
        """Writes the pending lines; also called when the server ends."""
        if self._lines:
            wire.say("\n".join(self._lines))
            self._lines.clear()
