"""Who comes in: key, size of the body, readiness, places in the queue; one line in the log for each; errors as answers."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import os
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxinfer.async_llm import RequestAborted, Stream
from jaxinfer.engine import EngineDeadError
from jaxinfer.metrics import Metrics
from jaxinfer.openai_api import ApiError
from jaxinfer.server_config import API_KEY_VARIABLE, ServerConfig

logger = logging.getLogger(__name__)

GUARDED = ("/generate", "/tokenize", "/detokenize")  # and everything under /v1/
DISCARDED_BYTES = 256 << 20
DISCARDING_SECONDS = 5.0
MAX_LOGGED_ERROR = 300  # characters
TURNS = 4  # requests that are parsed and tokenized at a time: as many as the tokenizer's threads, and their followers


class ClientGone(Exception):
    """The client closed its connection."""


class JSON(Response):
    """Escaped to ASCII: a lone surrogate that a client sent can then be sent back to it."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


@dataclass(eq=False)
class Call:
    """A request of the API while it is served."""

    path: str
    send: Send
    arrival: float = field(default_factory=time.time)  # seconds since the epoch, as the engine's own times
    id: str = "-"
    user: str | None = None
    status: int = 0
    sequences: int = 0
    streams: list[Stream] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))  # tokens, by prompt
    first_token: float | None = None
    finished: float | None = None
    reasons: list[str] = field(default_factory=list)
    error: str = ""
    turns: asyncio.Semaphore | None = None  # where a turn of it is held

    def end_turn(self) -> None:
        """Let the next request be parsed, unless that was done."""
        if self.turns is not None:
            self.turns.release()
            self.turns = None

    def __str__(self) -> str:
        head = f"{self.id} {self.path} {self.status or 'no answer'}"
        error = "".join(c if c.isprintable() else " " for c in self.error[:MAX_LOGGED_ERROR])  # it may quote the client
        if not self.sequences:
            return f"{head}: {error}" if error else head
        tokens = sum(self.generated.values())
        parts = [f"{self.prompt_tokens} prompt tokens ({self.cached_tokens} cached), {tokens} generated"]
        if self.first_token is not None:
            parts.append(f"ttft {self.first_token - self.arrival:.3f} s")
            if self.finished is not None and tokens > self.sequences:
                tpot = (self.finished - self.first_token) / (tokens / self.sequences - 1)
                parts.append(f"tpot {1000 * tpot:.2f} ms")
        parts.append(",".join(self.reasons) or error or "abort")
        if self.user is not None:
            parts.append(f"user {self.user[:80]!r}")
        return f"{head}: {', '.join(parts)}"


class Door:
    """Says who may come in, and knows who is in.

    Args:
        config: the limits. max_sequences: that may run or wait at a time.
    """

    def __init__(self, config: ServerConfig, max_sequences: int, metrics: Metrics):
        self.config, self.max_sequences, self.metrics = config, max_sequences, metrics
        self.api_key = config.api_key or os.environ.get(API_KEY_VARIABLE) or None
        self.ready = False
        # Of a burst, the first requests are submitted while the others wait to be parsed. All at a time, none would be before
        # the last is parsed, and the devices would idle until then: 0.2 s for 256 prompts of 600 token ids.
        self.turns = asyncio.Semaphore(TURNS)
        self.draining = False
        self.dead = False
        self.calls: set[Call] = set()
        self.sequences = 0
        self._idle = asyncio.Event()

    @property
    def open(self) -> bool:
        return self.ready and not self.draining and not self.dead

    def enter(self, call: Call) -> None:
        """A call begins. Raises ApiError where it may not."""
        if self.dead:
            raise ApiError(503, "the engine has failed; the server is ending")
        if self.draining:
            raise ApiError(503, "the server is stopping", headers={"Retry-After": "10"})
        if not self.ready:
            raise ApiError(503, "the model is being loaded or compiled; see /ready", headers={"Retry-After": "10"})
        self.calls.add(call)

    def leave(self, call: Call) -> None:
        self.sequences -= call.sequences
        self.calls.discard(call)
        if not self.calls:
            self._idle.set()

    def admit(self, call: Call, sequences: int) -> None:
        """Count a call's sequences. Raises ApiError for too many of its own (400), or a full queue (429)."""
        limit = self.max_sequences
        if sequences == 0:
            raise ApiError(400, "prompt is an empty list: at least one is needed", "prompt")
        if sequences > limit:
            raise ApiError(400, f"n: {sequences} sequences are asked for (prompts times n), allowed are {limit}", "n")
        if self.sequences + sequences > limit:
            message = f"{self.sequences} sequences run or wait, allowed are {limit}; try again later"
            raise ApiError(429, message, code="queue_full", headers={"Retry-After": "1"})
        call.sequences = sequences
        self.sequences += sequences

    async def wait_idle(self, timeout: float) -> None:
        """Until nobody is in. Raises TimeoutError after so many seconds."""
        async with asyncio.timeout(timeout):
            while self.calls:
                self._idle.clear()
                await self._idle.wait()


