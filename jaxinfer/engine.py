"""The engine: requests in, text out, a step at a time. `llm.LLM` is the front that people use.

A step is: schedule, run, and read the step before it. See README, "From prompt to text in six hops".
"""

from __future__ import annotations

import itertools
import logging
import numbers
import random
import signal
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer import runtime
from jaxinfer.checkpoint import open_checkpoint
from jaxinfer.config import EngineConfig, generation_defaults
from jaxinfer.model import Transformer
from jaxinfer.pages import PagePool
from jaxinfer.request import (
    CompletionOutput,
    Logprob,
    Request,
    RequestMetrics,
    RequestOutput,
    SamplingParams,
    check_bad_words,
)
from jaxinfer.runner import Runner, Sampled, Step, TokenLogprobs
from jaxinfer.scheduler import Scheduler
from jaxinfer.sharding import make_mesh
from jaxinfer.tokenizer import Detokenizer, Tokenizer, load_tokenizer
from jaxinfer.weights import load_params

logger = logging.getLogger(__name__)

Prompt = str | Sequence[int] | Mapping[str, Any]


@dataclass(eq=False)
class Text:
    """A request's text as it grows. `text` is all of it; what a stop string could still cut off is not yet shown."""

    detokenizer: Detokenizer | None
    stop: list[str]
    include_stop: bool
    text: str = ""

    def add(self, tokens: list[int], last: bool, check_stop: bool) -> str | None:
        """Append tokens; returns the stop string that ended the text, if one did."""
        if self.detokenizer is None:
            return None
        new = self.detokenizer.add(tokens) + (self.detokenizer.flush() if last else "")
        longest = max(map(len, self.stop), default=0)
        searched_from = max(0, len(self.text) - longest + 1)
        self.text += new
        if not check_stop or not new:
            return None
        found = [(at, s) for s in self.stop if (at := self.text.find(s, searched_from)) >= 0]
        if not found:
            return None
        at, stop = min(found, key=lambda pair: pair[0])
        self.text = self.text[: at + len(stop) if self.include_stop else at]
        return stop

    def shown(self, finished: bool) -> str:
        held = 0 if finished else max((len(s) - 1 for s in self.stop), default=0)
        return self.text[: max(0, len(self.text) - held)]


@dataclass(eq=False)
class Group:
    """A submitted prompt and its n samples."""

    request_id: str
    prompt: str | None
    params: SamplingParams
    requests: list[Request]
    texts: list[Text] = field(default_factory=list)


