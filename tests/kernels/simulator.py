"""Kernels in Mosaic's simulator, on the CPU."""

from collections.abc import Callable
from typing import Any

import jax


def simulated(kernel: Callable[..., Any], *operands: Any, **how: Any) -> Any:
    """What a kernel returns, with nothing beside it: its threads wait for one another in callbacks, and share XLA's few threads
    with all else, so that a program dispatched meanwhile can have both wait for ever."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    operands = jax.block_until_ready(operands)
    return jax.block_until_ready(kernel(*operands, **how, implementation="mosaic", interpret=plgpu.InterpretGPUParams()))
