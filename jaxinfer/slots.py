"""Slots: what the device keeps of each sequence it runs, and how a request gets into one.

Every request owns a slot of `SlotState`: its last token, length, sampling parameters, and what penalties and bans need to
know. `make_row` writes a request down on the host, `pack_rows` makes one transfer of several, `admit` puts them in place.

Letters: S slots, A slots filled at a time, V vocabulary (padded), Q bad-word sequences, W tokens of a bad word before its
last (or words of a mask), E logit_bias entries, M max_model_len.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from jaxinfer.request import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, MAX_LOGIT_BIAS, SamplingParams, check_bad_words
from jaxinfer.sharding import named, spec

STOP, BANNED, IN_PROMPT, GRAMMAR = 1, 2, 4, 8  # bits of flags_SV; GRAMMAR: banned until the next mask
MAX_VOCAB = 1 << 18  # what the sampler's integer sums allow: a row's 14-bit half weights stay below 2**32
_RECENT = MAX_BAD_WORD_TOKENS - 1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SlotState:
    """Per-sequence device state. The suffix of a name is its shape, and through `sharding.spec` its sharding."""

    token_S: jax.Array  # int32, the last token; its keys and values are not in the cache yet
    length_S: jax.Array  # int32, tokens so far, prompt and output; token_S stands at position length - 1
    stop_length_S: jax.Array  # int32, finished when length reaches it
    min_length_S: jax.Array  # int32, stop ids are masked while length is below it
    finished_S: jax.Array  # bool
    temperature_S: jax.Array  # float32, as are the next six
    top_p_S: jax.Array
    min_p_S: jax.Array
    presence_S: jax.Array
    frequency_S: jax.Array
    repetition_S: jax.Array
    top_k_S: jax.Array  # int32, 0 = all
    wanted_S: jax.Array  # int32, logprobs asked for, -1 = none
    key_S2: jax.Array  # uint32, from seed and sample index
    recent_SW: jax.Array  # int32, last output tokens, newest last, -1 before the first
    bad_prefix_SQW: jax.Array  # int32, what must stand in recent_SW, right-aligned, -1 = anything
    bad_last_SQ: jax.Array  # int32, the token banned then, -1 = unused
    flags_SV: jax.Array  # uint8, STOP | BANNED | IN_PROMPT | GRAMMAR
    bias_SV: jax.Array  # float32
    counts_SV: jax.Array  # int32, how often each token stands in the output


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SlotRow:
    """What `admit` writes into one slot: numpy only, the same shapes for every request, and small: the wide rows of
    bias and counts are built on the device from lists padded with the padded vocabulary's size, which scatters drop."""

    token: np.ndarray
    length: np.ndarray
    stop_length: np.ndarray
    min_length: np.ndarray
    temperature: np.ndarray
    top_p: np.ndarray
    min_p: np.ndarray
    presence: np.ndarray
    frequency: np.ndarray
    repetition: np.ndarray
    top_k: np.ndarray
    wanted: np.ndarray
    key_2: np.ndarray
    recent_W: np.ndarray
    bad_prefix_QW: np.ndarray
    bad_last_Q: np.ndarray
    flags_V: np.ndarray
    bias_ids_E: np.ndarray
    bias_E: np.ndarray
    output_M: np.ndarray


def letters(field: str) -> str:
    """The letters of a SlotState field: "flags_SV" -> "SV"."""
    return field.rsplit("_", 1)[1]


def state_of(value: Callable[[str], Any]) -> Any:
    return SlotState(**{field.name: value(field.name) for field in dataclasses.fields(SlotState)})


def state_shardings(mesh: Mesh) -> SlotState:
    """A SlotState of NamedShardings, for jit's in_shardings and out_shardings."""
    return state_of(lambda field: named(mesh, letters(field)))


def init_state(num_slots: int, padded_vocab: int, mesh: Mesh) -> SlotState:
    """Empty slots, all finished. Bytes: 9 * num_slots * padded_vocab over the mesh, and 8 KB a slot on every device.

    Raises:
        ValueError: the vocabulary exceeds 262144, or does not divide over the mesh.
    """
    if padded_vocab > MAX_VOCAB:
        raise ValueError(f"a vocabulary of {padded_vocab}: sampling supports at most {MAX_VOCAB} tokens")
    if padded_vocab % mesh.size:
        raise ValueError(f"a vocabulary of {padded_vocab} does not divide over {mesh.size} devices; pad it first")
    sizes = {"S": num_slots, "V": padded_vocab, "Q": MAX_BAD_WORDS, "W": _RECENT, "2": 2}
    dtypes: dict[str, Any] = {"finished_S": jnp.bool_, "key_S2": jnp.uint32, "flags_SV": jnp.uint8}
    floats = ("temperature", "top_p", "min_p", "presence", "frequency", "repetition", "bias")
    fill = {"finished_S": 1, "repetition_S": 1, "top_p_S": 1, "wanted_S": -1}
    fill |= {"recent_SW": -1, "bad_prefix_SQW": -1, "bad_last_SQ": -1}

    def empty(name: str) -> jax.Array:
        dtype = dtypes.get(name, jnp.float32 if name.rsplit("_", 1)[0] in floats else jnp.int32)
        return jnp.full([sizes[letter] for letter in letters(name)], fill.get(name, 0), dtype)

    return jax.jit(partial(state_of, empty), out_shardings=state_shardings(mesh))()


