"""Rotary embedding, and attention over the paged cache: the kernels where they run, their references elsewhere."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxinfer.sharding import spec
from pallas_kernels import decode_attention, prefill_attention


def rope_tables(position_T: jax.Array, inv_freq: np.ndarray, scaling: float) -> tuple[jax.Array, jax.Array]:
    """cos and sin, each [T, H/2] float32, of every token's angles (Su et al. 2021, RoFormer)."""
    angles = position_T[:, None].astype(jnp.float32) * inv_freq
    return jnp.cos(angles) * scaling, jnp.sin(angles) * scaling


def rope(x_TKJH: jax.Array, cos_Th: jax.Array, sin_Th: jax.Array) -> jax.Array:
    """Rotate heads, halves paired (h, h + H/2) as in Hugging Face checkpoints."""
    cos, sin = cos_Th[:, None, None], sin_Th[:, None, None]
    a, b = jnp.split(x_TKJH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_TKJH.dtype)


def reads_valid_pages_only(dtype: jnp.dtype, G: int, H: int, page_size: int) -> bool:
    """Whether both kernels run here (a Hopper GPU, a jax that has them, shapes they take); their references read every page
    of the table, however short the sequences are."""
    q = jax.ShapeDtypeStruct((1, 1, G, H), dtype)
    page = jax.ShapeDtypeStruct((1, 1, page_size, H), dtype)
    return all(kernel.why_unsupported(q, page, page) is None for kernel in (decode_attention, prefill_attention))


def attend_one(
    q_BKGH: jax.Array,
    keys_XKPH: jax.Array,
    values_XKPH: jax.Array,
    pages_BM: jax.Array,
    length_B: jax.Array,
    window: int | None,
    mesh: Mesh,
) -> jax.Array:
    """Attention of one query a sequence, at its last position, to the length_B tokens it has in the cache.

    window: attend to the last `window` positions only (Mistral's sliding window); None: to all. Each device does its own kv
    heads. See pallas_kernels.decode_attention.
    """
    kernel = functools.partial(decode_attention.decode_attention, window=window)
    specs = tuple(spec(letters) for letters in ("BKGH", "XKPH", "XKPH", "BM", "B"))
    return jax.shard_map(kernel, mesh=mesh, in_specs=specs, out_specs=spec("BKGH"), check_vma=False)(
        q_BKGH, keys_XKPH, values_XKPH, pages_BM, length_B
    )


def appends(dtype: jnp.dtype, G: int, H: int, page_size: int) -> bool:
    """Whether `append_and_attend` runs as one kernel here."""
    qkv = jax.ShapeDtypeStruct((1, 1, G + 2, H), dtype)
    page = jax.ShapeDtypeStruct((1, 1, page_size, H), dtype)
    return decode_attention.why_cannot_append(qkv, page, page) is None


def append_and_attend(
    qkv_BKJH: jax.Array,
    cos_Bh: jax.Array,
    sin_Bh: jax.Array,
    keys_XKPH: jax.Array,
    values_XKPH: jax.Array,
    pages_BM: jax.Array,
    length_B: jax.Array,
    window: int | None,
    mesh: Mesh,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of one new token a sequence: rotation, its place in the cache, and `attend_one`; the output and the cache.

    Rows of length 0 write nothing. See pallas_kernels.decode_attention.
    """
    kernel = functools.partial(decode_attention.append_and_attend, window=window)
    specs = tuple(spec(letters) for letters in ("BKJH", "Bh", "Bh", "XKPH", "XKPH", "BM", "B"))
    outs = tuple(spec(letters) for letters in ("BKGH", "XKPH", "XKPH"))
    return jax.shard_map(kernel, mesh=mesh, in_specs=specs, out_specs=outs, check_vma=False)(
        qkv_BKJH, cos_Bh, sin_Bh, keys_XKPH, values_XKPH, pages_BM, length_B
    )


def attend_chunks(
    q_TKGH: jax.Array,
    keys_XKPH: jax.Array,
    values_XKPH: jax.Array,
    pages_RM: jax.Array,
    offset_R: jax.Array,
    start_R: jax.Array,
    length_R: jax.Array,
    window: int | None,
    mesh: Mesh,
) -> jax.Array:
    """Causal attention of chunks of sequences, one after another along T, to all that their sequences have in the cache.

    See pallas_kernels.prefill_attention.
    """
    kernel = functools.partial(prefill_attention.prefill_attention, window=window)
    specs = tuple(spec(letters) for letters in ("TKGH", "XKPH", "XKPH", "RM", "R", "R", "R"))
    return jax.shard_map(kernel, mesh=mesh, in_specs=specs, out_specs=spec("TKGH"), check_vma=False)(
        q_TKGH, keys_XKPH, values_XKPH, pages_RM, offset_R, start_R, length_R
    )
