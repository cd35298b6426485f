"""The engine: requests in, text out, a step at a time. `llm.LLM` is the front that people use.

A step is: schedule, run, and read the step before it. See README, "From prompt to text in six hops".
"""

from __future__ import annotations

import dataclasses
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
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxinfer import runtime
from jaxinfer.buckets import LONG_PREFILL_TOKENS
from jaxinfer.checkpoint import open_checkpoint
from jaxinfer.config import EngineConfig, generation_defaults
from jaxinfer.model import Transformer
from jaxinfer.outputs import Group, Text, Turns
from jaxinfer.pages import PagePool
from jaxinfer.request import Logprob, Plan, Request, RequestOutput, SamplingParams, check_bad_words
from jaxinfer.runner import Runner, Sampled, Step, TokenLogprobs
from jaxinfer.scheduler import Scheduler
from jaxinfer.sharding import make_mesh
from jaxinfer.structured_outputs import GuidedTokenizer, Matcher
from jaxinfer.tokenizer import Detokenizer, Tokenizer, load_tokenizer
from jaxinfer.weights import load_params

logger = logging.getLogger(__name__)

Prompt = str | Sequence[int] | Mapping[str, Any]
HELD_DECODE_STEPS = 4  # full steps of prefill in a row before sequences that decode get one


class EngineDeadError(RuntimeError):
    """The engine cannot go on: it failed, and so did starting over with an empty cache."""