class Engine:
    """Continuous generation over one model on one mesh. Not thread-safe: one thread submits and steps.

    Args:
        config: every setting; see EngineConfig.

    Raises:
        ValueError, FileNotFoundError: a setting, checkpoint or memory budget that cannot work, said in full.
    """

    def __init__(self, config: EngineConfig):
        runtime.setup(gpu_memory_utilization=config.gpu_memory_utilization)
        self.config = config
        self.mesh = make_mesh(config.tensor_parallel_size)
        checkpoint = open_checkpoint(config.model, revision=config.revision, download_dir=config.download_dir)
        self.model_config = checkpoint.model_config
        self.max_model_len = max_model_len(config, self.model_config.max_position_embeddings)
        self.dtype = resolve_dtype(config.dtype, self.model_config.dtype)
        tokenizer_path = config.tokenizer or checkpoint.tokenizer_path
        self.tokenizer: Tokenizer | None = (
            None if tokenizer_path is None else load_tokenizer(tokenizer_path, chat_template=config.chat_template)
        )
        self.sampling_defaults = generation_defaults(checkpoint.generation_config)
        self.eos_token_ids = frozenset(self.model_config.eos_token_ids) or frozenset(
            [self.tokenizer.eos_token_id] if self.tokenizer and self.tokenizer.eos_token_id is not None else []
        )
        model = Transformer(self.model_config, self.mesh, self.dtype)
        graphdef, abstract = nnx.split(model)
        start = time.perf_counter()
        leaves = load_params(
            checkpoint, model, self.model_config, self.mesh, self.dtype, seed=config.seed, use_tqdm=config.use_tqdm
        )
        self.load_seconds = time.perf_counter() - start
        self.runner = Runner(
            self.model_config,
            config,
            self.mesh,
            graphdef,
            leaves,
            jax.tree.structure(abstract),
            self.dtype,
            self.max_model_len,
        )
        plain = [b for b in self.runner.prefill_buckets if not b.prompt_logprobs]
        self.scheduler = Scheduler(
            PagePool(self.runner.num_pages),
            page_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_model_len=self.max_model_len,
            prefill_shapes=[(b.rows, b.tokens) for b in plain],
            prompt_logprobs_tokens=self.runner.prefill_buckets[-1].tokens,
            steps=config.num_scheduler_steps or 1,
        )
        self._groups: dict[str, Group] = {}
        self._texts: dict[Request, tuple[Group, Text]] = {}
        self._in_flight: deque[Step] = deque()
        self._ids = itertools.count()
        self._random = random.Random(config.seed)

    # ---- in

    def submit(self, prompt: Prompt, params: SamplingParams | None = None, request_id: str | None = None) -> str:
        """Queue a prompt: text, token ids, {"prompt": text} or {"prompt_token_ids": ids}. Returns its request id.

        Raises:
            ValueError: an empty prompt, one that leaves no room under max_model_len, ids outside the vocabulary, or
                sampling parameters this model cannot honour.
        """
        params = (self.default_sampling_params() if params is None else params).clone()
        if request_id is None:
            request_id = next(name for name in map(str, self._ids) if name not in self._groups)
        if request_id in self._groups:
            raise ValueError(f"request_id {request_id!r} is already running; ids must be unique")
        text, ids = self._tokenize(prompt)
        vocab = self.model_config.vocab_size
        if not ids:
            raise ValueError(f"the prompt {prompt!r} is empty: at least one token is needed")
        if len(ids) >= self.max_model_len:
            raise ValueError(
                f"the prompt has {len(ids)} tokens; with max_model_len={self.max_model_len} it can have at most "
                f"{self.max_model_len - 1}, so that one token can follow. Shorten it or raise max_model_len"
            )
        if wrong := [i for i in ids if not 0 <= i < vocab]:
            raise ValueError(f"prompt token ids {wrong[:10]} are outside the vocabulary: allowed are 0 to {vocab - 1}")
        params.validate_for_vocab(vocab)
        if self.tokenizer is None and (params.stop or params.bad_words):
            raise ValueError("stop and bad_words are strings and need a tokenizer; this model has none (pass tokenizer=)")
        bad_words = self.tokenizer.bad_words_ids(params.bad_words) if self.tokenizer and params.bad_words else []
        check_bad_words(bad_words)
        if params.seed is None:
            params.seed = self._random.getrandbits(63)
        group = Group(request_id, text, params, [])
        for index in range(params.n):
            request = Request(
                f"{request_id}-{index}" if params.n > 1 else request_id,
                text,
                ids,
                params,
                eos_token_ids=self.eos_token_ids,
                sample_index=index,
                bad_words_ids=bad_words,
            )
            self.scheduler.check(request)
            group.requests.append(request)
            detokenizer = (
                Detokenizer(self.tokenizer, ids, skip_special_tokens=params.skip_special_tokens) if self.tokenizer else None
            )
            group.texts.append(Text(detokenizer, list(params.stop or []), params.include_stop_str_in_output))
        self._groups[request_id] = group
        for request, request_text in zip(group.requests, group.texts, strict=True):
            self._texts[request] = (group, request_text)
            self.scheduler.add(request)
        return request_id

    def abort(self, request_id: str) -> None:
        """Stop a request and free its pages; unknown or finished ids are ignored, as it may have just ended."""
        group = self._groups.pop(request_id, None)
        for request in group.requests if group else []:
            if not request.finished:
                request.finish("abort")
            self.scheduler.abort(request)
            self._texts.pop(request, None)

    def is_running(self, request_id: str) -> bool:
        """Whether a submitted request has neither finished nor been aborted."""
        return request_id in self._groups

    def default_sampling_params(self) -> SamplingParams:
        """vLLM's defaults, overridden by the checkpoint's generation_config.json."""
        return SamplingParams(**self.sampling_defaults)

    def _tokenize(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, Mapping):
            if not prompt or set(prompt) - {"prompt", "prompt_token_ids"}:
                raise ValueError(f"a prompt given as a dict has the keys 'prompt' or 'prompt_token_ids', got {sorted(prompt)}")
            if "prompt_token_ids" in prompt:
                return prompt.get("prompt"), token_ids(prompt["prompt_token_ids"])
            prompt = prompt["prompt"]
        if not isinstance(prompt, str):
            return None, token_ids(prompt)
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer: give prompts as token ids, or pass tokenizer=")
        ids = self.tokenizer.encode(prompt)
        if wrong := [i for i in ids if i >= self.model_config.vocab_size]:
            raise ValueError(
                f"the tokenizer gives ids {wrong[:10]} for this prompt, but the model's vocabulary has "
                f"{self.model_config.vocab_size} tokens: they do not belong together; check tokenizer="
            )
        return prompt, ids

    # ---- the loop

    @property
    def has_unfinished(self) -> bool:
        return self.scheduler.has_unfinished or bool(self._in_flight)

    def step(self) -> list[RequestOutput]:
        """Dispatch the next step, then read the one before it; returns the requests that got tokens.

        An interrupt (Ctrl-C) is held until the step is done: in the middle of one, the cache is on its way between
        programs. If dispatching fails, the requests of that step are aborted and the engine goes on with the others.
        """
        with interrupt_held():
            return self._step()

    def _step(self) -> list[RequestOutput]:
        plan = self.scheduler.schedule()
        if plan is not None:
            try:
                self._in_flight.append(self.runner.run(plan))
            except Exception:
                for request in [*(chunk.request for chunk in plan.prefill), *plan.decode]:
                    self.abort(self._texts[request][0].request_id if request in self._texts else "")
                raise
        if not self._in_flight or (plan is not None and len(self._in_flight) < 2):
            return []
        changed: dict[str, Group] = {}
        for sampled in self._in_flight.popleft().read():
            group = self._commit(sampled)
            if group is not None:
                changed[group.request_id] = group
        outputs = [self._output(group) for group in changed.values()]
        for output in outputs:
            if output.finished:
                for request in self._groups.pop(output.request_id).requests:
                    self._texts.pop(request)
        return outputs

    def _commit(self, sampled: Sampled) -> Group | None:
        """Append what a step gave a request; returns its group if that changed anything."""
        request = sampled.request
        if request.finished:  # it ended while this step was in flight
            return None
        group, text = self._texts[request]
        if sampled.prompt_logprobs is not None:
            request.prompt_logprobs += [self._logprobs(x, request.params.prompt_logprobs or 0) for x in sampled.prompt_logprobs]
        before = len(request.output_token_ids)
        taken = self.scheduler.commit(request, sampled.tokens)
        new = request.output_token_ids[before:]
        for i, token in enumerate(new):
            if sampled.logprobs is not None:
                request.logprobs.append(self._logprobs(sampled.logprobs[i], request.params.logprobs or 0))
            last = request.finished and i == taken - 1
            stopped_by_token = last and request.finish_reason == "stop"
            shown = [] if stopped_by_token and not request.params.include_stop_str_in_output else [token]
            stop = text.add(shown, last, check_stop=before + i + 1 > request.params.min_tokens)
            if stop is not None:
                self._stop_at(request, stop, before + i + 1)
                break
        return group if taken else None

    def _stop_at(self, request: Request, stop: str, count: int) -> None:
        """A stop string ended the text at the count-th token: drop what was sampled past it."""
        del request.output_token_ids[count:]
        if not request.finished:
            self.scheduler.abort(request)
        request.finish("stop", stop)

    def _logprobs(self, position: TokenLogprobs, count: int) -> dict[int, Logprob]:
        """vLLM's form: the token itself and the `count` likeliest, by id."""

        def entry(token: int, logprob: float, rank: int) -> Logprob:
            return Logprob(logprob, rank, None if self.tokenizer is None else self.tokenizer.id_to_piece_text(token))

        found = {position.token: entry(position.token, position.logprob, position.rank)}
        for rank, (token, logprob) in enumerate(zip(position.top_ids[:count], position.top_logprobs[:count], strict=True), 1):
            if token >= 0:  # -1: the vocabulary has no more
                found.setdefault(int(token), entry(int(token), float(logprob), rank))
        return found

    def _output(self, group: Group) -> RequestOutput:
        first = group.requests[0]
        outputs = []
        for index, (request, text) in enumerate(zip(group.requests, group.texts, strict=True)):
            logprobs = list(request.logprobs) if group.params.logprobs is not None else None
            cumulative = None
            if logprobs is not None:
                cumulative = sum(
                    position[token].logprob for position, token in zip(logprobs, request.output_token_ids, strict=True)
                )
            outputs.append(
                CompletionOutput(
                    index=index,
                    text=text.shown(request.finished),
                    token_ids=list(request.output_token_ids),
                    cumulative_logprob=cumulative,
                    logprobs=logprobs,
                    finish_reason=request.finish_reason,
                    stop_reason=request.stop_reason,
                )
            )
        finished = all(request.finished for request in group.requests)
        prompt_logprobs = [None, *first.prompt_logprobs] if group.params.prompt_logprobs is not None else None
        return RequestOutput(
            request_id=group.request_id,
            prompt=group.prompt,
            prompt_token_ids=first.prompt_token_ids,
            prompt_logprobs=prompt_logprobs,
            outputs=outputs,
            finished=finished,
            metrics=RequestMetrics(
                arrival_time=first.arrival_time,
                first_scheduled_time=first.scheduled_time,
                first_token_time=first.first_token_time,
                finished_time=max(r.finished_time or 0.0 for r in group.requests) if finished else None,
            ),
        )


