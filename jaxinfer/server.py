"""`jaxinfer serve`: the OpenAI API over an AsyncLLM, with FastAPI on uvicorn.

The event loop parses, answers and writes; tokenization runs in a pool, the engine on its own thread. What is asked of every
request (key, size of its body, whether we are ready, its line in the log) is asked once, by `Gate`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

from jaxinfer import __version__, runtime
from jaxinfer.async_llm import AsyncLLM, RequestAborted, Stream
from jaxinfer.config import EngineConfig
from jaxinfer.engine import EngineDeadError
from jaxinfer.gate import JSON, Call, ClientGone, Door, Gate, api_error, handle_error
from jaxinfer.metrics import Metrics
from jaxinfer.openai_api import (
    ApiError,
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    ErrorResponse,
    GenerateRequest,
    TokenizeRequest,
    bad_request,
    sampling_params,
    template_options,
)
from jaxinfer.openai_output import DONE, Answer, ChatCompletionResponse, CompletionResponse
from jaxinfer.outputs import Group
from jaxinfer.request import RequestOutput
from jaxinfer.server_config import ServerConfig

logger = logging.getLogger(__name__)

LAST_WORDS = 5.0  # seconds for answers on their way when the process ends anyway
EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold tokens back
]


class Server:
    """One model behind HTTP, from start to the last answer.

    Args:
        engine_config, config: the settings. llm: a running one, instead of loading engine_config.
    """

    def __init__(self, engine_config: EngineConfig, config: ServerConfig, llm: AsyncLLM | None = None):
        self.engine_config, self.config = engine_config, config
        self.names = config.served_model_name or [engine_config.model]
        self.llm = llm
        self.failure: BaseException | None = None  # why it could not start, or not go on
        self.created = int(time.time())
        self.metrics = Metrics(self.names[0], lambda: self.llm.stats() if self.llm and not self.llm.errored else None)
        self.door = Door(config, engine_config.max_num_seqs + config.max_queued_requests, self.metrics)
        self._uvicorn: uvicorn.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    # ---- from start to end

    async def run(self, sock: socket.socket) -> int:
        """Serve on a bound socket until `stop`; returns the exit status.

        Raises:
            ValueError, OSError: the model cannot be loaded, as AsyncLLM says it.
        """
        host, port = sock.getsockname()[:2]
        config = uvicorn.Config(
            create_app(self), log_config=None, log_level="warning", access_log=False, lifespan="off", ws="none",
            server_header=False, timeout_keep_alive=75, timeout_graceful_shutdown=round(LAST_WORDS),
        )  # fmt: skip
        self._uvicorn = Uvicorn(config)
        with self._signals():
            self._spawn(self._load())
            logger.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)
            await self._uvicorn.serve(sockets=[sock])
        if self.llm is not None and (self.door.ready or self.failure):  # not in the middle of a compilation
            await self.llm.shutdown()
        if self.failure is None:
            return 0
        if isinstance(self.failure, EngineDeadError):
            return 1
        raise self.failure

    def stop(self) -> None:
        """Refuse new requests, let running ones finish within shutdown_timeout, abort the rest, end. Twice: at once."""
        if self.door.draining or not self.door.ready:
            self._exit()
            return
        self.door.draining = True
        logger.info("stopping: %d requests have %g s to finish", len(self.door.calls), self.config.shutdown_timeout)
        self._spawn(self._drain())

    def _exit(self) -> None:
        if self._uvicorn is not None:
            self._uvicorn.should_exit = True
            self._uvicorn.force_exit = self.door.draining

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT stop the server, where this is the main thread."""
        loop, signals = asyncio.get_running_loop(), (signal.SIGTERM, signal.SIGINT)
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        for number in signals:
            loop.add_signal_handler(number, self.stop)
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)  # the loop itself keeps only a weak one
        task.add_done_callback(self._tasks.discard)

    async def _load(self) -> None:
        try:
            if self.llm is None:
                self.llm = await in_daemon_thread(lambda: AsyncLLM.from_config(self.engine_config))
            if self.config.warmup:
                await self.llm.warm_up()
        except BaseException as error:
            self.failure = error
            self._exit()
            return
        asyncio.wrap_future(self.llm.ended).add_done_callback(self._engine_ended)
        runtime.freeze_heap()
        self.door.ready = True
        logger.info("ready: %s as %s", self.engine_config.model, ", ".join(self.names))

    def _engine_ended(self, ended: asyncio.Future[None]) -> None:
        if not ended.cancelled() and ended.exception() is not None:
            self.door.dead = True
            self.failure = ended.exception()
            self._spawn(self._last_words())

    async def _last_words(self) -> None:
        """The engine is dead and everybody who waits has been told; let it be read, and /health once be asked."""
        with contextlib.suppress(TimeoutError):
            await self.door.wait_idle(LAST_WORDS)
        await asyncio.sleep(1)
        self._exit()

    async def _drain(self) -> None:
        try:
            await self.door.wait_idle(self.config.shutdown_timeout)
        except TimeoutError:
            logger.warning("stopping: %d requests were not finished in time", len(self.door.calls))
            for call in self.door.calls:
                for stream in call.streams:
                    stream.close(RequestAborted("the server is stopping; the request was not finished in time"))
            with contextlib.suppress(TimeoutError):
                await self.door.wait_idle(LAST_WORDS)
        if self._uvicorn is not None:
            self._uvicorn.should_exit = True

    # ---- generating

    async def answer(self, raw: Request, body: CompletionRequest | ChatCompletionRequest) -> Response:
        """POST /v1/completions and /v1/chat/completions."""
        llm, call = self.running_llm(), raw.scope["jaxinfer.call"]
        model = self.check_model(body.model)
        call.user = body.user or getattr(body, "safety_identifier", None)
        if isinstance(body, ChatCompletionRequest) and llm.engine.tokenizer is None:
            raise ApiError(400, "messages need a tokenizer and this model has none; use /v1/completions with ids", "messages")
        defaults = llm.get_default_sampling_params()
        if isinstance(body, ChatCompletionRequest):
            defaults.max_tokens = llm.engine.sampling_defaults.get("max_tokens")
        try:
            params = sampling_params(body, defaults)
        except ValueError as error:
            raise bad_request(error, body) from error
        prompts = [body] if isinstance(body, ChatCompletionRequest) else body.prompts()
        self.door.admit(call, len(prompts) * params.n)
        answer = Answer(body, model, llm.engine.tokenizer, params.n)
        call.id = answer.id
        groups = []
        for number, prompt in enumerate(prompts):
            try:
                prepared = await self._prompt(llm, body, prompt)
                groups.append(await llm.prepare(prepared, params, f"{answer.id}-{number}", body.priority or 0))
            except ValueError as error:
                raise bad_request(error, body) from error
        self.check_length(body, groups)
        if body.stream:
            return EventStream(self, call, answer, groups)
        async with self.started(call, groups, raw.receive) as streams:
            outputs = [await self.last(call, number, stream) for number, stream in enumerate(streams)]
        return JSON(answer.body(outputs))

    async def generate(self, raw: Request, body: GenerateRequest) -> Response:
        """POST /generate: one prompt, one text."""
        llm, call = self.running_llm(), raw.scope["jaxinfer.call"]
        request = CompletionRequest(prompt=body.prompt, max_tokens=body.max_tokens)
        try:
            params = sampling_params(request, llm.get_default_sampling_params())
            self.door.admit(call, 1)
            group = await llm.prepare(body.prompt, params)
        except ValueError as error:
            raise bad_request(error, body) from error
        self.check_length(request, [group])
        call.id = group.request_id
        async with self.started(call, [group], raw.receive) as streams:
            output = await self.last(call, 0, streams[0])
        return JSON({"text": output.outputs[0].text, "tokens": output.outputs[0].token_ids})

    async def _prompt(self, llm: AsyncLLM, body: CompletionRequest | ChatCompletionRequest, prompt: Any) -> Any:
        if isinstance(body, ChatCompletionRequest):
            messages, options, special = body.messages, template_options(body), bool(body.add_special_tokens)
            return await llm.run_in_pool(lambda: chat_tokens(llm, messages, options, special))
        if body.add_special_tokens is False and isinstance(prompt, str):
            ids = await llm.run_in_pool(lambda: llm.get_tokenizer().encode(prompt, add_special_tokens=False))
            return {"prompt": prompt, "prompt_token_ids": ids}
        return prompt

    def running_llm(self) -> AsyncLLM:
        assert self.llm is not None  # the gate lets nobody in before
        return self.llm

    def check_model(self, name: str | None) -> str:
        if name is not None and name not in self.names:
            served = ", ".join(map(repr, self.names))
            raise ApiError(404, f"the model {name[:200]!r} is not served here; served: {served}", "model", "model_not_found")
        return name or self.names[0]

    def check_length(self, body: CompletionRequest | ChatCompletionRequest, groups: Sequence[Group]) -> None:
        """Raises ApiError where max_tokens promises more than max_model_len leaves."""
        limit, longest = self.running_llm().engine.max_model_len, max(len(g.requests[0].prompt_token_ids) for g in groups)
        name = "max_completion_tokens" if getattr(body, "max_completion_tokens", None) is not None else "max_tokens"
        wanted = getattr(body, name)
        if wanted is not None and longest + wanted > limit:
            raise ApiError(
                400,
                f"{name} = {wanted}: with the prompt's {longest} tokens that is more than max_model_len = {limit}; "
                f"ask for at most {limit - longest}",
                name,
                "context_length_exceeded",
            )

    @asynccontextmanager
    async def started(self, call: Call, groups: Sequence[Group], receive: Receive) -> AsyncIterator[list[Stream]]:
        """The running streams of a call. They are aborted when the block ends, and when the client goes."""
        llm = self.running_llm()

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            for stream in call.streams:
                stream.close(ClientGone())

        try:
            for group in groups:
                call.streams.append(llm.submit(group))
                call.prompt_tokens += len(group.requests[0].prompt_token_ids)
            call.end_turn()
            watcher = asyncio.get_running_loop().create_task(watch())
            try:
                yield call.streams
            finally:
                watcher.cancel()
        finally:
            for stream in call.streams:
                stream.close()

    async def last(self, call: Call, number: int, stream: Stream) -> RequestOutput:
        """The finished output of a stream."""
        async for output in stream:
            self.saw(call, number, output)
        return output

    def saw(self, call: Call, number: int, output: RequestOutput) -> None:
        """Count an output. Raises ApiError for one that failed."""
        call.generated[number] += sum(len(completion.token_ids) for completion in output.outputs)
        if not output.finished:
            return
        call.cached_tokens += output.num_cached_tokens
        times = output.metrics
        if call.first_token is None:
            call.first_token = times.first_token_time
        call.finished = times.finished_time
        reasons = [completion.finish_reason or "abort" for completion in output.outputs]
        call.reasons += reasons
        failed = "error" in reasons
        reason = "error" if failed else reasons[0]
        self.metrics.request_done(call.arrival, times, reason, len(output.prompt_token_ids), call.generated[number])
        if failed:
            raise ApiError(500, output.error or "the engine failed in a step of this request")

    # ---- tokens

    async def tokenize(self, body: TokenizeRequest) -> Response:
        llm = self.running_llm()
        self.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "give either prompt or messages", "prompt")
        try:
            tokenizer = llm.get_tokenizer()
            if body.messages is None:
                text, special = body.prompt or "", body.add_special_tokens is not False
                ids = await llm.run_in_pool(lambda: tokenizer.encode(text, add_special_tokens=special))
            else:
                messages, options, special = body.messages, template_options(body), bool(body.add_special_tokens)
                prompt = await llm.run_in_pool(lambda: chat_tokens(llm, messages, options, special))
                ids = prompt["prompt_token_ids"]
        except ValueError as error:
            raise bad_request(error, body) from error
        pieces = None
        if body.return_token_strs:
            pieces = await llm.run_in_pool(lambda: [tokenizer.id_to_piece_text(i) for i in ids])
        return JSON({"count": len(ids), "max_model_len": llm.engine.max_model_len, "tokens": ids, "token_strs": pieces})

    async def detokenize(self, body: DetokenizeRequest) -> Response:
        llm = self.running_llm()
        self.check_model(body.model)
        vocab = llm.engine.model_config.vocab_size
        if wrong := [i for i in body.tokens if not 0 <= i < vocab]:
            raise ApiError(400, f"tokens {wrong[:10]} are outside the vocabulary: allowed are 0 to {vocab - 1}", "tokens")
        try:
            tokenizer = llm.get_tokenizer()
        except ValueError as error:
            raise bad_request(error, body) from error
        text = await llm.run_in_pool(lambda: tokenizer.decode(body.tokens, skip_special_tokens=False))
        return JSON({"prompt": text})

    def model_card(self, name: str) -> dict[str, Any]:
        limit = self.running_llm().engine.max_model_len
        about = {"owned_by": "jaxinfer", "root": self.engine_config.model, "parent": None, "max_model_len": limit}
        return {"id": name, "object": "model", "created": self.created} | about


