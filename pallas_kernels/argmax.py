"""The maximum of many logits and where it stands: pieces that kernels, their references and what reads their lists share.

A pair is (values, ids). Of equal values the lowest id is the better one, so what order they are compared in changes nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.mosaic import reduce_rows

NO_ID = np.int32(np.iinfo(np.int32).max)  # of padding: above every id


def better(a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The better one of two pairs, element by element."""
    first = (a[0] > b[0]) | ((a[0] == b[0]) & (a[1] < b[1]))
    return jnp.where(first, a[0], b[0]), jnp.where(first, a[1], b[1])


def argmax(value_BV: jax.Array, id_BV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(maximum, its id) over the last axis in one reduction. No NaN."""
    init = np.float32(-np.inf), NO_ID
    return lax.reduce((value_BV, id_BV), init, better, (value_BV.ndim - 1,))  # type: ignore[return-value]


def among(value: jax.Array, id: jax.Array, here: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What is `here`; (-inf, NO_ID) elsewhere, and NaN as -inf."""
    return jnp.where(here & (value == value), value, -jnp.inf), jnp.where(here, id, NO_ID)


def over_rows(value_N: jax.Array) -> jax.Array:
    """In a kernel: [N] for each of a warpgroup's 64 rows."""
    return lax.broadcast_in_dim(value_N, (64, *value_N.shape), [1])


def argmax_of_rows(
    values: Sequence[jax.Array], ids: Sequence[jax.Array], scratch: Sequence[Any], interpret: Any
) -> tuple[jax.Array, jax.Array]:
    """In a kernel: a warpgroup's pairs, each [64, N], → the best of each column, [N]. scratch: of values and of ids."""
    N = values[0].shape[1]
    most_N = reduce_rows("max", N, jnp.float32, interpret)(functools.reduce(jnp.maximum, values), scratch[0])
    best = [jnp.where(value == over_rows(most_N), id, NO_ID) for value, id in zip(values, ids, strict=True)]
    return most_N, reduce_rows("min", N, jnp.int32, interpret)(functools.reduce(jnp.minimum, best), scratch[1])
