"""What a caller asks for and what comes back: plain data, no jax."""

from __future__ import annotations

import json
import math
import numbers
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

GREEDY_TEMPERATURE = 1e-5  # temperatures below this are greedy, as vLLM's _SAMPLING_EPS
MAX_LOGPROBS = 20
MAX_BAD_WORDS = 128  # token sequences a request, after tokenization
MAX_BAD_WORD_TOKENS = 16  # tokens a sequence
MAX_LOGIT_BIAS = 1024  # entries a request (OpenAI's own limit is 300)
MAX_STOP = 64  # strings a request (OpenAI's own limit is 4): each token looks for them all
MAX_STOP_TOKEN_IDS = 1024


class RequestOutputKind(Enum):
    """What a RequestOutput carries, as vLLM's: all so far, only what is new, or all, once, at the end."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass
class StructuredOutputsParams:
    """The form an output must have, in exactly one of the first five ways; vLLM's names.

    json: a JSON Schema, a dict or its text; keywords that are not supported are refused. regex: matches the whole output;
        the syntax of Rust's regex crate, without look-around and word boundaries. choice: one of these strings.
    grammar: context-free, in llguidance's dialect of Lark or in GBNF. json_object: True for any JSON object.
    disable_any_whitespace: none between JSON's tokens. whitespace_pattern: a regex for what may stand there instead of
        any number of spaces, tabs and line ends. Both only with json or json_object.

    Raises ValueError naming field, value and what is allowed.
    """

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        for name in ("json_object", "disable_any_whitespace"):
            if not isinstance(getattr(self, name), bool | None):
                raise _error(f"structured_outputs.{name}", getattr(self, name), "True or False")
        for name in ("regex", "grammar", "whitespace_pattern"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise _error(f"structured_outputs.{name}", value, "a string that is not empty")
        if self.json is not None:
            self.json = _schema(self.json)
        if self.choice is not None:
            self.choice = _strings("structured_outputs.choice", self.choice)
            if not self.choice:
                raise _error("structured_outputs.choice", [], "a list with at least one string")
        if len(self._given) != 1:
            raise _error("structured_outputs", self._given or None, f"exactly one of {', '.join(_FORMS)}")
        options = [name for name in ("disable_any_whitespace", "whitespace_pattern") if getattr(self, name)]
        if options and (len(options) > 1 or self.kind not in ("json", "json_object")):
            raise _error("structured_outputs", [*options, self.kind], "one of these options at most, with json or json_object")

    @property
    def _given(self) -> list[str]:
        return [name for name in _FORMS if getattr(self, name) is not None and getattr(self, name) is not False]

    @property
    def kind(self) -> str:
        """Which of the five it is."""
        return self._given[0]


_FORMS = ("json", "regex", "choice", "grammar", "json_object")


@dataclass
class SamplingParams:
    """How to sample one request; vLLM's names, defaults and ranges.

    n: sequences to generate; must be 1 when greedy (they would all be equal).
    presence_penalty, frequency_penalty: [-2, 2], over the output. repetition_penalty: > 0, over prompt and output.
    temperature: >= 0; below 1e-5 is greedy, and then top_k, top_p and min_p change nothing.
    top_k: 0 or -1 for all. top_p: (0, 1]. min_p: [0, 1], relative to the likeliest token. Tokens that tie with the
        last one kept by top_k or top_p are kept too.
    seed: any int, taken modulo 2**64; None or -1 lets the engine draw one.
    stop: string or strings (64 at most) that end the output, cut off unless include_stop_str_in_output.
    stop_token_ids: ids (1024 at most) that end the output; ignore_eos leaves only these.
    max_tokens: None means up to max_model_len. min_tokens: until then EOS and stop ids cannot be sampled.
    logprobs, prompt_logprobs: how many alternatives to report, 0 to 20; of the raw model logits.
    logit_bias: token id -> [-100, 100], at most 1024 ids. allowed_token_ids: everything else is banned.
    bad_words: at most 128 token sequences of at most 16 tokens once tokenized; the last token of one is banned where
        it would complete it. The tokenized limits are checked by `check_bad_words`.
    structured_outputs: the form of the output, which ends where its grammar does, whatever min_tokens and ignore_eos say.
    output_kind: what each RequestOutput carries. `LLM.generate` returns finished outputs, whatever it says.

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
    structured_outputs: StructuredOutputsParams | None = None
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE

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
        if len(self.stop) > MAX_STOP:
            raise _error("stop", f"{len(self.stop)} of them", f"at most {MAX_STOP} strings")
        self.bad_words = _strings("bad_words", self.bad_words)
        self.stop_token_ids = _ids("stop_token_ids", self.stop_token_ids or ())
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise _error("stop_token_ids", f"{len(self.stop_token_ids)} of them", f"at most {MAX_STOP_TOKEN_IDS} ids")
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
        if self.structured_outputs is not None:
            if not isinstance(self.structured_outputs, StructuredOutputsParams):
                raise _error("structured_outputs", self.structured_outputs, "None or a StructuredOutputsParams")
            self.structured_outputs = replace(self.structured_outputs)
        if not isinstance(self.output_kind, RequestOutputKind):
            raise _error("output_kind", self.output_kind, f"one of {[str(kind) for kind in RequestOutputKind]}")
        if self.is_greedy and self.n > 1:
            raise _error("n", self.n, "1 when temperature is 0 (greedy sequences would all be equal)")

    @property
    def is_greedy(self) -> bool:
        """The likeliest token is taken (after penalties, bias and bans)."""
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def is_plain_greedy(self) -> bool:
        """The raw argmax is the answer and nothing else is asked for: sampling.greedy_sample may serve it."""
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
            and self.structured_outputs is None
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
    try:
        shown = repr(value)
    except (RecursionError, ValueError):  # nested too deep, or a number of too many digits
        shown = f"a {type(value).__name__} that cannot be shown"
    return ValueError(f"SamplingParams: {name} must be {allowed}, got {shown if len(shown) <= 400 else shown[:400] + '…'}")


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