def chat_tokens(llm: AsyncLLM, messages: list[dict[str, Any]], options: dict[str, Any], special: bool) -> dict[str, Any]:
    """A conversation as a prompt with its tokens; `special`: also those the template leaves to the tokenizer."""
    tokenizer = llm.get_tokenizer()
    text = tokenizer.render_chat(messages, **options)
    return {"prompt": text, "prompt_token_ids": tokenizer.encode(text, add_special_tokens=special)}


class EventStream(Response):
    """An answer as server-sent events. Its status is sent with the first output, so that a failure before it has its own."""

    def __init__(self, server: Server, call: Call, answer: Answer, groups: Sequence[Group]):
        super().__init__()
        self.server, self.call, self.answer, self.groups = server, call, answer, groups

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        server, call, answer = self.server, self.call, self.answer
        begun = False
        sent_at: dict[int, float] = {}
        async with server.started(call, self.groups, receive) as streams, aclosing(numbered(streams)) as outputs:
            try:
                async for number, output in outputs:
                    server.saw(call, number, output)
                    if not begun:
                        begun = True
                        await send({"type": "http.response.start", "status": 200, "headers": EVENT_STREAM})
                    now = time.perf_counter()
                    if number in sent_at:
                        server.metrics.inter_token.observe(now - sent_at[number])
                    sent_at[number] = now
                    if events := answer.events(number, output):
                        # Past the middleware: it has nothing to say about a body, tens of thousands of times a second.
                        await call.send({"type": "http.response.body", "body": events, "more_body": True})
                ending = answer.last_events()
            except (ApiError, RequestAborted, EngineDeadError) as error:
                if not begun:
                    raise
                ending = f"data: {json.dumps(api_error(error).body())}\n\n".encode() + DONE
            await call.send({"type": "http.response.body", "body": ending, "more_body": False})


