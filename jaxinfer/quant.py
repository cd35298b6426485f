"""Weights in int8: a pytree that stands where a matrix stood, and the one product that takes either.

W8A16: symmetric, a bfloat16 scale for each 128 elements along the reduced axis of a column, round to nearest. Each device's
shard is quantized by itself: its groups begin where the shard begins, the last one may be shorter.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxinfer.sharding import AXES
from pallas_kernels import linear, lm_head, persistent, swiglu
from pallas_kernels.linear_int8 import COLUMNS, GROUP

MAX_TILE_PADDING = 0.04  # of a shard: what tiles may add, else the shard stays as it is


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantArray:
    """An int8 matrix in place of an array of `letters` and `shape`, its reduced axes first.

    values, scales: of each shard [I, O] and [ceil(I/128), O]; or, `tiled`, as pallas_kernels.linear reads them, padded with
    zeros to multiples of 128: [O/128, I/128, 128, 128] and [O/128, I/128, 128]. `inputs`: how many axes are reduced.
    """

    values: jax.Array
    scales: jax.Array
    letters: str = field(metadata={"static": True})
    shape: tuple[int, ...] = field(metadata={"static": True})
    inputs: int = field(metadata={"static": True})
    tiled: bool = field(metadata={"static": True})
    mesh: Mesh = field(metadata={"static": True})

    @property
    def is_row_parallel(self) -> bool:
        """Whether a product's result is still to be summed over the devices."""
        return any(letter in AXES for letter in self.letters[: self.inputs])

    @property
    def local(self) -> tuple[int, int]:
        """[I, O] of one device's shard."""
        I, O = math.prod(self.shape[: self.inputs]), math.prod(self.shape[self.inputs :])  # noqa: E741
        shards = self.mesh.size
        return (I // shards, O) if self.is_row_parallel else (I, O // shards)

    @property
    def spec(self) -> PartitionSpec:
        """Of `values` and of `scales` alike."""
        return PartitionSpec(*(("tp", None) if self.is_row_parallel != self.tiled else (None, "tp")))

    @property
    def sharding(self) -> NamedSharding:
        return NamedSharding(self.mesh, self.spec)

    @property
    def flat(self) -> PartitionSpec:
        """Of the matrix that this stands for, [I, O]."""
        return PartitionSpec(*(("tp", None) if self.is_row_parallel else (None, "tp")))

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes


def abstract(letters: str, shape: tuple[int, ...], inputs: int, dtype: jnp.dtype, mesh: Mesh) -> QuantArray:
    """The QuantArray of ShapeDtypeStructs for an array of this shape; activations have `dtype`.

    Tiled where the Mosaic kernel runs and padding costs little. Raises ValueError where no axis is sharded exactly once.
    """
    if sum(letter in AXES for letter in letters) != 1:
        raise ValueError(f"a quantized array of letters {letters!r}: exactly one must be sharded, of {', '.join(AXES)}")
    nothing: Any = jax.ShapeDtypeStruct((), jnp.int8)
    array = QuantArray(nothing, nothing, letters, shape, inputs, False, mesh)
    rows, columns = array.local
    tiles, units = -(-columns // GROUP), -(-rows // GROUP)
    weight = (
        jax.ShapeDtypeStruct((tiles, units, GROUP, GROUP), jnp.int8),
        jax.ShapeDtypeStruct((tiles, units, GROUP), jnp.bfloat16),
    )
    small = tiles * units * GROUP * GROUP <= (1 + MAX_TILE_PADDING) * rows * columns
    tiled = small and linear.why_unsupported(jax.ShapeDtypeStruct((1, units * GROUP), dtype), weight) is None
    return with_layout(array, tiled)


def with_layout(array: QuantArray, tiled: bool) -> QuantArray:
    """The same, abstract, in the given layout."""
    array = replace(array, tiled=tiled)
    rows, columns = array.local
    one = jax.eval_shape(functools.partial(_quantize, tiled=tiled), jax.ShapeDtypeStruct((rows, columns), jnp.float32))

    def whole(x: jax.ShapeDtypeStruct) -> Any:
        parts = [*array.spec, *([None] * (len(x.shape) - 2))]
        shape = tuple(size * (array.mesh.size if part else 1) for size, part in zip(x.shape, parts, strict=True))
        return jax.ShapeDtypeStruct(shape, x.dtype)

    values, scales = (whole(x) for x in one)
    return replace(array, values=values, scales=scales)


def quantize(weight: jax.Array, array: QuantArray) -> QuantArray:
    """A weight of the abstract array's letters, quantized shard by shard; to be called under jit."""
    body = jax.shard_map(
        functools.partial(_quantize, tiled=array.tiled),
        mesh=array.mesh,
        in_specs=array.flat,
        out_specs=(array.spec, array.spec),
        check_vma=False,
    )
    values, scales = body(weight.reshape(math.prod(array.shape[: array.inputs]), -1))
    return replace(array, values=values, scales=scales)


def dequantize(array: QuantArray, dtype: Any) -> jax.Array:
    """The array that this stands for, of its letters and shape."""
    rows, columns = array.local
    body = jax.shard_map(
        lambda values, scales: _dequantize(values, scales, array.tiled, dtype)[:rows, :columns],
        mesh=array.mesh,
        in_specs=(array.spec, array.spec),
        out_specs=array.flat,
        check_vma=False,
    )
    return body(array.values, array.scales).reshape(array.shape)


def product(x_TI: jax.Array, weight: jax.Array | QuantArray, out_dtype: Any = None) -> jax.Array:
    """x times an input-major weight [I…, O…], as one plain matrix product: [T, O…], in x's dtype or `out_dtype`.

    An int8 weight is dequantized, then multiplied, so that tensor parallelism changes no more than rounding; few rows go to the
    streaming kernel where it runs. Plain weights are flattened, because XLA transposes or mistiles weights of more axes
    (measured on H200: 19 us a layer for `o`); the sharded axis comes first of what is flattened, so that a shard of the flat
    axis is a shard of the weight.
    """
    T, I = x_TI.shape  # noqa: E741
    if isinstance(weight, QuantArray):
        out_TO = _sharded(weight, functools.partial(_multiply, weight, out_dtype=out_dtype))(x_TI, weight.values, weight.scales)
        return out_TO.reshape(T, *weight.shape[weight.inputs :])
    inputs = 1
    while math.prod(weight.shape[:inputs]) < I:
        inputs += 1
    out_TO = jnp.dot(x_TI, weight.reshape(I, -1), preferred_element_type=out_dtype)
    return out_TO.reshape(T, *weight.shape[inputs:])


def argmax(x_BI: jax.Array, weight: jax.Array | QuantArray, valid: int | jax.Array) -> tuple[jax.Array, jax.Array]:
    """pallas_kernels.lm_head of one device's shard of a head, plain [V, I] or quantized: the largest logit of its first `valid`
    tokens, and which one that is, each [B]."""
    if not isinstance(weight, QuantArray):
        value_B1, id_B1 = lm_head.lm_head(x_BI, weight, valid)
    elif _streams(weight, x_BI):
        value_B1, id_B1 = lm_head.lm_head(_padded(x_BI, weight.values), (weight.values, weight.scales), valid)
    else:
        logits_BV = _multiply(weight, x_BI, weight.values, weight.scales, jnp.float32)
        value_B1, id_B1 = lm_head.of_logits(logits_BV, valid)
    return value_B1[:, 0], id_B1[:, 0]


def kernel_weight(weight: jax.Array | QuantArray, inputs: int) -> Any:
    """A weight, or under shard_map a device's shard of it, as pallas_kernels.decode_layer takes it: [I, O], or (tiles, scales)
    of a tiled int8 one. None for an int8 one that is not tiled, or padded to be."""
    if not isinstance(weight, QuantArray):
        return weight.reshape(math.prod(weight.shape[:inputs]), -1)
    rows, columns = weight.local
    return (weight.values, weight.scales) if weight.tiled and not (rows % GROUP or columns % GROUP) else None


def gated(x_TI: jax.Array, weight: jax.Array | QuantArray, mesh: Mesh) -> jax.Array:
    """silu(gate)·up of a product with a weight [I, F, 2], gate and up side by side, sharded along F: [T, F]."""
    if isinstance(weight, QuantArray):
        return _sharded(weight, functools.partial(_multiply, weight, silu=True))(x_TI, weight.values, weight.scales)

    def multiply(x_TI: jax.Array, weight_IFC: jax.Array) -> jax.Array:
        return swiglu.swiglu(x_TI, weight_IFC.reshape(len(weight_IFC), -1))

    if mesh.size == 1:
        return multiply(x_TI, weight)
    specs = (PartitionSpec(), PartitionSpec(None, "tp"))
    return jax.shard_map(multiply, mesh=mesh, in_specs=specs, out_specs=specs[1], check_vma=False)(x_TI, weight)


def _sharded(weight: QuantArray, multiply: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`multiply` of one device's columns of x and shard, over the mesh."""
    if weight.mesh.size == 1:
        return multiply
    split, whole = PartitionSpec(None, "tp"), PartitionSpec()
    x, out = (split, whole) if weight.is_row_parallel else (whole, split)

    def reduced(*args: jax.Array) -> jax.Array:
        out_TO = multiply(*args)
        return lax.psum(out_TO, "tp") if weight.is_row_parallel else out_TO

    specs = (x, weight.spec, weight.spec)
    return jax.shard_map(reduced, mesh=weight.mesh, in_specs=specs, out_specs=out, check_vma=False)


def _multiply(
    weight: QuantArray, x_TI: jax.Array, values: jax.Array, scales: jax.Array, out_dtype: Any = None, silu: bool = False
) -> jax.Array:
    """One device's product: [T, O], or [T, O/2] with silu."""
    rows, columns = weight.local
    if _streams(weight, x_TI):
        out_TO = linear.linear(_padded(x_TI, values), (values, scales), silu=silu, out_dtype=out_dtype)
        return out_TO[:, : columns // 2 if silu else columns]
    weight_IO = _dequantize(values, scales, weight.tiled, x_TI.dtype)[:rows, :columns]
    if silu:
        return swiglu.swiglu(x_TI, weight_IO)
    return jnp.dot(x_TI, weight_IO, preferred_element_type=out_dtype)


# ---- one shard


def _streams(weight: QuantArray, x_TI: jax.Array) -> bool:
    """Whether so few rows go to the streaming kernels."""
    return weight.tiled and len(x_TI) <= linear.MAX_ROWS


def _padded(x_TI: jax.Array, tiles: jax.Array) -> jax.Array:
    """x with as many columns as the tiles have rows."""
    return jnp.pad(x_TI, ((0, 0), (0, tiles.shape[1] * GROUP - x_TI.shape[1])))


def _quantize(weight_IO: jax.Array, tiled: bool) -> tuple[jax.Array, jax.Array]:
    rows, columns = weight_IO.shape
    groups = -(-rows // GROUP)
    padding = ((0, groups * GROUP - rows), (0, -columns % GROUP if tiled else 0))
    grouped = jnp.pad(weight_IO, padding).astype(jnp.float32).reshape(groups, GROUP, -1)
    scales_gO = (jnp.abs(grouped).max(axis=1) / 127).astype(jnp.bfloat16)
    steps = jnp.where(scales_gO == 0, 1, scales_gO).astype(jnp.float32)[:, None]
    values_IO = jnp.clip(jnp.round(grouped / steps), -127, 127).astype(jnp.int8).reshape(groups * GROUP, -1)
    return pack(values_IO, scales_gO) if tiled else (values_IO[:rows], scales_gO)


def _dequantize(values: jax.Array, scales: jax.Array, tiled: bool, dtype: Any) -> jax.Array:
    """[I, O] of a shard, with its padding where it is tiled."""
    values_IO, scales_gO = unpack(values, scales) if tiled else (values, scales)
    rows, groups = len(values_IO), len(scales_gO)
    grouped = jnp.pad(values_IO, ((0, groups * GROUP - rows), (0, 0))).reshape(groups, GROUP, -1).astype(jnp.float32)
    return (grouped * scales_gO.astype(jnp.float32)[:, None]).reshape(groups * GROUP, -1)[:rows].astype(dtype)


def pack(values_IO: jax.Array, scales_gO: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Values and scales as the kernels read them, of multiples of 128."""
    groups, columns = scales_gO.shape
    scales = scales_gO.reshape(groups, columns // COLUMNS, COLUMNS).swapaxes(0, 1)
    return persistent.tile_int8(values_IO, COLUMNS), scales


def unpack(values: jax.Array, scales: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The inverse of `pack`."""
    return persistent.untile_int8(values), scales.swapaxes(0, 1).reshape(scales.shape[1], -1)