@dataclass(frozen=True)
class EngineStats:
    """Where the engine stands, and what it has done since it started. Token counts are of prompts and outputs.

    decode_bandwidth_fraction: bytes that decode steps must read (weights, keys and values) a second, over what the device
    can read a second; a moving average over steps that only decode. None before there was one, and for unknown devices.
    """

    num_requests_running: int
    num_requests_waiting: int
    gpu_cache_usage_perc: float
    prompt_tokens: int
    generation_tokens: int
    num_preemptions: int
    prefix_cache_queries: int
    prefix_cache_hits: int
    decode_bandwidth_fraction: float | None


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
        model = Transformer(self.model_config, self.mesh, self.dtype, config.quantization)
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
        long = config.long_prefill_token_threshold
        self.scheduler = Scheduler(
            PagePool(self.runner.num_pages),
            page_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_model_len=self.max_model_len,
            max_num_batched_tokens=self.runner.max_tokens,
            max_prefill_rows=max(bucket.rows for bucket in self.runner.prefill_buckets),
            prefill_sizes=self.runner.prefill_sizes,
            prompt_logprobs_tokens=self.runner.prefill_buckets[-1].tokens,
            steps=config.num_scheduler_steps or 1,
            long_prefill_token_threshold=LONG_PREFILL_TOKENS if long is None else long,
            shared_prefill_sizes=self.runner.shared_prefill_sizes,
            shared_decode_rows=max(bucket.decode_rows for bucket in self.runner.prefill_buckets),
            held_decode_steps=HELD_DECODE_STEPS,
            enable_prefix_caching=config.enable_prefix_caching,
            policy=config.scheduling_policy,
        )
        self._groups: dict[str, Group] = {}
        self._texts: dict[Request, tuple[Group, Text]] = {}
        self._matchers: dict[Request, Matcher] = {}  # of requests with structured_outputs
        self._guided_tokenizer: GuidedTokenizer | None = None
        self._guided_lock = threading.Lock()
        self._in_flight: deque[Step] = deque()
        self._turns = Turns()
        self._prompt_tokens = self._generation_tokens = 0
        self._decode_clock = DecodeClock(self.runner)
        self._ids = itertools.count()
        self._random = random.Random(config.seed)

    # ---- in

    def submit(
        self, prompt: Prompt, params: SamplingParams | None = None, request_id: str | None = None, priority: int = 0
    ) -> str:
        """Queue a prompt; `prepare` and `add` in one. Returns its request id."""
        return self.add(self.prepare(prompt, params, request_id, priority))

    def prepare(
        self, prompt: Prompt, params: SamplingParams | None = None, request_id: str | None = None, priority: int = 0
    ) -> Group:
        """Tokenize and check a prompt: text, token ids, {"prompt": text} or {"prompt_token_ids": ids}. Any thread may.

        priority: smaller ones run first; needs scheduling_policy="priority".

        Raises:
            ValueError: an empty prompt, one that leaves no room under max_model_len, ids outside the vocabulary, or
                sampling parameters this model cannot honour.
        """
        params = (self.default_sampling_params() if params is None else params).clone()
        if priority != 0 and self.config.scheduling_policy != "priority":
            raise ValueError(
                f"priority = {priority!r}: this engine runs requests first come first served; set scheduling_policy='priority'"
            )
        if request_id is None:
            request_id = next(name for name in map(str, self._ids) if name not in self._groups)
        text, ids = self._tokenize(prompt)
        vocab = self.model_config.vocab_size
        if not ids:
            raise ValueError(f"the prompt {prompt!r} is empty: at least one token is needed")
        if len(ids) >= self.max_model_len:
            raise ValueError(
                f"the prompt has {len(ids)} tokens; with max_model_len={self.max_model_len} it can have at most "
                f"{self.max_model_len - 1}, so that one token can follow. Shorten it or raise max_model_len"
            )
        if min(ids) < 0 or max(ids) >= vocab:
            wrong = [i for i in ids if not 0 <= i < vocab]
            raise ValueError(f"prompt token ids {wrong[:10]} are outside the vocabulary: allowed are 0 to {vocab - 1}")
        params.validate_for_vocab(vocab)
        if self.tokenizer is None and (params.stop or params.bad_words):
            raise ValueError("stop and bad_words are strings and need a tokenizer; this model has none (pass tokenizer=)")
        bad_words = self.tokenizer.bad_words_ids(params.bad_words) if self.tokenizer and params.bad_words else []
        check_bad_words(bad_words)
        grammar = None
        if params.structured_outputs is not None:
            grammar = self._guided().compile(params.structured_outputs)
        if params.seed is None:
            params.seed = self._random.getrandbits(63)
        group = Group(request_id, text, params, [], grammar=grammar)
        for index in range(params.n):
            request = Request(
                f"{request_id}-{index}" if params.n > 1 else request_id,
                text,
                ids,
                params,
                eos_token_ids=self.eos_token_ids,
                sample_index=index,
                bad_words_ids=bad_words,
                priority=priority,
            )
            self.scheduler.check(request)
            group.requests.append(request)
            detokenizer = (
                Detokenizer(self.tokenizer, ids, skip_special_tokens=params.skip_special_tokens) if self.tokenizer else None
            )
            group.texts.append(Text(detokenizer, list(params.stop or []), params.include_stop_str_in_output))
        return group

    def add(self, group: Group) -> str:
        """Queue what `prepare` made; returns its request id.

        Raises:
            ValueError: a request of that id is running.
        """
        if group.request_id in self._groups:
            raise ValueError(f"request_id {group.request_id!r} is already running; ids must be unique")
        self._groups[group.request_id] = group
        for request, text in zip(group.requests, group.texts, strict=True):
            self._texts[request] = (group, text)
            if group.grammar is not None:
                self._matchers[request] = Matcher(group.grammar)
            self.scheduler.add(request)
        return group.request_id

    def abort(self, request_id: str) -> None:
        """Stop a request and free its pages; unknown or finished ids are ignored, as it may have just ended."""
        group = self._groups.get(request_id)
        if group is not None:
            self._end(group, "abort")

    def _end(self, group: Group, reason: str) -> None:
        """Forget a group; what of it still runs ends here."""
        del self._groups[group.request_id]
        for request in group.requests:
            if not request.finished:
                request.finish(reason)
            self.scheduler.abort(request)
            self._texts.pop(request, None)
            self._matchers.pop(request, None)

    @property
    def num_unfinished(self) -> int:
        """Submitted requests that have neither finished nor been aborted; n sequences count as one."""
        return len(self._groups)

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

    @property
    def could_step(self) -> bool:
        """Whether the device has nothing to do though the pending prompts fill a step: `step` would not wait for it."""
        return (not self._in_flight or self._in_flight[-1].is_done) and self.scheduler.fills_a_plan

    def step(self, patient: bool = False) -> list[RequestOutput]:
        """Dispatch the next step, then read the one before it; returns what the requests that got tokens have to show.

        patient: nobody waits for a token before every request has ended (see Scheduler.schedule).

        An interrupt (Ctrl-C) is held until the step is done: in the middle of one, the cache is on its way between
        programs. Where a step fails, its requests come back with finish_reason "error", and the engine goes on with the
        others; if the failure took the cache, they compute it anew.

        Raises:
            EngineDeadError: it cannot go on.
        """
        with interrupt_held():
            return self._step(patient)

    def _step(self, patient: bool) -> list[RequestOutput]:
        outputs: list[RequestOutput] = []
        if self._matchers and self._in_flight and any(request.slot >= 0 for request in self._matchers):
            outputs += self._read()  # their next masks need their last tokens
        plan = self.scheduler.schedule(patient)
        if plan is not None:
            outputs += self._held_outputs(plan.preempted)
            try:
                plan, slot_ids, mask_AW, failed = self._masks(plan)
                outputs += failed
                self._in_flight.append(self.runner.run(plan, slot_ids, mask_AW))
            except Exception as error:
                outputs += self._fail(plan, error, lost_state=self.runner.lost_state)
                return outputs
        if self._in_flight and (plan is None or len(self._in_flight) > 1):
            outputs += self._read()
        return outputs

    def _read(self) -> list[RequestOutput]:
        """Take in the oldest step in flight; what its requests have to show."""
        step = self._in_flight.popleft()
        try:
            late = step.is_done
            results = step.read()
        except Exception as error:
            return self._fail(step.plan, error, lost_state=True)
        self._decode_clock.tick(step.plan)
        changed: dict[str, Group] = {}
        for sampled in results:
            request = sampled.request
            if request not in self._texts:  # it ended while this step was in flight
                continue
            group, text = self._texts[request]
            try:
                if not self._commit(sampled, group, text):
                    continue
            except Exception as error:  # of this request's text or grammar; the others have no part in it
                logger.exception("request %s failed", request.request_id)
                self._end_with_error(group, error)
            changed[group.request_id] = group
        outputs = []
        # Where the next step does not decode, nobody knows how long a token would wait.
        decodes = not step.plan.prefill and self._in_flight and self._in_flight[0].plan.decode
        streams = sum(group.streams for group in changed.values()) if decodes else 0
        at_a_time = self._turns.tokens_at_a_time(streams, late)
        for group in changed.values():
            finished = all(request.finished for request in group.requests)
            if finished or (group.streams and not self._turns.waits(group, at_a_time)):
                outputs.append(group.output(finished))
            if finished and group.request_id in self._groups:
                self._end(group, "abort")
        return outputs

    def _fail(self, plan: Plan, error: Exception, lost_state: bool) -> list[RequestOutput]:
        """A step failed: its requests end, and if it took the device's state with it, the others start over."""
        logger.error("a step failed: %s", plan_summary(plan), exc_info=error)
        requests = [*plan.admitted, *(chunk.request for chunk in plan.prefill), *plan.decode]
        groups = {id(entry[0]): entry[0] for request in requests if (entry := self._texts.get(request))}
        for group in groups.values():
            self._end_with_error(group, error)
        held: list[RequestOutput] = []
        if lost_state:
            self._in_flight.clear()
            try:
                self.runner.reset()
            except Exception as again:
                raise EngineDeadError(f"a step failed ({error}), and then starting over without it: {again}") from again
            held = self._held_outputs(self.scheduler.running)
            self.scheduler.preempt_all()
        return [*held, *(group.output(True) for group in groups.values())]

    def _held_outputs(self, requests: Iterable[Request]) -> list[RequestOutput]:
        """What was held back of requests that will not get a token soon."""
        groups = {id(entry[0]): entry[0] for request in requests if (entry := self._texts.get(request))}
        return [group.output(False) for group in groups.values() if group.streams and group.shown and group.num_held]

    def _end_with_error(self, group: Group, error: Exception | str) -> None:
        group.error = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        self._end(group, "error")

    def _masks(self, plan: Plan) -> tuple[Plan, list[int], np.ndarray | None, list[RequestOutput]]:
        """What grammars allow the rows that they guide and that sample a token: the plan, without those whose grammar
        failed; the rows' slots and masks; and the outputs of those that failed."""
        if not self._matchers:
            return plan, [], None, []
        sampling = [*(chunk.request for chunk in plan.prefill if chunk.last), *plan.decode]
        guided = [request for request in sampling if request in self._matchers]
        if not guided:
            return plan, [], None, []
        slot_ids = [request.slot for request in guided]
        mask_AW, errors_A = self._guided().masks([self._matchers[request] for request in guided])
        groups = {id(self._texts[r][0]): (self._texts[r][0], e) for r, e in zip(guided, errors_A, strict=True) if e}
        for group, error in groups.values():
            self._end_with_error(group, error)
        if groups:
            gone = {request for group, _ in groups.values() for request in group.requests}
            plan = dataclasses.replace(
                plan,
                admitted=[request for request in plan.admitted if request not in gone],
                prefill=[chunk for chunk in plan.prefill if chunk.request not in gone],
                decode=[request for request in plan.decode if request not in gone],
            )
        kept = [i for i, error in enumerate(errors_A) if not error and not guided[i].finished]
        outputs = [group.output(True) for group, _ in groups.values()]
        return plan, [slot_ids[i] for i in kept], mask_AW[kept], outputs

    def _guided(self) -> GuidedTokenizer:
        if self.tokenizer is None:
            raise ValueError("structured_outputs need a tokenizer; this model has none (pass tokenizer=)")
        with self._guided_lock:
            if self._guided_tokenizer is None:
                self._guided_tokenizer = GuidedTokenizer(self.tokenizer, self.model_config.vocab_size, self.eos_token_ids)
            return self._guided_tokenizer

    def _commit(self, sampled: Sampled, group: Group, text: Text) -> bool:
        """Append what a step gave a request; whether that changed anything."""
        request = sampled.request
        if request.finished:  # by an earlier step, while others of its group go on
            return False
        if sampled.prompt_logprobs is not None:
            request.prompt_logprobs += [self._logprobs(x, request.params.prompt_logprobs or 0) for x in sampled.prompt_logprobs]
        before = len(request.output_token_ids)
        if not before and request.sample_index == 0 and sampled.tokens:
            self._prompt_tokens += len(request.prompt_token_ids)
        taken = self.scheduler.commit(request, sampled.tokens, sampled.prefilled)
        if sampled.logprobs is not None:
            count = request.params.logprobs or 0
            request.logprobs += [self._logprobs(position, count) for position in sampled.logprobs[:taken]]
        matcher = self._matchers.get(request)
        if matcher is not None:
            for token in request.output_token_ids[before:]:
                matcher.accept(token)
            if matcher.finished and not request.finished:  # an end-of-text token is all that could follow
                request.finish("stop")
                self.scheduler.abort(request)
        # Bans left no token after those that were taken: the text can only end here.
        cut = sampled.tokens[-1:] == [-1] and not request.finished
        if cut and matcher is not None and not matcher.may_end:
            raise RuntimeError("the grammar cannot go on: every token that it allows is banned")
        for i in range(taken):
            token, last = request.output_token_ids[before + i], i == taken - 1 and (request.finished or cut)
            stopped_by_token = last and request.finish_reason == "stop" and is_stop_token(request, token)
            shown = [] if stopped_by_token and not request.params.include_stop_str_in_output else [token]
            stop = text.add(shown, last, check_stop=before + i + 1 > request.params.min_tokens)
            if stop is not None:
                self._stop_at(request, stop, before + i + 1)
                break
        if cut and not request.finished:
            if not taken:
                text.add([], True, check_stop=False)
            request.finish("stop")
            self.scheduler.abort(request)
        self._generation_tokens += len(request.output_token_ids) - before
        return taken > 0 or cut

    def _stop_at(self, request: Request, stop: str, count: int) -> None:
        """A stop string ended the text at the count-th token: drop what was sampled past it."""
        del request.output_token_ids[count:], request.logprobs[count:]
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

    def stats(self) -> EngineStats:
        """Counts and gauges, cheap; any thread may ask."""
        scheduler, pool = self.scheduler, self.scheduler.pool
        return EngineStats(
            num_requests_running=scheduler.num_running,
            num_requests_waiting=scheduler.num_waiting,
            gpu_cache_usage_perc=1 - pool.num_free / (pool.num_pages - 1),
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            num_preemptions=scheduler.num_preemptions,
            prefix_cache_queries=scheduler.prefix_queries,
            prefix_cache_hits=scheduler.prefix_hits,
            decode_bandwidth_fraction=self._decode_clock.fraction,
        )