def make_row(
    params: SamplingParams,
    prompt_ids: Sequence[int],
    output_ids: Sequence[int] = (),
    *,
    eos_token_ids: Sequence[int],
    bad_words_ids: list[list[int]],
    vocab_size: int,
    padded_vocab: int,
    max_model_len: int,
    sample_index: int = 0,
) -> SlotRow:
    """The slot of a request, new (output_ids empty) or resumed: then it goes on exactly as if never interrupted.

    params: seeded (the engine draws a seed where the user gave none) and validated against the vocabulary.
    bad_words_ids: params.bad_words, tokenized. sample_index: which of the request's n sequences this is.

    Raises:
        ValueError: params has no seed and samples, bad_words_ids exceeds its limits, or the sequence is too long.
    """
    if params.seed is None and not params.is_greedy:
        raise ValueError("SamplingParams: seed must be set before a request enters a slot; draw one for it")
    length, prompt_length = len(prompt_ids) + len(output_ids), len(prompt_ids)
    if not 1 <= length <= max_model_len:
        raise ValueError(f"a sequence of {length} tokens does not fit a slot: allowed are 1 to {max_model_len}")
    check_bad_words(bad_words_ids)

    flags_V = np.zeros(padded_vocab, np.uint8)
    flags_V[vocab_size:] = BANNED
    if params.allowed_token_ids is not None:
        flags_V[:] = BANNED
        flags_V[params.allowed_token_ids] = 0
    flags_V[np.asarray(prompt_ids, np.int64)] |= IN_PROMPT
    stop_ids = list(params.stop_token_ids or ())
    if not params.ignore_eos:
        stop_ids += [i for i in eos_token_ids if i < vocab_size]
    flags_V[stop_ids] |= STOP

    bias = params.logit_bias or {}
    bias_ids_E = np.full(MAX_LOGIT_BIAS, padded_vocab, np.int32)
    bias_ids_E[: len(bias)] = list(bias)
    bias_E = np.zeros(MAX_LOGIT_BIAS, np.float32)
    bias_E[: len(bias)] = list(bias.values())

    output_M = np.full(max_model_len, padded_vocab, np.int32)
    output_M[: len(output_ids)] = output_ids
    recent = list(output_ids[-_RECENT:])
    bad_prefix_QW = np.full((MAX_BAD_WORDS, _RECENT), -1, np.int32)
    bad_last_Q = np.full(MAX_BAD_WORDS, -1, np.int32)
    for q, ids in enumerate(bad_words_ids):
        bad_prefix_QW[q, _RECENT - (len(ids) - 1) :] = ids[:-1]
        bad_last_Q[q] = ids[-1]

    max_tokens = max_model_len if params.max_tokens is None else params.max_tokens
    i32, f32 = partial(np.asarray, dtype=np.int32), partial(np.asarray, dtype=np.float32)
    return SlotRow(
        token=i32(output_ids[-1] if output_ids else prompt_ids[-1]),
        length=i32(length),
        stop_length=i32(min(prompt_length + max_tokens, max_model_len)),
        min_length=i32(min(prompt_length + params.min_tokens, max_model_len)),
        temperature=f32(params.temperature),
        top_p=f32(params.top_p),
        min_p=f32(params.min_p),
        presence=f32(params.presence_penalty),
        frequency=f32(params.frequency_penalty),
        repetition=f32(params.repetition_penalty),
        top_k=i32(min(max(params.top_k, 0), MAX_VOCAB)),
        wanted=i32(-1 if params.logprobs is None else params.logprobs),
        key_2=sequence_key(params.seed or 0, sample_index),
        recent_W=i32([-1] * (_RECENT - len(recent)) + recent),
        bad_prefix_QW=bad_prefix_QW,
        bad_last_Q=bad_last_Q,
        flags_V=flags_V,
        bias_ids_E=bias_ids_E,
        bias_E=bias_E,
        output_M=output_M,
    )


def pack_rows(slots: Sequence[int], rows: Sequence[SlotRow], count: int, num_slots: int) -> np.ndarray:
    """Rows for `count` slots as one int32 array [count, words], so that one transfer carries them all.

    What is missing to `count` is padding: its slot is num_slots, which `admit` drops.
    """
    packed = np.empty((count, 1 + sum(map(_words, jax.tree.leaves(rows[0])))), np.int32)
    packed[:, 0] = num_slots
    for line, slot, row in zip(packed, slots, rows, strict=False):
        line[0], at = slot, 1
        for leaf in jax.tree.leaves(row):
            flat = leaf.reshape(-1)
            words = np.pad(flat, (0, -flat.size % 4)).view(np.int32) if leaf.itemsize == 1 else flat.view(np.int32)
            line[at : at + words.size] = words
            at += words.size
    return packed


