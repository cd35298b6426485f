"""Residual add and RMSNorm of many rows in one kernel, for Hopper GPUs.

    residual_TD, delta_TD   bf16   D in 128s up to 8192
    weight_D                bf16
    → (residual + delta)_TD, and its norm: x·rsqrt(mean(x²) + eps)·weight   bf16

Rounded as plain jnp rounds: the sum, the normed row (in float32 from the rounded sum), and its product with the weight. (Of
XLA's programs the norm may have seen the sum, and the weight the norm, before it was rounded: its excess precision.)

What bounds it: reading and writing once, 8·T·D bytes; of few rows, the latency of one load and one sum over a row. XLA makes
two kernels of it, the sum's and the norm's, which reads the sum back. A block of one warpgroup takes a row, all of it in
registers: loads straight from device memory, 16 bytes a thread where D is in 1024s, those of the weight before the row's sum is
waited for.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import mosaic, persistent, tuning
from pallas_kernels.persistent import Emitter

LANES = 128  # threads of a warpgroup
MAX_D = 8192  # 64 numbers a thread
IMPLEMENTATIONS = ("mosaic", "reference")


def reference(residual_TD: jax.Array, delta_TD: jax.Array, weight_D: jax.Array, *, eps: float) -> tuple[jax.Array, jax.Array]:
    """The same in plain jnp."""
    residual_TD = residual_TD + delta_TD
    x_TD = residual_TD.astype(jnp.float32)
    x_TD = x_TD * lax.rsqrt(jnp.mean(x_TD * x_TD, axis=-1, keepdims=True) + eps)
    return residual_TD, x_TD.astype(residual_TD.dtype) * weight_D


@functools.lru_cache(maxsize=256)
def _kernel(T: int, D: int, eps: float, interpret: Any = None) -> Any:
    """The Mosaic GPU kernel: (residual, delta, weight [1, D]) → (residual, normed)."""
    plgpu = mosaic.plgpu()
    bf16, f32 = jnp.bfloat16, jnp.float32

    def load(ref, row):  # type: ignore[no-untyped-def]
        return _load(ref, row) if interpret is None else ref[row]

    def store(value, ref, row):  # type: ignore[no-untyped-def]
        if interpret is None:
            _store(value, ref, row)
        else:
            ref[row] = value

    def body(residual, delta, weight, total, normed):  # type: ignore[no-untyped-def]
        row = lax.axis_index("t")
        a, d, w = load(residual, row), load(delta, row), load(weight, jnp.int32(0))
        rounded = (a.astype(f32) + d.astype(f32)).astype(bf16)
        store(rounded, total, row)
        x = rounded.astype(f32)
        scaled = (x * lax.rsqrt(jnp.sum(x * x) * (1 / D) + eps)).astype(bf16)
        store((scaled.astype(f32) * w.astype(f32)).astype(bf16), normed, row)

    body.__name__ = f"add_rms_norm_{T}x{D}"
    kernel = plgpu.kernel(
        body,
        out_type=(jax.ShapeDtypeStruct((T, D), bf16),) * 2,
        grid=(T,),
        grid_names=("t",),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
        interpret=interpret,
    )
    return jax.jit(kernel)  # lowered once in a program, however many layers call it


def _layout(D: int) -> Any:
    """A row in a warpgroup's registers, in vectors of up to 16 bytes."""
    return mosaic.plgpu().Layout.WG_STRIDED((D,), vec_size=math.gcd(8, D // LANES))


def _pieces(e: Emitter, ref: Any, row: Any, D: int) -> list[Any]:
    """Where this thread's vectors of a row of [T, D] begin."""
    size = math.gcd(8, D // LANES)
    return [e.row_ptr(ref, row, D, e.add(e.mul(e.thread, size), i), 2) for i in range(0, D, LANES * size)]


def _global(e: Emitter, pointer: Any) -> Any:
    return e.m.llvm.addrspacecast(e.m.llvm.PointerType.get(1), pointer)


def _load(ref: Any, row: Any) -> Any:
    """A row of an array in device memory. (Of Mosaic's own loads, LLVM knows no more alignment than an element's.)"""
    D = ref.shape[1]

    @persistent.inline(["ref", "i32"], mosaic.plgpu().ShapeDtypeStruct((D,), jnp.bfloat16, layout=_layout(D)))
    def run(e: Emitter, ref: Any, row: Any) -> Any:
        layout = _layout(D).to_mgpu()
        vector = e.m.ir.VectorType.get((layout.vec_size,), e.bf16)
        load = functools.partial(e.m.llvm.load, vector, alignment=2 * layout.vec_size)
        loaded = np.array([load(_global(e, at)) for at in _pieces(e, ref, row, D)], dtype=object)
        return e.m.mgpu.FragmentedArray(_registers=loaded, _layout=layout, _is_signed=None)

    return run(ref, row)


def _store(value: Any, ref: Any, row: Any) -> None:
    """A row to an array in device memory."""
    D = ref.shape[1]

    @persistent.inline([_layout(D), "ref", "i32"])
    def run(e: Emitter, value: Any, ref: Any, row: Any) -> None:
        for vector, at in zip(value.registers.flat, _pieces(e, ref, row, D), strict=True):
            e.m.llvm.store(vector, _global(e, at), alignment=2 * value.layout.vec_size)

    run(value, ref, row)


def why_unsupported(residual_TD: Any, weight_D: Any, interpret: Any = None) -> str | None:
    """Why the Mosaic kernel cannot take these operands (arrays, or their shapes) here, or None where it can."""
    if why := tuning.why_no_mosaic(interpret):
        return why
    if residual_TD.dtype != jnp.bfloat16 or weight_D.dtype != jnp.bfloat16:
        return f"the residual is {residual_TD.dtype}, the weight {weight_D.dtype}: both must be bfloat16"
    T, D = residual_TD.shape
    if D % LANES or not 0 < D <= MAX_D:
        return f"rows of {D}: multiples of {LANES} up to {MAX_D} are supported"
    return None if T else "no rows"


def add_rms_norm(
    residual_TD: jax.Array,
    delta_TD: jax.Array,
    weight_D: jax.Array,
    *,
    eps: float,
    implementation: str | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """residual + delta and its root-mean-square norm (Zhang & Sennrich 2019); shapes and meaning as in the module's docstring.

    implementation: "mosaic", "reference", or None for the kernel where it supports device, dtypes and shapes, else the
    reference. interpret: plgpu.InterpretGPUParams() simulates the kernel on the CPU (with implementation="mosaic"). Raises
    ValueError for an unknown implementation, for shapes or dtypes that do not fit together, and where "mosaic" is named and not
    supported: it never falls back silently.
    """
    if residual_TD.ndim != 2 or delta_TD.shape != residual_TD.shape or weight_D.shape != residual_TD.shape[1:]:
        shapes = f"residual {residual_TD.shape}, delta {delta_TD.shape} and weight {weight_D.shape}"
        raise ValueError(f"{shapes}: they must be [T, D], [T, D] and [D]")
    if residual_TD.dtype != delta_TD.dtype:
        raise ValueError(f"the residual is {residual_TD.dtype}, the delta {delta_TD.dtype}: they must be the same")
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation={implementation!r}: allowed are {IMPLEMENTATIONS} and None")
    why = why_unsupported(residual_TD, weight_D, interpret) if implementation != "reference" else None
    if implementation == "mosaic" and why:
        raise tuning.Unsupported("add_rms_norm", why)
    if implementation == "reference" or why:
        return reference(residual_TD, delta_TD, weight_D, eps=eps)
    T, D = residual_TD.shape
    total_TD, normed_TD = _kernel(T, D, eps, interpret)(residual_TD, delta_TD, weight_D[None])
    return total_TD, normed_TD