def _schema(value: Any) -> str | dict[str, Any]:
    """A JSON Schema as it was given, text or a copy of a dict."""
    allowed = "a JSON Schema: a dict, or the text of a JSON object"
    try:
        schema = json.loads(value if isinstance(value, str) else json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise _error("structured_outputs.json", value, f"{allowed} ({error})") from error
    if not isinstance(schema, dict):
        raise _error("structured_outputs.json", value, allowed)
    return value if isinstance(value, str) else schema


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

    What follows `pages` is the scheduler's. Dispatched to the device: `num_computed`, the tokens whose keys and values are
    in the cache or on their way (prefix hits count), and `num_planned_outputs`, those sampled (those that came back count).
    It prefills while num_computed < num_to_prefill, which is num_tokens as it was at admission; the last chunk samples.
    Known to be done: `output_token_ids`, and `num_committed`, the tokens whose keys and values a finished step wrote.

    priority: smaller runs first. rank: (priority, arrival), how the scheduler orders requests. output_limit: the most
        outputs it may produce. num_cached_tokens: the prefix hit at its first admission.
    page_digests: of its leading full pages, as far as they were asked for; num_registered: those the prefix cache has.
    is_plain_greedy, wants_logprobs: of its params, which hundreds of rows are asked in every step.
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
    num_computed: int = 0
    num_to_prefill: int = 0
    num_planned_outputs: int = 0
    num_committed: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    output_limit: int = 0
    rank: tuple[int, int] = (0, 0)
    page_digests: list[bytes] = field(default_factory=list)
    num_registered: int = 0
    scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    priority: int = 0
    is_plain_greedy: bool = field(init=False)
    wants_logprobs: bool = field(init=False)

    def __post_init__(self) -> None:
        self.is_plain_greedy = self.params.is_plain_greedy
        self.wants_logprobs = self.params.logprobs is not None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def num_tokens(self) -> int:
        """Prompt and outputs so far."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def token_ids(self) -> list[int]:
        """Prompt and outputs so far, as a new list; `token_id_slice` copies only what is asked for."""
        return self.prompt_token_ids + self.output_token_ids

    def token_id_slice(self, start: int, stop: int) -> list[int]:
        """token_ids[start:stop], for 0 <= start <= stop."""
        prompt = len(self.prompt_token_ids)
        if stop <= prompt:
            return self.prompt_token_ids[start:stop]
        return self.prompt_token_ids[start:] + self.output_token_ids[max(0, start - prompt) : stop - prompt]

    def max_outputs(self, max_model_len: int) -> int:
        """The most tokens it may produce."""
        room = max_model_len - len(self.prompt_token_ids)
        return room if self.params.max_tokens is None else min(self.params.max_tokens, room)

    def max_length(self, max_model_len: int) -> int:
        """Prompt and outputs at their longest, in tokens."""
        return len(self.prompt_token_ids) + self.max_outputs(max_model_len)

    def append(self, token: int) -> None:
        """Take a sampled token and decide, as the device does, whether it is the last one."""
        if self.first_token_time is None:
            self.first_token_time = time.time()
        outputs, params = self.output_token_ids, self.params
        outputs.append(token)
        may_stop = len(outputs) > params.min_tokens
        if may_stop and token in self.eos_token_ids and not params.ignore_eos:
            self.finish("stop")
        elif may_stop and params.stop_token_ids and token in params.stop_token_ids:
            self.finish("stop", token)
        elif len(outputs) >= self.output_limit:
            self.finish("length")

    def finish(self, reason: str, stop_reason: int | str | None = None) -> None:
        """Mark it finished: "stop", "length", "abort" or "error"."""
        self.finish_reason, self.stop_reason, self.finished_time = reason, stop_reason, time.time()


@dataclass(frozen=True)
class Chunk:
    """A piece to prefill: tokens start … start + length - 1 of request.token_ids; `last`: the piece that samples a token.

    A request that was preempted prefills its prompt and the outputs it already had.
    """

    request: Request
    start: int
    length: int
    last: bool


@dataclass(frozen=True)
class Plan:
    """One step: slots to fill, pieces to prefill, rows to decode for `steps` tokens each, in this order.

    preempted: requests that lost slot and pages to this step, for information.
    """

    admitted: list[Request]
    prefill: list[Chunk]
    decode: list[Request]
    steps: int
    preempted: list[Request] = field(default_factory=list)


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
    """What has been generated for a prompt, as vLLM's: `outputs` holds its n samples; how much of them, `output_kind` says.

    num_cached_tokens: prompt tokens whose keys and values came from the prefix cache. error: why the request failed, where
    a sample's finish_reason is "error".
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    num_cached_tokens: int = 0
    error: str | None = None
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE

    def add(self, newer: RequestOutput) -> None:
        """Take in a later DELTA output of the same request, so that this one holds both."""
        for mine, theirs in zip(self.outputs, newer.outputs, strict=True):
            mine.text += theirs.text
            mine.token_ids += theirs.token_ids
            if mine.logprobs is not None and theirs.logprobs is not None:
                mine.logprobs += theirs.logprobs
            mine.cumulative_logprob = theirs.cumulative_logprob
            mine.finish_reason, mine.stop_reason = theirs.finish_reason, theirs.stop_reason
        if newer.prompt_logprobs is not None:  # only the first one carries them
            self.prompt_logprobs = newer.prompt_logprobs
        self.finished, self.metrics = newer.finished, newer.metrics
        self.num_cached_tokens, self.error = newer.num_cached_tokens, newer.error
