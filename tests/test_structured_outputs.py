"""Structured outputs: what is sampled through masks has its form, for every kind of tokenizer, at any tp; and what the
bans of a request leave nothing of, ends."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jsonschema
import numpy as np
import pytest
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_tokenizer import (  # noqa: F401
    LLAMA2_DECODER,
    decoders,
    mistral_file,
    package_file,
    qwen,
    qwen_metadata,
    qwen_ranks,
    qwen_vocab,
    smol,
    smol_metadata,
)
from tokenizers import pre_tokenizers

from jaxinfer import sampling, slots
from jaxinfer.request import SamplingParams, StructuredOutputsParams
from jaxinfer.sharding import make_mesh, named, round_up
from jaxinfer.slots import BANNED, GRAMMAR, STOP, SlotState
from jaxinfer.structured_outputs import GuidedTokenizer, Matcher
from jaxinfer.tokenizer import Detokenizer, Tokenizer, load_tokenizer

PADDING = 45  # ids of the model beyond the tokenizer's
SLOTS, PADDED = 16, 1 << 16  # one size for several vocabularies: they share compiled programs
SAMPLE = jax.jit(sampling.sample, static_argnames="mesh")
SET_MASKS = jax.jit(slots.set_masks, static_argnames="mesh")
ADMIT = {tp: jax.jit(slots.admit, out_shardings=slots.state_shardings(make_mesh(tp))) for tp in (1, 4)}


@pytest.fixture(scope="module")
def mistral() -> Tokenizer:
    """Sentencepiece, with a space before every text."""
    return load_tokenizer(mistral_file("v1"))


@pytest.fixture(scope="module")
def metaspace(mistral, tmp_path_factory) -> Tokenizer:
    """A small vocabulary of Llama 2's kind in a tokenizer.json."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{b:02X}>": b + 3 for b in range(256)}}
    vocab |= {piece: 259 + i for i, piece in enumerate(["▁", *'abcdefghijklmnopqrstuvwxyz0123456789{}[]":,.@', "▁a", '":'])}
    model = tokenizers.models.BPE(vocab=vocab, merges=[("▁", "a"), ('"', ":")], byte_fallback=True, unk_token="<unk>")
    hf = tokenizers.Tokenizer(model)
    hf.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    hf.decoder = decoders.Sequence(LLAMA2_DECODER)
    hf.add_special_tokens(["<s>", "</s>"])
    folder = tmp_path_factory.mktemp("metaspace")
    hf.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


TOKENIZERS = {"smol": [2, 0], "mistral": [2], "metaspace": [2], "qwen": [151645, 151643]}  # and their EOS ids


@pytest.fixture(scope="module", params=TOKENIZERS)
def guided(request) -> tuple[Tokenizer, GuidedTokenizer, list[int]]:
    tokenizer, eos = request.getfixturevalue(request.param), TOKENIZERS[request.param]
    return tokenizer, GuidedTokenizer(tokenizer, tokenizer.vocab_size + PADDING, eos), eos


@pytest.fixture(scope="module")
def small(metaspace) -> GuidedTokenizer:
    return GuidedTokenizer(metaspace, metaspace.vocab_size, [2])


def allowed(matcher: Matcher) -> np.ndarray:
    return np.flatnonzero(np.unpackbits(matcher.mask().view(np.uint8), bitorder="little"))


# ---------------------------------------------------------------------------------------------- sampled through masks

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["é", 'a"b', None, 1.5]}, "minItems": 1, "maxItems": 3},
        "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/point"}]},
    },
    "required": ["name", "age", "tags", "next"],
    "additionalProperties": False,
    "$defs": {
        "point": {
            "type": "object",
            "properties": {"x": {"type": "boolean"}, "at": {"type": "string", "format": "date"}},
            "required": ["x", "at"],
            "additionalProperties": False,
        }
    },
}
NUMBERS = {"type": "array", "items": {"type": "number", "multipleOf": 0.01, "minimum": 0, "maximum": 10}, "maxItems": 2}
CHOICES = ["yes", "yes, but", ' "no"\n\\ ', "e\u0301 名前 👩‍👩‍👧 \x01", "<s></s><|im_end|>"]
IP = r"(\d{1,3}\.){3}\d{1,3}|[0-9a-f:]{2,20}"
SUM = 'start: number ("+" number){0,3}\nnumber: /[0-9]{1,4}/ | "(" start ")"'
GBNF = 'root ::= item item? item?\nitem ::= "- " [a-z] [a-z]? "\\n"'


