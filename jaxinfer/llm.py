"""`LLM`: offline generation over an Engine, with vLLM's interface."""

from __future__ import annotations

import numbers
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from tqdm import tqdm

from jaxinfer.config import EngineConfig
from jaxinfer.engine import Engine, Prompt
from jaxinfer.request import RequestOutput, RequestOutputKind, SamplingParams
from jaxinfer.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, Any]]


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
        quantization: "int8", or None.
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
        self._latest: dict[str, RequestOutput] = {}  # of running requests, until who waits for one takes it

    @classmethod
    def from_config(cls, config: EngineConfig) -> LLM:
        """An LLM from a loaded EngineConfig (a preset of configs/)."""
        llm = cls.__new__(cls)
        llm.engine, llm._latest = Engine(config), {}
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
            ValueError: as Engine.prepare; no request is left behind then.
            RuntimeError: a step failed and took a request with it.
        """
        items = as_list(prompts)
        params = per_prompt(sampling_params, len(items))
        ids: list[str] = []
        try:
            for prompt, param in zip(items, params, strict=True):
                param = self.engine.default_sampling_params() if param is None else param.clone()
                param.output_kind = RequestOutputKind.FINAL_ONLY
                ids.append(self.engine.submit(prompt, param))
                if self.engine.could_step:  # the device need not wait for the other prompts
                    self._step(patient=self.engine.num_unfinished <= len(ids))
            return self._finish(ids, use_tqdm and self.engine.config.use_tqdm)
        except BaseException:
            for request_id in ids:
                self._abort(request_id)
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

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Stream:
        """Complete one prompt, yielding the output so far each time it grows. Leaving the loop aborts the request.

        Several streams, and `generate` beside them, may be read in any order: they share the engine's steps.
        """
        return Stream(self, self.engine.submit(prompt, sampling_params))

    def stream_chat(self, messages: Messages, sampling_params: SamplingParams | None = None) -> Stream:
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

    def reset_prefix_cache(self) -> None:
        """Forget what the pages of earlier prompts hold: no prompt starts from them."""
        self.engine.scheduler.reset_prefix_cache()

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
        left, done = dict.fromkeys(ids), {}
        with tqdm(total=len(ids), desc="Requests", unit="req", disable=not use_tqdm or not ids) as bar:
            while left:
                output = self._next(left, streams=False)
                if output.finished:
                    del left[output.request_id]
                    done[output.request_id] = output
                    bar.update()
        return [done[request_id] for request_id in ids]

    def _next(self, ids: Collection[str], streams: bool = True) -> RequestOutput:
        """The next output of one of these requests; those of others wait in `_latest` for who asks for them. Where none
        streams, of these or of others, nobody looks at a token before all are done."""
        while True:
            request_id = next((request_id for request_id in self._latest if request_id in ids), None)
            if request_id is not None:
                output = self._latest.pop(request_id)
                if output.error is not None:
                    raise RuntimeError(f"request {request_id} failed: {output.error}")
                return output
            if not any(self.engine.is_running(request_id) for request_id in ids):
                raise RuntimeError(f"requests {list(ids)} are not running any more: they were aborted")
            self._step(patient=not streams and self.engine.num_unfinished <= len(ids))

    def _step(self, patient: bool) -> None:
        for output in self.engine.step(patient=patient):
            kept = self._latest.get(output.request_id)
            if kept is not None and output.output_kind is RequestOutputKind.DELTA:
                kept.add(output)
            else:
                self._latest[output.request_id] = output

    def _abort(self, request_id: str) -> None:
        self.engine.abort(request_id)
        self._latest.pop(request_id, None)


class Stream(Iterator[RequestOutput]):
    """One request's outputs as they grow. Dropped or closed before its end, it aborts the request."""

    def __init__(self, llm: LLM, request_id: str):
        self._llm, self.request_id, self._done = llm, request_id, False

    def __next__(self) -> RequestOutput:
        if self._done:
            raise StopIteration
        output = self._llm._next([self.request_id])
        self._done = output.finished
        return output

    def close(self) -> None:
        """Abort the request if it still runs."""
        if not self._done:
            self._done = True
            self._llm._abort(self.request_id)

    def __del__(self) -> None:
        self.close()


def as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many, as a list: a list of ints is one prompt."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not isinstance(prompts, Iterable):
        raise ValueError(f"prompts are text, token ids, dicts, or a list of those, got {prompts!r}")
    items = list(prompts)
    if items and all(isinstance(item, numbers.Integral) for item in items):
        return [items]  # type: ignore[list-item]
    return items  # type: ignore[return-value]


def per_prompt(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> Sequence[SamplingParams | None]:
    """Sampling parameters for each of `count` prompts."""
    if params is None or isinstance(params, SamplingParams):
        return [params] * count
    if isinstance(params, Mapping) or not all(isinstance(p, SamplingParams) for p in params):
        raise ValueError(f"sampling_params is a SamplingParams, a list of them, or None, got {params!r}")
    if len(params) != count:
        raise ValueError(f"{len(params)} sampling_params for {count} prompts; give one for all, or one each")
    return params
