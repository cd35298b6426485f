"""What the warpgroups of a persistent decode layer do between its products: per-thread code (see persistent.py).

Each function is called by whole warpgroups inside a kernel. Buffers are in shared memory, or in device memory: plain row-major
ones, and `sync`, where places are numbers of 32-bit words and everything is sent (Emitter.send): matrices row by row, two bf16
to a word. Comments give what a thread does; shapes are those of decode_layer.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from pallas_kernels import fixed_point, mosaic, persistent
from pallas_kernels.persistent import RANKS, Emitter

MASKED = -1e30  # a finite stand-in for -inf


def rows_across(B: int) -> int:
    """Rows that a warpgroup's threads are dealt out over: a power of two."""
    return 1 << (B - 1).bit_length()


def sums_words(W: int) -> int:
    """Words of `sync` for the sums that the ranks of one team send one another: one tile's, of up to 16 rows."""
    return RANKS * W * 4 * RANKS * 8 * 4


def squares_words(N: int) -> int:
    """Words of `sync` for the sums of squares that the ranks of one team send one another: of two groups of pieces."""
    return RANKS * N * 4


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


def _keep(e: Emitter, x: Any, steps: Any, N: int, pieces: tuple[int, int], parts: list[tuple[Any, ...]], far: bool) -> None:
    """A warp: 128 columns of some rows into their x, in bf16, or where there are steps in fixed point. parts: row, a lane's
    column, the bits of it and the next and of two more, which follow, or are 8 columns `far`, and whether this lane has any. In
    fixed point the 128 are whole pieces."""
    if not steps:
        for n, column, pair, there in parts:
            places = [_column(e, x, N, pieces, n, e.add(column, 8 * i)) for i in range(2 if far else 1)]
            with e.when(there):
                if far:
                    for place, bits in zip(places, pair, strict=True):
                        e.ptx("st.shared.b32 [$0], $1;", place, bits)
                else:
                    e.ptx("st.shared.v2.b32 [$0], {$1, $2};", places[0], *pair)
        return
    l, pairs = e.rem(e.lane, 4), [pair for _, _, pair, _ in parts]  # noqa: E741
    if not far:  # lanes 2 apart exchange pairs, so that each has two 8 columns apart
        later = e.cmp("ne", e.div(l, 2), 0)
        others = [e.shuffle(e.select(later, *pair), 2) for pair in pairs]
        pairs = [(e.select(later, o, pair[0]), e.select(later, pair[1], o)) for pair, o in zip(pairs, others, strict=True)]
        l = e.add(e.mul(e.rem(l, 2), 2), e.div(l, 2))  # noqa: E741
    of_pieces = [
        (e.add(e.div(column, 128), pieces[1]), n, pair, there)
        for (n, column, _, there), pair in zip(parts, pairs, strict=True)
    ]
    for low in range(0, len(of_pieces), 8):  # of more the numbers do not fit the registers
        fixed_point.keep(e, (x, steps[0]), N, l, of_pieces[low : low + 8])


