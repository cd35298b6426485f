"""What the warpgroups of a persistent decode layer do between its products: per-thread code (see persistent.py).

Each function is called by whole warpgroups inside a kernel, with its buffers in device memory (row-major, the batch padded to N
rows, a multiple of 8) or in shared memory. Comments give what a thread does; shapes are those of decode_layer.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pallas_kernels import persistent
from pallas_kernels.persistent import Emitter, Product

SLICE = 128  # columns of the residual stream that one block adds and squares
LOG2E = 1.4426950408889634
MASKED = -1e30  # a finite stand-in for -inf


def add_and_square(refs: tuple[Any, ...], B: int, N: int, D: int, seen: Any, arrivals: int, piece: Any, flag0: int) -> None:
    """One warpgroup: residual + delta of SLICE columns, times the norm's weight, and the sums of the squares, a warp's columns
    at a time. Rows from B to N are written as zeros: what nobody writes would have to come from memory when it is read."""

    @persistent.inline(["ref"] * 7 + ["i32", "i32"])
    def run(e: Emitter, residual, delta, weight, total, xs, squares, sync, seen, piece):  # type: ignore[no-untyped-def]
        column = e.add(e.mul(piece, SLICE), e.thread)
        w = e.load_bf16(e.ptr(weight, column, 2))
        for first in range(0, N, 8):
            rows = range(first, min(first + 8, B))
            at = [e.add(column, n * D) for n in rows]
            pairs = [(e.load_bf16(e.ptr(residual, i, 2)), e.load_bf16(e.ptr(delta, i, 2))) for i in at]
            squared = []
            for i, (a, b) in zip(at, pairs, strict=True):
                bits = e.narrow(e.fadd(a, b))
                e.store_16(e.ptr(total, i, 2), bits)
                x = e.widen(bits)
                e.store_16(e.ptr(xs, i, 2), e.narrow(e.fmul(x, w)))
                square = e.fmul(x, x)
                for distance in (16, 8, 4, 2, 1):
                    square = e.fadd(square, e.shuffle(square, distance))
                squared.append(square)
            for n in range(first + len(rows), first + 8):
                e.store_16(e.ptr(xs, e.add(column, n * D), 2), e.m.arith.constant(e.i16, 0))
                squared.append(e.c(0.0))
            with e.when(e.cmp("eq", e.lane, 0)):
                where = e.add(e.mul(e.add(e.mul(piece, SLICE // 32), e.warp), N), first)
                for j in (0, 4):
                    e.ptx("st.global.v4.f32 [$0], {$1, $2, $3, $4};", e.ptr(squares, e.add(where, j), 4), *squared[j : j + 4])
        launch = e.add(e.div(seen, arrivals), 1)
        e.raise_flag(sync, e.add(piece, flag0), launch)

    run(*refs, seen, piece)


def norm_scales(squares: Any, scales: Any, N: int, D: int, grain: int, eps: float) -> None:
    """One warpgroup: 1/RMS of every row from the sums of squares, into shared memory."""

    @persistent.inline(["ref", "ref"])
    def run(e: Emitter, squares, scales):  # type: ignore[no-untyped-def]
        threads = 128 // N
        n, part = e.div(e.thread, threads), e.rem(e.thread, threads)
        count = D // grain
        total = e.c(0.0)
        for start in range(0, count, threads):
            i = e.add(part, start)
            inside = e.cmp("ult", i, count)
            i = e.select(inside, i, 0)
            x = e.ptx("ld.global.f32 $0, [$1];", e.ptr(squares, e.add(e.mul(i, N), n), 4), result=e.f32)
            total = e.fadd(total, e.select(inside, x, 0.0))
        distance = threads // 2
        while distance:
            total = e.fadd(total, e.shuffle(total, distance))
            distance //= 2
        mean = e.fadd(e.fmul(total, 1.0 / D), eps)
        scale = e.ptx("rsqrt.approx.f32 $0, $1;", mean, result=e.f32)
        e.utils.inline_ptx(
            "st.shared.f32 [$0], $1;", e.ptr(scales, n, 4), scale, predicate=e.cmp("eq", part, 0), has_side_effects=True
        )

    run(squares, scales)


Epilogue = Callable[..., None]


def finish(
    value: Any, product: Product, N: int, partials: Any, sync: Any, flag0: int, place: Any, epilogue: Epilogue, refs: Any
) -> None:
    """One warpgroup with its 64 columns of a tile: hand them to the tile's owner, or, as the owner, add the others'
    and run the epilogue. place: launch, tile, sharer (0 owns), sharers of the tile in a part, warpgroup."""
    plgpu = persistent._mgpu().plgpu
    C, many = product.columns // 64, product.parts * product.sharers

    @persistent.inline([plgpu.Layout.WGMMA, *["ref"] * (2 + len(refs)), *["i32"] * 5])
    def run(e: Emitter, value, partials, sync, *rest):  # type: ignore[no-untyped-def]
        *refs, launch, tile, me, count, w = rest
        pairs = e.unpack(value)

        def at(sharer, j):  # type: ignore[no-untyped-def]
            row = e.add(e.mul(e.add(e.mul(tile, many), sharer), C), w)
            return e.ptr(partials, e.add(e.mul(row, 64 * N), j * 512, e.mul(e.thread, 4)), 4)

        def flag(sharer):  # type: ignore[no-untyped-def]
            return e.add(e.mul(e.add(e.mul(tile, many), sharer), C), w, flag0)

        with e.when(e.cmp("ne", me, 0)):
            for j in range(N // 8):
                e.ptx("st.global.v4.f32 [$0], {$1, $2, $3, $4};", at(me, j), *pairs[2 * j], *pairs[2 * j + 1])
            e.raise_flag(sync, flag(me), launch)
        with e.when(e.cmp("eq", me, 0)):
            total = list(pairs)
            if many > 1:
                others = e.both(e.cmp("ult", e.thread, many), e.cmp("ne", e.thread, 0))
                shares = e.cmp("ult", e.rem(e.thread, product.sharers), count)
                e.poll(sync, flag(e.select(others, e.thread, 0)), launch, e.both(others, shares))
                e.barrier()
                for sharer in range(1, many):
                    there = e.m.arith.extui(e.i32, e.cmp("ult", sharer % product.sharers, count))
                    for j in range(N // 8):
                        got = e.ptx(
                            "{ .reg .pred p; setp.ne.b32 p, $5, 0; mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; "
                            "@p ld.global.v4.f32 {$0, $1, $2, $3}, [$4]; }",
                            at(sharer, j),
                            there,
                            result=[e.f32] * 4,
                        )
                        for half in range(2):
                            a, b = total[2 * j + half]
                            total[2 * j + half] = e.fadd(a, got[2 * half]), e.fadd(b, got[2 * half + 1])
            epilogue(e, total, tile, w, launch, sync, *refs)

    run(value, partials, sync, *refs, *place)


def gate_up(N: int, F: int, columns: int, flag0: int) -> Epilogue:
    """Rows 2f and 2f+1 are gate and up of f: h = silu(gate)·up, both times the norm's scale first."""

    def epilogue(e: Emitter, total, tile, w, launch, sync, h, scales):  # type: ignore[no-untyped-def]
        quad, odd = e.rem(e.lane, 4), e.rem(e.div(e.lane, 4), 2)
        is_odd = e.cmp("ne", odd, 0)
        f0 = e.add(e.mul(tile, columns // 2), e.mul(w, 32), e.mul(e.warp, 8), e.div(e.lane, 8))
        for (n_tile, half), (a, b) in zip(e.fragment(N), total, strict=True):
            n = e.add(e.mul(quad, 2), 8 * n_tile)
            s0, s1 = e.ptx("ld.shared.v2.f32 {$0, $1}, [$2];", e.ptr(scales, n, 4), result=[e.f32, e.f32])
            a, b = e.fmul(a, s0), e.fmul(b, s1)
            # The neighbour 4 lanes away has the other of gate and up: even lanes take row n, odd lanes row n + 1.
            other = e.shuffle(e.select(is_odd, a, b), 4)
            gate, up = e.select(is_odd, other, a), e.select(is_odd, b, other)
            power = e.ptx("ex2.approx.f32 $0, $1;", e.fmul(gate, -LOG2E), result=e.f32)
            inverse = e.ptx("rcp.approx.f32 $0, $1;", e.fadd(power, 1.0), result=e.f32)
            at = e.add(e.mul(e.add(n, odd), F), f0, 4 * half)
            e.store_16(e.ptr(h, at, 2), e.narrow(e.fmul(e.fmul(gate, up), inverse)))
        e.raise_flag(sync, e.add(e.mul(tile, columns // 64), w, flag0), launch)

    return epilogue


def store(N: int, B: int, O: int, columns: int) -> Epilogue:  # noqa: E741
    """out[B, O] in bf16."""

    def epilogue(e: Emitter, total, tile, w, launch, sync, out):  # type: ignore[no-untyped-def]
        column = e.add(e.mul(tile, columns), e.mul(w, 64), e.mul(e.warp, 16), e.div(e.lane, 4))
        for (n_tile, half), pair in zip(e.fragment(N), total, strict=True):
            for i, x in enumerate(pair):
                n = e.add(e.mul(e.rem(e.lane, 4), 2), 8 * n_tile + i)
                where = e.ptr(out, e.add(e.mul(n, O), column, 8 * half), 2)
                e.store_16(where, e.narrow(x), e.cmp("ult", n, B))

    return epilogue


def qkv_rows(N: int, B: int, O: int, columns: int, flag0: int, bias: bool) -> Epilogue:  # noqa: E741
    """qkv[B, O] in bf16, times the norm's scale, plus the bias."""

    def epilogue(e: Emitter, total, tile, w, launch, sync, out, scales, *biases):  # type: ignore[no-untyped-def]
        column = e.add(e.mul(tile, columns), e.mul(w, 64), e.mul(e.warp, 16), e.div(e.lane, 4))
        shift = [e.load_bf16(e.ptr(biases[0], e.add(column, 8 * half), 2)) if bias else e.c(0.0) for half in range(2)]
        for (n_tile, half), pair in zip(e.fragment(N), total, strict=True):
            n = e.add(e.mul(e.rem(e.lane, 4), 2), 8 * n_tile)
            scale = e.ptx("ld.shared.v2.f32 {$0, $1}, [$2];", e.ptr(scales, n, 4), result=[e.f32, e.f32])
            for i, x in enumerate(pair):
                where = e.ptr(out, e.add(e.mul(e.add(n, i), O), column, 8 * half), 2)
                e.store_16(where, e.narrow(e.fadd(e.fmul(x, scale[i]), shift[half])), e.cmp("ult", e.add(n, i), B))
        e.raise_flag(sync, e.add(e.mul(tile, columns // 64), w, flag0), launch)

    return epilogue


def residual_rows(N: int, B: int, D: int, columns: int, flag0: int) -> Epilogue:
    """residual += out; x = residual times the next norm's weight; sums of the squares of 16 columns at a time."""

    def epilogue(e: Emitter, total, tile, w, launch, sync, before, after, weight, xs, squares):  # type: ignore[no-untyped-def]
        group = e.add(e.mul(tile, columns // 16), e.mul(w, 4), e.warp)
        column = e.add(e.mul(group, 16), e.div(e.lane, 4))
        weights = [e.load_bf16(e.ptr(weight, e.add(column, 8 * half), 2)) for half in range(2)]
        for n_tile in range(N // 8):
            n = [e.add(e.mul(e.rem(e.lane, 4), 2), 8 * n_tile + i) for i in range(2)]
            at = [[e.add(e.mul(n[i], D), column, 8 * half) for i in range(2)] for half in range(2)]
            there = [e.cmp("ult", n[i], B) for i in range(2)]
            safe = [[e.select(there[i], at[half][i], 0) for i in range(2)] for half in range(2)]
            old = [[e.load_bf16(e.ptr(before, safe[half][i], 2)) for i in range(2)] for half in range(2)]
            sums = []
            for i in range(2):
                square = e.c(0.0)
                for half in range(2):
                    new = e.select(there[i], e.fadd(old[half][i], total[2 * n_tile + half][i]), 0.0)
                    bits = e.narrow(new)
                    x = e.widen(bits)
                    e.store_16(e.ptr(after, at[half][i], 2), bits, there[i])
                    e.store_16(e.ptr(xs, at[half][i], 2), e.narrow(e.fmul(x, weights[half])))
                    square = e.fadd(square, e.fmul(x, x))
                for distance in (4, 8, 16):
                    square = e.fadd(square, e.shuffle(square, distance))
                sums.append(square)
            with e.when(e.cmp("ult", e.lane, 4)):
                e.ptx("st.global.v2.f32 [$0], {$1, $2};", e.ptr(squares, e.add(e.mul(group, N), n[0]), 4), *sums)
        e.raise_flag(sync, e.add(e.mul(tile, columns // 64), w, flag0), launch)

    return epilogue


# ---------------------------------------------------------------- attention: one (row, kv head), a share of its positions


def _rotated(e: Emitter, qkv: Any, cos: Any, sin: Any, at: Any, angle: Any, half: int) -> tuple[Any, Any]:
    """The pair (h, h + H/2) at `at` turned by its angle, as bits of bf16."""
    a, b = e.load_bf16(e.ptr(qkv, at, 2)), e.load_bf16(e.ptr(qkv, e.add(at, half), 2))
    c, s = e.load_f32(e.ptr(cos, angle, 4)), e.load_f32(e.ptr(sin, angle, 4))
    x = e.m.arith.subf(e.fmul(a, c), e.fmul(b, s))
    y = e.fadd(e.fmul(b, c), e.fmul(a, s))
    return e.narrow(x), e.narrow(y)


def rotate_queries(refs: tuple[Any, ...], K: int, G: int, H: int, Q: int, row: Any, head: Any, w: Any) -> None:
    """One warpgroup: the group's rotated queries into its [Q, H] of shared memory; rows past G are zeros."""

    @persistent.inline(["ref"] * 3 + ["tiled"] + ["i32"] * 3)
    def run(e: Emitter, qkv, cos, sin, queries, row, head, w):  # type: ignore[no-untyped-def]
        half = H // 2
        base = e.mul(e.add(e.mul(row, K), head), (G + 2) * H)
        for start in range(0, Q * half, 128):
            p = e.add(e.thread, start)
            g, h = e.div(p, half), e.rem(p, half)
            inside = e.cmp("ult", g, G)
            at = e.add(base, e.mul(e.select(inside, g, 0), H), h)
            for i, bits in enumerate(_rotated(e, qkv, cos, sin, at, e.add(e.mul(row, half), h), half)):
                where = e.tiled_ptr(queries, e.mul(w, Q * H * 2), g, e.add(h, i * half), H)
                e.ptx("st.shared.b16 [$0], $1;", where, e.m.arith.select(inside, bits, e.m.arith.constant(e.i16, 0)))

    run(*refs, row, head, w)


def new_position(refs: tuple[Any, ...], dims: tuple[int, ...], row: Any, head: Any, page: Any, offset: Any, slot: Any) -> None:
    """One warpgroup: the new token's rotated key and its value, into the cache, and into the tile that was read before."""
    K, G, H, P, rows, columns = dims

    @persistent.inline(["ref"] * 5 + ["tiled"] + ["i32"] * 5)
    def run(e: Emitter, qkv, cos, sin, keys, values, tile, row, head, page, offset, slot):  # type: ignore[no-untyped-def]
        half = H // 2
        base = e.add(e.mul(e.add(e.mul(row, K), head), (G + 2) * H), G * H)
        place = e.mul(e.add(e.mul(head, P), offset), H)
        stage, line = e.mul(slot, rows * columns * 2), e.rem(offset, 64)
        with e.when(e.cmp("ult", e.thread, half)):
            turned = _rotated(e, qkv, cos, sin, e.add(base, e.thread), e.add(e.mul(row, half), e.thread), half)
            for i, bits in enumerate(turned):
                h = e.add(e.thread, i * half)
                e.ptx("st.shared.b16 [$0], $1;", e.tiled_ptr(tile, stage, line, h, columns), bits)
                e.store_16(e.row_ptr(keys, page, K * P * H, e.add(place, h), 2), bits)
        with e.when(e.cmp("ult", e.thread, H)):
            bits = e.ptx("ld.global.b16 $0, [$1];", e.ptr(qkv, e.add(base, H, e.thread), 2), result=e.i16)
            e.ptx("st.shared.b16 [$0], $1;", e.tiled_ptr(tile, stage, e.add(line, 64), e.thread, columns), bits)
            e.store_16(e.row_ptr(values, page, K * P * H, e.add(place, e.thread), 2), bits)

    run(*refs, row, head, page, offset, slot)


def append_key(refs: tuple[Any, ...], dims: tuple[int, ...], rows: int, row: Any, head: Any, page: Any, *place: Any) -> None:
    """One warpgroup: the new token's rotated key into the cache at (page, offset), and into line `line` of slot `slot` of a
    buffer of tiles of `rows` × H in shared memory; place = offset, slot, line."""
    K, G, H, P = dims

    @persistent.inline(["ref"] * 4 + ["tiled"] + ["i32"] * 6)
    def run(e: Emitter, qkv, cos, sin, keys, tiles, row, head, page, offset, slot, line):  # type: ignore[no-untyped-def]
        half = H // 2
        base = e.mul(e.add(e.mul(e.add(e.mul(row, K), head), G + 2), G), H)
        with e.when(e.cmp("ult", e.thread, half)):
            turned = _rotated(e, qkv, cos, sin, e.add(base, e.thread), e.add(e.mul(row, half), e.thread), half)
            for i, bits in enumerate(turned):
                h = e.add(e.thread, i * half)
                e.ptx("st.shared.b16 [$0], $1;", e.tiled_ptr(tiles, e.mul(slot, rows * H * 2), line, h, H), bits)
                e.store_16(e.row_ptr(keys, page, K * P * H, e.add(e.mul(e.add(e.mul(head, P), offset), H), h), 2), bits)

    run(*refs, row, head, page, *place)


def append_value(refs: tuple[Any, ...], dims: tuple[int, ...], rows: int, row: Any, head: Any, page: Any, *place: Any) -> None:
    """The value likewise, as it is."""
    K, G, H, P = dims

    @persistent.inline(["ref"] * 2 + ["tiled"] + ["i32"] * 6)
    def run(e: Emitter, qkv, values, tiles, row, head, page, offset, slot, line):  # type: ignore[no-untyped-def]
        base = e.mul(e.add(e.mul(e.add(e.mul(row, K), head), G + 2), G + 1), H)
        with e.when(e.cmp("ult", e.thread, H)):
            bits = e.ptx("ld.global.b16 $0, [$1];", e.ptr(qkv, e.add(base, e.thread), 2), result=e.i16)
            e.ptx("st.shared.b16 [$0], $1;", e.tiled_ptr(tiles, e.mul(slot, rows * H * 2), line, e.thread, H), bits)
            place = e.add(e.mul(e.add(e.mul(head, P), offset), H), e.thread)
            e.store_16(e.row_ptr(values, page, K * P * H, place, 2), bits)

    run(*refs, row, head, page, *place)


def keep_state(refs: tuple[Any, ...], acc: Any, m: Any, l: Any, H: int, Q: int, share: Any, flag: Any, launch: Any) -> None:  # noqa: E741
    """One warpgroup: its unnormalized output [H, Q], maxima and sums [Q] to device memory, as share number `share`."""
    plgpu = persistent._mgpu().plgpu
    column = plgpu.Layout.WGMMA.reduce(0)

    @persistent.inline([plgpu.Layout.WGMMA, column, column, *["ref"] * 3, *["i32"] * 3])
    def run(e: Emitter, acc, m, l, outs, states, sync, share, flag, launch):  # type: ignore[no-untyped-def]  # noqa: E741
        pairs = e.unpack(acc)
        for j in range(H // 64 * Q // 8):
            at = e.add(e.mul(share, H * Q), j * 512, e.mul(e.thread, 4))
            e.ptx("st.global.v4.f32 [$0], {$1, $2, $3, $4};", e.ptr(outs, at, 4), *pairs[2 * j], *pairs[2 * j + 1])
        with e.when(e.cmp("ult", e.thread, 4)):
            for i, vector in enumerate((m, l)):
                for j, pair in enumerate(e.unpack(vector)):
                    at = e.add(e.mul(share, 2 * Q), i * Q + 8 * j, e.mul(e.thread, 2))
                    e.ptx("st.global.v2.f32 [$0], {$1, $2};", e.ptr(states, at, 4), *pair)
        e.raise_flag(sync, flag, launch)

    run(acc, m, l, *refs, share, flag, launch)


def combine_states(refs: tuple[Any, ...], dims: tuple[int, ...], first: Any, row: Any, head: Any, split: Any) -> None:
    """One warpgroup of each of `splits` blocks: its part of the output [G, H] of one (row, kv head) from `shares` states."""
    B, N, K, G, H, Q, splits, shares = dims
    quads = H // 64 * Q // 8 * 128  # four numbers each, as one thread kept them
    mine = -(-quads // splits)

    @persistent.inline(["ref"] * 3 + ["i32"] * 4)
    def run(e: Emitter, outs, states, attended, first, row, head, split):  # type: ignore[no-untyped-def]
        for start in range(0, mine, 128):
            i = e.add(e.thread, start)
            quad = e.add(e.mul(split, mine), i)
            with e.when(e.both(e.cmp("ult", i, mine), e.cmp("ult", quad, quads))):
                block, thread = e.div(quad, 128), e.rem(quad, 128)
                h_block, g_tile = e.div(block, Q // 8), e.rem(block, Q // 8)
                lane, warp = e.rem(thread, 32), e.div(thread, 32)
                g = e.add(e.mul(g_tile, 8), e.mul(e.rem(lane, 4), 2))
                both = []
                for i in range(2):
                    at = [e.ptr(states, e.add(e.mul(e.add(first, s), 2 * Q), i * Q, g), 4) for s in range(shares)]
                    both.append([e.ptx("ld.global.v2.f32 {$0, $1}, [$2];", p, result=[e.f32] * 2) for p in at])
                ms, ls = both
                top = [e.c(MASKED)] * 2
                for pair in ms:
                    top = [e.m.arith.maximumf(a, b) for a, b in zip(top, pair, strict=True)]
                sums, totals = [e.c(0.0)] * 4, [e.c(0.0)] * 2
                for s in range(shares):
                    at = e.add(e.mul(e.add(first, s), H * Q), e.mul(quad, 4))
                    got = e.ptx("ld.global.v4.f32 {$0, $1, $2, $3}, [$4];", e.ptr(outs, at, 4), result=[e.f32] * 4)
                    weight = [e.exp2(e.m.arith.subf(ms[s][i], top[i])) for i in range(2)]
                    totals = [e.fadd(totals[i], e.fmul(weight[i], ls[s][i])) for i in range(2)]
                    sums = [e.fadd(sums[j], e.fmul(weight[j % 2], got[j])) for j in range(4)]
                for j, x in enumerate(sums):
                    total = totals[j % 2]
                    some = e.m.arith.cmpf(e.m.arith.CmpFPredicate.OGT, total, e.c(0.0))
                    inverse = e.ptx("rcp.approx.f32 $0, $1;", total, result=e.f32)
                    bits = e.narrow(e.select(some, e.fmul(x, inverse), 0.0))
                    h = e.add(e.mul(h_block, 64), e.mul(warp, 16), e.div(lane, 4), 8 * (j // 2))
                    column = e.add(e.mul(e.add(e.mul(head, G), e.add(g, j % 2)), H), h)
                    inside = e.cmp("ult", e.add(g, j % 2), G)
                    e.store_16(e.ptr(attended, e.add(e.mul(row, K * G * H), column), 2), bits, inside)
                    padding = e.both(inside, e.cmp("eq", row, 0))
                    for n in range(B, N):
                        zero = e.m.arith.constant(e.i16, 0)
                        e.store_16(e.ptr(attended, e.add(column, n * K * G * H), 2), zero, padding)

    run(*refs, first, row, head, split)
