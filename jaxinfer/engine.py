"""The engine: prompts in, text out. `LLM` is the offline front; `Engine` is the loop under it.

A step is: schedule, run, and read the step before it. See README, "From prompt to text in six hops".
"""

from __future__ import annotations

import itertools
import logging
import numbers
import random
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from tqdm import tqdm

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
Messages = Sequence[Mapping[str, Any]]


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
        return self.text[: len(self.text) - held] if held else self.text


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
        self._texts: dict[str, tuple[Group, Text]] = {}
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
        request_id = str(next(self._ids)) if request_id is None else request_id
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
        for request, request_text in zip(group.requests, group.texts, strict=True):
            self._texts[request.request_id] = (group, request_text)
            self.scheduler.add(request)
        self._groups[request_id] = group
        return request_id

    def abort(self, request_id: str) -> None:
        """Stop a request and free its pages; unknown or finished ids are ignored, as it may have just ended."""
        group = self._groups.pop(request_id, None)
        for request in group.requests if group else []:
            if not request.finished:
                request.finish("abort")
                self.scheduler.abort(request)
            self._texts.pop(request.request_id, None)

    def default_sampling_params(self) -> SamplingParams:
        """vLLM's defaults, overridden by the checkpoint's generation_config.json."""
        return SamplingParams(**self.sampling_defaults)

    def _tokenize(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, Mapping):
            unknown = set(prompt) - {"prompt", "prompt_token_ids"}
            if unknown or not prompt:
                raise ValueError(f"a prompt given as a dict has the keys 'prompt' or 'prompt_token_ids', got {sorted(prompt)}")
            if "prompt_token_ids" in prompt:
                return prompt.get("prompt"), [int(i) for i in prompt["prompt_token_ids"]]
            prompt = prompt["prompt"]
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("this model has no tokenizer: give prompts as token ids, or pass tokenizer=")
            return prompt, self.tokenizer.encode(prompt)
        return None, [int(i) for i in prompt]

    # ---- the loop

    @property
    def has_unfinished(self) -> bool:
        return self.scheduler.has_unfinished or bool(self._in_flight)

    def step(self) -> list[RequestOutput]:
        """Dispatch the next step, then read the one before it; returns the requests that got tokens."""
        plan = self.scheduler.schedule()
        if plan is not None:
            self._in_flight.append(self.runner.run(plan))
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
                    self._texts.pop(request.request_id)
        return outputs

    def _commit(self, sampled: Sampled) -> Group | None:
        """Append what a step gave a request; returns its group if that changed anything."""
        request = sampled.request
        if request.finished:  # it ended while this step was in flight
            return None
        group, text = self._texts[request.request_id]
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