async def numbered(streams: Sequence[Stream]) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """The outputs of all streams as they come, with the number of their stream."""
    if len(streams) == 1:
        async for output in streams[0]:
            yield 0, output
        return
    queue: asyncio.Queue[tuple[int, RequestOutput | Exception | None]] = asyncio.Queue(1)

    async def pump(number: int, stream: Stream) -> None:
        try:
            async for output in stream:
                await queue.put((number, output))
            await queue.put((number, None))
        except Exception as error:
            await queue.put((number, error))

    pumps = [asyncio.get_running_loop().create_task(pump(number, stream)) for number, stream in enumerate(streams)]
    running = len(pumps)
    try:
        while running:
            number, item = await queue.get()
            if item is None:
                running -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield number, item
    finally:
        for task in pumps:
            task.cancel()


def create_app(server: Server) -> FastAPI:
    """The routes."""
    errors: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorResponse}, "5XX": {"model": ErrorResponse}}
    app = FastAPI(title="jaxinfer", version=__version__, docs_url=None, redoc_url=None, responses=errors)
    app.add_middleware(Gate, door=server.door)
    if server.config.allowed_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=server.config.allowed_origins, allow_methods=["*"], allow_headers=["*"]
        )
    for kind in (ApiError, RequestAborted, EngineDeadError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, handle_error)

    stream = {"text/event-stream": {"schema": {"type": "string"}}}

    @app.post("/v1/completions", response_model=None, responses={200: {"model": CompletionResponse, "content": stream}})
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await server.answer(request, body)

    @app.post(
        "/v1/chat/completions", response_model=None, responses={200: {"model": ChatCompletionResponse, "content": stream}}
    )
    async def chat_completions(body: ChatCompletionRequest, request: Request) -> Response:
        return await server.answer(request, body)

    @app.get("/v1/models", response_model=None)
    async def models() -> Response:
        return JSON({"object": "list", "data": [server.model_card(name) for name in server.names]})

    @app.get("/v1/models/{model:path}", response_model=None)
    async def model(model: str) -> Response:
        return JSON(server.model_card(server.check_model(model)))

    @app.post("/tokenize", response_model=None)
    async def tokenize(body: TokenizeRequest) -> Response:
        return await server.tokenize(body)

    @app.post("/detokenize", response_model=None)
    async def detokenize(body: DetokenizeRequest) -> Response:
        return await server.detokenize(body)

    @app.post("/generate", response_model=None)
    async def generate(body: GenerateRequest, request: Request) -> Response:
        return await server.generate(request, body)

    @app.get("/health", response_model=None)
    async def health() -> Response:
        """Whether the process lives; a dead engine is a 503."""
        return JSON({"status": "dead" if server.door.dead else "ok"}, 503 if server.door.dead else 200)

    @app.get("/ready", response_model=None)
    async def ready() -> Response:
        """Whether requests are taken: the model is loaded and compiled, and we are not stopping."""
        return JSON({"ready": server.door.open}, 200 if server.door.open else 503)

    @app.get("/version", response_model=None)
    async def version() -> Response:
        return JSON({"version": __version__})

    @app.get("/metrics", response_model=None, response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(server.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return app


class Uvicorn(uvicorn.Server):
    """Signals are the Server's: uvicorn would close its sockets at once, and die of the signal in the end."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def in_daemon_thread(function: Any) -> Any:
    """As asyncio.to_thread, but the process can end before it does."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Any] = loop.create_future()

    def tell(setter: Any, value: Any) -> None:
        if not done.done():
            setter(value)

    def work() -> None:
        try:
            result, setter = function(), done.set_result
        except BaseException as error:
            result, setter = error, done.set_exception
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(tell, setter, result)

    threading.Thread(target=work, name="jaxinfer-load", daemon=True).start()
    return await done


def bind(host: str, port: int) -> socket.socket:
    """A listening address. Raises OSError, naming it, where it cannot be had."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=2048)
    except OSError as error:
        raise OSError(f"cannot listen on {host}, port {port}: {error.strerror or error}") from error


def serve(engine_config: EngineConfig, config: ServerConfig) -> int:
    """Load a model and serve it until SIGTERM or SIGINT; returns the exit status.

    Raises:
        ValueError, OSError: a setting or a model that cannot work, or an address that is taken.
    """
    sock = bind(config.host, config.port)
    # Threads take turns at the interpreter every half millisecond: at Python's 5 the engine, which gives it up several times a
    # step, would each time wait that long for an event loop that has hundreds of answers to write.
    sys.setswitchinterval(min(sys.getswitchinterval(), 0.5e-3))
    with asyncio.Runner(loop_factory=uvicorn.Config("", loop="auto").get_loop_factory()) as runner:
        server: list[Server] = []

        async def main() -> int:
            server.append(Server(engine_config, config))
            return await server[0].run(sock)

        status = runner.run(main())
        if not server[0].door.ready:  # stopped while it loaded or compiled, which nothing can interrupt
            logger.info("stopped before the model was ready")
            sys.stdout.flush()
            os._exit(status)
    return status