def token_ids(values: Any) -> list[int]:
    """Token ids as plain ints.

    Raises:
        ValueError: not a sequence of integers.
    """
    if not isinstance(values, Iterable) or isinstance(values, str | bytes | Mapping):
        raise ValueError(f"a prompt is text, token ids or a dict of either, got {values!r}")
    ids = list(values)
    if wrong := [i for i in ids if isinstance(i, bool) or not isinstance(i, numbers.Integral)]:
        raise ValueError(f"prompt token ids must be integers, got {wrong[0]!r}")
    return [int(i) for i in ids]


@contextmanager
def interrupt_held() -> Iterator[None]:
    """Hold back the first Ctrl-C until the block ends (main thread only; a second one is not held)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous, came = signal.getsignal(signal.SIGINT), False

    def hold(number: int, frame: Any) -> None:
        nonlocal came
        if came and callable(previous):
            previous(number, frame)
        came = True

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous if previous is not None else signal.SIG_DFL)
        if came and callable(previous):
            previous(signal.SIGINT, None)


def max_model_len(config: EngineConfig, trained: int) -> int:
    """The longest sequence, in tokens: what the user says, at most what the model was trained for."""
    if config.max_model_len is None:
        return trained
    if config.max_model_len > trained:
        raise ValueError(
            f"max_model_len={config.max_model_len} is more than the model's max_position_embeddings={trained}; "
            f"use at most {trained}"
        )
    return config.max_model_len


def resolve_dtype(dtype: str, checkpoint_dtype: str) -> jnp.dtype:
    """The dtype to compute in: "auto" is the checkpoint's on GPU (bfloat16 for float32 ones) and float32 on CPU."""
    if dtype != "auto":
        return jnp.dtype(dtype)
    if jax.default_backend() == "cpu":
        return jnp.dtype("float32")
    return jnp.dtype("bfloat16" if checkpoint_dtype == "float32" else checkpoint_dtype)
