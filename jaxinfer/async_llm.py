"""`AsyncLLM`: an Engine on a thread of its own, for asyncio programs.

The thread runs what other threads ask for (add, abort), then one step, and hands all of the step's outputs to an event
loop in one call; with nothing to do it sleeps. A reader that is slower than the engine finds its outputs merged into one,
so that it neither slows the others nor lets memory grow beyond its own answer.
"""

from __future__ import annotations

import asyncio
import atexit
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self, TypeVar

from jaxinfer.config import EngineConfig
from jaxinfer.engine import Engine, EngineDeadError, EngineStats, Prompt
from jaxinfer.outputs import Group
from jaxinfer.request import RequestOutput, RequestOutputKind, SamplingParams
from jaxinfer.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

T = TypeVar("T")
Item = RequestOutput | BaseException
TOKENIZER_THREADS = 2


class RequestAborted(RuntimeError):
    """The request was ended by somebody else than its reader: `abort`, or `shutdown`."""


class AsyncLLM:
    """Generation for asyncio programs, with vLLM's interface. Any number of tasks, on any event loops, may use one.

    Args:
        model: as LLM's. engine_args: every other field of EngineConfig.

    Raises:
        ValueError, FileNotFoundError: naming the setting, what is allowed and what to do.
    """

    def __init__(self, model: str, **engine_args: Any):
        self._start(Engine(EngineConfig(model=model).override(**engine_args)))

    @classmethod
    def from_config(cls, config: EngineConfig) -> Self:
        """An AsyncLLM from a loaded EngineConfig."""
        return cls.from_engine(Engine(config))

    @classmethod
    def from_engine(cls, engine: Engine) -> Self:
        """An AsyncLLM that steps this engine; from now on nobody else may."""
        llm = cls.__new__(cls)
        llm._start(engine)
        return llm

    def _start(self, engine: Engine) -> None:
        self.engine = engine
        # Set once the engine's thread has ended: to None after `shutdown`, to an EngineDeadError after a crash.
        self.ended: Future[None] = Future()
        self._wake = threading.Condition()
        self._commands: deque[Callable[[], None]] = deque()
        self._stopping = False
        self._streams: dict[str, Stream] = {}  # running requests; the engine's thread alone touches it
        self._mailboxes: dict[asyncio.AbstractEventLoop, Mailbox] = {}
        self._ids = itertools.count()
        self._pool = ThreadPoolExecutor(TOKENIZER_THREADS, "jaxinfer-tokenize")
        self._thread = threading.Thread(target=self._run, name="jaxinfer-engine", daemon=True)
        self._thread.start()
        # A thread that is inside XLA while the interpreter comes down can crash the process.
        atexit.register(self._stop)

    # ---- for users

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        priority: int = 0,
        timeout: float | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Complete one prompt, yielding outputs as they come; what each carries is sampling_params.output_kind.

        Leaving the loop, closing the generator or cancelling its task aborts the request within one step. A request that
        failed in the engine ends with finish_reason "error" and says why in RequestOutput.error.

        Args:
            prompt, sampling_params, priority: as Engine.prepare. request_id: None makes one.
            timeout: seconds from now until the last output.

        Raises:
            ValueError: as Engine.prepare, or request_id is running.
            asyncio.TimeoutError: not finished in time; the request is aborted.
            RequestAborted: `abort` or `shutdown` ended it.
            EngineDeadError: the engine cannot go on.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        async with asyncio.timeout(timeout):
            group = await self.prepare(prompt, sampling_params, request_id, priority)
        stream = self.submit(group, None if deadline is None else deadline - time.monotonic())
        try:
            async for output in stream:
                yield output
        finally:
            stream.close()

    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        priority: int = 0,
        timeout: float | None = None,
        **template_options: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """`generate` for one conversation. template_options: of Tokenizer.render_chat."""
        deadline = None if timeout is None else time.monotonic() + timeout
        async with asyncio.timeout(timeout):
            prompt = await self.run_in_pool(lambda: self.chat_prompt(messages, **template_options))
        left = None if deadline is None else deadline - time.monotonic()
        outputs = self.generate(prompt, sampling_params, request_id, priority, left)
        try:
            async for output in outputs:
                yield output
        finally:
            await outputs.aclose()

    async def abort(self, request_id: str) -> None:
        """End a request, whose reader then gets RequestAborted; unknown or finished ids are ignored."""
        await self._call(lambda: self._abort(request_id, RequestAborted(f"request {request_id} was aborted")))

    async def warm_up(self) -> None:
        """Compile every program now (each is otherwise compiled when first needed)."""
        await self._call(self.engine.runner.warm_up)

    async def shutdown(self) -> None:
        """Abort what runs and end the engine's thread. Waits for the step in flight."""
        await asyncio.to_thread(self._stop)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.shutdown()

    def stats(self) -> EngineStats:
        """What the engine is doing now; any thread may ask."""
        return self.engine.stats()

    @property
    def is_running(self) -> bool:
        return not self._stopping and not self.ended.done()

    @property
    def errored(self) -> bool:
        """Whether the engine crashed; `ended` says how."""
        return self.ended.done() and self.ended.exception() is not None

    def get_tokenizer(self) -> Tokenizer:
        """The tokenizer. ValueError where the model has none."""
        if self.engine.tokenizer is None:
            raise ValueError(f"{self.engine.config.model} comes without a tokenizer: give prompts as token ids")
        return self.engine.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """The model's own defaults (generation_config.json over vLLM's)."""
        return self.engine.default_sampling_params()

    # ---- the parts of generate, for who needs them apart (the server)

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]], **template_options: Any) -> Prompt:
        """A conversation as text and tokens. ValueError where the template refuses it."""
        tokenizer = self.get_tokenizer()
        text = tokenizer.render_chat(messages, **template_options)
        return {"prompt": text, "prompt_token_ids": tokenizer.encode(text, add_special_tokens=False)}

    async def run_in_pool(self, function: Callable[[], T]) -> T:
        """Run a function that may take long (tokenization, templates) beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function)

    async def prepare(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        priority: int = 0,
    ) -> Group:
        """Tokenize and check a prompt beside the event loop. Raises as `generate`."""
        self._check_alive()
        request_id = f"request-{next(self._ids)}" if request_id is None else request_id
        return await self.run_in_pool(lambda: self.engine.prepare(prompt, sampling_params, request_id, priority))

    def submit(self, group: Group, timeout: float | None = None) -> Stream:
        """Start what `prepare` made. Who reads the stream closes it."""
        self._check_alive()
        loop = asyncio.get_running_loop()
        mailbox = self._mailboxes.get(loop)
        if mailbox is None:
            mailbox = self._mailboxes[loop] = Mailbox(loop)
            self._mailboxes = {known: box for known, box in self._mailboxes.items() if not known.is_closed()}
        stream = Stream(self, group, mailbox, timeout)
        self._post(lambda: self._add(stream))
        return stream

    # ---- to the engine's thread

    def _check_alive(self) -> None:
        if self.errored:
            raise self._death() from self.ended.exception()
        if not self.is_running:
            raise EngineDeadError("the engine was shut down")

    def _death(self) -> EngineDeadError:
        return EngineDeadError(str(self.ended.exception()))

    def _post(self, command: Callable[[], None]) -> None:
        with self._wake:
            self._commands.append(command)
            self._wake.notify()
            ended = self.ended.done()
        if ended:  # nobody else will: every command left is one that tells a reader so
            self._drain_commands()

    async def _call(self, function: Callable[[], T]) -> T:
        """Run a function on the engine's thread, between two steps; also where the caller is cancelled meanwhile."""
        self._check_alive()
        done: Future[T] = Future()

        def command() -> None:
            awaited = done.set_running_or_notify_cancel()  # a result for a cancelled one would raise, and end the thread
            try:
                if self.ended.done():
                    raise EngineDeadError("the engine has ended")
                result = function()
            except Exception as error:
                if awaited:
                    done.set_exception(error)
            else:
                if awaited:
                    done.set_result(result)

        self._post(command)
        return await asyncio.wrap_future(done)

    def _stop(self) -> None:
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()
        self._pool.shutdown(wait=False, cancel_futures=True)
        atexit.unregister(self._stop)

    # ---- on the engine's thread

    def _run(self) -> None:
        error: EngineDeadError | None = None
        try:
            while self._wait():
                self._drain_commands()
                if self.engine.has_unfinished:
                    self._deliver(self._to_streams(self.engine.step()))
            for request_id in list(self._streams):
                self._abort(request_id, RequestAborted("the engine was shut down"))
        except BaseException as cause:  # whatever it was, those who wait must hear of it
            logger.critical("the engine stopped: %s", cause, exc_info=cause)
            error = EngineDeadError(f"the engine cannot go on: {type(cause).__name__}: {cause}")
            error.__cause__ = cause
        waiting, self._streams = list(self._streams.values()), {}
        with self._wake:
            if error is None:
                self.ended.set_result(None)
            else:
                self.ended.set_exception(error)
        self._drain_commands()
        self._deliver([(stream, EngineDeadError(str(error))) for stream in waiting])

    def _wait(self) -> bool:
        """Sleep until there is work; False to end."""
        with self._wake:
            while not (self._stopping or self._commands or self.engine.has_unfinished):
                self._wake.wait()
            return not self._stopping

    def _drain_commands(self) -> None:
        while True:
            try:
                command = self._commands.popleft()
            except IndexError:
                return
            command()

    def _add(self, stream: Stream) -> None:
        if self.ended.done():
            error = self._death() if self.errored else EngineDeadError("the engine was shut down")
            self._deliver([(stream, error)])
            return
        try:
            request_id = self.engine.add(stream.group)
        except ValueError as error:
            self._deliver([(stream, error)])
        else:
            self._streams[request_id] = stream

    def _abort(self, request_id: str, error: BaseException) -> None:
        stream = self._streams.pop(request_id, None)
        if stream is not None:
            self.engine.abort(request_id)
            self._deliver([(stream, error)])

    def _close(self, stream: Stream) -> None:
        request_id = stream.group.request_id
        if self._streams.get(request_id) is stream:  # and not another one that runs under the same id
            self._abort(request_id, RequestAborted(f"request {request_id} was closed"))

    def _to_streams(self, outputs: Iterable[RequestOutput]) -> list[tuple[Stream, Item]]:
        found: list[tuple[Stream, Item]] = []
        for output in outputs:
            found.append((self._streams[output.request_id], output))
            if output.finished:
                del self._streams[output.request_id]
        return found

    def _deliver(self, items: list[tuple[Stream, Item]]) -> None:
        touched = set()
        for stream, item in items:
            stream.mailbox.items.append((stream, item))
            touched.add(stream.mailbox)
        for mailbox in touched:
            if not mailbox.call():  # its event loop is gone, and every reader with it
                for request_id in [r for r, stream in self._streams.items() if stream.mailbox is mailbox]:
                    del self._streams[request_id]
                    self.engine.abort(request_id)


