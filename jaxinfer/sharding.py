"""One mesh axis, one alphabet: how every array of the engine is laid out over the GPUs.

The letters of an array's shape are its logical axes (see README, "Reading the code"). Four of them are split over the mesh
axis "tp" (Megatron-LM, Shoeybi et al. 2019, section 3): query heads N, kv heads K, the MLP's F and the vocabulary V.
A weight whose *output* axis is one of them is column-parallel, one whose *reduced* axis is one of them row-parallel.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxinfer.config import ModelConfig

AXES = {"N": "tp", "K": "tp", "F": "tp", "V": "tp"}


def make_mesh(tensor_parallel_size: int = 1) -> Mesh:
    """A mesh of the first `tensor_parallel_size` devices, with the one axis "tp".

    Raises:
        ValueError: more devices are asked for than there are.
    """
    devices = jax.devices()
    if tensor_parallel_size > len(devices):
        hint = (
            " On CPU, force more with jaxinfer.runtime.setup(num_cpu_devices=N) before JAX starts, or --num-cpu-devices N."
            if devices[0].platform == "cpu"
            else ""
        )
        raise ValueError(
            f"tensor_parallel_size={tensor_parallel_size}, but there are {len(devices)} {devices[0].platform} devices; "
            f"use 1 to {len(devices)}.{hint}"
        )
    return Mesh(np.array(devices[:tensor_parallel_size]), ("tp",), axis_types=(AxisType.Auto,))


def spec(letters: str) -> PartitionSpec:
    """The PartitionSpec of an array from the letters of its shape: spec("KJHD") == P("tp", None, None, None)."""
    return PartitionSpec(*(AXES.get(letter) for letter in letters))


def named(mesh: Mesh, letters: str) -> NamedSharding:
    """`spec(letters)` on a mesh; "" is a replicated scalar."""
    return NamedSharding(mesh, spec(letters))


@dataclass(frozen=True)
class Dims:
    """Sizes of the sharded axes after padding, so that each divides over the mesh.

    K kv heads, G query heads of each, F, V; `repeat` is how often each of the checkpoint's kv heads stands in K.
    Padded kv head k is the checkpoint's k // repeat and holds its query heads from (k % repeat) * G on; what is past the
    checkpoint's own heads (or rows of F and V) is zero: a zero query attends evenly to zero values and adds nothing.
    """

    K: int
    G: int
    F: int
    V: int
    repeat: int = 1


def padded_dims(config: ModelConfig, tensor_parallel_size: int) -> Dims:
    """The padding and replication rule: any tensor_parallel_size works for any head count."""
    tp, K = tensor_parallel_size, config.num_key_value_heads
    G = config.num_attention_heads // K
    repeat = tp // K if tp > K and tp % K == 0 else 1
    return Dims(
        K=K * repeat if repeat > 1 else round_up(K, tp),
        G=-(-G // repeat),
        F=round_up(config.intermediate_size, tp),
        V=round_up(config.vocab_size, tp),
        repeat=repeat,
    )


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `n`."""
    return -(-n // multiple) * multiple
