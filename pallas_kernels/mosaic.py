"""What kernels share of Pallas's Mosaic GPU, and what of it differs between the versions of jax that we support (0.11, 0.12).

Imported with any jax; its functions are called where kernels are made, with jax 0.11 or newer.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp


def plgpu() -> Any:
    """Pallas's Mosaic GPU module, untyped: its signatures differ between versions."""
    from jax.experimental.pallas import mosaic_gpu

    return mosaic_gpu


def store(ref: Any, value: Any) -> None:
    """ref[...] = value, also where lanes of a warp then write to the same bank of shared memory, which jax 0.12 refuses unless
    it is told, and 0.11 has no word for."""
    if hasattr(plgpu(), "store"):
        plgpu().store(ref, value, optimized=False)
    else:
        ref[...] = value


def reduce_rows(op: str, columns: int, dtype: Any = jnp.float32, interpret: Any = None) -> Any:
    """In a kernel: [64, columns] of a warpgroup → [columns], "max", "min" or "add", through scratch of `scratch_words` of the
    warpgroup's own (the built-in one is shared by all)."""
    if interpret is not None:
        return lambda x, scratch: getattr(x, "sum" if op == "add" else op)(axis=0)
    layout = plgpu().Layout.WGMMA

    @plgpu().inline_mgpu(
        arg_types=(layout, plgpu().RefType()),
        return_type=plgpu().ShapeDtypeStruct((columns,), dtype, layout=layout.reduce(0)),
    )
    def reduce(ctx: Any, x: Any, scratch: Any) -> Any:
        return x.reduce(op, 0, scratch)

    return reduce


def scratch_words(columns: int) -> int:
    """32-bit words that `reduce_rows` needs."""
    return 256 * min(columns // 8, 2)


def cluster_sync() -> None:
    """Waits for every thread of the cluster; what they wrote to one another's shared memory before is visible after."""
    from jax._src.lib.mlir import ir
    from jax._src.lib.mlir.dialects import llvm

    @plgpu().inline_mgpu()
    def sync(ctx: Any) -> None:
        for asm in ("barrier.cluster.arrive.release;", "barrier.cluster.wait.acquire;"):
            llvm.inline_asm(ir.Type.parse("!llvm.void"), [], asm, "~{memory}", has_side_effects=True)

    sync()
