"""What a caller asks for and what comes back: plain data, no jax."""

from __future__ import annotations

import math
import numbers
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

GREEDY_TEMPERATURE = 1e-5  # temperatures below this are greedy, as vLLM's _SAMPLING_EPS
MAX_LOGPROBS = 20
MAX_BAD_WORDS = 128  # token sequences a request, after tokenization
MAX_BAD_WORD_TOKENS = 16  # tokens a sequence
MAX_LOGIT_BIAS = 1024  # entries a request (OpenAI's own limit is 300)


@dataclass
class SamplingParams:
    """How to sample one request; vLLM's names, defaults and ranges.

    n: sequences to generate; must be 1 when greedy (they would all be equal).
    presence_penalty, frequency_penalty: [-2, 2], over the output. repetition_penalty: > 0, over prompt and output.
    temperature: >= 0; below 1e-5 is greedy, and then top_k, top_p and min_p change nothing.
    top_k: 0 or -1 for all. top_p: (0, 1]. min_p: [0, 1], relative to the likeliest token. Tokens that tie with the
        last one kept by top_k or top_p are kept too.
    seed: any int, taken modulo 2**64; None or -1 lets the engine draw one.
    stop: string or strings that end the output, cut off unless include_stop_str_in_output.
    stop_token_ids: ids that end the output; ignore_eos leaves only these.
    max_tokens: None means up to max_model_len. min_tokens: until then EOS and stop ids cannot be sampled.
    logprobs, prompt_logprobs: how many alternatives to report, 0 to 20; of the raw model logits.
    logit_bias: token id -> [-100, 100], at most 1024 ids. allowed_token_ids: everything else is banned.
    bad_words: at most 128 token sequences of at most 16 tokens once tokenized; the last token of one is banned where
        it would complete it. The tokenized limits are checked by `check_bad_words`.

    Raises ValueError naming field, value and range; an unknown field is Python's own TypeError.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None

    def __post_init__(self) -> None:
        self.n = _int("n", self.n, "at least 1", 1)
        self.presence_penalty = _float("presence_penalty", self.presence_penalty, "in [-2, 2]", -2, 2)
        self.frequency_penalty = _float("frequency_penalty", self.frequency_penalty, "in [-2, 2]", -2, 2)
        self.repetition_penalty = _float("repetition_penalty", self.repetition_penalty, "greater than 0", 0, above=True)
        self.temperature = _float("temperature", self.temperature, "at least 0", 0)
        self.top_p = _float("top_p", self.top_p, "in (0, 1]", 0, 1, above=True)
        self.top_k = _int("top_k", self.top_k, "0 or -1 (all tokens), or at least 1", -1)
        self.min_p = _float("min_p", self.min_p, "in [0, 1]", 0, 1)
        if self.seed is not None:
            self.seed = _int("seed", self.seed, "an integer or None")
            if self.seed == -1:
                self.seed = None
        self.stop = _strings("stop", [self.stop] if isinstance(self.stop, str) else self.stop)
        self.bad_words = _strings("bad_words", self.bad_words)
        self.stop_token_ids = _ids("stop_token_ids", self.stop_token_ids or ())
        for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise _error(name, getattr(self, name), "True or False")
        if self.max_tokens is not None:
            self.max_tokens = _int("max_tokens", self.max_tokens, "at least 1, or None (up to max_model_len)", 1)
        self.min_tokens = _int("min_tokens", self.min_tokens, "at least 0", 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise _error("min_tokens", self.min_tokens, f"at most max_tokens = {self.max_tokens}")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                allowed = f"None, or 0 to {MAX_LOGPROBS} (the full vocabulary, -1, is not offered)"
                setattr(self, name, _int(name, getattr(self, name), allowed, 0, MAX_LOGPROBS))
        if self.logit_bias is not None:
            self.logit_bias = _bias(self.logit_bias)
        if self.allowed_token_ids is not None:
            self.allowed_token_ids = _ids("allowed_token_ids", self.allowed_token_ids)
            if not self.allowed_token_ids:
                raise _error("allowed_token_ids", [], "None, or at least one token id")
        if self.min_tokens and self.allowed_token_ids and set(self.allowed_token_ids) <= set(self.stop_token_ids):
            allowed = "a list with an id that is not in stop_token_ids, as min_tokens bans those at first"
            raise _error("allowed_token_ids", self.allowed_token_ids, allowed)
        if self.is_greedy and self.n > 1:
            raise _error("n", self.n, "1 when temperature is 0 (greedy sequences would all be equal)")

    @property
    def is_greedy(self) -> bool:
        """The likeliest token is taken (after penalties, bias and bans)."""
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def is_plain_greedy(self) -> bool:
        """The raw argmax is the answer and nothing else is asked for: sampling.sample(greedy=True) may serve it."""
        return (
            self.is_greedy
            and self.presence_penalty == 0
            and self.frequency_penalty == 0
            and self.repetition_penalty == 1
            and self.min_tokens == 0
            and self.logprobs is None
            and self.allowed_token_ids is None
            and not self.logit_bias
            and not self.bad_words
        )

    def clone(self) -> SamplingParams:
        """A copy that shares no list or dict with this one; validates again, so later assignments are checked too."""
        return replace(self)

    def validate_for_vocab(self, vocab_size: int) -> None:
        """Raises ValueError naming the field and the token ids that are not in [0, vocab_size)."""
        for name in ("logit_bias", "allowed_token_ids", "stop_token_ids"):
            ids: Iterable[int] = getattr(self, name) or ()
            wrong = [i for i in ids if not 0 <= i < vocab_size]
            if wrong:
                raise _error(name, wrong, f"token ids in [0, {vocab_size}), the model's vocabulary")


def check_bad_words(bad_words_ids: list[list[int]]) -> None:
    """Raises ValueError when tokenized bad words exceed what a slot holds: 128 sequences of 16 tokens, none empty."""
    if len(bad_words_ids) > MAX_BAD_WORDS:
        raise ValueError(
            f"bad_words: {len(bad_words_ids)} token sequences, allowed are {MAX_BAD_WORDS} a request "
            "(a word can need one sequence with and one without a leading space); give fewer words"
        )
    for ids in bad_words_ids:
        if not 1 <= len(ids) <= MAX_BAD_WORD_TOKENS:
            raise ValueError(
                f"bad_words: a word became {len(ids)} tokens {ids[:20]}, allowed are 1 to {MAX_BAD_WORD_TOKENS}; "
                "give shorter words"
            )


def _error(name: str, value: Any, allowed: str) -> ValueError:
    return ValueError(f"SamplingParams: {name} must be {allowed}, got {value!r}")


def _int(name: str, value: Any, allowed: str, low: int | None = None, high: int | None = None) -> int:
    wrong = isinstance(value, bool) or not isinstance(value, numbers.Integral)
    if wrong or (low is not None and value < low) or (high is not None and value > high):
        raise _error(name, value, f"an integer, {allowed}" if wrong else allowed)
    return int(value)


def _float(name: str, value: Any, allowed: str, low: float, high: float = math.inf, *, above: bool = False) -> float:
    wrong = isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value)
    if wrong or value < low or value > high or (above and value == low):
        raise _error(name, value, f"a finite number {allowed}")
    return float(value)


def _strings(name: str, values: Any) -> list[str]:
    if values is None:
        return []
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise _error(name, values, "a list of strings")
    values = list(values)
    if not all(isinstance(s, str) and s for s in values):
        raise _error(name, values, "a list of non-empty strings")
    return values


def _ids(name: str, values: Any) -> list[int]:
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise _error(name, values, "a list of token ids")
    return [_int(name, i, "a token id, at least 0", 0) for i in values]


def _bias(values: Any) -> dict[int, float]:
    if not isinstance(values, dict):
        raise _error("logit_bias", values, "a dict from token id to a number in [-100, 100]")
    if len(values) > MAX_LOGIT_BIAS:
        raise _error("logit_bias", f"{len(values)} of them", f"at most {MAX_LOGIT_BIAS} entries")
    key = "keyed by token ids, at least 0"
    return {_int("logit_bias", i, key, 0): _float("logit_bias", b, "in [-100, 100]", -100, 100) for i, b in values.items()}


@dataclass(eq=False)
class Request:
    """One sequence being generated (of `n` samples of a prompt, one each), and where it stands.

    `num_prefilled` and `num_planned_outputs` count what has been dispatched to the device; `output_token_ids` what came back.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    eos_token_ids: frozenset[int] = frozenset()
    sample_index: int = 0
    bad_words_ids: list[list[int]] = field(default_factory=list)
    arrival_time: float = field(default_factory=time.time)
    output_token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob] | None] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    num_prefilled: int = 0
    num_planned_outputs: int = 0
    scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def max_outputs(self, max_model_len: int) -> int:
        """The most tokens it may produce."""
        room = max_model_len - len(self.prompt_token_ids)
        return room if self.params.max_tokens is None else min(self.params.max_tokens, room)

    def max_length(self, max_model_len: int) -> int:
        """Prompt and outputs at their longest, in tokens."""
        return len(self.prompt_token_ids) + self.max_outputs(max_model_len)

    def append(self, token: int, max_model_len: int) -> None:
        """Take a sampled token and decide, as the device does, whether it is the last one."""
        now = time.time()
        self.first_token_time = self.first_token_time or now
        self.output_token_ids.append(token)
        may_stop = len(self.output_token_ids) > self.params.min_tokens
        if may_stop and token in self.eos_token_ids and not self.params.ignore_eos:
            self.finish("stop")
        elif may_stop and token in (self.params.stop_token_ids or ()):
            self.finish("stop", token)
        elif len(self.output_token_ids) >= self.max_outputs(max_model_len):
            self.finish("length")

    def finish(self, reason: str, stop_reason: int | str | None = None) -> None:
        """Mark it finished: "stop", "length" or "abort"."""
        self.finish_reason, self.stop_reason, self.finished_time = reason, stop_reason, time.time()


@dataclass(frozen=True)
class Chunk:
    """A piece of a prompt to prefill: tokens start … start + length - 1; `last`: the piece that samples a token."""

    request: Request
    start: int
    length: int
    last: bool


@dataclass(frozen=True)
class Plan:
    """One step: slots to fill, prompt pieces to prefill, rows to decode for `steps` tokens each, in this order."""

    admitted: list[Request]
    prefill: list[Chunk]
    decode: list[Request]
    steps: int


@dataclass(frozen=True)
class Logprob:
    """Of one token at one position: log-probability of the raw distribution, rank (1 is the likeliest), and its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    """One sample of a request, as vLLM's."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(frozen=True)
class RequestMetrics:
    """Wall-clock times in seconds since the epoch; None where it has not come to that."""

    arrival_time: float
    first_scheduled_time: float | None
    first_token_time: float | None
    finished_time: float | None


@dataclass
class RequestOutput:
    """What has been generated for a prompt so far, as vLLM's: `outputs` holds its n samples, cumulative."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
