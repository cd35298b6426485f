"""The paged KV cache: one pool of pages, allocated once, donated through every step and updated in place.

Page 0 is a bin: padding rows and finished sequences write there, and no sequence ever owns it. A contiguous cache is a pool
whose page is max_model_len long: the same class. Paging after Kwon et al. 2023, "Efficient Memory Management for Large
Language Model Serving with PagedAttention".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxinfer.config import ModelConfig
from jaxinfer.sharding import Dims, named

LETTERS = "XKPH"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """One array a layer and side: keys[l], values[l] are [X pages, K kv heads, P tokens a page, H head_dim]."""

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]


def init_cache(config: ModelConfig, dims: Dims, num_pages: int, page_size: int, dtype: jnp.dtype, mesh: Mesh) -> KVCache:
    """Allocate the pool, zeroed, sharded over the kv heads."""
    shape = (num_pages, dims.K, page_size, config.head_dim)
    layers = config.num_hidden_layers
    zeros = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=named(mesh, LETTERS))
    return KVCache(tuple(zeros() for _ in range(layers)), tuple(zeros() for _ in range(layers)))


def abstract_cache(config: ModelConfig, dims: Dims, num_pages: int, page_size: int, dtype: jnp.dtype, mesh: Mesh) -> KVCache:
    """The pool's shapes and shardings, for compiling before it is allocated."""
    page: Any = jax.ShapeDtypeStruct((num_pages, dims.K, page_size, config.head_dim), dtype, sharding=named(mesh, LETTERS))
    return KVCache((page,) * config.num_hidden_layers, (page,) * config.num_hidden_layers)


def page_bytes(config: ModelConfig, dims: Dims, page_size: int, dtype: jnp.dtype, tensor_parallel_size: int) -> int:
    """Bytes that one page takes on each device, all layers, keys and values."""
    heads = dims.K // tensor_parallel_size
    return 2 * config.num_hidden_layers * heads * page_size * config.head_dim * jnp.dtype(dtype).itemsize


def write(pages_XKPH: jax.Array, new_TKH: jax.Array, page_T: jax.Array, offset_T: jax.Array) -> jax.Array:
    """Write each token's heads at its page and offset, in place when `pages_XKPH` is donated.

    Tokens of live sequences have distinct places; padding ones all go to page 0, where the last writer wins.
    """
    return pages_XKPH.at[page_T, :, offset_T].set(
        new_TKH.astype(pages_XKPH.dtype), mode="promise_in_bounds", unique_indices=True
    )