def fits(form: StructuredOutputsParams, text: str) -> bool:
    if form.json is not None:
        schema = form.json if isinstance(form.json, dict) else json.loads(form.json)
        jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())
        return not (form.disable_any_whitespace and re.search(r"[:,{]\s", text))
    if form.json_object:
        return isinstance(json.loads(text), dict)
    if form.choice is not None:
        return text in form.choice
    pattern = form.regex
    if form.grammar == SUM:
        assert text.count("(") == text.count(")")
        pattern = r"\(*\d{1,4}\)*(\+\(*\d{1,4}\)*)*"
    if form.grammar == GBNF:
        pattern = r"(- [a-z]{1,2}\n){1,3}"
    return re.fullmatch(pattern, text) is not None


Form = StructuredOutputsParams
ROWS: list[SamplingParams] = [
    SamplingParams(seed=i, max_tokens=None, n=1, structured_outputs=form, **change)
    for i, (form, change) in enumerate(
        [
            (Form(json=SCHEMA, disable_any_whitespace=True), {}),
            (Form(json=json.dumps(SCHEMA), whitespace_pattern="[ \n]"), {"top_p": 0.9}),
            (Form(json=SCHEMA, whitespace_pattern=" "), {"temperature": 0}),
            (Form(json=NUMBERS, disable_any_whitespace=True), {"bad_words": ["1"], "temperature": 2}),
            (Form(regex=IP), {"top_k": 3}),
            (Form(regex=IP), {"min_p": 0.2, "repetition_penalty": 1.5}),
            (Form(regex="(ab?)+"), {"min_tokens": 5}),
            (Form(choice=CHOICES), {}),
            (Form(choice=CHOICES), {"min_tokens": 2}),
            (Form(choice=CHOICES), {"temperature": 0, "presence_penalty": 1}),
            (Form(grammar=SUM), {}),
            (Form(grammar=GBNF), {"ignore_eos": True}),
            (Form(json_object=True, whitespace_pattern=" "), {}),
        ]
    )
] + [SamplingParams(seed=99, temperature=0.9, max_tokens=None)]  # and one without a form


def admitted(rows: list[SamplingParams], vocab: int, eos: list[int], bad: dict[int, list[list[int]]], tp: int) -> SlotState:
    """The requests in slots 0, 1, …; bad: row → its bad words' ids."""
    padded, mesh = max(PADDED, round_up(vocab, 4)), make_mesh(tp)
    kwargs: dict[str, Any] = {"eos_token_ids": eos, "vocab_size": vocab, "padded_vocab": padded, "max_model_len": 512}
    made = [slots.make_row(params, [5, 6], bad_words_ids=bad.get(b, []), **kwargs) for b, params in enumerate(rows)]
    state = slots.init_state(SLOTS, padded, mesh)
    return ADMIT[tp](state, np.arange(len(rows)), jax.tree.map(lambda *leaves: np.stack(leaves), *made))


def masked(state: SlotState, masks: dict[int, np.ndarray], tp: int) -> SlotState:
    """State with the masks (of slots) set."""
    slot_A = np.full(SLOTS, SLOTS, np.int32)
    slot_A[: len(masks)] = list(masks)
    mask_AW = np.zeros((SLOTS, len(next(iter(masks.values())))), np.uint32)
    mask_AW[: len(masks)] = list(masks.values())
    return SET_MASKS(state, slot_A, mask_AW, mesh=make_mesh(tp))


def step(logits: np.ndarray, state: SlotState, tp: int) -> tuple[list[int], SlotState]:
    padded = np.full((SLOTS, state.flags_SV.shape[1]), -np.inf, np.float32)
    padded[: len(logits), : logits.shape[1]] = logits
    slot_B, active_B, mesh = np.arange(SLOTS), np.arange(SLOTS) < len(logits), make_mesh(tp)
    output, state = SAMPLE(jax.device_put(padded, named(mesh, "BV")), state, slot_B, active_B, mesh=mesh)
    return np.asarray(output.token_B)[: len(logits)].tolist(), state


