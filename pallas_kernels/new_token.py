"""What a warpgroup of `decode_attention` does with a new token before it attends, its qkv being in device memory: per-thread
code, as in layer_phases.py.
"""

from __future__ import annotations

from typing import Any

from pallas_kernels import persistent
from pallas_kernels.persistent import Emitter


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
