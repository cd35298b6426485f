"""Shape buckets: which programs are compiled, so that steps of any size find one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxinfer.config import EngineConfig

MAX_DECODE_BUCKETS = 12
MAX_PREFILL_BUCKETS = 8
SHORT_PREFILL = 128
PROMPT_LOGPROBS_TOKENS = 128
MAX_PREFILL_ROWS = 32
LONG_PREFILL_TOKENS = 256  # of a step with a lone prompt while others decode, where the user says nothing
FEW_DECODE_ROWS = 64  # so many may share the prefill's program, and its tokens
LONG_CONTEXT = 2048


@dataclass(frozen=True)
class DecodeBucket:
    """A decode program: `rows` sequences with up to `pages` pages each, `steps` tokens a dispatch."""

    rows: int
    pages: int
    steps: int
    greedy: bool

    @property
    def name(self) -> str:
        return f"decode rows={self.rows} pages={self.pages} steps={self.steps} {'greedy' if self.greedy else 'sampling'}"


@dataclass(frozen=True)
class PrefillBucket:
    """A prefill program: pieces of up to `rows` sequences, `tokens` tokens in all, with up to `pages` pages each; and beside
    them a decode step of `decode_rows` sequences: weights are read once for both."""

    rows: int
    tokens: int
    pages: int
    prompt_logprobs: bool = False
    decode_rows: int = 0

    @property
    def name(self) -> str:
        extra = " prompt_logprobs" if self.prompt_logprobs else f" decode rows={self.decode_rows}" if self.decode_rows else ""
        return f"prefill tokens={self.tokens} rows={self.rows} pages={self.pages}{extra}"

    @property
    def words(self) -> int:
        """How many ints the program takes: see `split`."""
        return self.rows * (5 + self.pages) + self.tokens * (1 + self.prompt_logprobs)

    def split(self, packed: Any) -> tuple[Any, Any, Any]:
        """Of the program's one int32 array (so that one transfer carries it all), numpy's or jax's: a row a sequence (slot,
        offset among the tokens, start, length, last, pages), the tokens, and those one further on for prompt_logprobs."""
        end = self.rows * (5 + self.pages)
        return packed[:end].reshape(self.rows, 5 + self.pages), packed[end : end + self.tokens], packed[end + self.tokens :]


def prefill_buckets(config: EngineConfig, max_model_len: int, max_tokens: int, any_length: bool = False) -> list[PrefillBucket]:
    """The prefill programs, at most eight, smallest first; `max_tokens` is the most tokens of a step.

    `any_length`: the attention reads valid pages only, so one program serves every length (see decode_buckets). The last one
    is that for prompt_logprobs: one sequence, few tokens, since it keeps the logits of all of them.
    """
    pages = page_buckets(config.block_size, max_model_len)
    if any_length:
        pages = pages[-1:]

    def rows(tokens: int) -> int:
        return min(config.max_num_seqs, max(1, min(MAX_PREFILL_ROWS, tokens // 32), tokens // 256))

    # With a decode step beside them: where that reads weights for few rows, and prompts are few (see Scheduler).
    # Products take their rows 128 at a time, so it is the sum of both that is a power of two.
    beside = min(config.max_num_seqs, FEW_DECODE_ROWS)
    some = {min(count * LONG_PREFILL_TOKENS - beside, max_tokens) for count in (1, 4)} if config.max_num_seqs > 1 else set()
    both = [(tokens, beside) for tokens in sorted(some)]
    most = (MAX_PREFILL_BUCKETS - 1 - len(both)) // len(pages)
    sizes = [max_tokens]
    # A step is padded to its program's tokens: programs of half the tokens where the count allows, of a quarter otherwise.
    factor = 2 if any_length else 4
    while len(sizes) < most and sizes[-1] > SHORT_PREFILL:
        sizes.append(max(SHORT_PREFILL, pow2_ceil(sizes[-1]) // factor))
    buckets = [PrefillBucket(rows(tokens), tokens, m) for m in pages for tokens in sorted(sizes)]
    buckets += [PrefillBucket(rows(tokens), tokens, pages[-1], decode_rows=B) for tokens, B in both]
    return [*buckets, PrefillBucket(1, min(PROMPT_LOGPROBS_TOKENS, max_tokens), pages[-1], prompt_logprobs=True)]


def decode_buckets(config: EngineConfig, max_model_len: int, any_length: bool = False) -> list[DecodeBucket]:
    """The decode programs, at most a dozen (14 where 33 to 64 sequences may run), smallest first.

    `any_length`: the attention reads valid pages only, so one program serves every length. Otherwise short sequences have
    programs of their own, except with several steps a dispatch, where the dozen would not hold them.
    """
    steps = sorted({1, config.num_scheduler_steps or 1})
    pages = page_buckets(config.block_size, max_model_len)
    if any_length or len(steps) > 1:
        pages = pages[-1:]
    most = config.max_num_seqs
    if not any_length or len(steps) > 1:
        # At least two: with one kernel a product a step of one row took no less time (H200, Llama-3-8B: 4.14 against 4.13 ms).
        sizes = [max(2, b) for b in np.geomspace(1, most, MAX_DECODE_BUCKETS // (2 * len(steps) * len(pages)))]
    elif most <= 64:
        # Up to 16 rows may be the persistent kernel's (pallas_kernels.decode_layer), which shares a row's keys and values out
        # over as many blocks as its rows leave: a long sequence with a row of padding beside it would have half of them.
        sizes = [*(rows for rows in (1, 2, 4, 8, 16, 32) if rows < most), most]
    else:  # up to 64 rows a step takes about as long as it does to read the weights; beyond that, rows cost
        sizes = [2, 16, *(most * i / 4 for i in (1, 2, 3, 4))]
    rows = sorted({round(float(b)) for b in sizes})
    return [DecodeBucket(b, m, k, greedy) for m in pages for b in rows for k in steps for greedy in (True, False)]


def page_buckets(page_size: int, max_model_len: int) -> list[int]:
    """Pages a row: the reference attention reads them all, so long contexts get a program for short sequences too."""
    full = -(-max_model_len // page_size)
    return [full] if max_model_len <= LONG_CONTEXT or full < 8 else [full // 8, full]


def coarse(pages: int, least: int = 0) -> int:
    """At most one in 128 fewer, eight bits and then zeros, but no fewer than `least` where there are so many: programs are
    compiled for the pool's size, and the next start finds them again though a few pages more or less are free."""
    shift = max(0, pages.bit_length() - 8)
    return max(pages >> shift << shift, min(pages, least))


def pow2_ceil(n: int) -> int:
    return 1 << (n - 1).bit_length()
