"""Outputs of a given form: a JSON schema, a regex, a choice or a grammar, as masks over the vocabulary.

`GuidedTokenizer.compile` makes a grammar of a request's StructuredOutputsParams; each of its sequences walks it with a
`Matcher` of its own: a mask before a token is sampled, `accept` after. Grammars, lexing and the walk over the vocabulary's
trie are llguidance's (Moskal et al., "Making Structured Outputs Go Brrr", 2025); here it learns our tokenizers' bytes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import llguidance
import numpy as np

from jaxinfer.request import StructuredOutputsParams
from jaxinfer.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_CACHED_GRAMMARS = 64
_SENTINEL = "\x02"  # a byte token in every vocabulary with byte fallback, and part of no longer one


@dataclass(frozen=True)
class Grammar:
    """A compiled grammar. Any number of matchers may start from it, in any thread."""

    start: llguidance.LLMatcher
    vocab_size: int


class GuidedTokenizer:
    """A vocabulary as llguidance sees it: what `compile` needs. Building it takes half a second for 150 000 tokens.

    Args:
        tokenizer: gives the tokens' bytes.
        vocab_size: the model's. Tokens beyond it are left out, ids without a token are never allowed.
        eos_token_ids: allowed where the grammar may end, and only there.

    Raises:
        ValueError: no EOS id within the vocabulary.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Iterable[int]) -> None:
        ids, count = sorted(eos_token_ids), min(vocab_size, tokenizer.vocab_size)
        eos = [i for i in ids if i < count]
        if not eos:
            raise ValueError(
                f"structured_outputs need an EOS token to end with, but of the eos_token_ids {ids} none is below {count}; "
                "set eos_token_id in the model's config.json or generation_config.json"
            )
        self.vocab_size = vocab_size
        wrapper = llguidance.TokenizerWrapper(_Vocabulary(tokenizer, vocab_size, eos))
        self._vocabulary = llguidance.LLTokenizer(wrapper, eos_token=eos)
        self._limits = llguidance.LLParserLimits(verbose_errors=False)
        self._executor = llguidance.LLExecutor()
        self._compiled = lru_cache(_CACHED_GRAMMARS)(self._compile)

    def compile(self, params: StructuredOutputsParams) -> Grammar:
        """The grammar of a request: milliseconds, or a part of a second for a large one; thread-safe. The last 64 are kept.

        Raises:
            ValueError: llguidance cannot follow it; names the field and says why.
        """
        if params.json is not None:
            try:
                text = params.json if isinstance(params.json, str) else json.dumps(params.json)
            except RecursionError as error:
                raise ValueError("structured_outputs.json cannot be compiled: it is nested too deep") from error
        elif params.choice is not None:
            # Lark's strings are JSON's, all in printable ASCII.
            text = "start: " + " | ".join(json.dumps(choice).replace("\x7f", r"\u007f") for choice in params.choice)
        else:
            text = params.regex or params.grammar or '{"type": "object"}'
        return self._compiled(params.kind, text, not params.disable_any_whitespace, params.whitespace_pattern)

    def _compile(self, kind: str, text: str, whitespace: bool, whitespace_pattern: str | None) -> Grammar:
        try:
            if kind == "regex":
                grammar = llguidance.LLMatcher.grammar_from_regex(text)
            elif kind == "choice":
                grammar = llguidance.LLMatcher.grammar_from_lark(text)
            elif kind == "grammar":
                grammar = llguidance.grammar_from("grammar", text)
            else:
                options: Any = {"whitespace_flexible": whitespace, "whitespace_pattern": whitespace_pattern}
                grammar = llguidance.LLMatcher.grammar_from_json_schema(text, defaults=options)
        except ValueError as error:
            raise ValueError(f"structured_outputs.{kind} cannot be compiled: {error}") from error
        matcher = llguidance.LLMatcher(self._vocabulary, grammar, log_level=0, limits=self._limits)
        matcher.compute_bitmask()  # whether anything fits at all; and matchers then start with a warm lexer
        if matcher.is_error():
            raise ValueError(f"structured_outputs.{kind} cannot be compiled: {_reason(matcher)}")
        for warning in matcher.get_grammar_warnings():
            logger.warning("structured_outputs.%s: %s", kind, warning)
        return Grammar(matcher, self.vocab_size)

    def masks(self, matchers: Sequence[Matcher]) -> tuple[np.ndarray, list[str | None]]:
        """uint32 [A, ceil(vocab_size / 32)]: `Matcher.mask` of several matchers of this vocabulary, on several cores; and what
        is wrong with each of them (`Matcher.error`), so that one that fails need not fail the others."""
        masks_AW = np.zeros((len(matchers), -(-self.vocab_size // 32)), np.uint32)
        pairs = [(matcher._matcher, a) for a, matcher in enumerate(matchers)]
        if pairs:
            self._executor.unsafe_compute_mask_ptr(pairs, masks_AW.ctypes.data, masks_AW.strides[0], len(pairs))
        return masks_AW, [matcher.error for matcher in matchers]


class _Vocabulary:
    """What llguidance.TokenizerWrapper asks of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos: list[int]) -> None:
        count = min(vocab_size, tokenizer.vocab_size)
        specials = {i for i in tokenizer.special_ids if i < count} | set(eos)
        self.eos_token_id = eos[0]
        self.bos_token_id = tokenizer.bos_token_id
        self.special_token_ids = sorted(specials)
        self.tokens = [tokenizer.id_to_bytes(i) for i in range(count)] + [b""] * (vocab_size - count)
        self._tokenizer = tokenizer
        self._ids = {data: i for i, data in reversed(list(enumerate(self.tokens))) if data and i not in specials}
        self._longest = max(map(len, self._ids), default=0)

    def __call__(self, text: str) -> list[int]:
        """The tokens for a text that the grammar leaves no choice of: the model's own where these are exactly its bytes (no
        special tokens, no space before it, nothing normalized), else the longest that fit."""
        before = _SENTINEL if self._tokenizer.strip_first_space else ""
        skip = len(self._tokenizer.encode(before, add_special_tokens=False))
        own = self._tokenizer.encode(before + text, add_special_tokens=False)[skip:]
        data = text.encode()
        if b"".join(self.tokens[i] for i in own) == data and not any(i in self.special_token_ids for i in own):
            return own
        ids: list[int] = []
        while data:
            end = next((n for n in range(self._longest, 0, -1) if data[:n] in self._ids), 0)
            if not end:  # the vocabulary cannot spell it: the matcher ends in an error
                break
            ids.append(self._ids[data[:end]])
            data = data[end:]
        return ids


class Matcher:
    """Where one sequence stands in its grammar. Not thread-safe."""

    def __init__(self, grammar: Grammar) -> None:
        self._matcher = grammar.start.deep_copy()
        self._vocab_size = grammar.vocab_size

    def mask(self) -> np.ndarray:
        """uint32 [ceil(vocab_size / 32)], the lowest bit first: 1 for tokens that may come next. Never empty; EOS is among
        them exactly where the output may end here.

        Raises:
            RuntimeError: the grammar became too complex for llguidance, or asks for bytes that no token spells.
        """
        mask_W = np.zeros(-(-self._vocab_size // 32), np.uint32)
        self._matcher.unsafe_compute_mask_ptr(mask_W.ctypes.data, mask_W.nbytes)
        self._check()
        return mask_W

    def accept(self, token: int) -> None:
        """Go on past a sampled token.

        Raises:
            RuntimeError: the mask did not allow it.
        """
        self._matcher.consume_token(token)
        self._check()

    @property
    def finished(self) -> bool:
        """Nothing can follow: EOS was accepted, or is all that the grammar has left."""
        return self._matcher.is_stopped()

    @property
    def may_end(self) -> bool:
        """The output so far is complete, whether or not more may follow."""
        return self._matcher.is_accepting()

    @property
    def error(self) -> str | None:
        """Why it cannot go on; it then stays so, and its masks mean nothing."""
        return f"structured_outputs: {_reason(self._matcher)}" if self._matcher.is_error() else None

    def _check(self) -> None:
        if (error := self.error) is not None:
            raise RuntimeError(error)


def _reason(matcher: llguidance.LLMatcher) -> str:
    return matcher.get_error().removesuffix("<non-verbose/>").strip().replace("NoExtensionBias", "no token fits")