class DecodeClock:
    """How near steps that only decode come to the device's read limit, as a moving average of their last hundred or so."""

    def __init__(self, runner: Runner):
        device = runner.mesh.devices.flat[0]
        self.limit = runtime.read_limit(device.device_kind)
        self.weight_bytes = runner.step_weight_bytes
        self.token_bytes = runner.page_bytes / runner.config.block_size
        self.fraction: float | None = None
        self._last: tuple[float, bool] = (0.0, False)

    def tick(self, plan: Plan) -> None:
        """A step was read. Its time is that since the step before, where the device had no pause between the two."""
        if self.limit is None:
            return
        now, only_decode = time.perf_counter(), not plan.prefill and not plan.admitted and bool(plan.decode)
        before, counted = self._last
        self._last = now, only_decode
        if counted and only_decode and 0 < now - before < 1:
            tokens = sum(request.num_computed for request in plan.decode)
            rate = (self.weight_bytes * plan.steps + self.token_bytes * tokens * plan.steps) / (now - before)
            share = rate / self.limit
            self.fraction = share if self.fraction is None else 0.99 * self.fraction + 0.01 * share


def is_stop_token(request: Request, token: int) -> bool:
    """Whether a token that ended a request is one that may not show (a grammar's last token is text)."""
    return (token in request.eos_token_ids and not request.params.ignore_eos) or token in (request.params.stop_token_ids or ())


def plan_summary(plan: Plan) -> str:
    return f"{len(plan.prefill)} prompts in prefill, {len(plan.decode)} sequences in decode"


def token_ids(values: Any) -> list[int]:
    """Token ids as plain ints.

    Raises:
        ValueError: not a sequence of integers.
    """
    if not isinstance(values, Iterable) or isinstance(values, str | bytes | Mapping):
        raise ValueError(f"a prompt is text, token ids or a dict of either, got {values!r}")
    ids = list(values)
    if set(map(type, ids)) <= {int}:
        return ids
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