def unpack_rows(packed_AW: jax.Array, like: SlotRow) -> tuple[jax.Array, SlotRow]:
    """The inverse of `pack_rows`, on the device: (slot_A, rows with a leading axis A); `like` gives shapes and dtypes."""
    leaves, treedef = jax.tree.flatten(like)
    out, at = [], 1
    for leaf in leaves:
        words_Aw = packed_AW[:, at : at + _words(leaf)]
        flat_An = lax.bitcast_convert_type(words_Aw, leaf.dtype).reshape(len(packed_AW), -1)
        out.append(flat_An[:, : leaf.size].reshape(-1, *leaf.shape))
        at += words_Aw.shape[1]
    return packed_AW[:, 0], jax.tree.unflatten(treedef, out)


def _words(leaf: np.ndarray) -> int:
    return -(-leaf.nbytes // 4)


def admit(state: SlotState, slot: jax.Array, row: SlotRow) -> SlotState:
    """Puts requests into slots: one (a scalar int32), or several (slot_A and a row of arrays with a leading axis A; slots
    out of range are dropped). Jit it with `state` donated and out_shardings=state_shardings(mesh), so that the state's
    layout never changes."""
    V = state.flags_SV.shape[1]

    def wide(bias_ids_E: jax.Array, bias_E: jax.Array, output_M: jax.Array) -> tuple[jax.Array, jax.Array]:
        bias_V = jnp.zeros(V, jnp.float32).at[bias_ids_E].set(bias_E, mode="drop")
        return bias_V, jnp.zeros(V, jnp.int32).at[output_M].add(1, mode="drop")

    values = {name: getattr(row, name) for name in (f.name for f in dataclasses.fields(SlotRow))}
    sparse = [values.pop(name) for name in ("bias_ids_E", "bias_E", "output_M")]
    values["bias_V"], values["counts_V"] = (jax.vmap(wide) if jnp.ndim(slot) else wide)(*sparse)
    values["finished"] = False
    new = {}
    for field in dataclasses.fields(SlotState):
        stem, suffix = field.name.rsplit("_", 1)
        name = f"{stem}_{suffix[1:]}" if suffix[1:] else stem
        new[field.name] = getattr(state, field.name).at[slot].set(values.pop(name), mode="drop")
    return SlotState(**new)


def set_masks(state: SlotState, slot_A: jax.Array, mask_AW: jax.Array, mesh: Mesh) -> SlotState:
    """Allows each slot the tokens of its mask and no others, until its next mask or `admit`.

    slot_A: int32, distinct; those out of range are dropped. mask_AW: uint32, token 32 w + i is bit i of word w (as
    structured_outputs.Matcher.mask gives them); tokens beyond its words are not allowed. Jit it as `admit`.
    """

    def shard(flags_SV: jax.Array, slot_A: jax.Array, mask_AW: jax.Array) -> jax.Array:
        V = flags_SV.shape[1]
        id_V = lax.axis_index("tp") * V + jnp.arange(V)
        word_AV = jnp.take(mask_AW, id_V >> 5, axis=1, mode="fill", fill_value=0)
        banned_AV = (word_AV >> (id_V & 31).astype(jnp.uint32) & 1) == 0
        flags_AV = jnp.take(flags_SV, slot_A, axis=0, mode="clip") & ~np.uint8(GRAMMAR)
        return flags_SV.at[slot_A].set(flags_AV | jnp.where(banned_AV, np.uint8(GRAMMAR), np.uint8(0)), mode="drop")

    flags_SV = jax.shard_map(
        shard, mesh=mesh, in_specs=(spec("SV"), spec("A"), spec("AW")), out_specs=spec("SV"), check_vma=False
    )(state.flags_SV, slot_A, mask_AW)
    return dataclasses.replace(state, flags_SV=flags_SV)


def threefry2x32(key0: Any, key1: Any, counter0: Any, counter1: Any) -> tuple[Any, Any]:
    """The Threefry-2x32 block cipher, 20 rounds (Salmon et al. 2011), on uint32 arrays of numpy or jax that broadcast.

    Spelled out, not taken from jax.random, because a seed must give the same text in every version of jax, and because
    plain elementwise operations fuse with what uses them.
    """
    keys = (key0, key1, key0 ^ key1 ^ np.uint32(0x1BD11BDA))
    x0, x1 = counter0 + keys[0], counter1 + keys[1]
    for group in range(5):
        for rotation in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            x0 = x0 + x1
            x1 = ((x1 << np.uint32(rotation)) | (x1 >> np.uint32(32 - rotation))) ^ x0
        x0 = x0 + keys[(group + 1) % 3]
        x1 = x1 + keys[(group + 2) % 3] + np.uint32(group + 1)
    return x0, x1


def sequence_key(seed: int, sample_index: int) -> np.ndarray:
    """uint32[2]: the key of one sequence. seed: any int, modulo 2**64."""
    words = np.array([[seed & 0xFFFFFFFF], [seed >> 32 & 0xFFFFFFFF], [sample_index], [0]], np.uint32)
    return np.concatenate(threefry2x32(*words))