def run(tokenizer: Tokenizer, guided: GuidedTokenizer, eos: list[int], rows: list[SamplingParams], tp: int) -> list[list[int]]:
    """The tokens of requests of a model with random logits, as an engine makes them: mask, sample, accept."""
    bad = {b: tokenizer.bad_words_ids(params.bad_words) for b, params in enumerate(rows) if params.bad_words}
    state = admitted(rows, guided.vocab_size, eos, bad, tp)
    matchers = {b: Matcher(guided.compile(p.structured_outputs)) for b, p in enumerate(rows) if p.structured_outputs}
    ends = [*eos, *(i for i in range(tokenizer.vocab_size) if tokenizer.id_to_bytes(i) in (b'"', b"}"))]
    rng, tokens = np.random.default_rng(0), [[] for _ in rows]
    while matchers and max(map(len, tokens)) < 200:
        masks, errors = guided.masks(list(matchers.values()))
        assert not any(errors)
        state = masked(state, dict(zip(matchers, masks)), tp)
        logits = rng.normal(size=(len(rows), guided.vocab_size)).astype(np.float32) * 2
        logits[:, ends] += np.log(guided.vocab_size)  # or strings would go on for long
        new, state = step(logits, state, tp)
        finished_S = np.asarray(state.finished_S)
        for b, token in enumerate(new):
            if token >= 0:
                tokens[b].append(token)
            if b in matchers and token >= 0:
                matchers[b].accept(token)
            elif b in matchers:  # min_tokens bans EOS, and the grammar all else
                assert matchers[b].may_end and finished_S[b] and len(tokens[b]) < rows[b].min_tokens
                del matchers[b]
            if b in matchers and matchers[b].finished:
                del matchers[b]
                state = dataclasses.replace(state, finished_S=state.finished_S.at[b].set(True))
    assert not matchers, [tokenizer.decode(tokens[b]) for b in matchers]
    return tokens


def test_every_sampled_output_has_its_form(guided):
    tokenizer, form, eos = guided
    rows = ROWS if tokenizer.vocab_size < 100_000 else ROWS[::4]
    for params, ids in zip(rows, run(tokenizer, form, eos, rows, tp=1)):
        if params.structured_outputs is None:
            continue
        stream = Detokenizer(tokenizer, [5, 300])
        text = stream.add(ids) + stream.flush()
        assert fits(params.structured_outputs, text), (params.structured_outputs, text)
        assert len(ids) >= params.min_tokens or text in CHOICES
        assert max(ids) < tokenizer.vocab_size
        assert not set(ids[:-1]) & (set(eos) | tokenizer.special_ids)


@pytest.mark.slow
def test_tp_4_gives_the_same_tokens(metaspace):
    guided = GuidedTokenizer(metaspace, metaspace.vocab_size + PADDING, [2])
    assert run(metaspace, guided, [2], ROWS, tp=4) == run(metaspace, guided, [2], ROWS, tp=1)


# ------------------------------------------------------------------------------------------------------ on the device


def bits(ids: list[int], words: int = 12) -> np.ndarray:
    mask = np.zeros(32 * words, np.uint8)
    mask[ids] = 1
    return np.packbits(mask, bitorder="little").view(np.uint32)


