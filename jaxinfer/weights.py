"""Parameters for a mesh, from a checkpoint or drawn: each device's slice is made for it alone.

The sharded layout (heads padded or repeated, F and V padded; see `sharding.Dims`) is applied while a slice is copied
from the checkpoint, so the host never holds more than the fused tensors of two parameters: the one that is being read
and the one that is on its way to the devices. What the model holds in another order than the checkpoint (`stored`) is
read as stored, and transposed on the devices.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh
from tqdm.auto import tqdm

from jaxinfer.checkpoint import Checkpoint, logical_shapes, open_checkpoint
from jaxinfer.config import ModelConfig
from jaxinfer.model import Transformer
from jaxinfer.quant import QuantArray, quantize
from jaxinfer.sharding import AXES, Dims, named

__all__ = ["load_params", "open_checkpoint"]

CHUNK_BYTES = 2 << 20  # read at a time: bounds what dequantizing and casting need beside the parameter itself
MAX_READERS = 8


class Param(NamedTuple):
    """One parameter of the model: `logical` is its name without letters, `layer` None outside the blocks; letters and
    shape are in the checkpoint's order, `wanted` are the model's letters; what it is quantized to, if it is."""

    logical: str
    layer: int | None
    letters: str
    shape: tuple[int, ...]
    wanted: str
    quantized: QuantArray | None = None

    @property
    def path(self) -> str:
        return self.logical if self.layer is None else f"blocks.{self.layer}.{self.logical}"


class Piece(NamedTuple):
    """Rows and columns of a checkpoint's tensor, and the view of the host array they go to."""

    view: np.ndarray
    tensor: str
    rows: slice
    cols: slice | None = None


def load_params(
    checkpoint: Checkpoint,
    model: Transformer,
    config: ModelConfig,
    mesh: Mesh,
    dtype: jnp.dtype,
    *,
    seed: int = 0,
    use_tqdm: bool = True,
) -> list[jax.Array]:
    """Every parameter of an abstract model, sharded over its mesh by the letters of its shape.

    Args:
        checkpoint: of `open_checkpoint`; already checked against `config`.
        model: built abstract, for `config`, `mesh` and `dtype`.
        seed: of random weights; their values are the same under any tensor parallelism.
        use_tqdm: show a progress bar, in bytes on the devices.

    Returns:
        The arrays in the order of `jax.tree.leaves(nnx.state(model))`.
    """
    params = _params(model)
    total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(nnx.state(model)))
    desc = "Drawing weights" if checkpoint.source is None else "Loading weights"
    leaves: list[jax.Array] = []
    with (
        tqdm(total=total, desc=desc, unit="B", unit_scale=True, disable=not use_tqdm) as bar,
        ThreadPoolExecutor(min(MAX_READERS, os.cpu_count() or 1)) as pool,
    ):
        programs: dict[tuple[str, tuple[int, ...]], Callable[[np.ndarray], jax.Array | QuantArray]] = {}
        for p in params:
            if checkpoint.source is None:
                if (p.logical, p.shape) not in programs:
                    programs[p.logical, p.shape] = _random_program(p, config, model.dims, mesh, dtype)
                value = programs[p.logical, p.shape](_key(seed, p.path))
            else:
                value = _read_param(p, checkpoint, config, model.dims, mesh, dtype, pool)
                if leaves:
                    leaves[-1].block_until_ready()  # only one parameter's host copy beside the one being read
            arrays = jax.tree.leaves(value)
            leaves += arrays
            bar.update(sum(array.nbytes for array in arrays))
        jax.block_until_ready(leaves)
    return leaves


def _params(model: Transformer) -> list[Param]:
    """The model's parameters, in the order of its leaves: blocks[3].attn.qkv_DKJH → ("qkv", 3, "KJHD", shape, "DKJH")."""
    out = []
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        value, stored = variable.get_value(), variable.stored
        quantized = value if isinstance(value, QuantArray) else None
        letters = quantized.letters if quantized else variable.letters
        layer = int(str(path[1])) if path[0] == "blocks" else None
        size = dict(zip(letters, value.shape, strict=True))
        shape = tuple(size[letter] for letter in stored)
        out.append(Param(str(path[-1]).removesuffix(f"_{variable.letters}"), layer, stored, shape, letters, quantized))
    return out