def _rows_and_chunks(e: Emitter, B: int, chunks: int) -> list[tuple[Any, Any]]:
    """A warp's share of `chunks` times 128 columns of B rows: row (some beyond B) and chunk of each of its parts. With four
    rows or more a warp has the same rows of all chunks, by turns."""
    across = rows_across(B)
    turns = max(across // 4, 1)
    if across >= 4:
        return [(e.add(e.warp, 4 * (k % turns)), e.c(k // turns)) for k in range(turns * chunks)]
    parts = [e.add(e.warp, 4 * k) for k in range(-(-across * chunks // 4))]
    return [(e.rem(part, across), e.div(part, across)) for part in parts]


def normed_x(
    refs: tuple[Any, ...], dims: tuple[int, ...], pieces_of_x: tuple[int, int], first: bool, writes: Any, place: tuple[Any, ...]
) -> None:
    """One warpgroup: a group of units of this rank's columns of the residual stream, times the norm's weight, into x, the sums
    of their squares to the whole team. dims: B, N, D, a unit's rows, units of a group, groups. first: the stream is in device
    memory, `residual`, or where refs[5] = (delta, total) is given their sum, written to `total` too where `writes`; else it is
    what `residual_rows` sent. refs[1]: arrays of norms; refs[4]: steps of x in fixed point, if it is that. place: rank, its
    number of units, the first of these, which group it is, tag, place of the stream, of the team's sums, which array of norms,
    where in it this one begins."""
    B, N, D, rows, group, groups = dims
    across = rows_across(B)
    of_warp, parts = max(across // 4, 1), 4 // min(across, 4)
    residual, norms, sync, x, fixed, sum_ = refs

    @persistent.inline(["ref", "ref", "tiled"] + ["i32"] * 10 + ["ref"] * (len(norms) + len(fixed) + len(sum_)))
    def run(  # type: ignore[no-untyped-def]
        e: Emitter, residual, sync, x, rank, pieces, piece, which, tag, stream, squares, which_norm, norm, writes, *more
    ):
        weight, more = e.one_of(more[: len(norms)], which_norm), more[len(norms) :]
        steps, summed = more[: len(fixed)], more[len(fixed) :]
        begin, columns, total_squares = e.mul(piece, rows), e.mul(pieces, rows), [e.c(0.0)] * of_warp

        def source(column):  # type: ignore[no-untyped-def]
            return e.add(e.mul(e.add(e.mul(e.div(column, rows), RANKS), rank), rows), e.rem(column, rows))

        mine = _rows_and_chunks(e, B, -(-group * rows // 128))
        for low in range(0, len(mine), 8):
            parts_of_x = []
            for n, chunk in mine[low : low + 8]:
                here = e.add(e.mul(chunk, 128), e.mul(e.lane, 4))
                column = e.add(begin, here)
                inside = e.both(e.cmp("ult", here, group * rows), e.cmp("ult", column, columns))
                inside = e.both(inside, e.cmp("ult", n, B))
                parts_of_x.append((inside, n, column, e.select(inside, source(column), 0)))
            weights = [e.load_32(e.ptr(weight, e.add(norm, at), 2), 2) for *_, at in parts_of_x]
            if first:
                places = [e.select(inside, e.add(e.mul(n, D), at), 0) for inside, n, _, at in parts_of_x]
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
                places = [e.add(stream, e.mul(e.select(inside, n, 0), D), at) for inside, n, _, at in parts_of_x]
                words = e.receive(sync, places, tag, [inside for inside, *_ in parts_of_x])
            kept = []
            for k, ((inside, n, column, _), pair, factors) in enumerate(zip(parts_of_x, words, weights, strict=True)):
                stream_4, factors_4 = ([f for bits in two for f in e.halves(bits)] for two in (pair, factors))
                scaled = [e.fmul(s, f) for s, f in zip(stream_4, factors_4, strict=True)]
                kept.append((n, column, (e.pair(*scaled[:2]), e.pair(*scaled[2:])), inside))
                row = (low + k) % of_warp
                for s in stream_4:
                    total_squares[row] = e.fadd(total_squares[row], e.select(inside, e.fmul(s, s), 0.0))
            _keep(e, x, steps, N, pieces_of_x, kept, far=False)
        for distance in (1, 2, 4, 8, 16):
            total_squares = [e.fadd(of_row, e.shuffle(of_row, distance)) for of_row in total_squares]
        # A lane for each row that the warp has; with one group the other's words are zeros.
        value = total_squares[0]
        for i, of_row in enumerate(total_squares):
            value = e.select(e.cmp("eq", e.lane, i), of_row, value)
        n, part = (e.add(e.warp, e.mul(e.lane, 4)), 0) if across >= 4 else (e.rem(e.warp, across), e.div(e.warp, across))
        at = e.add(e.mul(e.add(e.mul(e.add(e.mul(n, RANKS), rank), parts), part), 4), e.mul(which, 2))
        with e.when(e.cmp("ult", e.lane, of_warp)):
            e.send(e.ptr(sync, e.add(squares, at), 4), [value] if groups == 2 else [value, e.c(0.0)], tag)

    run(residual, sync, x, *place, writes, *norms, *fixed, *sum_)


def norm_scales(sync: Any, scales: Any, B: int, D: int, eps: float, squares: Any, tag: Any) -> None:
    """One warpgroup: 1/RMS of every row from the team's sums of squares, into shared memory."""
    across = rows_across(B)
    of_row = RANKS * (4 // min(across, 4))  # lanes: each has the sums of both groups

    @persistent.inline(["ref", "ref", "i32", "i32"])
    def run(e: Emitter, sync, scales, squares, tag):  # type: ignore[no-untyped-def]
        mine = e.cmp("ult", e.thread, across * of_row)
        (words,) = e.receive(sync, [e.add(squares, e.mul(e.select(mine, e.thread, 0), 4))], tag, [mine])
        total = e.fadd(*map(e.as_f32, words))
        for distance in (d for d in (1, 2, 4, 8, 16) if d < of_row):
            total = e.fadd(total, e.shuffle(total, distance))
        root = e.ptx("rsqrt.approx.f32 $0, $1;", e.fadd(e.fmul(total, 1.0 / D), eps), result=e.f32)
        with e.when(e.both(mine, e.cmp("eq", e.rem(e.thread, of_row), 0))):
            e.ptx("st.shared.f32 [$0], $1;", e.ptr(scales, e.div(e.thread, of_row), 4), root)
        e.barrier()

    run(sync, scales, squares, tag)


def h_group(B: int, rows: int, slots: int) -> int:
    """Pieces of h that `h_x` takes at a time: at most half, and about eight loads a thread."""
    across = rows_across(B)
    return max(1, min(-(-slots // 2), 8 * 128 * 4 // (across * rows)))


def h_x(refs: tuple[Any, ...], dims: tuple[int, ...], pieces_of_x: tuple[int, int], place: tuple[Any, ...]) -> None:
    """One warpgroup: a group of units of h, as `gate_up` sent them, into x. refs: sync, x and, in fixed point, its steps. dims:
    B, N, F, a unit's rows, units of a group. place: h's in sync, the block's rank and its number of units, the first of these,
    tag."""
    B, N, F, rows, group = dims

    @persistent.inline(["ref", "tiled"] + ["i32"] * 5 + ["ref"] * (len(refs) - 2))
    def run(e: Emitter, sync, x, h, rank, pieces, piece, tag, *steps):  # type: ignore[no-untyped-def]
        parts = []
        for n, chunk in _rows_and_chunks(e, B, -(-group * rows // 128)):
            here = e.add(e.mul(chunk, 128), e.mul(e.lane, 4))
            column = e.add(e.mul(piece, rows), here)
            inside = e.both(e.cmp("ult", here, group * rows), e.cmp("ult", column, e.mul(pieces, rows)))
            inside = e.both(inside, e.cmp("ult", n, B))
            source = e.add(e.mul(e.add(e.mul(e.div(column, rows), RANKS), rank), rows), e.rem(column, rows))
            at = e.select(inside, e.add(e.mul(n, F), source), 0)
            parts.append((n, column, inside, e.add(h, at)))
        words = e.receive(sync, [place for *_, place in parts], tag, [inside for *_, inside, _ in parts])
        kept = [(n, column, pair, inside) for (n, column, inside, _), pair in zip(parts, words, strict=True)]
        _keep(e, x, steps, N, pieces_of_x, kept, far=False)

    run(*refs[:2], *place, *refs[2:])


# ---------------------------------------------------------------- sums of a product, scattered over the team


def send_sums(value: Any, sync: Any, B: int, N: int, W: int, sums: Any, w: Any, rank: Any, tag: Any) -> None:
    """One warpgroup with its 64 columns of a tile: 8 of them to each rank of the team. What a thread has of a column, two or
    four rows, goes as four numbers of 24 bits (a relative error below 2^-15) with one tag: half of what each beside a tag of
    its own would be, and L2, which the weights pass through, has less to do."""
    plgpu = mosaic.plgpu()

    @persistent.inline([plgpu.Layout.WGMMA, "ref", *["i32"] * 4])
    def run(e: Emitter, value, sync, sums, w, rank, tag):  # type: ignore[no-untyped-def]
        pairs = dict(zip(e.fragment(N), e.unpack(value), strict=True))
        for half in range(2):
            numbers = [*pairs[0, half], *(pairs[1, half] if N > 8 else [e.c(0.0)] * 2)]
            to, rows = e.add(e.mul(e.warp, 2), half), e.rem(e.lane, 4)
            index = e.add(e.mul(e.add(e.mul(e.add(e.mul(to, W), w), 4), rows), RANKS), rank)
            at = e.add(sums, e.mul(e.add(e.mul(index, 8), e.div(e.lane, 4)), 4))
            with e.when(e.cmp("ult", e.mul(rows, 2), B)):
                e.send(e.ptr(sync, at, 4), e.pack_24(numbers), tag)

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
    sync: Any, B: int, N: int, columns: int, place: tuple[Any, ...], to: tuple[Any, Any], epilogue: Epilogue, refs: Any
) -> None:
    """One warpgroup: this rank's 8 of every 64 columns of a tile, from all ranks, into the epilogue. A lane asks half of the
    ranks for a column's rows; lanes 16 apart have the other half, and exchange to have 8 of 16 rows each; lanes 4 apart then
    have neighbouring columns of two rows, and exchange to have a pair of columns of one each. place: the sums' place in sync,
    tile, rank, their tag, layer, whether to look at a word of each rank until it comes: who asks for all over and over is a
    trip ahead, but takes from L2 what the weights need. to: the tag of what the epilogue sends, and where that begins."""
    if columns != 128:
        raise ValueError(f"{columns} columns of a tile: 128 are supported")
    W = columns // 64

    @persistent.inline(["ref"] * (1 + len(refs)) + ["i32"] * 8)
    def run(e: Emitter, sync, *rest):  # type: ignore[no-untyped-def]
        *refs, sums, tile, rank, tag, layer, patient, sent, begin = rest
        w, later = e.rem(e.warp, W), e.cmp("ne", e.div(e.lane, 16), 0)
        rows, c = e.mul(e.rem(e.lane, 4), 2), e.add(e.mul(e.div(e.warp, W), 4), e.rem(e.div(e.lane, 4), 4))
        odd = e.cmp("ne", e.rem(c, 2), 0)

        def wait():  # type: ignore[no-untyped-def]
            has = e.cmp("ult", rows, B)
            first = e.mul(e.add(e.mul(e.add(e.mul(rank, W), w), 4), e.select(has, e.rem(e.lane, 4), 0)), RANKS)
            first = e.add(first, e.select(later, RANKS // 2, 0))
            at_rank = lambda i: e.add(sums, e.mul(e.add(e.mul(e.add(first, i), 8), c), 4))  # noqa: E731
            looks = e.both(has, e.cmp("ne", patient, 0))
            e.watch(e.ptr(sync, at_rank(e.rem(e.div(e.lane, 4), 4)), 4), tag, looks, words=3)
            got = e.receive(sync, [at_rank(i) for i in range(RANKS // 2)], tag, [has] * (RANKS // 2), each=3)
            totals = [e.c(0.0)] * 4
            for words in got:
                totals = [e.fadd(x, y) for x, y in zip(totals, e.unpack_24(words), strict=True)]
            others = [e.shuffle(e.select(later, x, y), 16) for x, y in zip(totals[:2], totals[2:], strict=True)]
            halves = [e.select(later, y, x) for x, y in zip(totals[:2], totals[2:], strict=True)]
            total = [e.fadd(x, y) for x, y in zip(halves, others, strict=True)]
            other = e.shuffle(e.select(odd, *total), 4)
            return e.select(odd, other, total[0]), e.select(odd, total[1], other)

        rows_here = e.add(rows, e.select(later, 8, 0))
        column = e.add(e.mul(tile, columns), e.mul(w, 64), e.mul(rank, 8), e.mul(e.div(c, 2), 2))
        at = Sums(e.add(rows_here, e.rem(c, 2)), column, layer, e.cmp("ult", rows_here, B), wait)
        epilogue(e, at, (sent, begin), sync, *refs)
        e.barrier()  # so that no warp reports more tiles than another

    run(sync, *refs, *place, *to)


def gate_up(F: int) -> Epilogue:
    """Columns 2f and 2f+1 are gate and up of f: h = silu(gate)·up, both times the norm's scale first."""

    def epilogue(e: Emitter, at: Sums, to, sync, scales):  # type: ignore[no-untyped-def]
        gate, up = at.wait()
        scale = e.ptx("ld.shared.f32 $0, [$1];", e.ptr(scales, e.select(at.there, at.row, 0), 4), result=e.f32)
        gate, up = e.fmul(gate, scale), e.fmul(up, scale)
        h = e.silu_up(gate, up)
        bits = e.pair(h, e.shuffle(h, 8))  # the lane 8 further has the next f
        f = e.div(at.column, 2)
        with e.when(e.both(at.there, e.cmp("eq", e.rem(f, 2), 0))):
            e.send(e.ptr(sync, e.add(to[1], e.mul(at.row, F), f), 4), [bits], to[0])

    return epilogue


def store(B: int, O: int) -> Epilogue:  # noqa: E741
    """out[B, O] in bf16."""

    def epilogue(e: Emitter, at: Sums, to, sync, out):  # type: ignore[no-untyped-def]
        bits = e.pair(*at.wait())
        with e.when(e.cmp("ult", at.row, B)):
            e.ptx("st.global.b32 [$0], $1;", e.ptr(out, e.add(e.mul(at.row, O), at.column), 2), bits)

    return epilogue


def qkv_rows(O: int, bias: bool) -> Epilogue:  # noqa: E741
    """qkv [·, O] in bf16: times the norm's scale, plus the bias, which has O numbers a layer, if any."""

    def epilogue(e: Emitter, at: Sums, to, sync, scales, *biases):  # type: ignore[no-untyped-def]
        shift = e.c(0.0), e.c(0.0)
        if bias:
            shift = e.halves(e.load_32(e.ptr(biases[0], e.add(e.mul(at.layer, O), at.column), 2))[0])
        pair = at.wait()
        scale = e.ptx("ld.shared.f32 $0, [$1];", e.ptr(scales, e.select(at.there, at.row, 0), 4), result=e.f32)
        bits = e.pair(*(e.fadd(e.fmul(x, scale), s) for x, s in zip(pair, shift, strict=True)))
        with e.when(at.there):
            e.send(e.ptr(sync, e.add(to[1], e.mul(at.row, O), at.column), 4), [bits], to[0])

    return epilogue


def residual_rows(B: int, D: int) -> Epilogue:
    """The residual stream, updated in place (after each product by the same thread), and sent to everybody."""

    def epilogue(e: Emitter, at: Sums, to, sync, stream):  # type: ignore[no-untyped-def]
        inside = e.cmp("ult", at.row, B)
        where = e.ptr(stream, e.add(e.mul(e.select(inside, at.row, 0), D), at.column), 2)
        before = e.halves(e.load_32(where)[0])
        pair = at.wait()
        bits = e.pair(*(e.fadd(a, b) for a, b in zip(before, pair, strict=True)))
        with e.when(inside):
            e.store_32(where, bits)
        with e.when(at.there):
            e.send(e.ptr(sync, e.add(to[1], e.mul(at.row, D), at.column), 4), [bits], to[0])

    return epilogue


# ---------------------------------------------------------------- attention: one (row, kv head), a share of its positions


def rotate(refs: tuple[Any, ...], dims: tuple[int, ...], place: tuple[Any, ...]) -> None:
    """One warpgroup: the group's rotated queries into its [Q, H] of shared memory, rows past G zeros; the rotated key and the
    value into its [2, H] of `fresh`. dims: K, G, H, Q. place: qkv's in sync, tag, row, kv head, warpgroup."""
    K, G, H, Q = dims

    @persistent.inline(["ref"] * 3 + ["tiled", "ref"] + ["i32"] * 5)
    def run(e: Emitter, sync, cos, sin, queries, fresh, qkv, tag, row, head, w):  # type: ignore[no-untyped-def]
        half, parts = H // 2, H // 8  # a thread turns 4 columns and the 4 that are H/2 further
        base, queries_at, fresh_at = e.mul(e.add(e.mul(row, K), head), (G + 2) * H), e.mul(w, Q * H * 2), e.mul(w, 2 * H)

        def at(column):  # type: ignore[no-untyped-def]
            return e.add(qkv, base, column)

        for start in range(0, (Q - G) * H // 8, 128):
            i = e.add(e.thread, start)
            where = e.tiled_ptr(queries, queries_at, e.add(e.div(i, H // 8), G), e.mul(e.rem(i, H // 8), 8), H)
            with e.when(e.cmp("ult", i, (Q - G) * H // 8)):
                e.ptx("st.shared.v4.b32 [$0], {$1, $2, $3, $4};", where, *[e.c(0)] * 4)
        angle = e.add(e.mul(row, half), e.mul(e.rem(e.thread, parts), 4))  # of all that this thread turns
        c, s = ([e.as_f32(x) for x in e.load_32(e.ptr(ref, angle, 4), 4)] for ref in (cos, sin))
        e.watch(e.ptr(sync, at(0), 4), tag, e.cmp("ult", e.thread, 128))
        for start in range(0, (G + 1) * parts, 128):
            i = e.add(e.thread, start)
            inside = e.cmp("ult", i, (G + 1) * parts)
            j, h = e.div(e.select(inside, i, 0), parts), e.mul(e.rem(i, parts), 4)
            is_value = e.cmp("ult", i, H // 4)
            value = e.mul(e.select(is_value, i, 0), 4)
            places = [at(e.add(e.mul(j, H), h)), at(e.add(e.mul(j, H), h, half)), at(e.add((G + 1) * H, value))]
            near, far, v = e.receive(sync, places, tag, [inside, inside, is_value])
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
    plgpu = mosaic.plgpu()
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
    """One warpgroup: its output [H, Q] with what is in `halved`, if anything, normalized, in bf16, and the logarithms of the
    sums of exponentials [Q] to sync. refs: sync, halved. dims: G, H, Q. place: the state's in sync, tag, whether `halved` has
    any."""
    G, H, Q = dims
    plgpu = mosaic.plgpu()
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
                item = e.add(e.mul(e.add(e.mul(g, H // 16), e.warp, 4 * h_block), 4), e.div(e.lane, 8))
                with e.when(e.cmp("ult", g, G)):
                    e.send(e.ptr(sync, e.add(state, e.mul(item, 4)), 4), words, tag)
            pair_of_g = e.add(e.lane, 4 * tile)
            with e.when(e.both(e.cmp("ult", e.thread, 4), e.cmp("ult", pair_of_g, -(-G // 2)))):
                e.send(e.ptr(sync, e.add(state, G * H, e.mul(pair_of_g, 4)), 4), logs, tag)

    run(acc, m, l, *refs, *place)


def attended_x(
    refs: tuple[Any, ...], dims: tuple[int, ...], pieces_of_x: tuple[int, int], window: int | None, place: tuple[Any, ...]
) -> None:
    """One warpgroup: this rank's columns of the attention's output, from the states of all shares, into x: a warp has a head's
    128 numbers of a row, a lane positions h, h + 1, h + 8, h + 9. refs: length, sync, x and, in fixed point, its steps. dims:
    B, N, G, a unit's rows, units, shares (at most 16). place: the states' in sync, first column, columns, tag."""
    B, N, G, rows, slots, shares = dims
    H, words = 128, states_words(G, 128)
    together = max(1, 8 // shares)  # heads of a row

    @persistent.inline(["ref", "ref", "tiled"] + ["i32"] * 4 + ["ref"] * (len(refs) - 3))
    def run(e: Emitter, length, sync, x, states, begin, columns, tag, *steps):  # type: ignore[no-untyped-def]
        across = rows_across(B)
        h = e.add(e.mul(e.div(e.lane, 4), 16), e.mul(e.rem(e.lane, 4), 2))

        def item(part):  # type: ignore[no-untyped-def]
            """Row, whether there is such a head, number of shares, which head of a pair, where data and logarithms begin."""
            row, chunk = e.rem(part, across), e.div(part, across)
            column = e.mul(chunk, H)
            wanted = e.both(e.cmp("ult", column, columns), e.cmp("ult", row, B))
            known_row, head_of_all = e.select(wanted, row, 0), e.select(wanted, e.div(e.add(begin, column), H), 0)
            n = e.load_32(e.ptr(length, known_row, 4))[0]
            tiles = e.div(e.add(n, 63), 64)
            if window is not None:
                tiles = e.sub(tiles, e.div(e.select(e.cmp("ult", window, n), e.sub(n, window), 0), 64))
            used = e.select(wanted, e.select(e.cmp("ult", tiles, shares), tiles, shares), 0)
            g = e.rem(head_of_all, G)
            state = e.add(states, e.mul(e.add(e.mul(e.div(head_of_all, G), B), known_row), shares * words))
            data, log = e.add(state, e.mul(g, H)), e.add(state, G * H, e.mul(e.div(g, 2), 4))
            return row, e.add(column, h), wanted, used, e.cmp("ne", e.rem(g, 2), 0), data, log

        def step(j, none):  # type: ignore[no-untyped-def]
            part = lambda k: e.add(e.mul(e.add(e.mul(j, together), k), 4), e.warp)  # noqa: E731
            items = [item(part(k)) for k in range(together)]
            ptrs, needed = [], []
            for _, _, _, used, _, data, log in items:
                if shares > 1:  # a lane has a share's logarithm
                    ptrs.append(e.add(log, e.mul(e.rem(e.lane, 16), words)))
                    needed.append(e.cmp("ult", e.rem(e.lane, 16), used))
                for s in range(shares):
                    ptrs.append(e.add(data, e.mul(e.lane, 4), s * words))
                    needed.append(e.cmp("ult", s, used))
            got = iter(zip(e.receive(sync, ptrs, tag, needed), needed, strict=True))
            kept = []
            for row, column, wanted, _, odd, _, _ in items:
                if shares == 1:
                    kept.append((row, column, next(got)[0], wanted))
                    continue
                (even_log, odd_log), has = next(got)
                weights = _weights(e, e.select(has, e.as_f32(e.select(odd, odd_log, even_log)), MASKED))
                total = [e.c(0.0)] * 4
                for s in range(shares):
                    values = [f for bits in next(got)[0] for f in e.halves(bits)]
                    weight = e.from_lane(weights, e.c(s))
                    total = [e.fadd(x, e.fmul(weight, y)) for x, y in zip(total, values, strict=True)]
                kept.append((row, column, (e.pair(*total[:2]), e.pair(*total[2:])), wanted))
            _keep(e, x, steps, N, pieces_of_x, kept, far=True)
            return none

        e.fold(e.c(-(-across * (slots * rows // H) // (4 * together))), [], step)

    run(*refs[:3], *place, *refs[3:])


def _weights(e: Emitter, log: Any) -> Any:
    """Weights that add up to 1, from sixteen lanes' logarithms."""
    top = log
    for distance in (1, 2, 4, 8):
        top = e.m.arith.maximumf(top, e.shuffle(top, distance))
    weight = total = e.exp2(e.m.arith.subf(log, top))
    for distance in (1, 2, 4, 8):
        total = e.fadd(total, e.shuffle(total, distance))
    return e.fmul(weight, e.ptx("rcp.approx.f32 $0, $1;", total, result=e.f32))