@pytest.mark.parametrize("tp", [1, 4])
def test_masks_are_set_bit_by_bit(tp):
    """Of the slots named, of tokens within the words; and nothing else changes, until a slot is admitted anew."""
    rows = [SamplingParams(seed=0, stop_token_ids=[7], allowed_token_ids=[7, 8, 9] if b == 1 else None) for b in range(6)]
    before = admitted(rows, 400, [2], {}, tp)
    rng = np.random.default_rng(tp)
    old, new = rng.integers(0, 2**32, (2, 3, 12), dtype=np.uint32)
    state = masked(masked(before, dict(zip((1, 3, 4), old)), tp), dict(zip((3, 0, 1), new)), tp)
    want = np.array(before.flags_SV)
    for slot, mask in ((4, old[2]), (3, new[0]), (0, new[1]), (1, new[2])):
        allow = np.unpackbits(mask.view(np.uint8), bitorder="little").astype(bool)
        want[slot, : len(allow)] |= np.where(allow, 0, GRAMMAR).astype(np.uint8)
        want[slot, len(allow) :] |= GRAMMAR
    assert np.array_equal(state.flags_SV, want)
    assert (want[1, 10:] & BANNED).all() and (want[:6, 7] & STOP).all()
    for field in dataclasses.fields(SlotState):
        if field.name != "flags_SV":
            assert np.array_equal(getattr(state, field.name), getattr(before, field.name)), field.name
    again = ADMIT[tp](state, 3, slots.make_row(
        rows[3], [5, 6], eos_token_ids=[2], bad_words_ids=[], vocab_size=400, padded_vocab=PADDED, max_model_len=512
    ))  # fmt: skip
    assert np.array_equal(again.flags_SV[3], before.flags_SV[3]) and np.array_equal(again.flags_SV[1], want[1])
    assert again.flags_SV.sharding == before.flags_SV.sharding


@pytest.mark.parametrize("tp", [1, 4])
def test_where_bans_leave_no_token_the_row_ends(tp):
    plain: dict[str, Any] = {"seed": 3, "max_tokens": 40}
    rows = [
        SamplingParams(**plain, min_tokens=2),
        SamplingParams(**plain, allowed_token_ids=[9], presence_penalty=1),
        SamplingParams(**plain, temperature=0, bad_words=["x"]),
        SamplingParams(**plain, allowed_token_ids=[5], bad_words=["x"]),  # without a grammar too
        SamplingParams(**plain, logprobs=1),
        SamplingParams(**plain, temperature=0, logit_bias={8: -100}),
        SamplingParams(**plain, top_p=0.9),
        SamplingParams(**plain, top_k=2),
    ]
    before = admitted(rows, 400, [2], {2: [[7]], 3: [[5]]}, tp)
    masks = {b: bits([7, 8]) for b in (1, 4, 5, 7)} | {0: bits([2]), 2: bits([7])}
    logits = np.random.default_rng(0).normal(size=(len(rows), 400)).astype(np.float32)
    logits[:, 8], logits[7] = 9, np.nan
    tokens, state = step(logits, masked(before, masks, tp), tp)
    unmasked, _ = step(logits, before, tp)
    assert tokens[:4] == [-1] * 4 and unmasked[3] == -1 and -1 not in unmasked[:3]
    assert tokens[4:] == [8, 7, unmasked[6], tokens[7]] and tokens[7] in (7, 8)
    assert np.asarray(state.finished_S)[:8].tolist() == [True] * 4 + [False] * 4
    for field in dataclasses.fields(SlotState):
        if field.name not in ("finished_S", "flags_SV"):
            assert np.array_equal(getattr(state, field.name)[:4], getattr(before, field.name)[:4]), field.name
    tokens, state = step(logits, masked(state, {4: bits([11]), 5: bits([2])}, tp), tp)
    assert tokens[:6] == [-1] * 4 + [11, 2]
    assert np.asarray(state.finished_S)[4:6].tolist() == [False, True]


# ------------------------------------------------------------------------------------------------------- on the host


def walk(tokenizer: Tokenizer, matcher: Matcher, rng: np.random.Generator) -> list[int]:
    tokens = []
    while not matcher.finished:
        tokens.append(int(rng.choice(allowed(matcher))))
        matcher.accept(tokens[-1])
    return tokens


@functools.cache
def spelled(tokenizer: Tokenizer) -> set[int]:
    """Bytes that have a token of their own; SmolLM2 lacks a few."""
    tokens = (tokenizer.id_to_bytes(i) for i in range(tokenizer.vocab_size) if i not in tokenizer.special_ids)
    return {data[0] for data in tokens if len(data) == 1}


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(' ae\u0301<s>\\"\n')), min_size=1))
def test_any_text_can_be_forced(guided, text):
    """Its exact bytes come, also where the tokenizer itself would normalize, put a space before, or see special tokens."""
    tokenizer, form, _ = guided
    assume(set(text.encode()) <= spelled(tokenizer))
    tokens = walk(tokenizer, Matcher(form.compile(Form(choice=[text]))), np.random.default_rng(0))
    assert b"".join(map(tokenizer.id_to_bytes, tokens)) == text.encode()
    assert not set(tokens) & tokenizer.special_ids


