"""Products with int8 weights as they are: x in fixed point, two int8 planes.

Per-thread code, as in layer_phases.py; layer_kernel.py and linear_int8.py call it.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from pallas_kernels import mosaic, persistent
from pallas_kernels.persistent import Emitter

HIGHEST = 127 * 256  # of 16 bits whose high byte, after rounding, is still an int8
INTEGERS = float(3 << 22)  # float32 near it are whole numbers


def keep(e: Emitter, refs: tuple[Any, Any], N: int, l: Any, parts: list[tuple[Any, ...]], swizzled: bool = True) -> None:  # noqa: E741
    """A warp: rows of pieces of x, each 128 columns of bf16 of which this lane has two pairs, to numbers of 16 bits and a step,
    x = q·step, the largest magnitude being 32512 steps: finer than bf16. wgmma takes int8 with nothing but int8, so
    q = 256·high + low: a piece [2·N, 128] int8 is eights of rows of high and of low by turns, columns in the order of
    `persistent.tile_int8`; in shared memory in the same bytes that the row has in bf16, swizzled likewise, else in device
    memory. A NaN or an infinity makes its step and the row's product NaN. refs: x and steps [·, N] f32. parts: piece,
    row, the bits of columns 64·half + 16·step + 2·l and the next and of those 8 further, and whether there is such a row, where
    lane = 16·half + 4·step + (0 to 3, in any order; l says which)."""
    x, steps = refs
    half, step, memory = e.div(e.lane, 16), e.rem(e.div(e.lane, 4), 4), "shared" if swizzled else "global"
    # All rows at each step: one after another they would wait for each other's latencies.
    numbers = [[f for bits in pair for f in e.halves(bits)] for _, _, pair, _ in parts]
    tops = [e.largest(four) for four in numbers]
    inverses = [e.fmul(e.ptx("rcp.approx.f32 $0, $1;", top, result=e.f32), float(HIGHEST)) for top in tops]
    pairs = list(zip(numbers, inverses, strict=True))
    # The lowest bits of a number added to INTEGERS are those of the nearest integer; 128 more round the high byte.
    low, high = (
        [[e.as_i32(e.fma(f, inverse, e.c(INTEGERS + more))) for f in (a, c, b, d)] for (a, b, c, d), inverse in pairs]
        for more in (0.0, 128.0)
    )
    for (piece, n, _, there), top, lows, highs in zip(parts, tops, low, high, strict=True):
        line, place = e.rem(n, 8), e.add(e.mul(l, 2), half)
        scale = e.fma(top, e.c(0.0), e.fmul(top, 1 / HIGHEST))  # of an infinity NaN: what is added to it here is no number
        at = e.add(e.mul(piece, N * 256), e.mul(e.div(n, 8), 2048), e.mul(line, 128))
        to = e.add(at, e.mul(e.m.arith.xori(place, line) if swizzled else place, 16), e.mul(step, 4))
        with e.when(there):
            e.ptx(f"st.{memory}.b32 [$0], $1;", e.ptr(x, to, 1), e.gather_bytes(highs, 1))
            e.ptx(f"st.{memory}.b32 [$0], $1;", e.ptr(x, e.add(to, 1024), 1), e.gather_bytes(lows, 0))
        with e.when(e.both(there, e.cmp("eq", e.lane, 0))):
            e.ptx(f"st.{memory}.f32 [$0], $1;", e.ptr(steps, e.add(e.mul(piece, N), n), 4), scale)


def add_scaled(refs: tuple[Any, ...], N: int, product: Any, total: Any, w: Any, group: Any, piece: Any) -> Any:
    """One warpgroup: total [64, N] plus the product [64, 2·N] of a group of a unit, 64 columns from 64·w on, with a piece of x
    in fixed point, times the columns' scales and the rows' steps. refs: scales [·, 128] bf16, of which the `group`-th, and
    steps [·, N] f32."""
    plgpu = mosaic.plgpu()
    returned = plgpu.ShapeDtypeStruct((64, N), jnp.float32, layout=plgpu.Layout.WGMMA)

    @persistent.inline([plgpu.Layout.WGMMA, plgpu.Layout.WGMMA, "ref", "ref", *["i32"] * 3], returned)
    def run(e: Emitter, product, total, scales, steps, w, group, piece):  # type: ignore[no-untyped-def]
        parts, sums, out = e.unpack(product), e.unpack(total), []
        column = e.add(e.mul(e.add(e.mul(group, 2), w), 64), e.mul(e.warp, 16), e.div(e.lane, 4))
        scale = [
            e.widen(e.ptx("ld.shared.b16 $0, [$1];", e.ptr(scales, e.add(column, 8 * half), 2), result=e.i16))
            for half in range(2)
        ]
        for tile in range(N // 8):
            row = e.add(e.mul(piece, N), 8 * tile, e.mul(e.rem(e.lane, 4), 2))
            step = e.ptx("ld.shared.v2.f32 {$0, $1}, [$2];", e.ptr(steps, row, 4), result=[e.f32] * 2)
            for half in range(2):
                both = zip(parts[4 * tile + half], parts[4 * tile + 2 + half], strict=True)
                q = [e.to_f32(e.add(e.mul(high, 256), low)) for high, low in both]
                weight = [e.fmul(scale[half], x) for x in step]
                out.append(tuple(map(e.fma, q, weight, sums[2 * tile + half])))
        return e.pack(out, (64, N))

    return run(product, total, *refs, w, group, piece)
