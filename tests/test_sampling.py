"""Sampling against an independent numpy account of vLLM's semantics, and the promises of DESIGN.md: the same tokens at
any tp, padding, slot and batch, after any restart; thresholds exact; no row harms another; no logits are gathered."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.extend.random
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import sampling
from jaxinfer import slots as slots_module
from jaxinfer.request import SamplingParams
from jaxinfer.sampling import SampleOutput
from jaxinfer.sharding import make_mesh, named, round_up, spec
from jaxinfer.slots import SlotState

VOCAB, SLOTS, EOS = 203, 16, 2  # 203 does not divide over 2, 4 or 8
TPS = (1, 2, 4, 8)
SAMPLE = jax.jit(sampling.sample, static_argnames=("mesh", "unrolled"))
GREEDY_SAMPLE = jax.jit(sampling.greedy_sample, static_argnames="mesh")
mesh_of = functools.cache(make_mesh)


@functools.cache
def admit_of(tp: int) -> Any:
    return jax.jit(slots_module.admit, out_shardings=slots_module.state_shardings(mesh_of(tp)))


@functools.cache
def empty(slots: int, padded_vocab: int, tp: int) -> SlotState:
    return slots_module.init_state(slots, padded_vocab, mesh_of(tp))


@dataclasses.dataclass
class Row:
    """A request: what the sampler is told of it, and what the reference needs."""

    params: SamplingParams
    prompt: list[int] = dataclasses.field(default_factory=lambda: [1, 3, 5])
    output: list[int] = dataclasses.field(default_factory=list)
    bad: list[list[int]] = dataclasses.field(default_factory=list)
    index: int = 0


def made(row: Row, vocab: int, padded: int) -> slots_module.SlotRow:
    return slots_module.make_row(
        row.params,
        row.prompt,
        row.output,
        eos_token_ids=(EOS,),
        bad_words_ids=row.bad,
        vocab_size=vocab,
        padded_vocab=padded,
        max_model_len=64,
        sample_index=row.index,
    )


def start(rows: Sequence[Row], tp: int = 1, vocab: int = VOCAB, slots: Sequence[int] | None = None) -> SlotState:
    padded = round_up(vocab, tp)
    state = empty(max(SLOTS, len(rows)), padded, tp)
    for slot, row in zip(slots or range(len(rows)), rows):
        state = admit_of(tp)(state, np.int32(slot), made(row, vocab, padded))
    return state


def step(
    logits: np.ndarray,
    state: SlotState,
    tp: int = 1,
    *,
    slots: Sequence[int] | None = None,
    active: Sequence[bool] | None = None,
    greedy: bool = False,
) -> tuple[SampleOutput, SlotState]:
    """One step. Up to SLOTS rows are padded to SLOTS with inactive ones, so that few shapes are compiled."""
    n, V = logits.shape
    B = max(n, SLOTS)
    padded = np.full((B, round_up(V, tp)), -np.inf, np.float32)
    padded[:n, :V] = logits
    slot_B, active_B = np.zeros(B, np.int32), np.zeros(B, bool)
    slot_B[:n] = range(n) if slots is None else slots
    active_B[:n] = True if active is None else active
    put = functools.partial(jax.device_put, device=named(mesh_of(tp), "BV"))
    if greedy:
        output, state = GREEDY_SAMPLE(*map(put, best_of(padded, tp)), state, slot_B, active_B, mesh=mesh_of(tp))
    else:
        output, state = SAMPLE(put(padded), state, slot_B, active_B, mesh=mesh_of(tp))
    return jax.tree.map(lambda a: a[:n], output), state


def best_of(logits: np.ndarray, tp: int) -> tuple[np.ndarray, np.ndarray]:
    """Each shard's largest logit and its id, [B, tp], as Transformer.argmax gives them."""
    shards = np.where(np.isnan(logits), -np.inf, logits).reshape(len(logits), tp, -1)
    id_BX = shards.argmax(axis=2) + np.arange(tp) * shards.shape[2]
    return shards.max(axis=2), id_BX.astype(np.int32)


def tokens_of(logits: np.ndarray, rows: Sequence[Row], tp: int = 1) -> list[int]:
    return np.asarray(step(logits, start(rows, tp, logits.shape[1]), tp)[0].token_B).tolist()


# The reference: one row, float64, in the words of vLLM's sampler.


