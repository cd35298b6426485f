"""Sampling on slots, vocabulary-sharded: from logits to tokens without ever gathering the logits.

`sample` reads the rows' slots (`slots.SlotState`), samples, and writes the slots back; nothing crosses to the host but the
tokens. `greedy_sample` is for rows that are all plainly greedy, of which the head gives each shard's best token only.

The order is vLLM's: bans (structured_outputs, allowed_token_ids, bad_words, min_tokens), logit_bias, penalties,
temperature, min_p, top_k, top_p, then one token by the Gumbel-max trick (Gumbel 1954): argmax(logit / temperature +
Gumbel noise) is a draw from the softmax. The noise is one Threefry-2x32 block (Salmon et al. 2011) a token, a pure
function of (seed, sample index, position, global token id): the same in any batch slot, under any sharding and padding,
after any restart.

top_k and top_p need a threshold over all shards. It is searched exactly: eight passes fix four bits each of the
float's order-preserving integer image, each pass counting (top_k) or weighing (top_p) what lies above 15 candidates,
summed over the shards. Weights are integers: their sums depend neither on the order of addition nor on the sharding.

The host never waits for a step: what only some requests need stands under conditionals that fit into a CUDA graph, and
what would not fit is avoided in them: loops, sorts, and over several devices collectives.

Letters: S slots, B rows of the step, V vocabulary (global, padded; a shard's part inside shard_map), Q bad-word
sequences, W tokens of a bad word before its last, J candidate thresholds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from jaxinfer.request import GREEDY_TEMPERATURE, MAX_LOGPROBS
from jaxinfer.sharding import spec
from jaxinfer.slots import BANNED, GRAMMAR, IN_PROMPT, STOP, SlotState, letters, state_of, threefry2x32
from pallas_kernels.argmax import argmax

_HALF_BITS = 14
_PADDING_ID = 1 << 30  # above every id
_FEW = 512  # candidates that may all be compared with each other
_LOWEST, _HIGHEST = float(np.finfo(np.float32).min), float(np.finfo(np.float32).max)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SampleOutput:
    """One step's result. token_B is -1 on inactive rows, and where the bans leave no token. The rest is None from
    `greedy_sample`, and meaningless unless an active row wants logprobs. Logprobs are of the raw logits; rank 1 is the
    likeliest; alternatives are in falling order, id -1 (logprob -inf) where the vocabulary has no more."""

    token_B: jax.Array
    logprob_B: jax.Array | None = None
    rank_B: jax.Array | None = None
    top_ids_B20: jax.Array | None = None
    top_logprobs_B20: jax.Array | None = None


def sample(
    logits_BV: jax.Array,
    state: SlotState,
    slot_B: jax.Array,
    active_B: jax.Array,
    mesh: Mesh,
    *,
    unrolled: bool | None = None,
) -> tuple[SampleOutput, SlotState]:
    """Samples one token a row and advances the rows' slots.

    logits_BV: float32, V sharded over "tp", -inf on vocabulary padding (as Transformer.logits gives them).
    slot_B: int32; slots of active rows are distinct, those of others may be anything.
    active_B: False for padding and for prompts not yet complete. A row whose slot is finished is inactive too.
        Inactive rows leave their slot as it was and return token -1.
    unrolled: search top_k's and top_p's limits in straight code, as a GPU needs it, not in a loop, which a CPU compiles in
        half the time; None: as the mesh's devices want it. Both give the same tokens.

    A jitted program that donates the state should return it before the output: JAX gives a donated buffer to the first
    output of its shape and type, so token_B ahead of it would shift every [S] array by one, at a copy each (if B = S).

    Where the bans leave no token, the row gives -1 and its slot is finished, and otherwise as it was.

    NaN logits count as -inf: the row still yields a valid id and no other row notices. Of equal maxima, the lowest id
    wins. Top-p weights are resolved to 2**-28 of the likeliest token's.
    """
    tp = mesh.shape["tp"]
    unrolled = mesh.devices.flat[0].platform != "cpu" if unrolled is None else unrolled
    active_B = active_B & ~state.finished_S[slot_B]
    specs = state_of(lambda field: spec(letters(field)))
    run = jax.shard_map(
        partial(_sample_shard, tp=tp, unrolled=unrolled),
        mesh=mesh,
        in_specs=(spec("BV"), specs, spec("B"), spec("B")),
        out_specs=(spec("B"), spec("B"), (spec("B"), spec("B"), spec("BE"), spec("BE")), specs.counts_SV),
        check_vma=False,  # an all_gather's result is equal on all devices, which the type system cannot see
    )
    token_B, stop_B, logprobs, counts_SV = run(logits_BV, state, slot_B, active_B)
    recent_BW = jnp.concatenate([state.recent_SW[slot_B, 1:], token_B[:, None]], axis=1)
    rows_B = jnp.where(active_B & (token_B >= 0), slot_B, state.recent_SW.shape[0])
    recent_SW = state.recent_SW.at[rows_B].set(recent_BW, mode="drop")
    output = SampleOutput(jnp.where(active_B, token_B, -1), *logprobs)
    state = dataclasses.replace(state, counts_SV=counts_SV, recent_SW=recent_SW)
    return output, _advanced(state, slot_B, active_B, token_B, stop_B)


def greedy_sample(
    value_BX: jax.Array, id_BX: jax.Array, state: SlotState, slot_B: jax.Array, active_B: jax.Array, mesh: Mesh
) -> tuple[SampleOutput, SlotState]:
    """`sample` where every active row's params are `is_plain_greedy`, of no more than each device's best token, as
    Transformer.argmax gives them (after vLLM's LogitsProcessor.get_top_tokens). It gives the same tokens, and leaves the
    counts that only penalties and bad words read.

    value_BX: float32 logits, a column a device, sharded as logits are; id_BX: int32, their tokens. The rest as in `sample`.
    """
    active_B = active_B & ~state.finished_S[slot_B]

    def of_shard(value_B1: jax.Array, id_B1: jax.Array, *slots: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _winner(value_B1[:, 0], id_B1[:, 0], *slots, tp=mesh.size)[1:]

    specs = (spec("BV"), spec("BV"), spec("SV"), spec("B"))
    run = jax.shard_map(of_shard, mesh=mesh, in_specs=specs, out_specs=(spec("B"),) * 2, check_vma=False)
    token_B, stop_B = run(value_BX, id_BX, state.flags_SV, slot_B)
    return SampleOutput(jnp.where(active_B, token_B, -1)), _advanced(state, slot_B, active_B, token_B, stop_B)


def _advanced(state: SlotState, slot_B: jax.Array, active_B: jax.Array, token_B: jax.Array, stop_B: jax.Array) -> SlotState:
    """The slots with each active row's token, if it got one."""
    length_B = state.length_S[slot_B]
    done_B = (stop_B & (length_B >= state.min_length_S[slot_B])) | (length_B + 1 >= state.stop_length_S[slot_B])
    # One small reduction instead of three scatters: to each slot, 2 + (token, done) of the row that owns it, 1 if that
    # row got no token, else 0.
    owns_SB = (slot_B == jnp.arange(state.token_S.shape[0])[:, None]) & active_B
    mail_B = jnp.where(token_B >= 0, 2 + 2 * token_B + done_B, 1)
    mail_S = jnp.sum(jnp.where(owns_SB, mail_B, 0), axis=1)
    changed_S = mail_S > 1
    return dataclasses.replace(
        state,
        token_S=jnp.where(changed_S, (mail_S >> 1) - 1, state.token_S),
        length_S=state.length_S + changed_S,
        finished_S=jnp.where(mail_S > 0, (mail_S & 1) == 1, state.finished_S),
    )


def prompt_logprobs(logits_TV: jax.Array, target_T: jax.Array, mesh: Mesh) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(logprob_T, rank_T, top_ids_T20, top_logprobs_T20) of each position's next token, as in SampleOutput.

    logits_TV: float32, V sharded, -inf on vocabulary padding. target_T: the token that follows; -1 gives -inf.
    """
    return jax.shard_map(
        lambda logits, target: _logprobs(_without_nan(logits), target, mesh.shape["tp"]),
        mesh=mesh,
        in_specs=(spec("TV"), spec("T")),
        out_specs=(spec("T"), spec("T"), spec("TE"), spec("TE")),
        check_vma=False,
    )(logits_TV, target_T)


# Everything below sees one shard of the vocabulary.


def _sample_shard(
    logits_BV: jax.Array, state: SlotState, slot_B: jax.Array, active_B: jax.Array, *, tp: int, unrolled: bool
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...], jax.Array]:
    """The full sampler: (token_B, stop_B, logprobs, counts_SV)."""
    raw_BV = _without_nan(logits_BV)
    offset = _offset(raw_BV.shape[1], tp)
    temperature_B = state.temperature_S[slot_B]
    hot_B = temperature_B >= GREEDY_TEMPERATURE
    x_BV = _processed(raw_BV, state, slot_B, offset)
    scaled_BV = jnp.clip(x_BV / jnp.where(hot_B, temperature_B, 1)[:, None], _LOWEST, _HIGHEST)
    y_BV = jnp.where(x_BV == -jnp.inf, x_BV, scaled_BV)
    floor_B = _floor(y_BV, state, slot_B, active_B & hot_B, tp, unrolled)
    noise_BV = gumbel(state.key_S2[slot_B], state.length_S[slot_B], offset + jnp.arange(raw_BV.shape[1]))
    noisy_BV = jnp.where(_ordered(y_BV) >= floor_B[:, None], y_BV + noise_BV, -jnp.inf)
    score_BV = jnp.where(hot_B[:, None], noisy_BV, y_BV)
    best_B, id_B = argmax(score_BV, lax.broadcasted_iota(jnp.int32, score_BV.shape, 1))
    best_B, token_B, stop_B = _winner(best_B, id_B + offset, state.flags_SV, slot_B, tp=tp)
    token_B = jnp.where(best_B > -jnp.inf, token_B, -1)  # -inf is banned: what is not, is finite

    # Out-of-range places are dropped: inactive rows, and tokens of other shards (below 0 would wrap, hence the bound).
    place_B = jnp.where(active_B & (token_B >= offset), token_B - offset, raw_BV.shape[1])
    counts_SV = state.counts_SV.at[slot_B, place_B].add(1, mode="drop")

    wanted = jnp.any(active_B & (state.wanted_S[slot_B] >= 0))
    return token_B, stop_B, _logprobs(raw_BV, token_B, tp, partial(_only_if, wanted)), counts_SV


def _processed(raw_BV: jax.Array, state: SlotState, slot_B: jax.Array, offset: jax.Array | int) -> jax.Array:
    """Bias, penalties, then bans: banned is -inf and everything else finite. (All but the bans work token by token, so
    that the bans may come last changes nothing.)"""

    def per_row(field_S: jax.Array) -> jax.Array:
        return field_S[slot_B][:, None]

    flags_BV, counts_BV = state.flags_SV[slot_B], state.counts_SV[slot_B]
    x_BV = jnp.clip(raw_BV, _LOWEST, _HIGHEST) + state.bias_SV[slot_B]
    repetition_B1 = per_row(state.repetition_S)
    seen_BV = ((flags_BV & IN_PROMPT) != 0) | (counts_BV > 0)
    x_BV = jnp.where(seen_BV, jnp.where(x_BV > 0, x_BV / repetition_B1, x_BV * repetition_B1), x_BV)
    x_BV = x_BV - per_row(state.frequency_S) * counts_BV - per_row(state.presence_S) * (counts_BV > 0)
    early_B1 = per_row(state.length_S) < per_row(state.min_length_S)
    banned_BV = ((flags_BV & (BANNED | GRAMMAR)) != 0) | (early_B1 & ((flags_BV & STOP) != 0))
    x_BV = jnp.where(banned_BV, -jnp.inf, jnp.clip(x_BV, _LOWEST, _HIGHEST))

    prefix_BQW, last_BQ = state.bad_prefix_SQW[slot_B], state.bad_last_SQ[slot_B]
    match_BQ = jnp.all((prefix_BQW == -1) | (prefix_BQW == state.recent_SW[slot_B][:, None]), axis=-1)
    here_BQ = match_BQ & (last_BQ >= offset)
    place_BQ = jnp.where(here_BQ, last_BQ - offset, raw_BV.shape[1])
    return x_BV.at[jnp.arange(x_BV.shape[0])[:, None], place_BQ].set(-jnp.inf, mode="drop")


def _floor(y_BV: jax.Array, state: SlotState, slot_B: jax.Array, hot_B: jax.Array, tp: int, unrolled: bool) -> jax.Array:
    """The lowest kept value of each row (its `_ordered` image, uint32), after min_p, top_k and top_p.

    top_k keeps what is not below the k-th largest value. top_p keeps a token while the probability of all strictly
    larger ones, among those min_p and top_k kept, is below p.
    """
    top_k_B, top_p_B = state.top_k_S[slot_B], state.top_p_S[slot_B]
    limit_k_B, limit_p_B = hot_B & (top_k_B > 0), hot_B & (top_p_B < 1)
    top_B = jnp.maximum(_over_shards(lax.pmax, jnp.max(y_BV, axis=1), tp), _LOWEST)
    floor_B = _ordered(top_B + jnp.log(state.min_p_S[slot_B]))

    # A collective inside a conditional would make the host wait for the predicate: over several devices both searches run.
    only_if = _only_if if tp == 1 else lambda _, body: body()

    def count_floor() -> jax.Array:
        def reached(candidates: list[jax.Array]) -> list[jax.Array]:
            counts = _above(_ordered(y_BV), None, candidates, tp)
            return [count_B >= top_k_B.astype(jnp.uint32) for count_B in counts]

        return jnp.where(limit_k_B, _search(reached, y_BV.shape[0], unrolled), 0)

    floor_B = jnp.maximum(floor_B, only_if(jnp.any(limit_k_B), count_floor))

    def mass_floor() -> jax.Array:
        def masses(candidates: list[jax.Array]) -> list[tuple[jax.Array, jax.Array]]:
            sums = _above(_ordered(y_BV), _weights(y_BV, top_B), candidates, tp)
            halves = zip(sums[: len(candidates)], sums[len(candidates) :], strict=True)
            return [(high_B + (low_B >> _HALF_BITS), low_B & ((1 << _HALF_BITS) - 1)) for high_B, low_B in halves]

        # p of the kept mass, in the same two halves: p is a multiple of 2**-32 (a float32 below 1, if not tiny).
        least_B, rest_B = _times_fraction(*masses([floor_B])[0], (top_p_B * 2.0**32).astype(jnp.uint32))
        rest_B = jnp.where((least_B == 0) & (rest_B == 0), jnp.uint32(1), rest_B)  # keep at least the likeliest

        def reached(candidates: list[jax.Array]) -> list[jax.Array]:
            sums = masses(candidates)
            return [(high_B > least_B) | ((high_B == least_B) & (low_B >= rest_B)) for high_B, low_B in sums]

        return jnp.where(limit_p_B, _search(reached, y_BV.shape[0], unrolled), 0)

    return jnp.maximum(floor_B, only_if(jnp.any(limit_p_B), mass_floor))


def _only_if(wanted: jax.Array, body: Callable[[], Any]) -> Any:
    """`body()`, or zeros of its shapes without running it.

    Without loops, sorts and collectives in the body, XLA makes it a node of a CUDA graph; with one, the host would wait
    for `wanted`, that is for the whole step, before it can launch anything more.
    """
    zeros = partial(jax.tree.map, lambda x: jnp.zeros(x.shape, x.dtype))
    body = jax.jit(body)  # traced once for its shapes and for itself
    return lax.cond(wanted, body, lambda: zeros(jax.eval_shape(body)))


def _search(reached: Callable[[list[jax.Array]], list[jax.Array]], B: int, unrolled: bool) -> jax.Array:
    """The largest uint32 [B] that `reached` accepts, 0 if none; it accepts small values and refuses large ones.

    Unrolled, it is asked about 15 candidates [B] at a time, four bits a pass (see `_only_if`); in a loop, a bit a pass.
    """
    bits = 4 if unrolled else 1

    @jax.jit  # so that it is traced once
    def one_pass(found_B: jax.Array, step_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        accepted = reached([found_B + j * step_B for j in range(1, 1 << bits)])
        return found_B + step_B * sum(accept_B.astype(jnp.uint32) for accept_B in accepted), step_B >> bits

    # Not a constant to XLA: the passes are then the same kernels, which it compiles once.
    carry = jnp.zeros(B, jnp.uint32), lax.optimization_barrier(jnp.full(B, 1 << (32 - bits), jnp.uint32))
    if not unrolled:
        return lax.fori_loop(0, 32, lambda _, carry: one_pass(*carry), carry)[0]
    for _ in range(8):
        carry = one_pass(*carry)
    return carry[0]


def _above(key_BV: jax.Array, weight_BV: jax.Array | None, candidates: list[jax.Array], tp: int) -> list[jax.Array]:
    """For each candidate [B], how many tokens have a key at or above it; or with weights, first the sums of the upper
    and then those of the lower _HALF_BITS of what they weigh. All are uint32 [B].

    One reduction of many operands, first in blocks: a GPU reads the keys once and keeps all sums in registers, where
    reductions of their own would be a kernel each. No scatter, so nothing depends on the order of atomics.
    """
    B, V = key_BV.shape
    L = _block(V)
    blocks = -(-V // L)
    if weight_BV is None:
        weights = [jnp.ones_like(key_BV)]
    else:
        weights = [weight_BV >> _HALF_BITS, weight_BV & ((1 << _HALF_BITS) - 1)]

    def part(weight_BV: jax.Array, candidate_B: jax.Array) -> jax.Array:
        over_BV = jnp.where(key_BV >= candidate_B[:, None], weight_BV, 0)
        return jnp.pad(over_BV, ((0, 0), (0, blocks * L - V))).reshape(B, blocks, L)

    def add(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        return tuple(x + y for x, y in zip(a, b, strict=True))

    parts = tuple(part(weight_BV, candidate_B) for weight_BV in weights for candidate_B in candidates)
    zeros = (np.uint32(0),) * len(parts)
    sums = lax.reduce(lax.reduce(parts, zeros, add, (2,)), zeros, add, (1,))
    return list(lax.psum(jnp.stack(sums), "tp")) if tp > 1 else list(sums)


def _block(V: int) -> int:
    """Tokens a block of V is reduced in, dividing V if possible. On an H200 smaller blocks spend their time in exchanging
    sums, and larger ones leave multiprocessors idle (and meet slow kernels of XLA: blocks of 2004, one row: 25 us for 3)."""
    most = min(V, 1344)
    return next((L for L in range(most, most // 2, -1) if V % L == 0), most)


def _weights(y_BV: jax.Array, top_B: jax.Array) -> jax.Array:
    """exp(y - top) as a 28-bit integer."""
    return jnp.rint(jnp.exp(y_BV - top_B[:, None]) * (2.0**28 - 16)).astype(jnp.uint32)


def _times_fraction(high: jax.Array, low: jax.Array, fraction: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(high * 2**14 + low) * fraction / 2**32 in the same halves, rounded down by at most two units."""

    def product(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:  # 32 x 32 -> (upper, lower) 32 bits
        a1, a0, b1, b0 = a >> 16, a & 0xFFFF, b >> 16, b & 0xFFFF
        middle = a1 * b0 + (a0 * b0 >> 16)
        middle2 = a0 * b1 + (middle & 0xFFFF)
        return a1 * b1 + (middle >> 16) + (middle2 >> 16), a * b

    upper, lower = product(high, fraction)
    rest = (lower >> (32 - _HALF_BITS)) + product(low, fraction)[0]
    return upper + (rest >> _HALF_BITS), rest & ((1 << _HALF_BITS) - 1)


def _winner(
    best_B: jax.Array, token_B: jax.Array, flags_SV: jax.Array, slot_B: jax.Array, *, tp: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of each shard's best token, as its score and global id, the best: its score, its id, and whether that is a stop id."""
    stop_B = flags_SV[slot_B, token_B - _offset(flags_SV.shape[1], tp)] & STOP
    if tp == 1:
        return best_B, token_B, stop_B != 0
    packed = lax.all_gather(jnp.stack([lax.bitcast_convert_type(best_B, jnp.int32), 2 * token_B + stop_B]), "tp", axis=2)
    best_B, code_B = argmax(lax.bitcast_convert_type(packed[0], jnp.float32), packed[1])
    return best_B, code_B >> 1, (code_B & 1) != 0


def _logprobs(
    raw_BV: jax.Array, token_B: jax.Array, tp: int, only_if: Callable[[Callable[[], Any]], Any] = lambda body: body()
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(logprob_B, rank_B, top_ids_B20, top_logprobs_B20) of log_softmax(raw): two small collectives.

    only_if: runs a body, or gives zeros instead. Bodies hold all work on the vocabulary and no collective.
    """
    V = raw_BV.shape[1]
    E = min(MAX_LOGPROBS, V)
    offset = _offset(V, tp)

    def local() -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
        top_B = jnp.maximum(jnp.max(raw_BV, axis=1), _LOWEST)
        total_B = jnp.sum(jnp.exp(raw_BV - top_B[:, None]), axis=1)
        here_B = (token_B >= offset) & (token_B < offset + V)
        local_B = jnp.clip(token_B - offset, 0, V - 1)
        chosen_B = jnp.where(here_B, jnp.take_along_axis(raw_BV, local_B[:, None], axis=1)[:, 0], -jnp.inf)
        value_BE, id_BE = _top(raw_BV, lax.broadcasted_iota(jnp.int32, raw_BV.shape, 1), E)
        return value_BE, id_BE + offset, top_B, total_B, chosen_B

    def above(chosen_B: jax.Array) -> jax.Array:
        return jnp.sum(raw_BV > chosen_B[:, None], axis=1, dtype=jnp.int32)

    def result(
        value_BE: jax.Array, id_BE: jax.Array, top_B: jax.Array, total_B: jax.Array, chosen_B: jax.Array, above_B: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        missing = ((0, 0), (0, MAX_LOGPROBS - value_BE.shape[1]))
        value_BE = jnp.pad(value_BE, missing, constant_values=-jnp.inf)
        id_BE = jnp.where(value_BE == -jnp.inf, -1, jnp.pad(id_BE, missing))
        # A row without any finite logit has log_sum -inf: its logprobs stay -inf, not NaN.
        log_sum_B = jnp.where(total_B > 0, top_B + jnp.log(total_B), 0)
        return chosen_B - log_sum_B, 1 + above_B, id_BE, value_BE - log_sum_B[:, None]

    if tp == 1:

        def all_here() -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
            parts = local()
            return result(*parts, above(parts[-1]))

        return only_if(all_here)

    def packed() -> jax.Array:
        value_BE, id_BE, *of_row = local()
        floats = jnp.concatenate([value_BE, jnp.stack(of_row, axis=1)], axis=1)
        return jnp.concatenate([lax.bitcast_convert_type(floats, jnp.int32), id_BE], axis=1)

    both = lax.all_gather(only_if(packed), "tp", axis=1)  # B tp 2E+3
    floats, ids = lax.bitcast_convert_type(both[..., : E + 3], jnp.float32), both[..., E + 3 :]
    B = raw_BV.shape[0]
    value_BE, id_BE = _top(floats[..., :E].reshape(B, -1), ids.reshape(B, -1), min(MAX_LOGPROBS, tp * E))
    top_B = jnp.max(floats[..., E], axis=1)
    total_B = jnp.sum(floats[..., E + 1] * jnp.exp(floats[..., E] - top_B[:, None]), axis=1)
    chosen_B = jnp.max(floats[..., E + 2], axis=1)
    return result(value_BE, id_BE, top_B, total_B, chosen_B, lax.psum(only_if(lambda: above(chosen_B)), "tp"))


def _top(value_BN: jax.Array, id_BN: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The `count` largest of each row and their ids (distinct), falling; of equals, the lower id first. No NaN.

    No sort and no loop (see `_only_if`): blocks shrink the row, since the best `count` elements lie in the blocks with
    the best `count` maxima; the few that are left find their places by comparison with each other.
    """
    while value_BN.shape[1] > max(_FEW, 2 * count):
        B, N = value_BN.shape
        L = 1 << math.ceil(math.log2(N / count) / 2)  # half the bits of the shrinking now, half in the next round
        blocks = -(-N // L)
        missing = jnp.broadcast_to(N + jnp.arange(blocks * L - N, dtype=jnp.int32), (B, blocks * L - N))
        value_BNL = jnp.pad(value_BN, ((0, 0), (0, blocks * L - N)), constant_values=-jnp.inf).reshape(B, blocks, L)
        id_BNL = jnp.concatenate([id_BN, _PADDING_ID + missing], axis=1).reshape(B, blocks, L)
        best_BN, first_BN = argmax(value_BNL, id_BNL)
        block_BE = _places(best_BN, first_BN, lax.broadcasted_iota(jnp.int32, best_BN.shape, 1), count)[:, :, None]
        value_BN = jnp.take_along_axis(value_BNL, block_BE, axis=1).reshape(B, -1)
        id_BN = jnp.take_along_axis(id_BNL, block_BE, axis=1).reshape(B, -1)
    return _places(value_BN, id_BN, value_BN, count), _places(value_BN, id_BN, id_BN, count)


def _places(value_BN: jax.Array, id_BN: jax.Array, what_BN: jax.Array, count: int) -> jax.Array:
    """what_BN in the order of falling values (and rising ids), the first `count`."""
    value_BN1, id_BN1 = value_BN[:, :, None], id_BN[:, :, None]
    value_B1N, id_B1N = value_BN[:, None], id_BN[:, None]
    before_BNN = (value_B1N > value_BN1) | ((value_B1N == value_BN1) & (id_B1N < id_BN1))
    place_BN = jnp.sum(before_BNN, axis=2, dtype=jnp.int32)
    here_BEN = place_BN[:, None] == jnp.arange(count)[:, None]
    return jnp.sum(jnp.where(here_BEN, what_BN[:, None], 0), axis=2, dtype=what_BN.dtype)


def _offset(V: int, tp: int) -> jax.Array | int:
    """Global id of this shard's first token."""
    return lax.axis_index("tp") * V if tp > 1 else 0


def _over_shards(reduce: Callable[[jax.Array, str], jax.Array], x: jax.Array, tp: int) -> jax.Array:
    return reduce(x, "tp") if tp > 1 else x


def _without_nan(x: jax.Array) -> jax.Array:
    return jnp.where(jnp.isnan(x), -jnp.inf, x)


def _ordered(x: jax.Array) -> jax.Array:
    """A float32's image in uint32, in the same order; both zeros have one image. No NaN."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)
    return jnp.where(bits >> 31 != 0, ~bits, bits | jnp.uint32(1 << 31))


def gumbel(key_B2: jax.Array, position_B: jax.Array, id_V: jax.Array) -> jax.Array:
    """Standard Gumbel noise, float32 [B, V], from one 32-bit word a (key, position, id)."""
    position_B1, id_1V = position_B.astype(jnp.uint32)[:, None], id_V.astype(jnp.uint32)[None]
    bits_BV, _ = threefry2x32(key_B2[:, :1], key_B2[:, 1:], position_B1, id_1V)
    # u in (0, 1), finest near 0: the largest noise comes from the smallest u, so rare tokens keep all 32 bits.
    u_BV = jnp.minimum(bits_BV.astype(jnp.float32) * 2.0**-32 + 2.0**-33, 1 - 2.0**-24)
    return -jnp.log(-jnp.log1p(-u_BV))
