"""Products of a persistent decode layer with int8 weights as they are: x in fixed point, two int8 planes.

Per-thread code, as in layer_phases.py; layer_kernel.py calls it.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from pallas_kernels import persistent
from pallas_kernels.persistent import Emitter

HIGHEST = 127 * 256  # of 16 bits whose high byte, after rounding, is still an int8


def to_fixed_point(x: Any, steps: Any, B: int, N: int, most: int, first: Any, count: Any) -> None:
    """One warpgroup: `count` pieces of x from the `first`, at most `most`, from bf16 [N, 128] to numbers of 16 bits and a step,
    x = q·step, for each row of a piece, whose largest magnitude is 32512 steps: finer than bf16. wgmma takes int8 with nothing
    but int8, so q = 256·high + low: a piece becomes [2·N, 128] int8 in the same bytes, eights of rows of high and of low by
    turns, columns in the order of `persistent.tile_int8`. steps [·, N] f32. A NaN or an infinity makes its step so too, and the
    row's product NaN. Rows from B on stay as they are."""

    @persistent.inline(["tiled", "ref", "i32", "i32"])
    def run(e: Emitter, x, steps, first, count):  # type: ignore[no-untyped-def]
        half, step, l = e.div(e.lane, 16), e.rem(e.div(e.lane, 4), 4), e.rem(e.lane, 4)  # noqa: E741
        e.barrier()  # all of x is there

        def several(j, none):  # type: ignore[no-untyped-def]
            # A warp has a row of a piece: a thread two pairs of columns 8 apart, which are a word of high and of low.
            rows, pairs = [], []
            for k in range(at_once):
                i = e.add(e.mul(e.add(e.mul(j, at_once), k), 4), e.warp)
                there = e.cmp("ult", i, e.mul(count, B))
                i = e.select(there, i, 0)
                piece, n = e.add(first, e.div(i, B)), e.rem(i, B)
                line = e.rem(n, 8)
                at = e.add(e.mul(piece, N * 256), e.mul(e.div(n, 8), 2048), e.mul(line, 128))
                rows.append((there, at, line, e.add(e.mul(piece, N), n)))
                eights = [e.m.arith.xori(e.add(e.mul(step, 2), h), line) for h in range(2)]
                words = [e.add(at, e.mul(half, 1024), e.mul(eight, 16), e.mul(l, 4)) for eight in eights]
                pairs.append([e.ptx("ld.shared.b32 $0, [$1];", e.ptr(x, word, 1), result=e.i32) for word in words])
            for (there, at, line, place), bits in zip(rows, pairs, strict=True):
                (a, b), (c, d) = map(e.halves, bits)
                top = e.largest([a, b, c, d])
                inverse = e.fmul(e.ptx("rcp.approx.f32 $0, $1;", top, result=e.f32), float(HIGHEST))
                low = [e.rounded(e.fmul(value, inverse)) for value in (a, c, b, d)]
                high = [e.add(q, 128) for q in low]
                to = e.add(at, e.mul(e.m.arith.xori(e.add(e.mul(l, 2), half), line), 16), e.mul(step, 4))
                with e.when(there):
                    e.ptx("st.shared.b32 [$0], $1;", e.ptr(x, to, 1), e.gather_bytes(high, 1))
                    e.ptx("st.shared.b32 [$0], $1;", e.ptr(x, e.add(to, 1024), 1), e.gather_bytes(low, 0))
                with e.when(e.both(there, e.cmp("eq", e.lane, 0))):
                    e.ptx("st.shared.f32 [$0], $1;", e.ptr(steps, place, 4), e.fmul(top, 1 / HIGHEST))
            return none

        at_once = min(4, -(-B * most // 4))
        e.fold(e.div(e.add(e.mul(count, B), 4 * at_once - 1), 4 * at_once), [], several)

    run(x, steps, first, count)


def add_scaled(refs: tuple[Any, ...], N: int, product: Any, total: Any, w: Any, group: Any, piece: Any) -> Any:
    """One warpgroup: total [64, N] plus the product [64, 2·N] of a group of a unit, 64 columns from 64·w on, with a piece of x
    in fixed point, times the columns' scales and the rows' steps. refs: scales [·, 128] bf16, of which the `group`-th, and
    steps [·, N] f32."""
    plgpu = persistent._mgpu().plgpu
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