class Mailbox:
    """Outputs on their way to the streams of one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.loop = loop
        self.items: deque[tuple[Stream, Item]] = deque()
        self._called = False

    def call(self) -> bool:
        """Have the loop empty it, unless it is about to; False where the loop is closed. For the engine's thread."""
        if self._called:
            return not self.loop.is_closed()
        self._called = True
        try:
            self.loop.call_soon_threadsafe(self._empty)
        except RuntimeError:
            self.items.clear()
            return False
        return True

    def _empty(self) -> None:
        self._called = False  # before the items are read: what comes after the last one is called for again
        while self.items:
            stream, item = self.items.popleft()
            stream.put(item)


class Stream:
    """One request's outputs, for one task of the event loop that made it. Iterate it, and close it when done."""

    def __init__(self, llm: AsyncLLM, group: Group, mailbox: Mailbox, timeout: float | None):
        self.group, self.mailbox = group, mailbox
        self._llm = llm
        self._delta = group.params.output_kind is RequestOutputKind.DELTA
        self._output: RequestOutput | None = None
        self._error: BaseException | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._ended = False  # nothing more will come
        self._timeout = timeout
        self._timer = None if timeout is None else mailbox.loop.call_later(max(0.0, timeout), self._expire)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RequestOutput:
        while self._output is None:
            if self._error is not None:
                error, self._error = self._error, None
                raise error
            if self._ended:
                raise StopAsyncIteration
            if self._waiter is not None:
                raise RuntimeError(f"request {self.group.request_id} is being read by another task already")
            self._waiter = self.mailbox.loop.create_future()
            try:
                await self._waiter
            except asyncio.CancelledError:
                self.close()
                raise
            finally:
                self._waiter = None
        output, self._output = self._output, None
        return output

    def put(self, item: Item) -> None:
        """Take what the engine sent; on the event loop."""
        if self._ended:
            return
        if isinstance(item, BaseException):
            self._end(item)
        else:
            if self._delta and self._output is not None:
                self._output.add(item)
            else:
                self._output = item
            if item.finished:
                self._end(None)
        self._notify()

    def close(self, error: BaseException | None = None) -> None:
        """Abort the request if it still runs; outputs that were not read are dropped. Its reader gets `error`, or the end."""
        self._output = None
        if self._ended:
            return
        self._end(error)
        self._notify()
        self._llm._post(lambda: self._llm._close(self))

    def _expire(self) -> None:
        output = self._output
        self.close(TimeoutError(f"request {self.group.request_id} was not finished within timeout = {self._timeout} s"))
        self._output = output  # what came in time can still be read

    def _end(self, error: BaseException | None) -> None:
        self._ended, self._error = True, error
        if self._timer is not None:
            self._timer.cancel()

    def _notify(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