class LLM:
    """Offline generation, with vLLM's interface.

    Args:
        model: a Hugging Face directory or hub id, a .gguf file, an alias from configs/, or random:<config.json>.
        tokenizer: directory or file to take the tokenizer from instead of the model's.
        tensor_parallel_size: GPUs that each weight is split over.
        dtype: "auto", "bfloat16", "float16" or "float32"; auto takes the checkpoint's on GPU and float32 on CPU.
        max_model_len: longest sequence in tokens; None: what the model was trained for.
        gpu_memory_utilization: fraction of each GPU's memory for weights, cache and temporaries.
        seed: draws the seeds of requests that bring none, and random weights.
        quantization: None.
        engine_args: every other field of EngineConfig.

    Raises:
        ValueError, FileNotFoundError: naming the setting, what is allowed and what to do.
    """

    def __init__(
        self,
        model: str,
        tokenizer: str | None = None,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        max_model_len: int | None = None,
        gpu_memory_utilization: float = 0.9,
        seed: int = 0,
        quantization: str | None = None,
        **engine_args: Any,
    ):
        config = EngineConfig(model=model).override(
            tokenizer=tokenizer,
            tensor_parallel_size=tensor_parallel_size,
            dtype=dtype,
            max_model_len=max_model_len,
            gpu_memory_utilization=gpu_memory_utilization,
            seed=seed,
            quantization=quantization,
            **engine_args,
        )
        self.engine = Engine(config)

    @classmethod
    def from_config(cls, config: EngineConfig) -> LLM:
        """An LLM from a loaded EngineConfig (a preset of configs/)."""
        llm = cls.__new__(cls)
        llm.engine = Engine(config)
        return llm

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete prompts, all at once; outputs come in the prompts' order.

        Args:
            prompts: one prompt or a list: text, token ids, {"prompt": …} or {"prompt_token_ids": …}.
            sampling_params: one for all, or one each; None: the model's defaults.
            use_tqdm: show a progress bar over requests.

        Raises:
            ValueError: as Engine.submit; nothing is generated then.
        """
        items = as_list(prompts)
        params = per_prompt(sampling_params, len(items))
        ids: list[str] = []
        try:
            for prompt, param in zip(items, params, strict=True):
                ids.append(self.engine.submit(prompt, param))
            return self._finish(ids, use_tqdm)
        except BaseException:
            for request_id in ids:
                self.engine.abort(request_id)
            raise

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
    ) -> list[RequestOutput]:
        """Answer one conversation ([{"role": …, "content": …}, …]) or a list of them, through the chat template."""
        conversations: Sequence[Any] = [messages] if messages and isinstance(messages[0], Mapping) else messages
        prompts = [self._chat_prompt(conversation, add_generation_prompt) for conversation in conversations]
        return self.generate(prompts, sampling_params, use_tqdm)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Complete one prompt, yielding the output so far each time it grows. Leaving the loop aborts the request."""
        request_id = self.engine.submit(prompt, sampling_params)
        return self._stream(request_id)

    def stream_chat(self, messages: Messages, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """`stream` for one conversation."""
        return self.stream(self._chat_prompt(messages, True), sampling_params)

    def get_tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            ValueError: the model has none.
        """
        if self.engine.tokenizer is None:
            raise ValueError(f"{self.engine.config.model} comes without a tokenizer; pass tokenizer=")
        return self.engine.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """The model's own defaults (generation_config.json over vLLM's)."""
        return self.engine.default_sampling_params()

    def warm_up(self) -> None:
        """Compile every program now (each is otherwise compiled when first needed)."""
        self.engine.runner.warm_up()

    def stats(self) -> dict[str, Any]:
        """Compile seconds and counts, load seconds, and bytes on each device."""
        runner = self.engine.runner
        return {
            "num_compilations": len(runner.programs),
            "compile_seconds": runner.compile_seconds,
            "load_seconds": self.engine.load_seconds,
            "params_bytes_per_device": sum(leaf.addressable_shards[0].data.nbytes for leaf in runner.leaves),
            "embedding_bytes_per_device": runner.embedding_bytes,
            "kv_cache_bytes_per_device": runner.num_pages * runner.page_bytes,
            "kv_bytes_per_token_per_device": runner.page_bytes // self.engine.config.block_size,
            "num_pages": runner.num_pages,
            "block_size": self.engine.config.block_size,
            "max_model_len": self.engine.max_model_len,
            "dtype": str(jnp.dtype(self.engine.dtype)),
        }

    def bare_step_seconds(self, batch_size: int, length: int, steps: int = 64) -> float:
        """Median seconds of the compiled decode step alone; see Runner.bare_step_seconds."""
        return self.engine.runner.bare_step_seconds(batch_size, length, steps)

    def _chat_prompt(self, messages: Messages, add_generation_prompt: bool) -> Prompt:
        tokenizer = self.get_tokenizer()
        text = tokenizer.render_chat(messages, add_generation_prompt=add_generation_prompt)
        return {"prompt": text, "prompt_token_ids": tokenizer.encode(text, add_special_tokens=False)}

    def _finish(self, ids: list[str], use_tqdm: bool) -> list[RequestOutput]:
        done: dict[str, RequestOutput] = {}
        with tqdm(total=len(ids), desc="Requests", unit="req", disable=not use_tqdm) as bar:
            wanted = set(ids)
            while len(done) < len(ids):
                for output in self.engine.step():
                    if output.finished and output.request_id in wanted:
                        done[output.request_id] = output
                        bar.update()
        return [done[request_id] for request_id in ids]

    def _stream(self, request_id: str) -> Iterator[RequestOutput]:
        try:
            while True:
                for output in self.engine.step():
                    if output.request_id == request_id:
                        yield output
                        if output.finished:
                            return
        finally:
            self.engine.abort(request_id)


def as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many, as a list: a list of ints is one prompt."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    items = list(prompts)
    if items and all(isinstance(item, numbers.Integral) for item in items):
        return [items]  # type: ignore[list-item]
    return items  # type: ignore[return-value]


def per_prompt(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> Sequence[SamplingParams | None]:
    """Sampling parameters for each of `count` prompts."""
    if params is None or isinstance(params, SamplingParams):
        return [params] * count
    if len(params) != count:
        raise ValueError(f"{len(params)} sampling_params for {count} prompts; give one for all, or one each")
    return params


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
