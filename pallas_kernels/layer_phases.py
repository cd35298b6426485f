"""What the warpgroups of a persistent decode layer do between its products: per-thread code (see persistent.py).

Each function is called by whole warpgroups inside a kernel. Buffers are in shared memory, or in device memory: plain row-major
ones, and `sync`, where places are numbers of 32-bit words and everything is sent (Emitter.send), the batch padded to N rows.
There a row's numbers stand in groups, the groups of all rows before the next columns: 8 columns of qkv and of the residual
stream, 4 of h. Comments give what a thread does; shapes are those of decode_layer.py.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from pallas_kernels import persistent
from pallas_kernels.persistent import RANKS, Emitter

LOG2E = 1.4426950408889634
MASKED = -1e30  # a finite stand-in for -inf


def sums_words(W: int, N: int) -> int:
    """Words of `sync` for the sums that the ranks of one team send one another: one tile's."""
    return RANKS * W * N // 2 * RANKS * 8 * 4


def squares_words(N: int) -> int:
    """Words of `sync` for the sums of squares of one group of pieces that the ranks of one team send one another."""
    return 4 * RANKS * N * 2


def states_words(G: int, H: int) -> int:
    """Words of `sync` for one share of one (row, kv head): the outputs and their logarithms of the sum of exponentials."""
    return G * H + -(-G // 2) * 4


def halved_shape(H: int, Q: int) -> tuple[int, int]:
    """Of shared memory in which one warpgroup hands another its output [H, Q], maxima and sums [Q]: 128 threads' pairs."""
    return (H // 64 * 2 + 2) * (Q // 8), 256


# ---------------------------------------------------------------- x, into shared memory


def _column(e: Emitter, x: Any, N: int, pieces: tuple[int, int], n: Any, column: Any) -> Any:
    """Where x[n, column] of a block's part of x is: pieces of so many columns, swizzled for wgmma, from the first of
    them on: (columns, first)."""
    width, first = pieces
    column = e.add(column, first * width)
    return e.tiled_ptr(x, e.mul(e.div(column, width), N * width * 2), n, e.rem(column, width), width)


def normed_x(
    refs: tuple[Any, ...], dims: tuple[int, ...], pieces_of_x: tuple[int, int], first: bool, writes: Any, place: tuple[Any, ...]
) -> None:
    """One warpgroup: a group of units of this rank's columns of the residual stream, times the norm's weight, into x, the sums
    of their squares, a warp's at a time, to the whole team. dims: B, N, D, a unit's rows, units of a group. first: the stream
    is in device memory, `residual`, or where refs end with delta and total their sum, written to `total` too where `writes`;
    else it is what `residual_rows` sent. place: rank, its number of units, the first of these, tag, place of the stream, of the
    team's sums, where in `weight` the norm's begins."""
    B, N, D, rows, group = dims
    across = 1 << (B - 1).bit_length()
    columns_at_once = 512 // across

    @persistent.inline(["ref"] * 3 + ["tiled"] + ["i32"] * 8 + ["ref"] * (len(refs) - 4))
    def run(  # type: ignore[no-untyped-def]
        e: Emitter, residual, weight, sync, x, rank, pieces, piece, tag, stream, squares, norm, writes, *summed
    ):
        begin, columns, total_squares = e.mul(piece, rows), e.mul(pieces, rows), e.c(0.0)  # in x

        def source(column):  # type: ignore[no-untyped-def]
            return e.add(e.mul(e.add(e.mul(e.div(column, rows), RANKS), rank), rows), e.rem(column, rows))

        # A thread has one row and 4 columns at a time; lanes go along what lies together in sync: 8 columns, all rows.
        n, eight = e.rem(e.div(e.thread, 2), across), e.div(e.thread, 2 * across)
        mine = e.cmp("ult", n, B)
        for low in range(0, -(-group * rows // columns_at_once), 8):
            parts_of_x = []
            for k in range(low, min(low + 8, -(-group * rows // columns_at_once))):
                here = e.add(e.mul(eight, 8), e.mul(e.rem(e.thread, 2), 4), k * columns_at_once)
                inside = e.both(e.cmp("ult", here, group * rows), e.cmp("ult", e.add(begin, here), columns))
                inside, column = e.both(inside, mine), e.add(begin, here)
                parts_of_x.append((inside, column, e.select(inside, source(column), 0)))
            weights = [e.load_32(e.ptr(weight, e.add(norm, at), 2), 2) for *_, at in parts_of_x]
            if first:
                places = [e.select(inside, e.add(e.mul(n, D), at), 0) for inside, _, at in parts_of_x]
                words: list[Any] = [e.load_32(e.ptr(residual, place, 2), 2) for place in places]
                if summed:
                    delta, total = summed
                    added = [e.load_32(e.ptr(delta, place, 2), 2) for place in places]
                    for k, (old, new) in enumerate(zip(words, added, strict=True)):
                        both = [[e.fadd(a, b) for a, b in zip(e.halves(o), e.halves(d))] for o, d in zip(old, new)]
                        words[k] = [e.pair(*pair) for pair in both]
                        with e.when(e.both(parts_of_x[k][0], e.cmp("ne", writes, 0))):
                            e.ptx("st.global.v2.b32 [$0], {$1, $2};", e.ptr(total, places[k], 2), *words[k])
            else:

                def sent(at, n):  # type: ignore[no-untyped-def]
                    return e.ptr(sync, e.add(stream, e.mul(e.add(e.mul(e.div(at, 8), N), n), 8), e.rem(at, 8)), 4)

                if low == 0:  # of the first group; the others are there about then, and looking costs a trip
                    lane0 = e.mul(e.div(e.mul(e.warp, 16), across), 8)
                    needed = e.both(e.cmp("ult", lane0, group * rows), e.cmp("ult", lane0, columns))
                    needed = e.both(needed, e.cmp("eq", piece, 0))
                    e.watch(sent(e.select(needed, source(lane0), 0), 0), tag, needed)
                needed = [inside for inside, *_ in parts_of_x]
                words = e.receive([sent(at, e.select(inside, n, 0)) for inside, _, at in parts_of_x], tag, needed)
            for (inside, column, _), pair, factors in zip(parts_of_x, words, weights, strict=True):
                stream_4, factors_4 = ([f for bits in two for f in e.halves(bits)] for two in (pair, factors))
                scaled = [e.fmul(s, f) for s, f in zip(stream_4, factors_4, strict=True)]
                with e.when(inside):
                    bits = [e.pair(*scaled[:2]), e.pair(*scaled[2:])]
                    e.ptx("st.shared.v2.b32 [$0], {$1, $2};", _column(e, x, N, pieces_of_x, n, column), *bits)
                for s in stream_4:
                    total_squares = e.fadd(total_squares, e.select(inside, e.fmul(s, s), 0.0))
        for distance in (1, *(d for d in (2, 4, 8, 16) if d >= 2 * across)):
            total_squares = e.fadd(total_squares, e.shuffle(total_squares, distance))
        # Of the rows' lanes every other pair sends, with the sum of the next row; rows of padding have zeros.
        next_row = e.shuffle(total_squares, 2) if across > 1 else e.c(0.0)
        is_row = e.cmp("ult", e.lane, 2 * across)
        with e.when(e.both(e.cmp("ult", e.lane, 2 * N), e.cmp("eq", e.rem(e.lane, 4), 0))):
            of_warp = e.add(e.mul(rank, 4), e.warp)
            pair = e.add(e.mul(of_warp, N // 2), e.div(e.lane, 4))
            both = [e.select(is_row, x, 0.0) for x in (total_squares, next_row)]
            e.send(e.ptr(sync, e.add(squares, e.mul(pair, 4)), 4), both, tag)

    run(*refs[:4], *place, writes, *refs[4:])


def norm_scales(sync: Any, scales: Any, N: int, D: int, eps: float, groups: int, squares: Any, tag: Any) -> None:
    """One warpgroup: 1/RMS of every row from the team's sums of squares, into shared memory. A lane for each sum of a group."""

    @persistent.inline(["ref", "ref", "i32", "i32"])
    def run(e: Emitter, sync, scales, squares, tag):  # type: ignore[no-untyped-def]
        pairs = [e.add(e.warp, start) for start in range(0, N // 2, 4)]
        ats = [e.add(squares, e.mul(e.add(e.mul(e.lane, N // 2), pair), 4)) for pair in pairs]
        places = [e.ptr(sync, e.add(at, i * squares_words(N)), 4) for at in ats for i in range(groups)]
        received = e.receive(places, tag, [e.cmp("ult", e.thread, 128)] * len(places))
        for i, pair in enumerate(pairs):
            of_pair = received[i * groups : (i + 1) * groups]
            sums = [functools.reduce(e.fadd, map(e.as_f32, of_row)) for of_row in zip(*of_pair, strict=True)]
            for distance in (16, 8, 4, 2, 1):
                sums = [e.fadd(x, e.shuffle(x, distance)) for x in sums]
            means = [e.fadd(e.fmul(x, 1.0 / D), eps) for x in sums]
            roots = [e.ptx("rsqrt.approx.f32 $0, $1;", mean, result=e.f32) for mean in means]
            with e.when(e.cmp("eq", e.lane, 0)):
                e.ptx("st.shared.v2.f32 [$0], {$1, $2};", e.ptr(scales, e.mul(pair, 2), 4), *roots)
        e.barrier()

    run(sync, scales, squares, tag)


def h_group(B: int, rows: int, slots: int) -> int:
    """Pieces of h that `h_x` takes at a time: at most half, and about eight loads a thread."""
    return max(1, min(-(-slots // 2), 8 * 128 * 4 // (B * rows)))


def h_x(refs: tuple[Any, ...], dims: tuple[int, ...], pieces_of_x: tuple[int, int], place: tuple[Any, ...]) -> None:
    """One warpgroup: a group of units of h, as `gate_up` sent them, into x. dims: B, N, a unit's rows, units of a group. place:
    h's in sync, the block's rank and its number of units, the first of these, tag."""
    B, N, rows, group = dims

    @persistent.inline(["ref", "tiled"] + ["i32"] * 5)
    def run(e: Emitter, sync, x, h, rank, pieces, piece, tag):  # type: ignore[no-untyped-def]
        quads = rows // 4
        here = e.select(e.cmp("ult", group, e.sub(pieces, piece)), group, e.sub(pieces, piece))
        limit = e.mul(here, quads * B)

        def at(i):  # type: ignore[no-untyped-def]
            # Lanes go along what lies together in sync: 4 columns, all rows.
            n, j, quad = e.rem(i, B), e.add(piece, e.div(i, quads * B)), e.rem(e.div(i, B), quads)
            source = e.add(e.mul(e.add(e.mul(j, RANKS), rank), quads), quad)  # pieces of all ranks by turns
            return n, e.mul(e.add(e.mul(j, quads), quad), 4), e.ptr(sync, e.add(h, e.mul(e.add(e.mul(source, N), n), 4)), 4)

        items = [e.add(e.thread, start) for start in range(0, group * quads * B, 128)]
        # The last unit of a group comes last: until then a lane looks at a quad of it. The last group must not lose a trip.
        patient = e.either(e.cmp("eq", piece, 0), e.cmp("ult", e.add(piece, group), pieces))
        watched = e.mul(e.add(e.mul(here, quads), e.rem(e.lane, RANKS), -RANKS), B)
        e.watch(at(watched)[2], tag, e.both(patient, e.cmp("ne", here, 0)))
        places = [at(e.select(e.cmp("ult", i, limit), i, 0)) for i in items]
        words = e.receive([p for _, _, p in places], tag, [e.cmp("ult", i, limit) for i in items])
        for i, (n, column, _), pair in zip(items, places, words, strict=True):
            with e.when(e.cmp("ult", i, limit)):
                e.ptx("st.shared.v2.b32 [$0], {$1, $2};", _column(e, x, N, pieces_of_x, n, column), *pair)

    run(*refs, *place)


# ---------------------------------------------------------------- sums of a product, scattered over the team


def send_sums(value: Any, sync: Any, B: int, N: int, W: int, sums: Any, w: Any, rank: Any, tag: Any) -> None:
    """One warpgroup with its 64 columns of a tile: 8 of them to each rank of the team."""
    plgpu = persistent._mgpu().plgpu

    @persistent.inline([plgpu.Layout.WGMMA, "ref", *["i32"] * 4])
    def run(e: Emitter, value, sync, sums, w, rank, tag):  # type: ignore[no-untyped-def]
        for (n_tile, half), pair in zip(e.fragment(N), e.unpack(value), strict=True):
            to = e.add(e.mul(e.warp, 2), half)
            rows = e.add(e.rem(e.lane, 4), 4 * n_tile)
            index = e.add(e.mul(e.add(e.mul(e.add(e.mul(to, W), w), N // 2), rows), RANKS), rank)
            at = e.add(sums, e.mul(e.add(e.mul(index, 8), e.div(e.lane, 4)), 4))
            with e.when(e.cmp("ult", e.mul(rows, 2), B)):
                e.send(e.ptr(sync, at, 4), pair, tag)

    run(value, sync, sums, w, rank, tag)


@dataclasses.dataclass(frozen=True)
class Sums:
    """What a thread gets of a tile's sums: row `row`, columns `column` and `column` + 1, once `wait` returns them."""

    row: Any
    column: Any
    layer: Any  # in the model's stacks of norms and biases
    there: Any  # whether this thread has any
    wait: Callable[[], tuple[Any, Any]]


Epilogue = Callable[..., None]


def take_sums(
    sync: Any, B: int, N: int, W: int, columns: int, place: tuple[Any, ...], sent: Any, epilogue: Epilogue, refs: Any
) -> None:
    """One warpgroup: this rank's 8 of every 64 columns of a tile, from all ranks, into the epilogue. A warp has 8 rows of 8
    columns; lanes 4 apart have neighbouring columns of two rows, and exchange to have a pair of columns of one each.
    place: the sums' place in sync, tile, rank, their tag, layer, whether to look at a word of each rank until it comes: who asks
    for all over and over is a trip ahead, but takes from L2 what the weights need. sent: the tag of what the epilogue sends."""
    row_tiles = -(-B // 8)

    @persistent.inline(["ref"] * (1 + len(refs)) + ["i32"] * 7)
    def run(e: Emitter, sync, *rest):  # type: ignore[no-untyped-def]
        *refs, sums, tile, rank, tag, layer, patient, sent = rest
        for start in range(0, W * row_tiles, 4):
            part = e.add(e.warp, start)
            w, n_tile = e.div(part, row_tiles), e.rem(part, row_tiles)
            with e.when(e.cmp("ult", part, W * row_tiles)):
                pair = e.add(e.rem(e.lane, 4), e.mul(n_tile, 4))
                there = e.cmp("ult", e.mul(pair, 2), B)
                odd = e.cmp("ne", e.rem(e.div(e.lane, 4), 2), 0)

                def wait(e=e, w=w, n_tile=n_tile, pair=pair, there=there, odd=odd):  # type: ignore[no-untyped-def]
                    first = e.mul(e.add(e.mul(rank, W), w), N // 2)
                    of_ranks = e.add(sums, e.mul(e.add(first, e.mul(n_tile, 4)), RANKS * 32), e.mul(e.rem(e.lane, RANKS), 32))
                    e.watch(e.ptr(sync, of_ranks, 4), tag, e.cmp("ne", patient, 0))
                    index = e.mul(e.add(first, e.select(there, pair, 0)), RANKS)
                    at = e.add(sums, e.mul(e.add(e.mul(index, 8), e.div(e.lane, 4)), 4))
                    got = e.receive([e.ptr(sync, e.add(at, 32 * i), 4) for i in range(RANKS)], tag, [there] * RANKS)
                    total = [e.c(0.0)] * 2
                    for words in got:
                        total = [e.fadd(x, e.as_f32(bits)) for x, bits in zip(total, words, strict=True)]
                    other = e.shuffle(e.select(odd, *total), 4)
                    return e.select(odd, other, total[0]), e.select(odd, total[1], other)

                row = e.add(e.mul(pair, 2), e.rem(e.div(e.lane, 4), 2))
                column = e.add(e.mul(tile, columns), e.mul(w, 64), e.mul(rank, 8), e.mul(e.div(e.lane, 8), 2))
                epilogue(e, Sums(row, column, layer, there, wait), sent, sync, *refs)
        e.barrier()  # so that no warp reports more tiles than another

    run(sync, *refs, *place, sent)


def _grouped(e: Emitter, place: Any, N: int, at: Sums) -> Any:
    """Where in sync a pair of columns of one row goes: 8 columns of a row together."""
    return e.add(place, e.mul(e.add(e.mul(e.div(at.column, 8), N), at.row), 8), e.rem(at.column, 8))


def gate_up(N: int, place: int) -> Epilogue:
    """Columns 2f and 2f+1 are gate and up of f: h = silu(gate)·up, both times the norm's scale first."""

    def epilogue(e: Emitter, at: Sums, sent, sync, scales):  # type: ignore[no-untyped-def]
        gate, up = at.wait()
        scale = e.ptx("ld.shared.f32 $0, [$1];", e.ptr(scales, at.row, 4), result=e.f32)
        gate, up = e.fmul(gate, scale), e.fmul(up, scale)
        power = e.ptx("ex2.approx.f32 $0, $1;", e.fmul(gate, -LOG2E), result=e.f32)
        inverse = e.ptx("rcp.approx.f32 $0, $1;", e.fadd(power, 1.0), result=e.f32)
        h = e.fmul(e.fmul(gate, up), inverse)
        bits = e.pair(h, e.shuffle(h, 8))  # the lane 8 further has the next f
        f = e.div(at.column, 2)
        with e.when(e.both(at.there, e.cmp("eq", e.rem(f, 2), 0))):
            where = e.add(place, e.mul(e.add(e.mul(e.div(f, 4), N), at.row), 4), e.rem(f, 4))
            e.send(e.ptr(sync, where, 4), [bits], sent)

    return epilogue


def store(B: int, O: int) -> Epilogue:  # noqa: E741
    """out[B, O] in bf16."""

    def epilogue(e: Emitter, at: Sums, sent, sync, out):  # type: ignore[no-untyped-def]
        bits = e.pair(*at.wait())
        with e.when(e.cmp("ult", at.row, B)):
            e.ptx("st.global.b32 [$0], $1;", e.ptr(out, e.add(e.mul(at.row, O), at.column), 2), bits)

    return epilogue


def qkv_rows(N: int, place: int, bias: int) -> Epilogue:
    """qkv in bf16: times the norm's scale, plus the bias, which has so many numbers a layer, or none."""

    def epilogue(e: Emitter, at: Sums, sent, sync, scales, *biases):  # type: ignore[no-untyped-def]
        shift = e.c(0.0), e.c(0.0)
        if bias:
            shift = e.halves(e.load_32(e.ptr(biases[0], e.add(e.mul(at.layer, bias), at.column), 2))[0])
        pair = at.wait()
        scale = e.ptx("ld.shared.f32 $0, [$1];", e.ptr(scales, at.row, 4), result=e.f32)
        bits = e.pair(*(e.fadd(e.fmul(x, scale), s) for x, s in zip(pair, shift, strict=True)))
        with e.when(at.there):
            e.send(e.ptr(sync, _grouped(e, place, N, at), 4), [bits], sent)

    return epilogue


def residual_rows(N: int, B: int, D: int, place: int | None) -> Epilogue:
    """The residual stream, updated in place (after each product by the same thread); and, where it has a place in sync, sent to
    everybody."""

    def epilogue(e: Emitter, at: Sums, sent, sync, stream):  # type: ignore[no-untyped-def]
        inside = e.cmp("ult", at.row, B)
        where = e.ptr(stream, e.add(e.mul(e.select(inside, at.row, 0), D), at.column), 2)
        before = e.halves(e.load_32(where)[0])
        bits = e.pair(*(e.fadd(a, b) for a, b in zip(before, at.wait(), strict=True)))
        with e.when(inside):
            e.store_32(where, bits)
        if place is None:
            return
        with e.when(at.there):
            e.send(e.ptr(sync, _grouped(e, place, N, at), 4), [bits], sent)

    return epilogue


# ---------------------------------------------------------------- attention: one (row, kv head), a share of its positions


def rotate(refs: tuple[Any, ...], dims: tuple[int, ...], place: tuple[Any, ...]) -> None:
    """One warpgroup: the group's rotated queries into its [Q, H] of shared memory, rows past G zeros; the rotated key and the
    value into its [2, H] of `fresh`. place: qkv's in sync, tag, row, kv head, warpgroup."""
    N, G, H, Q = dims

    @persistent.inline(["ref"] * 3 + ["tiled", "ref"] + ["i32"] * 5)
    def run(e: Emitter, sync, cos, sin, queries, fresh, qkv, tag, row, head, w):  # type: ignore[no-untyped-def]
        half, parts = H // 2, H // 8  # a thread turns 4 columns and the 4 that are H/2 further
        base, queries_at, fresh_at = e.mul(head, (G + 2) * H), e.mul(w, Q * H * 2), e.mul(w, 2 * H)

        def at(column):  # type: ignore[no-untyped-def]
            column = e.add(base, column)
            return e.ptr(sync, e.add(qkv, e.mul(e.add(e.mul(e.div(column, 8), N), row), 8), e.rem(column, 8)), 4)

        for start in range(0, (Q - G) * H // 8, 128):
            i = e.add(e.thread, start)
            where = e.tiled_ptr(queries, queries_at, e.add(e.div(i, H // 8), G), e.mul(e.rem(i, H // 8), 8), H)
            with e.when(e.cmp("ult", i, (Q - G) * H // 8)):
                e.ptx("st.shared.v4.b32 [$0], {$1, $2, $3, $4};", where, *[e.c(0)] * 4)
        angle = e.add(e.mul(row, half), e.mul(e.rem(e.thread, parts), 4))  # of all that this thread turns
        c, s = ([e.as_f32(x) for x in e.load_32(e.ptr(ref, angle, 4), 4)] for ref in (cos, sin))
        e.watch(at(0), tag, e.cmp("ult", e.thread, 128))
        for start in range(0, (G + 1) * parts, 128):
            i = e.add(e.thread, start)
            inside = e.cmp("ult", i, (G + 1) * parts)
            j, h = e.div(e.select(inside, i, 0), parts), e.mul(e.rem(i, parts), 4)
            is_value = e.cmp("ult", i, H // 4)
            value = e.mul(e.select(is_value, i, 0), 4)
            ptrs = [at(e.add(e.mul(j, H), h)), at(e.add(e.mul(j, H), h, half))]
            near, far, v = e.receive([*ptrs, at(e.add((G + 1) * H, value))], tag, [inside, inside, is_value])
            a, b = ([f for bits in pair for f in e.halves(bits)] for pair in (near, far))
            x = [e.m.arith.subf(e.fmul(a[k], c[k]), e.fmul(b[k], s[k])) for k in range(4)]
            y = [e.fadd(e.fmul(b[k], c[k]), e.fmul(a[k], s[k])) for k in range(4)]
            is_key = e.cmp("eq", j, G)
            for k, turned in ((0, x), (half, y)):
                bits = e.pair(*turned[:2]), e.pair(*turned[2:])
                with e.when(e.both(inside, e.cmp("ult", j, G))):
                    e.ptx("st.shared.v2.b32 [$0], {$1, $2};", e.tiled_ptr(queries, queries_at, j, e.add(h, k), H), *bits)
                with e.when(e.both(inside, is_key)):
                    e.ptx("st.shared.v2.b32 [$0], {$1, $2};", e.ptr(fresh, e.add(fresh_at, h, k), 2), *bits)
            with e.when(is_value):
                e.ptx("st.shared.v2.b32 [$0], {$1, $2};", e.ptr(fresh, e.add(fresh_at, H, value), 2), *v)

    run(*refs, *place)


def new_position(refs: tuple[Any, ...], dims: tuple[int, ...], place: tuple[Any, ...]) -> None:
    """One warpgroup: the new token's key and value, as `rotate` left them, into the layer's cache, and into the tile that was
    read before. refs: fresh, tile, each layer's keys, each one's values. place: kv head, page, offset in it, stage of the ring,
    warpgroup, layer."""
    K, H, P, rows, columns = dims
    L = len(refs) // 2 - 1

    @persistent.inline(["ref", "tiled"] + ["i32"] * 6 + ["ref"] * 2 * L)
    def run(e: Emitter, fresh, tile, head, page, offset, slot, w, layer, *caches):  # type: ignore[no-untyped-def]
        stage, line = e.mul(slot, rows * columns * 2), e.rem(offset, 64)
        at = e.add(e.mul(e.add(e.mul(head, P), offset), H), e.thread)
        with e.when(e.cmp("ult", e.thread, H)):
            for i, cache in enumerate((e.one_of(caches[:L], layer), e.one_of(caches[L:], layer))):
                here = e.add(e.mul(w, 2 * H), i * H, e.thread)
                bits = e.ptx("ld.shared.b16 $0, [$1];", e.ptr(fresh, here, 2), result=e.i16)
                e.ptx("st.shared.b16 [$0], $1;", e.tiled_ptr(tile, stage, e.add(line, 64 * i), e.thread, columns), bits)
                e.store_16(e.row_ptr(cache, page, K * P * H, at, 2), bits)

    run(*refs[:2], *place, *refs[2:])


def hand_state(halved: Any, acc: Any, m: Any, l: Any) -> None:  # noqa: E741
    """One warpgroup: its output [H, Q], maxima and sums of exponentials [Q] to `halved`, for `send_state` of another."""
    plgpu = persistent._mgpu().plgpu
    column = plgpu.Layout.WGMMA.reduce(0)

    @persistent.inline([plgpu.Layout.WGMMA, column, column, "ref"])
    def run(e: Emitter, acc, m, l, halved):  # type: ignore[no-untyped-def]  # noqa: E741
        for i, pair in enumerate([*e.unpack(acc), *e.unpack(m), *e.unpack(l)]):
            e.ptx("st.shared.v2.f32 [$0], {$1, $2};", e.ptr(halved, e.add(e.mul(e.thread, 2), 256 * i), 4), *pair)

    run(acc, m, l, halved)


def send_state(
    refs: tuple[Any, Any],
    acc: Any,
    m: Any,
    l: Any,  # noqa: E741
    dims: tuple[int, int, int],
    place: tuple[Any, Any, Any],
) -> None:
    """One warpgroup: its output [H, Q] with what is in `halved`, if anything, normalized, in bf16, and the logarithms of the sums
    of exponentials [Q] to sync. refs: sync, halved. dims: G, H, Q. place: the state's in sync, tag, whether `halved` has any."""
    G, H, Q = dims
    plgpu = persistent._mgpu().plgpu
    column = plgpu.Layout.WGMMA.reduce(0)

    @persistent.inline([plgpu.Layout.WGMMA, column, column, "ref", "ref", *["i32"] * 3])
    def run(e: Emitter, acc, m, l, sync, halved, state, tag, both):  # type: ignore[no-untyped-def]  # noqa: E741
        both = e.cmp("ne", both, 0)

        def with_theirs(mine, i, nothing):  # type: ignore[no-untyped-def]
            """This thread's i-th pair, and the other warpgroup's."""
            at = e.ptr(halved, e.add(e.mul(e.thread, 2), 256 * i), 4)
            theirs = e.ptx("ld.shared.v2.f32 {$0, $1}, [$2];", at, result=[e.f32] * 2)
            return [(x, e.select(both, y, nothing)) for x, y in zip(mine, theirs, strict=True)]

        outputs, tiles = e.unpack(acc), Q // 8
        pairs = [with_theirs(pair, i, 0.0) for i, pair in enumerate(outputs)]
        tops = [with_theirs(pair, len(pairs) + i, MASKED) for i, pair in enumerate(e.unpack(m))]
        sums = [with_theirs(pair, len(pairs) + tiles + i, 0.0) for i, pair in enumerate(e.unpack(l))]
        odd = e.cmp("ne", e.rem(e.div(e.lane, 4), 2), 0)
        for tile in range(tiles):
            logs, factors = [], []
            for ms, ls in zip(tops[tile], sums[tile], strict=True):
                top = e.m.arith.maximumf(*ms)
                weights = [e.exp2(e.m.arith.subf(x, top)) for x in ms]
                total = e.fadd(*map(e.fmul, ls, weights))
                inverse = e.ptx("rcp.approx.f32 $0, $1;", total, result=e.f32)
                logs.append(e.fadd(top, e.ptx("lg2.approx.f32 $0, $1;", total, result=e.f32)))
                factors.append([e.fmul(x, inverse) for x in weights])
            # Lanes 4 apart have neighbouring positions of two queries: they exchange, so that each has two positions of one.
            g = e.add(8 * tile, e.mul(e.rem(e.lane, 4), 2), e.select(odd, 1, 0))
            for h_block in range(H // 64):
                words = []
                for pair in pairs[(h_block * tiles + tile) * 2 :][:2]:  # 8 positions apart
                    even_, odd_ = (e.fadd(*map(e.fmul, both_, f)) for both_, f in zip(pair, factors, strict=True))
                    other = e.shuffle(e.select(odd, even_, odd_), 4)
                    words.append(e.pair(e.select(odd, other, even_), e.select(odd, odd_, other)))
                item = e.add(e.mul(e.add(e.mul(e.add(e.warp, 4 * h_block), G), g), 4), e.div(e.lane, 8))
                with e.when(e.cmp("ult", g, G)):
                    e.send(e.ptr(sync, e.add(state, e.mul(item, 4)), 4), words, tag)
            pair_of_g = e.add(e.lane, 4 * tile)
            with e.when(e.both(e.cmp("ult", e.thread, 4), e.cmp("ult", pair_of_g, -(-G // 2)))):
                e.send(e.ptr(sync, e.add(state, G * H, e.mul(pair_of_g, 4)), 4), logs, tag)

    run(acc, m, l, *refs, *place)


def attended_x(
    refs: tuple[Any, ...], dims: tuple[int, ...], pieces_of_x: tuple[int, int], window: int | None, place: tuple[Any, ...]
) -> None:
    """One warpgroup: this rank's columns of the attention's output, from the states of all shares, into x. An item is 4
    numbers of a query: positions h, h + 1, h + 8, h + 9. place: the states' in sync, first column, columns, tag."""
    B, N, K, G, H, rows, slots, shares = dims
    words, each = states_words(G, H), G * H // 4  # each: items of a (row, kv head)
    aligned = K * G * H // rows % RANKS == 0 and slots * rows % (G * H) == 0
    heads = slots * rows // (G * H) if aligned else min(K, -(-slots * rows // (G * H)) + 1)

    @persistent.inline(["ref", "ref", "tiled"] + ["i32"] * 4)
    def run(e: Emitter, length, sync, x, states, begin, columns, tag):  # type: ignore[no-untyped-def]
        first_head = e.div(begin, G * H)

        def item(i):  # type: ignore[no-untyped-def]
            row, which, i = e.div(i, heads * each), e.rem(e.div(i, each), heads), e.rem(i, each)
            head, g = e.add(first_head, which), e.rem(e.div(i, 4), G)
            h = e.add(e.mul(e.div(i, 4 * G), 16), e.mul(e.rem(i, 4), 2))
            known = e.both(e.cmp("ult", row, B), e.cmp("ult", head, K))
            row, head = e.select(known, row, 0), e.select(known, head, 0)
            column = e.sub(e.add(e.mul(head, G * H), e.mul(g, H), h), begin)
            wanted = e.both(known, e.cmp("ult", column, columns))
            n = e.load_32(e.ptr(length, row, 4))[0]
            tiles = e.div(e.add(n, 63), 64)
            if window is not None:
                tiles = e.sub(tiles, e.div(e.select(e.cmp("ult", window, n), e.sub(n, window), 0), 64))
            used = e.select(wanted, e.select(e.cmp("ult", tiles, shares), tiles, shares), 0)
            state = e.add(states, e.mul(e.add(e.mul(head, B), row), shares * words))
            log = e.add(state, G * H, e.mul(e.div(g, 2), 4))
            return row, column, wanted, used, e.cmp("ne", e.rem(g, 2), 0), e.add(state, e.mul(i, 4)), log

        # Until every row has something, a lane looks at one row.
        *_, used, _, data, _ = item(e.add(e.mul(e.lane, heads * each), e.mul(e.warp, min(each // 4, 32))))
        e.watch(e.ptr(sync, data, 4), tag, e.cmp("ne", used, 0))
        at_once = min(shares, 4)
        together = max(1, 8 // shares)  # items of a thread, where an item has few shares

        def step(j, none):  # type: ignore[no-untyped-def]
            items = [item(e.add(e.thread, e.mul(e.add(e.mul(j, together), k), 128))) for k in range(together)]

            def more(i, totals):  # type: ignore[no-untyped-def]
                ptrs, needed = [], []
                for *_, used, _, data, log in items:
                    for s in range(at_once):
                        s = e.add(e.mul(i, at_once), s)
                        ptrs += [e.ptr(sync, e.add(at, e.mul(s, words)), 4) for at in (data, log)]
                        needed += [e.cmp("ult", s, used)] * 2
                got = e.receive(ptrs, tag, needed)
                after = []
                for k, (*_, odd, _, _) in enumerate(items):
                    of_item = slice(2 * k * at_once, 2 * (k + 1) * at_once)
                    after += _weighed(e, totals[6 * k : 6 * k + 6], got[of_item], needed[of_item], odd)
                return after

            nothing = [e.c(MASKED), *[e.c(0.0)] * 5] * together
            rounds = e.div(e.add(items[0][3], at_once - 1), at_once)
            totals = more(e.c(0), nothing) if shares <= at_once else e.fold(rounds, nothing, more)
            for k, (row, column, wanted, used, *_) in enumerate(items):
                sum_, *out = totals[6 * k + 1 : 6 * k + 6]
                inverse = e.select(e.cmp("ne", used, 0), e.ptx("rcp.approx.f32 $0, $1;", sum_, result=e.f32), 0.0)
                values = [e.fmul(value, inverse) for value in out]
                store(row, column, wanted, [e.pair(*values[:2]), e.pair(*values[2:])])
            return none

        def step_alone(j, none):  # type: ignore[no-untyped-def]
            items = [item(e.add(e.thread, e.mul(e.add(e.mul(j, together), k), 128))) for k in range(together)]
            needed = [e.cmp("ne", used, 0) for *_, used, _, _, _ in items]
            got = e.receive([e.ptr(sync, data, 4) for *_, data, _ in items], tag, needed)
            for (row, column, wanted, *_), pair in zip(items, got, strict=True):
                store(row, column, wanted, pair)
            return none

        def store(row, column, wanted, pair):  # type: ignore[no-untyped-def]
            column = e.select(wanted, column, 0)
            with e.when(wanted):
                for i, bits in enumerate(pair):
                    e.ptx("st.shared.b32 [$0], $1;", _column(e, x, N, pieces_of_x, row, e.add(column, 8 * i)), bits)

        e.fold(e.c(-(-B * heads * each // (128 * together))), [], step if shares > 1 else step_alone)

    run(*refs, *place)


def _weighed(e: Emitter, total: list[Any], got: list[Any], used: list[Any], odd: Any) -> list[Any]:
    """A query's maximum, sum of weights, and weighed sums of four positions, with more states: numbers, the logarithms of it and
    its neighbour, and so on by turns, and whether they are used."""
    top, sum_, *out = total
    logs = [e.select(has, e.as_f32(e.select(odd, b, a)), MASKED) for (a, b), has in zip(got[1::2], used[1::2], strict=True)]
    new = functools.reduce(e.m.arith.maximumf, logs, top)
    old = e.exp2(e.m.arith.subf(top, new))
    sum_, out = e.fmul(sum_, old), [e.fmul(x, old) for x in out]
    for log, pair, has in zip(logs, got[0::2], used[0::2], strict=True):
        weight = e.select(has, e.exp2(e.m.arith.subf(log, new)), 0.0)
        sum_ = e.fadd(sum_, weight)
        out = [e.fadd(x, e.fmul(weight, value)) for x, value in zip(out, (f for bits in pair for f in e.halves(bits)))]
    return [new, sum_, *out]


# ---------------------------------------------------------------- for decode_attention, which has qkv in device memory


def _rotated(e: Emitter, qkv: Any, cos: Any, sin: Any, at: Any, angle: Any, half: int) -> tuple[Any, Any]:
    """The pair (h, h + H/2) at `at` turned by its angle, as bits of bf16."""
    a, b = e.load_bf16(e.ptr(qkv, at, 2)), e.load_bf16(e.ptr(qkv, e.add(at, half), 2))
    c, s = e.load_f32(e.ptr(cos, angle, 4)), e.load_f32(e.ptr(sin, angle, 4))
    x = e.m.arith.subf(e.fmul(a, c), e.fmul(b, s))
    y = e.fadd(e.fmul(b, c), e.fmul(a, s))
    return e.narrow(x), e.narrow(y)


def rotate_new_token(refs: tuple[Any, ...], K: int, G: int, H: int, Q: int, row: Any, head: Any, w: Any) -> None:
    """One warpgroup: the group's rotated queries, its rotated key and its value into the warpgroup's [Q, H] of shared memory;
    further rows are zeros."""

    @persistent.inline(["ref"] * 3 + ["tiled"] + ["i32"] * 3)
    def run(e: Emitter, qkv, cos, sin, queries, row, head, w):  # type: ignore[no-untyped-def]
        half = H // 2
        base = e.mul(e.add(e.mul(row, K), head), (G + 2) * H)
        zero = e.m.arith.constant(e.i16, 0)
        for start in range(0, Q * half, 128):
            p = e.add(e.thread, start)
            g, h = e.div(p, half), e.rem(p, half)
            inside = e.cmp("ult", g, G + 2)
            at = e.add(base, e.mul(e.select(inside, g, 0), H), h)
            for i, bits in enumerate(_rotated(e, qkv, cos, sin, at, e.add(e.mul(row, half), h), half)):
                as_it_is = e.ptx("ld.global.b16 $0, [$1];", e.ptr(qkv, e.add(at, i * half), 2), result=e.i16)
                bits = e.m.arith.select(e.cmp("ult", g, G + 1), bits, as_it_is)
                where = e.tiled_ptr(queries, e.mul(w, Q * H * 2), g, e.add(h, i * half), H)
                e.ptx("st.shared.b16 [$0], $1;", where, e.m.arith.select(inside, bits, zero))

    run(*refs, row, head, w)


def append_kept(
    refs: tuple[Any, ...], dims: tuple[int, ...], rows: int, Q: int, kept: int, w: Any, head: Any, page: Any, *place: Any
) -> None:
    """One warpgroup: what `rotate_new_token` kept in row `kept` of its [Q, H] into the cache at (page, offset), and into line
    `line` of slot `slot` of a buffer of tiles of `rows` × H in shared memory; place = offset, slot, line."""
    K, _, H, P = dims

    @persistent.inline(["tiled", "ref", "tiled"] + ["i32"] * 6)
    def run(e: Emitter, queries, pages, tiles, w, head, page, offset, slot, line):  # type: ignore[no-untyped-def]
        with e.when(e.cmp("ult", e.thread, H)):
            where = e.tiled_ptr(queries, e.mul(w, Q * H * 2), kept, e.thread, H)
            bits = e.ptx("ld.shared.b16 $0, [$1];", where, result=e.i16)
            e.ptx("st.shared.b16 [$0], $1;", e.tiled_ptr(tiles, e.mul(slot, rows * H * 2), line, e.thread, H), bits)
            place = e.add(e.mul(e.add(e.mul(head, P), offset), H), e.thread)
            e.store_16(e.row_ptr(pages, page, K * P * H, place, 2), bits)

    run(*refs, w, head, page, *place)