def reference_logits(logits: np.ndarray, row: Row) -> np.ndarray:
    p, x = row.params, logits.astype(np.float64)
    if p.allowed_token_ids is not None:
        x[[i for i in range(len(x)) if i not in p.allowed_token_ids]] = -np.inf
    for ids in row.bad:
        before = ids[:-1]
        if len(before) <= len(row.output) and row.output[len(row.output) - len(before) :] == before:
            x[ids[-1]] = -np.inf
    if len(row.output) < p.min_tokens:
        x[list(p.stop_token_ids or ()) + ([] if p.ignore_eos else [EOS])] = -np.inf
    for i, bias in (p.logit_bias or {}).items():
        x[i] += bias
    counts = np.bincount(row.output, minlength=len(x))
    seen = (np.bincount(row.prompt, minlength=len(x)) + counts) > 0
    x[seen] = np.where(x[seen] > 0, x[seen] / p.repetition_penalty, x[seen] * p.repetition_penalty)
    return x - p.frequency_penalty * counts - p.presence_penalty * (counts > 0)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def reference_kept(x: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Which tokens min_p, top_k and top_p leave, of logits already divided by the temperature."""
    x = x.copy()
    probs = softmax(x)
    x[probs < params.min_p * probs.max()] = -np.inf
    if params.top_k > 0:
        x[x < np.sort(x)[::-1][min(params.top_k, len(x)) - 1]] = -np.inf
    if params.top_p < 1:
        order = np.argsort(x, kind="stable")
        dropped = np.cumsum(softmax(x)[order]) <= 1 - float(np.float32(params.top_p))
        dropped[-1] = False
        kept_values = x[order][~dropped]
        x[x < kept_values.min()] = -np.inf
    return x > -np.inf


def reference_noise(row: Row, V: int) -> np.ndarray:
    seed = (row.params.seed or 0) % 2**64
    block = jax.extend.random.threefry_2x32
    seed_words = (np.uint32(seed % 2**32), np.uint32(seed // 2**32))
    key = np.asarray(block(seed_words, np.array([row.index, 0], np.uint32)))
    position = np.full(V, len(row.prompt) + len(row.output), np.uint32)
    bits = np.asarray(block((key[0], key[1]), np.concatenate([position, np.arange(V, dtype=np.uint32)])))[:V]
    return -np.log(-np.log1p(-(bits + 0.5) / 2.0**32))


def reference_token(logits: np.ndarray, row: Row) -> int:
    x = reference_logits(logits, row)
    if row.params.temperature < 1e-5:
        return int(np.argmax(x))
    y = x / row.params.temperature
    return int(np.argmax(np.where(reference_kept(y, row.params), y + reference_noise(row, len(y)), -np.inf)))


def random_row(rng: np.random.Generator) -> Row:
    def maybe(value: Any, default: Any) -> Any:
        return value if rng.random() < 0.5 else default

    ids = rng.integers(0, VOCAB, 60).tolist()
    params = SamplingParams(
        temperature=maybe(float(rng.uniform(0.3, 3)), maybe(0.0, 1.0)),
        top_k=maybe(int(rng.integers(1, 250)), maybe(-1, 0)),
        top_p=maybe(float(rng.uniform(0.01, 1)), 1.0),
        min_p=maybe(float(rng.uniform(0, 0.3)), 0.0),
        presence_penalty=maybe(float(rng.uniform(-2, 2)), 0.0),
        frequency_penalty=maybe(float(rng.uniform(-2, 2)), 0.0),
        repetition_penalty=maybe(float(rng.uniform(0.5, 2)), 1.0),
        min_tokens=maybe(int(rng.integers(0, 6)), 0),
        stop_token_ids=maybe(ids[:3], None),
        ignore_eos=bool(rng.random() < 0.5),
        logit_bias=maybe(dict(zip(ids[3:9], rng.uniform(-10, 10, 6).tolist())), None),
        allowed_token_ids=maybe(ids[9:50], None),
        logprobs=maybe(5, None),
        seed=int(rng.integers(-(2**63), 2**63)),
        max_tokens=40,
    )
    output = rng.integers(0, VOCAB, rng.integers(0, 6)).tolist()
    bad = [ids[50:51], ids[51:53], output[-2:] + ids[53:54]]
    prompt = rng.integers(0, VOCAB, rng.integers(1, 9)).tolist()
    return Row(params, prompt, output, maybe(bad, []), index=int(rng.integers(0, 3)))


@pytest.mark.parametrize("seed", range(6))
def test_every_parameter_at_once_over_steps_and_tp(seed):
    """Random requests, four steps each: tp 1 = 2 = 4 = 8 = the reference, whose outputs grow with ours."""
    rng = np.random.default_rng(seed)
    rows = [random_row(rng) for _ in range(SLOTS)]
    states = {tp: start(rows, tp) for tp in TPS}
    alive = [True] * SLOTS
    for _ in range(4):
        logits = (rng.normal(size=(SLOTS, VOCAB)) * rng.uniform(0.5, 4, (SLOTS, 1))).astype(np.float32)
        expected = [reference_token(logits[b], rows[b]) if alive[b] else -1 for b in range(SLOTS)]
        for tp in TPS:
            output, states[tp] = step(logits, states[tp], tp)
            assert np.asarray(output.token_B).tolist() == expected, f"tp={tp}"
        for b, row in enumerate(rows):
            if alive[b]:
                row.output.append(expected[b])
                stops = list(row.params.stop_token_ids or ()) + ([] if row.params.ignore_eos else [EOS])
                alive[b] = expected[b] not in stops
        for tp in TPS:
            assert (~np.asarray(states[tp].finished_S)).tolist() == alive
            lengths = [len(row.prompt) + len(row.output) for row in rows]
            assert np.asarray(states[tp].length_S).tolist() == lengths


ONE_CHANGE: list[dict[str, Any]] = [
    {"temperature": 0.7},
    {"temperature": 5.0},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 10_000},
    {"top_p": 1e-9},
    {"top_p": 0.3},
    {"top_p": 0.95},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"presence_penalty": 1.7},
    {"frequency_penalty": -1.3},
    {"repetition_penalty": 1.9},
    {"repetition_penalty": 0.4},
    {"logit_bias": {4: 30.0, 9: -100.0}},
    {"allowed_token_ids": [8, 77, 200]},
]


def test_each_transform_alone():
    """One parameter a slot, many logits: equals the reference."""
    rows = [Row(SamplingParams(seed=11 + i, **c), [4, 9, 9], [9, 9, 30, 4]) for i, c in enumerate(ONE_CHANGE)]
    assert len(rows) == SLOTS
    state, rng = start(rows), np.random.default_rng(0)
    for _ in range(40):
        logits = (rng.normal(size=(SLOTS, VOCAB)) * 3).astype(np.float32)
        got = np.asarray(step(logits, state)[0].token_B).tolist()
        assert got == [reference_token(logits[b], rows[b]) for b in range(SLOTS)]


@functools.cache
def kept_of(tp: int, unrolled: bool) -> Any:
    specs = jax.tree.map(lambda sharding: sharding.spec, slots_module.state_shardings(mesh_of(tp)))

    def shard(y_BV: jax.Array, state: SlotState) -> jax.Array:
        slot_B, hot_B = jnp.arange(len(y_BV)), jnp.ones(len(y_BV), bool)
        return sampling._ordered(y_BV) >= sampling._floor(y_BV, state, slot_B, hot_B, tp, unrolled)[:, None]

    return jax.jit(jax.shard_map(shard, mesh=mesh_of(tp), in_specs=(spec("BV"), specs), out_specs=spec("BV"), check_vma=False))


def kept_mask(logits: np.ndarray, rows: Sequence[Row], tp: int) -> np.ndarray:
    """Which tokens a row may draw (logits of one row each, temperature 1, nothing banned)."""
    B, V = logits.shape
    padded = np.full((B, round_up(V, tp)), -np.inf, np.float32)
    padded[:, :V] = logits
    looped, unrolled = (np.asarray(kept_of(tp, way)(padded, start(rows, tp, V)))[:, :V] for way in (False, True))
    assert np.array_equal(looped, unrolled)
    return unrolled


@pytest.mark.parametrize("tp", [1, 8])
def test_top_k_keeps_exactly_the_ties(tp):
    rng = np.random.default_rng(1)
    rows = [Row(SamplingParams(top_k=k, seed=0)) for k in (1, 2, 3, 10, 50, 70, 75, 100, VOCAB - 1, VOCAB)]
    logits = rng.integers(-6, 6, (len(rows), VOCAB)).astype(np.float32)
    logits[logits == 3] *= -0.0  # both zeros are one value
    for b, (row, mask) in enumerate(zip(rows, kept_mask(logits, rows, tp))):
        kth = np.sort(logits[b])[::-1][row.params.top_k - 1]
        assert (mask == (logits[b] >= kth)).all()


@pytest.mark.parametrize("tp", [1, 8])
def test_top_p_is_exact_on_a_flat_vocabulary_of_128k(tp):
    rng, V = np.random.default_rng(2), 128_003
    rows = [Row(SamplingParams(top_p=p, seed=0)) for p in (0.9, 0.5, 0.999)]
    logits = (rng.permutation(V) * np.float32(1e-5))[None].repeat(len(rows), 0)
    mask = kept_mask(logits, rows, tp)
    for b, row in enumerate(rows):
        probs = np.sort(softmax(logits[b].astype(np.float64)))[::-1]
        count = int(np.sum(np.cumsum(probs) - probs < float(np.float32(row.params.top_p))))
        assert 40_000 < count < V
        assert mask[b].sum() == count
        assert logits[b][mask[b]].min() > logits[b][~mask[b]].max()


def test_top_p_of_top_k_of_min_p_on_peaked_and_long_tailed_logits():
    rng = np.random.default_rng(3)
    combos = [(0.9, 0, 0.0), (0.99, 500, 0.0), (0.7, 20, 0.05), (0.95, 0, 0.01), (0.3, 3, 0.0), (1.0, 9, 0.5)]
    rows = [Row(SamplingParams(top_p=p, top_k=k, min_p=m, seed=0)) for p, k, m in combos]
    for scale in (0.1, 2.0, 8.0):
        logits = (rng.standard_t(3, (len(rows), 3001)) * scale).astype(np.float32)
        mask = kept_mask(logits, rows, 2)
        for b, row in enumerate(rows):
            assert (mask[b] == reference_kept(logits[b].astype(np.float64), row.params)).all(), (scale, combos[b])


@pytest.mark.parametrize(("change", "kept"), [({}, 16), ({"top_k": 5}, 5), ({"top_p": 0.6}, None), ({"temperature": 2.0}, 16)])
def test_draws_follow_the_distribution(change, kept):
    """Chi-square over 40 960 draws: 1024 sequences (512 seeds, two sample indices) of 40 tokens."""
    x = np.linspace(0, 3, 16)[np.random.default_rng(4).permutation(16)].astype(np.float32)
    params = SamplingParams(max_tokens=50, ignore_eos=True, **change)
    rows = [Row(dataclasses.replace(params, seed=i // 2), index=i % 2) for i in range(8)]
    state = start(rows, 1, 16)
    wide = jax.tree.map(lambda a: jnp.tile(a[:8], (128,) + (1,) * (a.ndim - 1)), state)
    keys = np.stack([slots_module.sequence_key(i // 2, i % 2) for i in range(1024)])
    wide = dataclasses.replace(wide, key_S2=jnp.asarray(keys))
    counts = np.zeros(16)
    for _ in range(40):
        output, wide = step(np.tile(x, (1024, 1)), wide)
        counts += np.bincount(np.asarray(output.token_B), minlength=16)
    y = x.astype(np.float64) / params.temperature
    mask = reference_kept(y, params)
    assert kept is None or mask.sum() == kept
    expected = softmax(np.where(mask, y, -np.inf)) * 40_960
    assert counts[~mask].sum() == 0
    chi = np.sum((counts[mask] - expected[mask]) ** 2 / expected[mask])
    # mean + 5 standard deviations of chi-square with (kept - 1) degrees of freedom
    assert chi < (mask.sum() - 1) + 5 * np.sqrt(2 * (mask.sum() - 1))


def test_noise_is_threefry_and_its_keys_are_distinct():
    """Our Threefry equals jax's; Gumbel noise has the right mean and variance; seeds are taken modulo 2**64."""
    rng = np.random.default_rng(5)
    k0, k1, c0, c1 = rng.integers(0, 2**32, (4, 100), dtype=np.uint32)
    got = slots_module.threefry2x32(k0, k1, c0, c1)
    for i in range(100):
        want = jax.extend.random.threefry_2x32((k0[i], k1[i]), np.array([c0[i], c1[i]]))
        assert [int(g[i]) for g in got] == np.asarray(want).tolist()
    keys = {tuple(slots_module.sequence_key(s, i)) for s in (0, 1, -1, 2**32, 2**63, -5) for i in range(4)}
    assert len(keys) == 24
    assert (slots_module.sequence_key(-3, 1) == slots_module.sequence_key(2**64 - 3, 1)).all()
    key_B2 = jnp.asarray(slots_module.sequence_key(7, 0))[None]
    noise = np.asarray(sampling.gumbel(key_B2, jnp.array([9]), jnp.arange(1 << 18)))
    assert np.isfinite(noise).all()
    assert abs(noise.mean() - np.euler_gamma) < 0.01 and abs(noise.var() - np.pi**2 / 6) < 0.02


def hot_rows(n: int) -> list[Row]:
    return [Row(SamplingParams(seed=100 + i, top_p=0.95, top_k=50 * (i % 2), max_tokens=40)) for i in range(n)]


def test_slot_and_batch_do_not_matter():
    rng, rows = np.random.default_rng(6), hot_rows(8)
    logits = (rng.normal(size=(8, VOCAB)) * 2).astype(np.float32)
    alone = [tokens_of(logits[i : i + 1], [rows[i]])[0] for i in range(8)]
    slots = rng.permutation(SLOTS)[:8].tolist()
    state = start(rows, 1, slots=slots)
    assert np.asarray(step(logits, state, slots=slots)[0].token_B).tolist() == alone
    order = rng.permutation(8)
    shuffled = step(logits[order], state, slots=[slots[i] for i in order])[0]
    assert np.asarray(shuffled.token_B).tolist() == [alone[i] for i in order]


def test_vocabulary_padding_does_not_matter():
    """203 tokens padded to 208 or to 2048: padding is never drawn, and nothing else changes."""
    rows, rng = hot_rows(4), np.random.default_rng(7)
    logits = (rng.normal(size=(4, VOCAB)) - 50).astype(np.float32)
    plain = tokens_of(logits, rows)
    wide = np.full((4, 2048), -np.inf, np.float32)
    wide[:, :VOCAB] = logits
    state = slots_module.init_state(SLOTS, 2048, mesh_of(1))
    kwargs: dict[str, Any] = {"eos_token_ids": (), "bad_words_ids": [], "vocab_size": VOCAB, "padded_vocab": 2048}
    for slot, row in enumerate(rows):
        state = admit_of(1)(state, slot, slots_module.make_row(row.params, row.prompt, **kwargs, max_model_len=64))
    assert np.asarray(step(wide, state)[0].token_B).tolist() == plain


@pytest.mark.parametrize("tp", TPS)
def test_greedy_variant_equals_the_full_one_and_numpy(tp):
    rows = [Row(SamplingParams(temperature=0, stop_token_ids=[7], max_tokens=2 + b % 3)) for b in range(SLOTS)]
    rng = np.random.default_rng(8)
    short = full = start(rows, tp)
    for _ in range(3):
        logits = rng.integers(-9, 0, (SLOTS, VOCAB)).astype(np.float32)  # all below padding's 0, with many ties
        logits[3, 7] = logits[4, EOS] = 5
        a, short = step(logits, short, tp, greedy=True)
        b, full = step(logits, full, tp)
        assert a.logprob_B is None
        assert np.array_equal(a.token_B, b.token_B)
        live = np.asarray(a.token_B) >= 0
        assert np.array_equal(np.asarray(a.token_B)[live], np.argmax(logits, axis=1)[live])
        for name in ("token_S", "length_S", "finished_S"):
            assert np.array_equal(getattr(short, name), getattr(full, name)), name


@pytest.mark.parametrize("tp", [1, 8])
def test_lowest_id_wins_ties(tp):
    rows = [Row(SamplingParams(temperature=t, top_k=k, seed=0)) for t, k in ((0.0, 0), (1e-6, 3), (0.0, 0))]
    logits = np.zeros((3, VOCAB), np.float32)
    logits[1, [30, 90, 200]] = 1
    logits[2, 150:] = np.inf
    for greedy in (False, True):
        output, _ = step(logits, start(rows, tp), tp, greedy=greedy)
        assert np.asarray(output.token_B).tolist() == [0, 30, 150]


def test_bad_words_ban_only_the_completing_token():
    params = SamplingParams(temperature=0, max_tokens=30)
    rows = [
        Row(params, [1, 5, 6], [], [[5]]),
        Row(params, [5, 6], [], [[6, 5]]),  # the prompt's tokens do not count
        Row(params, [1], [6], [[6, 5]]),
        Row(params, [1], [6, 7], [[6, 5]]),
        Row(params, [1], [5] * 15, [[5] * 16]),
        Row(params, [1], [5] * 14, [[5] * 16]),
        Row(params, [1], [9, 6], [[1, 2], [6, 5], [6, 4]]),
    ]
    logits = np.zeros((len(rows), VOCAB), np.float32)
    logits[:, [5, 4, 3]] = [9, 8, 7]
    for tp in (1, 4):
        assert tokens_of(logits, rows, tp) == [4, 5, 4, 5, 4, 5, 3]


def test_penalties_count_every_step_of_the_output():
    """A constant favourite loses 1 a use by frequency and 0.5 once by presence: the choices alternate as computed."""
    row = Row(SamplingParams(temperature=0, frequency_penalty=1.0, presence_penalty=0.5, max_tokens=30), [5, 5, 5])
    logits = np.full((1, VOCAB), -50, np.float32)
    logits[0, [5, 6, 7]] = [4.1, 2.8, 1.0]
    for tp in (1, 4):
        state, got = start([row], tp), []
        for _ in range(8):
            output, state = step(logits, state, tp)
            got.append(int(output.token_B[0]))
        want: list[int] = []
        while len(want) < 8:
            want.append(reference_token(logits[0], Row(row.params, row.prompt, want)))
        assert got == want and set(got) == {5, 6, 7}
        assert np.asarray(state.counts_SV)[0, [5, 6, 7]].tolist() == [got.count(i) for i in (5, 6, 7)]


@pytest.mark.parametrize("tp", [1, 4])
def test_min_tokens_masks_stops_and_then_they_finish_the_row(tp):
    rows = [
        Row(SamplingParams(temperature=0, min_tokens=2, stop_token_ids=[9], max_tokens=20)),
        Row(SamplingParams(temperature=0, stop_token_ids=[9], max_tokens=20)),
        Row(SamplingParams(temperature=0, ignore_eos=True, max_tokens=3)),
        Row(SamplingParams(temperature=0, max_tokens=None)),
    ]
    logits = np.zeros((4, VOCAB), np.float32)
    logits[:2, 9], logits[:2, EOS], logits[:2, 50] = 9, 8, 7
    logits[2, EOS], logits[3, 60] = 9, 9
    state, seen, finished = start(rows, tp), [], []
    for _ in range(4):
        output, state = step(logits, state, tp)
        seen.append(np.asarray(output.token_B).tolist())
        finished.append(np.asarray(state.finished_S)[:4].tolist())
    assert seen == [[50, 9, EOS, 60], [50, -1, EOS, 60], [9, -1, EOS, 60], [-1, -1, -1, 60]]
    assert finished == [
        [False, True, False, False],
        [False, True, False, False],
        [True, True, True, False],
        [True, True, True, False],
    ]
    assert np.asarray(state.length_S)[:4].tolist() == [6, 4, 6, 7]
    assert np.asarray(state.stop_length_S)[:4].tolist() == [19 + 4, 23, 6, 64]


@pytest.mark.parametrize("greedy", [False, True])
def test_inactive_rows_change_nothing(greedy):
    """Padding rows may share a live row's slot, or name one that does not exist."""
    rows = [Row(SamplingParams(temperature=0, max_tokens=9)) for _ in range(3)]
    before = start(rows, 2)
    logits = np.random.default_rng(9).normal(size=(4, VOCAB)).astype(np.float32)
    output, after = step(logits, before, 2, slots=[1, 1, 2, SLOTS], active=[False, True, False, False], greedy=greedy)
    assert np.asarray(output.token_B).tolist() == [-1, logits[1].argmax(), -1, -1]
    untouched = [s for s in range(SLOTS) if s != 1]
    for field in dataclasses.fields(SlotState):
        a, b = (np.asarray(getattr(s, field.name)) for s in (before, after))
        assert np.array_equal(a[untouched], b[untouched]), field.name
    assert int(after.length_S[1]) == 4 and int(after.token_S[1]) == logits[1].argmax()


@pytest.mark.parametrize("greedy", [False, True])
def test_nan_rows_stay_alone_and_valid(greedy):
    temperature = 0.0 if greedy else 0.8
    params = SamplingParams(temperature=temperature, seed=3, top_p=0.9, top_k=40)
    rows = [Row(params) for _ in range(4)]
    rng = np.random.default_rng(10)
    logits = rng.normal(size=(4, VOCAB)).astype(np.float32)
    clean = np.asarray(step(logits, start(rows, 2), 2, greedy=greedy)[0].token_B)
    logits[1] = np.nan
    logits[2, : VOCAB - 1] = np.nan
    got = np.asarray(step(logits, start(rows, 2), 2, greedy=greedy)[0].token_B)
    assert got[[0, 3]].tolist() == clean[[0, 3]].tolist()
    assert 0 <= got[1] < VOCAB and got[2] == VOCAB - 1


def test_hopeless_rows_still_give_allowed_tokens():
    """Infinite, NaN and overflowing logits under a ban: the allowed token."""
    params = SamplingParams(temperature=0.01, seed=1, top_p=0.5, min_p=0.5, allowed_token_ids=[77], logit_bias={77: -100})
    logits = np.full((4, VOCAB), np.inf, np.float32)
    logits[:, 77] = [np.nan, -np.inf, -3e38, np.inf]
    assert tokens_of(logits, [Row(params)] * 4, 2) == [77] * 4


def check_logprobs(got: Sequence[Any], logits: np.ndarray, tokens: Sequence[int]) -> None:
    logprob, rank, top_ids, top_logprobs = (np.asarray(g) for g in got)
    for b, token in enumerate(tokens):
        x = logits[b].astype(np.float64)
        want = x - x.max() - np.log(np.sum(np.exp(x - x.max())))
        order = np.argsort(-x, kind="stable")[:20]
        assert abs(logprob[b] - want[token]) < 1e-5
        assert rank[b] == 1 + np.sum(x > x[token])
        assert top_ids[b, : len(order)].tolist() == order.tolist()
        assert np.abs(top_logprobs[b, : len(order)] - want[order]).max() < 1e-5
        assert (top_ids[b, len(order) :] == -1).all() and (top_logprobs[b, len(order) :] == -np.inf).all()


@pytest.mark.parametrize("tp", TPS)
@pytest.mark.parametrize("vocab", [VOCAB, 13])
def test_logprobs_are_of_raw_logits(tp, vocab):
    params = SamplingParams(seed=1, temperature=2.0, top_k=3, logit_bias={3: 50.0}, presence_penalty=1, logprobs=2)
    rows = [Row(dataclasses.replace(params, seed=b)) for b in range(5)]
    logits = (np.random.default_rng(11).normal(size=(5, vocab)) * 3).astype(np.float32)
    logits[4] = np.round(logits[4])  # ties
    output, _ = step(logits, start(rows, tp, vocab), tp)
    tokens = np.asarray(output.token_B).tolist()
    assert 3 in tokens
    got = (output.logprob_B, output.rank_B, output.top_ids_B20, output.top_logprobs_B20)
    check_logprobs(got, logits, tokens)


@pytest.mark.parametrize("tp", [1, 4])
def test_prompt_logprobs(tp):
    rng = np.random.default_rng(12)
    logits = (rng.normal(size=(7, VOCAB)) * 3).astype(np.float32)
    target = rng.integers(0, VOCAB, 7)
    padded = np.full((7, round_up(VOCAB, tp)), -np.inf, np.float32)
    padded[:, :VOCAB] = logits
    run = jax.jit(sampling.prompt_logprobs, static_argnames="mesh")
    check_logprobs(run(padded, target.astype(np.int32), mesh=mesh_of(tp)), logits, target.tolist())
    padded[0] = np.nan
    logprob, _, ids, _ = run(padded, target.astype(np.int32), mesh=mesh_of(tp))
    assert float(logprob[0]) == -np.inf and (np.asarray(ids[0]) == -1).all()


def test_a_resumed_request_goes_on_as_if_never_interrupted():
    rng = np.random.default_rng(13)
    rows = [dataclasses.replace(random_row(rng), output=[]) for _ in range(SLOTS)]
    for row in rows:
        row.params.ignore_eos, row.params.stop_token_ids = True, []
    logits = (rng.normal(size=(8, SLOTS, VOCAB)) * 2).astype(np.float32)
    state, tokens = start(rows), []
    for i in range(8):
        output, state = step(logits[i], state)
        tokens.append(np.asarray(output.token_B).tolist())
    for row, output_ids in zip(rows, zip(*tokens[:5])):
        row.output = list(output_ids)
    resumed = start(rows, 4)
    for i in range(5, 8):
        output, resumed = step(logits[i], resumed, 4)
        assert np.asarray(output.token_B).tolist() == tokens[i]
    for name in ("token_S", "length_S", "counts_SV", "recent_SW", "finished_S"):
        assert np.array_equal(np.asarray(getattr(resumed, name))[..., :15], np.asarray(getattr(state, name))[..., :15])


def test_admission_clears_the_slot_and_keeps_the_layout():
    mesh = mesh_of(4)
    busy = Row(SamplingParams(temperature=0, logit_bias={5: 9.0}, stop_token_ids=[8]), [1, 2], [6, 6], [[7, 7]])
    fresh = Row(SamplingParams(temperature=0), [3])
    reused, new = start([busy, fresh], 4, slots=[0, 0]), start([fresh], 4)
    for field in dataclasses.fields(SlotState):
        a, b = getattr(reused, field.name), getattr(new, field.name)
        assert np.array_equal(a, b), field.name
        assert a.sharding == named(mesh, slots_module.letters(field.name)), field.name
    flags = np.asarray(new.flags_SV)[0]
    assert flags[[3, EOS, 4]].tolist() == [slots_module.IN_PROMPT, slots_module.STOP, 0]
    assert flags[VOCAB:].tolist() == [slots_module.BANNED]


@pytest.mark.parametrize("greedy", [False, True])
def test_compiled_program_gathers_no_vocabulary_and_copies_no_state(greedy):
    tp, V, S = 4, 4096, 8  # as many slots as rows: the state still keeps its own buffers
    mesh = mesh_of(tp)
    state = slots_module.init_state(S, V, mesh)
    arguments: Any = (jax.ShapeDtypeStruct((8, V), jnp.float32, sharding=named(mesh, "BV")), state)
    rows = (jax.ShapeDtypeStruct((8,), jnp.int32), jax.ShapeDtypeStruct((8,), jnp.bool_))

    if greedy:
        best = [jax.ShapeDtypeStruct((8, tp), dtype, sharding=named(mesh, "BV")) for dtype in (jnp.float32, jnp.int32)]
        arguments = (tuple(best), state)

    def state_first(logits: Any, state: SlotState, slot: Any, active: Any) -> Any:
        if greedy:
            return sampling.greedy_sample(*logits, state, slot, active, mesh)[::-1]
        return sampling.sample(logits, state, slot, active, mesh, unrolled=True)[::-1]

    run = jax.jit(state_first, donate_argnums=1)
    compiled = run.lower(*arguments, *rows).compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None and memory is not None
    collective = r"= \(?\w+\[([\d,]+)\][^=]*? (?:all-gather|all-reduce|all-to-all|collective-permute)"
    wide = [int(np.prod([int(n) for n in shape.split(",")])) for shape in re.findall(collective, text)]
    # 8 rows of: 43 floats and ids from 4 shards; 15 candidates in two halves.
    assert wide and max(wide) <= 8 * 43 * 4 < 8 * V // tp
    if greedy:
        assert len(wide) == 1 and "conditional" not in text and "sort" not in text
    parts = [x.addressable_shards[0].data for x in jax.tree.leaves(state)]
    copied = set(re.findall(r"\[([\d,]*)\]\S* copy\(", text))
    assert not copied & {",".join(str(n) for n in part.shape) for part in parts}
    assert memory.alias_size_in_bytes >= sum(part.nbytes for part in parts)


def branches(jaxpr: Any) -> list[str]:
    """The text of every conditional's branches."""
    found = []
    for eqn in jaxpr.eqns:
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)  # of a closed one
                if hasattr(inner, "eqns"):
                    found += [str(inner)] if eqn.primitive.name == "cond" else branches(inner)
    return found