def test_text_that_the_vocabulary_cannot_spell(smol):  # noqa: F811
    guided = GuidedTokenizer(smol, smol.vocab_size, [2])
    with pytest.raises(ValueError, match="choice cannot be compiled: no token fits"):
        guided.compile(Form(choice=["\x04"]))
    with pytest.raises(RuntimeError, match="structured_outputs: no token fits"):
        walk(smol, Matcher(guided.compile(Form(choice=["a\x04"]))), np.random.default_rng(0))


def test_forced_text_has_the_models_own_tokens(smol, mistral):  # noqa: F811
    for tokenizer, pieces in ((smol, ["hello", "Ġworld", "!"]), (mistral, ["hello", "▁world", "!"])):
        guided = GuidedTokenizer(tokenizer, tokenizer.vocab_size, [2])
        matcher = Matcher(guided.compile(Form(choice=["hello world!"])))
        assert [tokenizer.id_to_token(i) for i in walk(tokenizer, matcher, np.random.default_rng(0))] == pieces


def test_eos_is_allowed_exactly_where_the_output_may_end(guided):
    tokenizer, form, eos = guided
    matcher = Matcher(form.compile(Form(regex="[ab]([cd][ef])?")))

    def take(data: bytes) -> None:
        matcher.accept(next(int(i) for i in allowed(matcher) if tokenizer.id_to_bytes(i) == data))

    for data, ends in ((b"a", False), (b"d", True), (b"e", False)):
        assert set(eos) <= set(allowed(matcher)) if ends else not set(eos) & set(allowed(matcher))
        assert matcher.may_end == ends and not matcher.finished
        take(data)
    assert matcher.finished and matcher.may_end and set(allowed(matcher)) == set(eos)
    early = Matcher(form.compile(Form(regex="a+")))
    early.accept(int(allowed(early)[0]))
    early.accept(eos[-1])
    assert early.finished


def test_only_tokens_of_the_models_vocabulary(smol):  # noqa: F811
    """Of a model with more ids than the tokenizer, and of one with fewer."""
    for vocab in (smol.vocab_size + 100, 1000):
        guided = GuidedTokenizer(smol, vocab, [2, 10**6])
        matcher = Matcher(guided.compile(Form(regex="(?s:.*)")))
        ids = allowed(matcher)
        assert len(matcher.mask()) == -(-vocab // 32) and ids.max() < min(vocab, smol.vocab_size)
        assert set(ids) & smol.special_ids == {2}
        assert len(ids) > 0.9 * min(vocab, smol.vocab_size)
        assert np.array_equal(guided.masks([matcher])[0], [matcher.mask()])
        assert guided.masks([])[0].shape == (0, -(-vocab // 32))
    with pytest.raises(ValueError, match=r"eos_token_ids \[1000\] none is below 1000; set eos_token_id"):
        GuidedTokenizer(smol, 1000, [1000])


def test_a_token_that_does_not_fit(small):
    matcher = Matcher(small.compile(Form(regex="ab")))
    for _ in range(2):  # and it stays in error
        with pytest.raises(RuntimeError, match=r"structured_outputs: .*doesn't satisfy the grammar"):
            matcher.accept(2)
    with pytest.raises(RuntimeError, match="doesn't satisfy"):
        matcher.mask()
    well = Matcher(small.compile(Form(regex="ab")))
    masks, errors = small.masks([matcher, well])
    assert errors == [matcher.error, None] and np.array_equal(masks[1], well.mask())


def test_compile_in_threads_and_one_grammar_for_many(small, metaspace):
    forms = [Form(regex=f"[ab]{{{n}}}") for n in (1, 2, 3)] * 20

    def outputs(form: StructuredOutputsParams) -> list[list[int]]:
        return [walk(metaspace, Matcher(small.compile(form)), np.random.default_rng(seed)) for seed in range(4)]

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(outputs, forms)) == [outputs(form) for form in forms]
    assert small.compile(Form(regex="[ab]{1}")) is small.compile(Form(regex="[ab]{1}"))
    spaced = small.compile(Form(json={}))
    assert spaced is small.compile(Form(json="{}")) and spaced is not small.compile(Form(json={}, disable_any_whitespace=True))


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"regex": "(a"}, "regex cannot be compiled: .*unclosed group"),
        ({"regex": "(?=a)b"}, "regex cannot be compiled: .*look-around"),
        ({"regex": r"[^\s\S]"}, "regex cannot be compiled: no token fits"),
        ({"json": {"type": "objec"}}, "json cannot be compiled: Invalid type: objec"),
        ({"json": {"uniqueItems": True}}, "json cannot be compiled: .*uniqueItems"),
        ({"json": {"$ref": "#/$defs/x"}}, "json cannot be compiled: .*/\\$defs/x"),
        ({"json_object": True, "whitespace_pattern": "("}, "json_object cannot be compiled: .*unclosed"),
        ({"grammar": "start: nothing"}, "grammar cannot be compiled: .*unknown name"),
        ({"grammar": "root ::= nothing"}, "grammar cannot be compiled: .*nothing"),
    ],
)
def test_what_cannot_be_compiled_says_why(small, form, message):
    with pytest.raises(ValueError, match=f"(?s)structured_outputs.{message}"):
        small.compile(Form(**form))