class Gate:
    """ASGI middleware round the API: key, size, readiness; one line in the log for each request."""

    def __init__(self, app: ASGIApp, door: Door):
        self.app, self.door = app, door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if scope["type"] != "http" or not (path.startswith("/v1/") or path in GUARDED):
            await self.app(scope, receive, send)
            return
        call = Call(f"{scope['method']} {quote(path)}", send)  # quoted: a line end in it would start a line of the log

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                call.status = message["status"]
            await send(message)

        try:
            headers = dict(scope["headers"])
            self._check_key(headers)
            self.door.enter(call)
            scope["jaxinfer.call"] = call
            receive = await self._body(headers, receive)  # before its turn: a client may send as slowly as it likes
            await self.door.turns.acquire()
            call.turns = self.door.turns
            await self.app(scope, receive, noted)
        except ApiError as error:
            call.error = error.message
            await error_response(error)(scope, receive, noted)
        except ClientGone:
            call.status = 499  # nginx's code for it; nobody is there to read it
            if call.sequences:
                self.door.metrics.finished["abort"] += 1
        except Exception:
            call.status = 500
            raise
        finally:
            call.end_turn()
            self.door.leave(call)
            logger.info("%s", call)

    def _check_key(self, headers: dict[bytes, bytes]) -> None:
        if self.door.api_key is None:
            return
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self.door.api_key.encode()):
            message = "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'"
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> Receive:
        """The whole body, read; as a `receive` that gives it at once. Raises ApiError (413) where it is too large."""
        limit = self.door.config.max_request_bytes
        message = f"the body is larger than max_request_bytes = {limit}"
        if int(headers.get(b"content-length", b"0")) > limit:
            if b"expect" not in headers:  # who waits for "100 Continue" has sent nothing yet
                await discard(receive)
            raise ApiError(413, message)
        body, more = bytearray(), True
        while more:
            event = await receive()
            if event["type"] == "http.disconnect":
                raise ClientGone
            body += event.get("body", b"")
            more = event.get("more_body", False)
            if len(body) > limit:
                if more:
                    await discard(receive)
                raise ApiError(413, message)
        whole = iter([{"type": "http.request", "body": bytes(body), "more_body": False}])

        async def replay() -> Message:
            return next(whole, None) or await receive()

        return replay


async def discard(receive: Receive) -> None:
    """Take the rest of a body that nobody wants, within reason: a client that still sends would miss our answer."""
    seen = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DISCARDING_SECONDS):
            while seen < DISCARDED_BYTES:
                event = await receive()
                seen += len(event.get("body", b""))
                if not event.get("more_body"):
                    return


def api_error(error: Exception) -> ApiError:
    """What a client is told of an exception."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestAborted):
        return ApiError(503, str(error), headers={"Retry-After": "10"})
    if isinstance(error, EngineDeadError):
        return ApiError(500, str(error), code="engine_dead")
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {}))
    if isinstance(error, RequestValidationError):
        return validation_error(error)
    return ApiError(500, "the server failed; its log says how")


def validation_error(error: RequestValidationError) -> ApiError:
    """The first field that is wrong, and all that is wrong with it."""
    problems = error.errors()
    where = [str(part) for part in problems[0]["loc"][1:]]
    if problems[0]["type"] == "json_invalid":
        detail = problems[0].get("ctx", {}).get("error", "")
        return ApiError(400, f"the body is not valid JSON: {detail} at position {where[0] if where else 0}")
    if not where:
        return ApiError(400, f"the body must be a JSON object, sent as application/json: {problems[0]['msg']}")
    field_name = where[0]
    if problems[0]["type"] == "extra_forbidden":
        return ApiError(400, f"{'.'.join(where)[:200]}: there is no such field; see /openapi.json", field_name[:200])
    said = dict.fromkeys(p["msg"].removeprefix("Value error, ") for p in problems if str(p["loc"][1]) == field_name)
    return ApiError(400, f"{field_name}: {'; '.join(list(said)[:4])}", field_name)


def error_response(error: Exception) -> Response:
    told = api_error(error)
    return JSON(told.body(), told.status, headers=told.headers)


async def handle_error(request: Request, error: Exception) -> Response:
    if isinstance(call := request.scope.get("jaxinfer.call"), Call):
        call.error = api_error(error).message
    return error_response(error)
