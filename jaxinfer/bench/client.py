"""A streaming client of the OpenAI API that keeps times and counts, lean enough to load a server from one core."""

import asyncio
import contextlib
import json
import time
from dataclasses import dataclass, field

import aiohttp

FAILED = ("error", "abort")  # finish reasons of an answer that is none


@dataclass
class Reply:
    """One request as the client saw it. Seconds; `start` and `times` (of each chunk with output) are perf_counter's.

    The counts are the server's usage, None where it sends none. error: "" for a request that succeeded.
    """

    start: float = 0.0
    times: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    input_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    finish_reason: str | None = None
    error: str = ""

    @property
    def ttft(self) -> float:
        return self.times[0] - self.start

    @property
    def latency(self) -> float:
        """Until the last chunk with output."""
        return self.times[-1] - self.start

    @property
    def itl(self) -> list[float]:
        return [after - before for before, after in zip(self.times, self.times[1:])]

    def saw(self, payload: bytes, now: float) -> None:
        """Takes one event of the stream in. Raises what the lookups raise for one that is not as OpenAI's."""
        event = json.loads(payload)
        if event.get("error"):
            self.error = error_message(event)
            return
        if usage := event.get("usage"):
            self.input_tokens, self.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
            self.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        if not event.get("choices"):
            return
        choice = event["choices"][0]
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        delta = choice.get("delta")
        if delta is None:
            # A token may have no text (half a character, a model without a tokenizer): it counts all the same.
            text = choice["text"]
        elif "role" in delta and not delta.get("content"):
            return  # a chat's opening, which some servers send before any token
        else:
            text = delta.get("content")
            text = delta.get("reasoning_content", delta.get("reasoning")) if text is None else text
            if text is None:
                return  # a chat's end: the finish reason alone
        self.times.append(now)
        self.texts.append(text)


async def stream(session: aiohttp.ClientSession, url: str, body: bytes) -> Reply:
    """Sends one request with "stream": true and reads the answer to its end; what goes wrong is in `error`."""
    reply = Reply(start=time.perf_counter())
    try:
        async with session.post(url, data=body) as response:
            if response.status != 200:
                reply.error = f"HTTP {response.status}: {error_message(await response.text())}"
                return reply
            done, rest = False, b""
            # Whatever has come, at once: a task wakes up once a packet, not once a line.
            async for data in response.content.iter_any():
                now = time.perf_counter()
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    if line.startswith(b"data:"):
                        payload = line[5:].strip()
                        if payload == b"[DONE]":
                            done = True
                        else:
                            reply.saw(payload, now)
    except TimeoutError:
        reply.error = f"timed out after {session.timeout.total:g} s (--timeout)"
    except (aiohttp.ClientError, OSError) as error:
        reply.error = f"{type(error).__name__}: {error}"
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        reply.error = f"not an answer as OpenAI's: {type(error).__name__}: {error}"
    else:
        if not reply.error:
            reply.error = _missing(reply, done)
    return reply


def _missing(reply: Reply, done: bool) -> str:
    if reply.finish_reason in FAILED:
        return f"finish_reason {reply.finish_reason}"
    if not done:
        return "the stream ended before [DONE]"
    return "" if reply.times else "the answer has no token"


def error_message(answer: str | dict) -> str:
    """The message of OpenAI's error body (or a stream's error event), or else the text as it is, on one line."""
    text = answer
    if isinstance(answer, str):
        with contextlib.suppress(ValueError):  # a proxy's page, say
            answer = json.loads(answer)
    if isinstance(answer, dict):
        error = answer.get("error", answer)
        text = error.get("message", error) if isinstance(error, dict) else error
    return " ".join(str(text).split())[:300]


def open_session(api_key: str | None, timeout: float, max_concurrency: int | None) -> aiohttp.ClientSession:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
    return aiohttp.ClientSession(
        headers=headers,
        timeout=aiohttp.ClientTimeout(total=timeout),
        # Given up before the server does (uvicorn: 5 s): a connection that it closes as a request goes out fails it.
        connector=aiohttp.TCPConnector(limit=max_concurrency or 0, keepalive_timeout=3),
    )


async def wait_until_ready(session: aiohttp.ClientSession, base_url: str, seconds: float) -> None:
    """Until /v1/models answers anything but 503, asked twice a second. Raises ValueError after so many seconds."""
    end = time.perf_counter() + seconds
    while True:
        try:
            async with session.get(f"{base_url}/v1/models", timeout=aiohttp.ClientTimeout(total=30)) as response:
                if response.status != 503:
                    return
                state = f"HTTP 503: {error_message(await response.text())}"
        except (aiohttp.ClientError, OSError) as error:
            state = f"{type(error).__name__}: {error}"
        if time.perf_counter() > end:
            raise ValueError(f"{base_url} is not ready after {seconds:g} s (--ready-check-timeout-sec): {state}")
        await asyncio.sleep(0.5)


async def first_model(session: aiohttp.ClientSession, base_url: str) -> str:
    """The first of /v1/models. Raises ValueError saying why there is none."""
    try:
        async with session.get(f"{base_url}/v1/models", timeout=aiohttp.ClientTimeout(total=30)) as response:
            text = await response.text()
            if response.status != 200:
                hints = {401: "; give --api-key", 404: "; give --model", 503: "; give --ready-check-timeout-sec to wait for it"}
                hint = hints.get(response.status, "")
                raise ValueError(f"{base_url}/v1/models: HTTP {response.status}: {error_message(text)}{hint}")
            return str(json.loads(text)["data"][0]["id"])
    except (aiohttp.ClientError, OSError) as error:  # a TimeoutError is an OSError
        raise ValueError(f"no server answers at {base_url}: {type(error).__name__}: {error}") from None
    except (json.JSONDecodeError, LookupError, TypeError) as error:
        raise ValueError(f"{base_url}/v1/models names no model ({error!r}): give --model") from None