def test_warnings_are_logged(small, caplog):
    small.compile(Form(json={"x-guidance": {"lenient": True}, "uniqueItems": True}))
    assert re.search("structured_outputs.json: .*uniqueItems", caplog.text)


# ------------------------------------------------------------------------------------------------------- the parameters


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({}, " must be exactly one of json, regex, choice, grammar, json_object, got None"),
        ({"json_object": False}, "exactly one of"),
        ({"regex": "a", "json": {}}, "exactly one of .*got \\['json', 'regex'\\]"),
        ({"json": "{"}, "json must be a JSON Schema.*got '{'"),
        ({"json": "[1]"}, "json must be a JSON Schema"),
        ({"json": {"a": {1}}}, "json must be a JSON Schema.*not JSON serializable"),
        ({"json": {"const": float("nan")}}, "json must be a JSON Schema"),
        *[({"regex": v}, "regex must be a string that is not empty") for v in ("", 5)],
        ({"grammar": ""}, "grammar must be a string that is not empty"),
        *[({"choice": v}, "choice must be a list") for v in ([], [""], "yes", [1])],
        ({"json_object": 1}, "json_object must be True or False"),
        ({"json": {}, "disable_any_whitespace": "no"}, "disable_any_whitespace must be True or False"),
        ({"json": {}, "whitespace_pattern": ""}, "whitespace_pattern must be a string that is not empty"),
        ({"regex": "a", "disable_any_whitespace": True}, "with json or json_object"),
        ({"choice": ["a"], "whitespace_pattern": " "}, "with json or json_object"),
        ({"json": {}, "disable_any_whitespace": True, "whitespace_pattern": " "}, "one of these options at most"),
    ],
)
def test_refused_params_name_the_field(form, message):
    with pytest.raises(ValueError, match=f"SamplingParams: structured_outputs.*{message}"):
        Form(**form)


def test_sampling_params_take_a_form_and_share_nothing():
    schema = {"type": "object", "required": ["a"]}
    params = SamplingParams(temperature=0, structured_outputs=Form(json=schema))
    assert params.structured_outputs.kind == "json" and not params.is_plain_greedy
    copy = params.clone()
    schema["required"].append("b")
    assert copy == params and copy.structured_outputs.json["required"] == ["a"]
    assert copy.structured_outputs is not params.structured_outputs
    assert copy.structured_outputs.json["required"] is not params.structured_outputs.json["required"]
    with pytest.raises(ValueError, match=r"structured_outputs must be None or a StructuredOutputsParams, got \{'reg"):
        SamplingParams(structured_outputs={"regex": "a"})
