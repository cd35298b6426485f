"""Rotary embedding and attention over the paged cache: in plain jnp for every device, and where the kernel wins, by kernel."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from jaxinfer.sharding import spec
from pallas_kernels import decode_attention

# Scores are [B, K, queries * G, S] in float32: past this many elements a device, queries are taken block by block.
MAX_SCORES = 1 << 29


def rope_tables(position_BT: jax.Array, inv_freq: np.ndarray, scaling: float) -> tuple[jax.Array, jax.Array]:
    """cos and sin, each [B, T, H/2] float32, of every token's angles (Su et al. 2021, RoFormer)."""
    angles = position_BT[..., None].astype(jnp.float32) * inv_freq
    return jnp.cos(angles) * scaling, jnp.sin(angles) * scaling


def rope(x_BTnH: jax.Array, cos_BTh: jax.Array, sin_BTh: jax.Array) -> jax.Array:
    """Rotate heads, halves paired (h, h + H/2) as in Hugging Face checkpoints; any head axes between T and H."""
    extra = (1,) * (x_BTnH.ndim - cos_BTh.ndim)
    cos = cos_BTh.reshape(cos_BTh.shape[:2] + extra + cos_BTh.shape[2:])
    sin = sin_BTh.reshape(sin_BTh.shape[:2] + extra + sin_BTh.shape[2:])
    a, b = jnp.split(x_BTnH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTnH.dtype)


def attend(
    q_BTKGH: jax.Array,
    keys_XKPH: jax.Array,
    values_XKPH: jax.Array,
    pages_BM: jax.Array,
    position_BT: jax.Array,
    length_B: jax.Array,
    window: int | None,
) -> jax.Array:
    """Causal softmax attention of each query to its sequence's pages, up to and including its own position.

    Args:
        q_BTKGH: queries, kv head by kv head, with G query heads each.
        pages_BM: the pages of each sequence, in order; what is past its length may be any page, it is masked.
        position_BT: the position of each query; those at length_B or later are padding and give nothing meaningful.
        length_B: tokens in the cache, this step's included.
        window: attend to the last `window` positions only (Mistral's sliding window); None: to all.

    Returns:
        [B, T, K, G, H], of q's dtype. Masked values are replaced by zeros, not multiplied by them, so that numbers which
        blew up in a page's former owner cannot reach its next one.
    """
    B, T, K, G, H = q_BTKGH.shape
    P = keys_XKPH.shape[2]
    S = pages_BM.shape[1] * P
    keys_BKSH = gather_pages(keys_XKPH, pages_BM)
    values_BKSH = gather_pages(values_XKPH, pages_BM)
    position_S = jnp.arange(S)
    values_BKSH = jnp.where((position_S < length_B[:, None])[:, None, :, None], values_BKSH, 0)

    def block(q_BtKGH: jax.Array, position_Bt: jax.Array) -> jax.Array:
        # Queries and the group's heads share an axis Q: at decode a lone T = 1 would keep XLA from fusing the softmax.
        t = q_BtKGH.shape[1]
        q_BKQH = jnp.swapaxes(q_BtKGH, 1, 2).reshape(B, K, t * G, H)
        scores = jnp.einsum("BKQH,BKSH->BKQS", q_BKQH, keys_BKSH, preferred_element_type=jnp.float32)
        visible_BtS = position_S <= position_Bt[..., None]
        if window is not None:
            visible_BtS &= position_S > position_Bt[..., None] - window
        visible_BQS = jnp.repeat(visible_BtS, G, axis=1, total_repeat_length=t * G)
        scores = jnp.where(visible_BQS[:, None], scores * H**-0.5, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1).astype(q_BtKGH.dtype)
        out_BKQH = jnp.einsum("BKQS,BKSH->BKQH", weights, values_BKSH)
        return jnp.swapaxes(out_BKQH.reshape(B, K, t, G, H), 1, 2)

    blocks = num_blocks(T, B * K * G * T * S)
    if blocks == 1:
        return block(q_BTKGH, position_BT)

    def split(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(B, blocks, T // blocks, *x.shape[2:]), 1, 0)

    out = lax.map(lambda args: block(*args), (split(q_BTKGH), split(position_BT)))
    return jnp.moveaxis(out, 0, 1).reshape(B, T, K, G, H)


def has_decode_kernel(dtype: jnp.dtype, G: int, H: int, page_size: int) -> bool:
    """Whether `attend_one` runs here: a Hopper GPU, a jax that has the kernel, and shapes it takes."""
    q = jax.ShapeDtypeStruct((1, 1, G, H), dtype)
    page = jax.ShapeDtypeStruct((1, 1, page_size, H), dtype)
    return decode_attention.why_unsupported(q, page, page) is None


def attend_one(
    q_BKGH: jax.Array,
    keys_XKPH: jax.Array,
    values_XKPH: jax.Array,
    pages_BM: jax.Array,
    length_B: jax.Array,
    window: int | None,
    mesh: Mesh,
) -> jax.Array:
    """`attend` for one query a sequence, at its last position, by the kernel: reads valid pages only, however wide the
    table is. Each device runs it on its own kv heads."""
    kernel = functools.partial(decode_attention.decode_attention, window=window, implementation="mosaic")
    specs = tuple(spec(letters) for letters in ("BKGH", "XKPH", "XKPH", "BM", "B"))
    return jax.shard_map(kernel, mesh=mesh, in_specs=specs, out_specs=spec("BKGH"), check_vma=False)(
        q_BKGH, keys_XKPH, values_XKPH, pages_BM, length_B
    )


def gather_pages(cache_XKPH: jax.Array, pages_BM: jax.Array) -> jax.Array:
    """The pages of each sequence, side by side: [B, K, M*P, H]."""
    B, M = pages_BM.shape
    _, K, P, H = cache_XKPH.shape
    pages_BMKPH = cache_XKPH.at[pages_BM].get(mode="promise_in_bounds")
    return jnp.swapaxes(pages_BMKPH, 1, 2).reshape(B, K, M * P, H)


def num_blocks(T: int, elements: int) -> int:
    """Into how many equal blocks T queries are split so that a block's scores stay under MAX_SCORES (T a power of two)."""
    blocks = 1
    while elements // blocks > MAX_SCORES and blocks < T and T % (2 * blocks) == 0:
        blocks *= 2
    return blocks