# ---- from a checkpoint


def _read_param(
    p: Param,
    checkpoint: Checkpoint,
    config: ModelConfig,
    dims: Dims,
    mesh: Mesh,
    dtype: jnp.dtype,
    pool: ThreadPoolExecutor,
) -> jax.Array | QuantArray:
    source, names = checkpoint.source, checkpoint.names
    assert source is not None and names is not None

    def copy(piece: Piece, start: int, stop: int) -> None:
        first = piece.rows.start
        name = names[piece.tensor, p.layer]
        piece.view[start:stop] = source.read(name, slice(first + start, first + stop), piece.cols)

    def device_slice(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        bounds = [part.indices(size)[:2] for part, size in zip(index, p.shape, strict=True)]
        out = np.zeros([stop - start for start, stop in bounds], dtype)
        start = next((b[0] for b, letter in zip(bounds, p.letters, strict=True) if letter in AXES), 0)
        jobs = []
        for piece in _pieces(p.logical, out, start, config, dims):
            rows = len(piece.view)
            step = max(1, CHUNK_BYTES * rows // max(1, piece.view.size * 4))
            jobs += [pool.submit(copy, piece, i, min(i + step, rows)) for i in range(0, rows, step)]
        for job in jobs:
            job.result()
        return out

    stored = jax.make_array_from_callback(p.shape, named(mesh, p.letters), device_slice)
    if p.quantized is None and p.letters == p.wanted:
        return stored
    return _on_device(p.letters, p.wanted, p.quantized, mesh)(stored)


@cache
def _on_device(
    letters: str, wanted: str, quantized: QuantArray | None, mesh: Mesh
) -> Callable[[jax.Array], jax.Array | QuantArray]:
    """From the checkpoint's order to the model's, and quantized if it is to be."""
    order = [letters.index(letter) for letter in wanted]
    if quantized is None:
        return jax.jit(lambda stored: jnp.transpose(stored, order), out_shardings=named(mesh, wanted))
    return jax.jit(lambda stored: quantize(jnp.transpose(stored, order), quantized), out_shardings=quantized.sharding)


def _pieces(logical: str, out: np.ndarray, start: int, config: ModelConfig, dims: Dims) -> Iterator[Piece]:
    """What goes where in one device's slice of a parameter; what no piece covers is padding and stays zero.

    Args:
        out: the slice, contiguous; the views are into it.
        start: where the slice begins along its sharded axis.
    """
    shapes, H = logical_shapes(config), config.head_dim
    if logical in ("qkv", "qkv_bias"):
        suffix = logical.removeprefix("qkv")
        for local in range(out.shape[0]):
            kv_head, heads = source_heads(start + local, config, dims)
            if kv_head is None:
                continue
            group = len(heads)
            targets = {
                "q": (out[local, :group], slice(heads.start * H, heads.stop * H)),
                "k": (out[local, dims.G : dims.G + 1], slice(kv_head * H, (kv_head + 1) * H)),
                "v": (out[local, dims.G + 1 :], slice(kv_head * H, (kv_head + 1) * H)),
            }
            for name, (view, rows) in targets.items():
                yield Piece(view.reshape(-1, *out.shape[3:]), name + suffix, rows)
    elif logical == "o":
        flat = out.reshape(out.shape[0], -1)
        for local in range(out.shape[1]):
            kv_head, heads = source_heads(start + local, config, dims)
            if kv_head is not None and heads:
                at = local * dims.G * H
                cols = slice(heads.start * H, heads.stop * H)
                yield Piece(flat[:, at : at + len(heads) * H], "o", slice(0, out.shape[0]), cols)
    elif logical == "gate_up":
        stop = min(start + out.shape[0], config.intermediate_size)
        for c, name in enumerate(("gate", "up")):
            yield Piece(out[: max(0, stop - start), c], name, slice(start, stop))
    elif logical == "down":
        stop = min(start + out.shape[1], config.intermediate_size)
        if stop > start:
            yield Piece(out[:, : stop - start], "down", slice(0, out.shape[0]), slice(start, stop))
    else:  # embed and lm_head by vocabulary, norms whole
        stop = min(start + out.shape[0], shapes[logical][0])
        yield Piece(out[: max(0, stop - start)], logical, slice(start, stop))


def source_heads(k: int, config: ModelConfig, dims: Dims) -> tuple[int | None, range]:
    """Padded kv head k → the checkpoint's kv head, None if k is padding, and the query heads that stand in its group."""
    kv_head, part = divmod(k, dims.repeat)
    if kv_head >= config.num_key_value_heads:
        return None, range(0)
    group = config.num_attention_heads // config.num_key_value_heads
    first, last = min(part * dims.G, group), min((part + 1) * dims.G, group)
    return kv_head, range(kv_head * group + first, kv_head * group + last)


# ---- drawn


def _key(seed: int, path: str) -> np.ndarray:
    """Two 32-bit words from a seed and a parameter's path."""
    return np.frombuffer(hashlib.sha256(f"{seed}/{path}".encode()).digest()[:8], np.uint32)


def _random_program(
    p: Param, config: ModelConfig, dims: Dims, mesh: Mesh, dtype: jnp.dtype
) -> Callable[[np.ndarray], jax.Array | QuantArray]:
    """A program key → parameter, for every parameter of this name and shape.

    Uniform with standard deviation 1/sqrt(inputs), so that products keep the scale of their input at any size and depth;
    norm weights are one, biases small. An element is a hash of the key and of its place in the unpadded tensor: no
    temporaries, nothing to gather, and the same values however it is padded, repeated and sharded.
    """
    scale = math.sqrt(3) * (0.02 if p.logical == "qkv_bias" else _inputs(p.logical, config) ** -0.5)

    def draw(key: jax.Array) -> jax.Array | QuantArray:
        if "norm" in p.logical:
            return jnp.ones(p.shape, dtype)
        place, real = _places(p, config, dims)
        bits = _hash(_hash(place + key[0]) ^ key[1])
        uniform = (bits >> 8).astype(jnp.float32) * 2.0**-23 - 1  # exact, so that backends agree
        stored = jnp.where(real, uniform * scale, 0).astype(dtype)
        wanted = jnp.transpose(stored, [p.letters.index(letter) for letter in p.wanted])
        return wanted if p.quantized is None else quantize(wanted, p.quantized)

    return jax.jit(draw, out_shardings=named(mesh, p.wanted) if p.quantized is None else p.quantized.sharding)


def _inputs(logical: str, config: ModelConfig) -> int:
    """Length of the reduced axis."""
    widths = {"o": config.num_attention_heads * config.head_dim, "down": config.intermediate_size}
    return widths.get(logical, config.hidden_size)


def _places(p: Param, config: ModelConfig, dims: Dims) -> tuple[jax.Array, jax.Array]:
    """Each element's number in the unpadded parameter (uint32), and whether it is there at all."""
    axis = {letter: lax.broadcasted_iota(jnp.uint32, p.shape, i) for i, letter in enumerate(p.letters)}
    size = {"K": config.num_key_value_heads, "F": config.intermediate_size, "V": config.vocab_size}
    size["G"] = config.num_attention_heads // size["K"]
    size["J"] = size["G"] + 2
    real = jnp.ones(p.shape, bool)
    if "K" in axis:
        part, axis["K"] = axis["K"] % dims.repeat, axis["K"] // dims.repeat
        letter = "J" if "J" in axis else "G"
        is_query = axis[letter] < dims.G
        query = part * dims.G + axis[letter]
        real &= ~is_query | (query < size["G"])
        axis[letter] = jnp.where(is_query, query, axis[letter] - dims.G + size["G"])
    place = jnp.zeros(p.shape, jnp.uint32)
    for letter, length in zip(p.letters, p.shape, strict=True):
        place = place * jnp.uint32(size.get(letter, length)) + axis[letter]
        if letter in AXES:
            real &= axis[letter] < size[letter]
    return place, real


def _hash(x: jax.Array) -> jax.Array:
    """A well-mixed bijection of uint32 (lowbias32, C. Wellons, "Prospecting for Hash Functions", 2018)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