@pytest.mark.parametrize("tp", [1, 4])
def test_nothing_in_the_program_makes_the_host_wait(tp):
    """A GPU runs a conditional without the host only if it fits into a CUDA graph: no loop, sort or collective inside."""
    mesh, V = mesh_of(tp), 4096
    state = slots_module.init_state(8, V, mesh)
    rows = (jax.ShapeDtypeStruct((8,), jnp.int32), jax.ShapeDtypeStruct((8,), jnp.bool_))
    logits = jax.ShapeDtypeStruct((8, V), jnp.float32, sharding=named(mesh, "BV"))
    traced = SAMPLE.trace(logits, state, *rows, mesh=mesh, unrolled=True)
    lowered = traced.lower().as_text()
    assert not re.findall(r"stablehlo\.(?:while|sort)|(?:chlo|mhlo)\.top_?k|@\w*top_?k\b", lowered, re.IGNORECASE)
    conditionals = re.findall(r"stablehlo\.(?:case|if)\b", lowered)
    # top_k, top_p and logprobs; over several devices the searches always run, and the logprobs are in two parts
    assert len(conditionals) == (3 if tp == 1 else 2)
    inside = " ".join(branches(traced.jaxpr.jaxpr))
    assert "reduce" in inside and not re.findall(r"\b(?:psum|pmax|all_gather)", inside)


@pytest.mark.parametrize("vocab", [1344, 4008, 2689, 5003])
def test_sums_above_are_exact_in_blocks_that_fit_and_that_do_not(vocab):
    rng = np.random.default_rng(14)
    key = rng.integers(0, 2**32, (3, vocab), dtype=np.uint32)
    weight = rng.integers(0, 2**28, (3, vocab), dtype=np.uint32)
    candidates = np.concatenate([np.zeros((1, 3), np.uint32), np.full((1, 3), 2**32 - 1, np.uint32), key[:, :5].T])
    L = sampling._block(vocab)
    assert (vocab % L == 0) == (vocab in (1344, 4008)) and L <= 1344
    counts = jax.jit(lambda k, c: sampling._above(k, None, list(c), 1))(key, candidates)
    sums = jax.jit(lambda k, w, c: sampling._above(k, w, list(c), 1))(key, weight, candidates)
    for i, candidate in enumerate(candidates):
        over = key >= candidate[:, None]
        assert np.array_equal(counts[i], over.sum(axis=1))
        total = np.asarray(sums[i]).astype(np.uint64) * 2**14 + np.asarray(sums[len(candidates) + i])
        assert np.array_equal(total, np.where(over, weight, 0).astype(np.uint64).sum(axis=1))


@pytest.mark.parametrize("N", [20, 512, 513, 6000, 40_003])
def test_top_equals_a_stable_sort(N):
    """Many ties, infinities, and ids in any order: falling values, and of equals the lower id."""
    rng = np.random.default_rng(N)
    value = rng.integers(-9, 9 if N % 2 else 2000, (3, N)).astype(np.float32)
    value[0, N // 2 :] = -np.inf
    value[1, 10:] = -np.inf  # fewer finite values than asked for
    value[2, ::700] = np.inf
    ids = np.stack([rng.permutation(N) for _ in range(3)]).astype(np.int32)
    got_value, got_id = jax.jit(sampling._top, static_argnums=2)(value, ids, 20)
    for b in range(3):
        order = np.lexsort((ids[b], -value[b]))[:20]
        assert np.array_equal(np.asarray(got_value)[b], value[b][order])
        assert np.array_equal(np.asarray(got_id)[b], ids[b][order])


def test_refusals():
    kwargs: dict[str, Any] = {"eos_token_ids": (), "vocab_size": 9, "padded_vocab": 9, "max_model_len": 4}
    with pytest.raises(ValueError, match="seed must be set"):
        slots_module.make_row(SamplingParams(), [1], bad_words_ids=[], **kwargs)
    with pytest.raises(ValueError, match="5 tokens does not fit a slot: allowed are 1 to 4"):
        slots_module.make_row(SamplingParams(seed=0), [1] * 5, bad_words_ids=[], **kwargs)
    with pytest.raises(ValueError, match="bad_words"):
        slots_module.make_row(SamplingParams(seed=0), [1], bad_words_ids=[[1] * 17], **kwargs)
    with pytest.raises(ValueError, match="at most 262144"):
        slots_module.init_state(1, 262_145, mesh_of(1))
    with pytest.raises(ValueError, match="does not divide over 2 devices"):
        slots_module.init_state(1, 9, mesh_of(2))


def test_packed_rows_fill_the_same_slots() -> None:
    """One transfer of several rows, padded to a fixed count, is the same as admitting them one by one."""
    rows = [
        Row(SamplingParams(seed=2**63 - 5, temperature=0.7, logit_bias={7: -3.5}, allowed_token_ids=[7, 9]), index=2),
        Row(SamplingParams(seed=1, top_p=0.25, stop_token_ids=[11], logprobs=4), output=[4, 4, 6], bad=[[1, 2], [3]]),
    ]
    slots = [5, 3]
    written = [made(row, VOCAB, VOCAB + 2) for row in rows]
    packed = slots_module.pack_rows(slots, written, 4, SLOTS)
    empty_state = slots_module.init_state(SLOTS, VOCAB + 2, mesh_of(1))
    together = jax.jit(lambda state, words: slots_module.admit(state, *slots_module.unpack_rows(words, written[0])))(
        empty_state, packed
    )
    one_by_one = empty_state
    for slot, row in zip(slots, written, strict=True):
        one_by_one = slots_module.admit(one_by_one, jnp.int32(slot), row)
    for field in dataclasses.fields(SlotState):
        np.testing.assert_array_equal(getattr(together, field.name), getattr(one_by_one, field.name), err_msg=field.name)
