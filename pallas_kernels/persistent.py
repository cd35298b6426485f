"""What persistent decode kernels are built from, for Hopper GPUs: products streamed through one ring of shared memory,
and words sent between blocks. Imported by the kernels' modules only where Mosaic GPU is used (jax 0.11 and newer).

A persistent kernel runs a grid of at most one block a multiprocessor; all blocks run at once and work through the same
phases. A `Product` is a phase out[O, N] = weight[K, O]ᵀ·x[N, K]ᵀ; its weight is cut in units of `rows` × `columns`. Eight
blocks are a team; a team takes whole columns of units, and each of its blocks (its ranks) an eighth of K, of every phase: so
a block needs an eighth of x only. The sums of a column of units are scattered over the team: each rank gets 8 of every 64
columns, adds the eight shares in one order, and goes on with those columns. Results are the same bit for bit.

A producer warpgroup keeps the ring full of weights, across phases: it asks for the next phase's first units before what
they are multiplied with exists. What blocks tell one another goes through device memory (L2) in words of 8 bytes: 4 bytes
of data and a tag, which says in which launch and layer they were written, or for which tile (NCCL's "LL" protocol); sums in
16 bytes, of which the last four are the tag. A reader polls the data itself, so a hop is one store and one load: no fence,
no flag, nothing that is ever reset. These words live in an array that only such kernels write. A word that stays out for
seconds traps.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels import mosaic

LOG2E = 1.4426950408889634
SPIN_LIMIT = 1 << 21  # polls of about a microsecond
RANKS = 8  # blocks of a team: what a warpgroup's 64 columns are scattered over, 8 to each


@dataclasses.dataclass(frozen=True)
class Product:
    """How one weight [K, O] is dealt out to `teams` of eight blocks, in units of `rows` × `columns`."""

    K: int
    O: int  # noqa: E741
    rows: int
    columns: int
    teams: int
    apart: bool = False  # whether a rank's units along K are RANKS apart, not next to one another

    def __post_init__(self) -> None:
        if self.K % self.rows or self.O % self.columns:
            raise ValueError(f"{self}: units must divide K and O")

    @property
    def tiles(self) -> int:
        """Columns of units."""
        return self.O // self.columns

    @property
    def units(self) -> int:
        """Units along K."""
        return self.K // self.rows

    @property
    def slots(self) -> int:
        """Units along K of a rank, at most: the pieces of x, `rows` long, that a block needs."""
        return -(-self.units // RANKS)

    # Also on traced values.
    def tiles_of(self, team: Any) -> Any:
        return (self.tiles - team + self.teams - 1) // self.teams

    def tile(self, team: Any, i: Any) -> Any:
        """The team's i-th. Teams take neighbours, so that what is read at a time is in longer runs of a row of the weight."""
        return team + i * self.teams

    def units_of(self, rank: Any) -> Any:
        if self.apart:
            return (self.units - rank + RANKS - 1) // RANKS
        return (rank + 1) * self.units // RANKS - rank * self.units // RANKS

    def unit(self, rank: Any, i: Any) -> Any:
        """The rank's i-th along K."""
        return rank + i * RANKS if self.apart else rank * self.units // RANKS + i


# ---------------------------------------------------------------- emitters: per-thread code inside a warpgroup


def _mgpu() -> Any:
    from types import SimpleNamespace

    from jax._src.lib.mlir import ir
    from jax._src.lib.mlir.dialects import arith, gpu, llvm, nvvm, vector
    from jax.experimental.mosaic import gpu as mgpu
    from jax.experimental.mosaic.gpu import utils

    dialects = dict(arith=arith, gpu=gpu, llvm=llvm, nvvm=nvvm, vector=vector)
    return SimpleNamespace(ir=ir, **dialects, mgpu=mgpu, utils=utils)


# What blocks send one another stays in L2 while all weights pass through it, and so does everything small that is read or
# written in words (norms, the stream, angles, lengths): otherwise the first look at a line goes to memory, and waits behind
# the weights.
POLICY, HINT = ".reg .b64 keep; createpolicy.fractional.L2::evict_last.b64 keep, 1.0;", "L2::cache_hint"


class Emitter:
    """Shorthand for per-thread code: 32-bit integers and floats as MLIR values, memory through inline PTX."""

    def __init__(self) -> None:
        m = _mgpu()
        self.m, self.utils = m, m.utils
        self.i32 = m.ir.IntegerType.get_signless(32)
        self.i16 = m.ir.IntegerType.get_signless(16)
        self.f32 = m.ir.F32Type.get()
        self.bf16 = m.ir.BF16Type.get()
        # Asked for anew in every function: what hangs on it is then not kept from layer to layer, in registers that spill.
        self.thread = self.rem(self.ptx("mov.u32 $0, %tid.x;", result=self.i32), 128)  # of the warpgroup
        self.warp, self.lane = self.div(self.thread, 32), self.rem(self.thread, 32)

    def c(self, x: Any) -> Any:
        if isinstance(x, int):
            return self.m.arith.constant(self.i32, x)
        return self.m.arith.constant(self.f32, x) if isinstance(x, float) else x

    def add(self, *xs: Any) -> Any:
        return functools.reduce(lambda a, b: self.m.arith.addi(self.c(a), self.c(b)), xs)

    def sub(self, a: Any, b: Any) -> Any:
        return self.m.arith.subi(self.c(a), self.c(b))

    def mul(self, a: Any, b: Any) -> Any:
        return self.m.arith.muli(self.c(a), self.c(b))

    def div(self, a: Any, b: Any) -> Any:
        return self.m.arith.divui(self.c(a), self.c(b))

    def rem(self, a: Any, b: Any) -> Any:
        return self.m.arith.remui(self.c(a), self.c(b))

    def cmp(self, op: str, a: Any, b: Any) -> Any:
        return self.m.arith.cmpi(getattr(self.m.arith.CmpIPredicate, op), self.c(a), self.c(b))

    def both(self, a: Any, b: Any) -> Any:
        return self.m.arith.andi(a, b)

    def either(self, a: Any, b: Any) -> Any:
        return self.m.arith.ori(a, b)

    def select(self, p: Any, a: Any, b: Any) -> Any:
        return self.m.arith.select(p, self.c(a), self.c(b))

    def fadd(self, a: Any, b: Any) -> Any:
        return self.m.arith.addf(self.c(a), self.c(b))

    def fmul(self, a: Any, b: Any) -> Any:
        return self.m.arith.mulf(self.c(a), self.c(b))

    def when(self, condition: Any) -> Any:
        return self.utils.when(condition)

    def ptr(self, ref: Any, offset: Any, size: int) -> Any:
        """The address of element `offset` (of `size` bytes) of a buffer."""
        i8 = self.m.ir.IntegerType.get_signless(8)
        return self.utils.getelementptr(self._base(ref), [self.mul(offset, size)], i8)

    def _base(self, ref: Any) -> Any:
        return ref if ref.type == self.m.llvm.PointerType.get() else self.utils.memref_ptr(ref)

    def one_of(self, refs: Sequence[Any], index: Any) -> Any:
        """The index-th of several buffers, for `ptr` and `row_ptr`."""
        found = self.utils.memref_ptr(refs[0])
        for i, ref in enumerate(refs[1:], 1):
            found = self.select(self.cmp("eq", index, i), self.utils.memref_ptr(ref), found)
        return found

    def row_ptr(self, ref: Any, index: Any, stride: int, offset: Any, size: int) -> Any:
        """The address of element index·stride + offset, in 64 bits: for arrays past 2 GB."""
        i64 = self.m.ir.IntegerType.get_signless(64)
        i8 = self.m.ir.IntegerType.get_signless(8)
        far = self.m.arith.muli(self.m.arith.extui(i64, index), self.m.arith.constant(i64, stride * size))
        near = self.m.arith.extui(i64, self.mul(offset, size))
        return self.utils.getelementptr(self._base(ref), [self.m.arith.addi(far, near)], i8)

    def tiled_ptr(self, ref: Any, base: Any, row: Any, column: Any, columns: int) -> Any:
        """The address of a 16-bit element of a matrix of `columns` columns, kept as `swizzled` says, `base` bytes into ref."""
        tile = self.add(self.mul(self.div(row, 8), columns // 64), self.div(column, 64))
        line = self.rem(row, 8)
        within = self.m.arith.xori(self.mul(self.rem(column, 64), 2), self.mul(line, 16))
        return self.ptr(ref, self.add(base, self.mul(tile, 1024), self.mul(line, 128), within), 1)

    def load_f32(self, ptr: Any) -> Any:
        return self.ptx("ld.global.f32 $0, [$1];", ptr, result=self.f32)

    def load_32(self, ptr: Any, count: int = 1) -> list[Any]:
        """1, 2 or 4 words of 32 bits."""
        if count == 1:
            code = f"{{ {POLICY} ld.global.{HINT}.b32 $0, [$1], keep; }}"
            return [self.ptx(code, ptr, result=self.i32)]
        outs = ", ".join(f"${i}" for i in range(count))
        code = f"{{ {POLICY} ld.global.{HINT}.v{count}.b32 {{{outs}}}, [${count}], keep; }}"
        return list(self.ptx(code, ptr, result=[self.i32] * count))

    def store_32(self, ptr: Any, bits: Any) -> None:
        self.ptx(f"{{ {POLICY} st.global.{HINT}.b32 [$0], $1, keep; }}", ptr, bits)

    def exp2(self, x: Any) -> Any:
        return self.ptx("ex2.approx.f32 $0, $1;", x, result=self.f32)

    def silu_up(self, gate: Any, up: Any) -> Any:
        """silu(gate)·up."""
        power = self.exp2(self.fmul(gate, -LOG2E))
        inverse = self.ptx("rcp.approx.f32 $0, $1;", self.fadd(power, 1.0), result=self.f32)
        return self.fmul(self.fmul(gate, up), inverse)

    def ptx(self, code: str, *args: Any, result: Any = None) -> Any:
        return self.utils.inline_ptx(code, *args, result_types=result, has_side_effects=True)

    def load_bf16(self, ptr: Any) -> Any:
        bits = self.ptx("ld.global.b16 $0, [$1];", ptr, result=self.i16)
        return self.widen(bits)

    def widen(self, bits: Any) -> Any:
        wide = self.m.arith.shli(self.m.arith.extui(self.i32, bits), self.c(16))
        return self.utils.bitcast(wide, self.f32)

    def narrow(self, x: Any) -> Any:
        """float32 → the bits of the nearest bf16."""
        return self.m.arith.bitcast(self.i16, self.m.arith.truncf(self.bf16, x))

    def store_16(self, ptr: Any, bits: Any, predicate: Any = None) -> None:
        self.utils.inline_ptx("st.global.b16 [$0], $1;", ptr, bits, predicate=predicate, has_side_effects=True)

    def shuffle(self, x: Any, distance: int) -> Any:
        return self.utils.shfl_bfly(x, distance)

    def largest(self, xs: Sequence[Any]) -> Any:
        """The largest magnitude of all lanes' float32; NaN is larger than any."""
        bits = [self.m.arith.andi(self.utils.bitcast(x, self.i32), self.c(0x7FFFFFFF)) for x in xs]
        mine = functools.reduce(self.m.arith.maxui, bits)
        return self.as_f32(self.ptx("redux.sync.max.u32 $0, $1, 0xffffffff;", mine, result=self.i32))

    def to_f32(self, x: Any) -> Any:
        """An int32 as float32."""
        return self.m.arith.sitofp(self.f32, x)

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        return self.ptx("fma.rn.f32 $0, $1, $2, $3;", a, b, c, result=self.f32)

    def gather_bytes(self, words: Sequence[Any], which: int) -> Any:
        """Byte `which` of each of four words."""
        a, b, c, d = words
        both = (4 + which) << 4 | which
        return self.permute(self.permute(a, b, both), self.permute(c, d, both), 0x5410)

    def permute(self, a: Any, b: Any, selected: int) -> Any:
        """Four of the eight bytes of two words; the lowest is chosen by the lowest hexadecimal digit."""
        return self.ptx(f"prmt.b32 $0, $1, $2, {selected:#x};", a, b, result=self.i32)

    def barrier(self) -> None:
        self.utils.warpgroup_barrier()

    def first_thread(self) -> Any:
        return self.cmp("eq", self.thread, 0)

    def halves(self, bits: Any) -> tuple[Any, Any]:
        """Two bf16 of 32 bits as float32."""
        high = self.m.arith.andi(bits, self.m.arith.constant(self.i32, -65536))
        return self.utils.bitcast(self.m.arith.shli(bits, self.c(16)), self.f32), self.utils.bitcast(high, self.f32)

    def pair(self, a: Any, b: Any) -> Any:
        """Two float32 → the 32 bits of the nearest bf16."""
        return self.ptx("cvt.rn.bf16x2.f32 $0, $2, $1;", a, b, result=self.i32)

    def as_i32(self, x: Any) -> Any:
        return self.utils.bitcast(x, self.i32)

    def as_f32(self, bits: Any) -> Any:
        return self.utils.bitcast(bits, self.f32)

    def from_lane(self, x: Any, lane: Any) -> Any:
        """What another lane of the warp has for x, float32."""
        return self.ptx("shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;", x, lane, result=self.f32)

    def send(self, ptr: Any, words: Sequence[Any], tag: Any) -> None:
        """One or two words of 32 bits to 8 or 16 aligned bytes, each beside the tag and inseparable from it; or three, with one
        tag, to 16."""
        if len(words) == 3:
            code = "mov.b64 x, {$1, $2}; mov.b64 y, {$3, $4}; mov.b128 z, {x, y};"
            code += f" st.relaxed.gpu.global.{HINT}.b128 [$0], z, keep;"
            self.ptx(f"{{ {POLICY} .reg .b64 x, y; .reg .b128 z; {code} }}", ptr, *words, tag)
            return
        if len(words) == 1:
            code = f"mov.b64 x, {{$1, $2}}; st.relaxed.gpu.global.{HINT}.b64 [$0], x, keep;"
            self.ptx(f"{{ {POLICY} .reg .b64 x; {code} }}", ptr, *words, tag)
            return
        code = f"mov.b64 x, {{$1, $3}}; mov.b64 y, {{$2, $3}}; st.relaxed.gpu.global.{HINT}.v2.b64 [$0], {{x, y}}, keep;"
        self.ptx(f"{{ {POLICY} .reg .b64 x, y; {code} }}", ptr, *words, tag)

    def watch(self, ptr: Any, tag: Any, needed: Any, words: int = 1) -> None:
        """Wait, where needed, until what was sent to ptr, so many words with one tag, bears it: spares L2 the polls that
        `receive` would make while nothing is there."""
        self.ptx(
            f"{{ {POLICY} .reg .pred p; .reg .b32 v, n; setp.eq.u32 p, $2, 0; mov.b32 n, 0; @p bra THERE;\n"
            f"AGAIN: ld.relaxed.gpu.global.{HINT}.b32 v, [$0+{4 * words}], keep; setp.eq.u32 p, v, $1; @p bra THERE;\n"
            f"add.u32 n, n, 1; setp.gt.u32 p, n, {SPIN_LIMIT}; @p trap; bra AGAIN;\n"
            "THERE: }",
            ptr,
            tag,
            self.m.arith.extui(self.i32, needed),
        )

    def pack_24(self, values: Sequence[Any]) -> list[Any]:
        """Four float32 → three words: the upper 24 bits of each, cut off (rounded, a NaN of all ones would become zero)."""
        a, b, c, d = map(self.as_i32, values)
        return [self.permute(a, b, 0x5321), self.permute(b, c, 0x6532), self.permute(c, d, 0x7653)]

    def unpack_24(self, words: Sequence[Any]) -> list[Any]:
        """The four float32 of `pack_24`."""
        x, y, z = words
        parts = self.m.arith.shli(x, self.c(8)), self.permute(x, y, 0x5433), self.permute(y, z, 0x4322), z
        return [self.as_f32(self.m.arith.andi(part, self.c(-256))) for part in parts]

    def receive(
        self, sync: Any, places: Sequence[Any], tag: Any, needed: Sequence[Any], each: int = 2
    ) -> list[tuple[Any, ...]]:
        """What was sent to 16 aligned bytes of sync from each place on, two words (or three: `each`), once all needed ones bear
        the tag; others are zeros."""
        k, total = len(places), each * len(places)
        tag_at = f"${total + k}"
        distinct = list({id(x): x for x in needed}.values())
        which = [next(j for j, x in enumerate(distinct) if x is need) for need in needed]
        code = [f"{{ {POLICY} .reg .pred p, q<{len(distinct)}>; .reg .b32 n, v<{total}>, t<{2 * k}>; .reg .b64 x<{k}>, y<{k}>;"]
        code += [f".reg .b128 z<{k}>;"] if each == 3 else []
        code += [f"setp.ne.u32 q{j}, ${total + k + 1 + j}, 0;" for j in range(len(distinct))]
        # Places are half as many registers as addresses.
        code += [".reg .b64 a;"]
        code += ["mov.b32 n, 0;", *(f"mov.b64 x{i}, {{n, {tag_at}}}; mov.b64 y{i}, x{i};" for i in range(k))]
        if each == 3:
            code += [f"mov.b64 x{i}, {{n, n}}; mov.b128 z{i}, {{x{i}, y{i}}};" for i in range(k)]
        code += ["AGAIN:"]
        for i in range(k):
            kind, to = ("v2.b64", f"{{x{i}, y{i}}}") if each == 2 else ("b128", f"z{i}")
            code += [f"mad.wide.u32 a, ${total + i}, 4, ${total + k + 1 + len(distinct)};"]
            code += [f"@q{which[i]} ld.relaxed.gpu.global.{HINT}.{kind} {to}, [a], keep;"]
        for i in range(k):
            if each == 2:
                code += [f"mov.b64 {{v{2 * i}, t{2 * i}}}, x{i}; mov.b64 {{v{2 * i + 1}, t{2 * i + 1}}}, y{i};"]
            else:
                code += [f"mov.b128 {{x{i}, y{i}}}, z{i}; mov.b64 {{v{3 * i}, v{3 * i + 1}}}, x{i};"]
                code += [f"mov.b64 {{v{3 * i + 2}, t{i}}}, y{i};"]
        code += [f"setp.eq.u32 p, t0, {tag_at};"]
        code += [f"setp.eq.and.u32 p, t{i}, {tag_at}, p;" for i in range(1, (2 if each == 2 else 1) * k)]
        code += ["@p bra THERE;", f"add.u32 n, n, 1; setp.gt.u32 p, n, {SPIN_LIMIT}; @p trap; bra AGAIN;"]
        code += ["THERE:"]
        code += [f"mov.b32 ${i}, v{i};" for i in range(total)]
        flags = [self.m.arith.extui(self.i32, x) for x in distinct]
        args = [*map(self.c, places), tag, *flags, self.utils.memref_ptr(sync)]
        words = self.ptx("\n".join(code) + " }", *args, result=[self.i32] * total)
        return list(zip(*(words[i::each] for i in range(each)), strict=True))

    def count(self, ptr: Any, needed: Any) -> Any:
        """A warp: once all its lanes have written what comes before, one more at ptr, where needed; what was there before, or 0
        where it is not. Who finds others counted sees what they have written."""
        flag = self.m.arith.extui(self.i32, self.both(self.cmp("eq", self.lane, 0), needed))
        return self.ptx(
            "{ .reg .pred p; .reg .b32 v; bar.warp.sync 0xffffffff; setp.ne.u32 p, $2, 0; mov.b32 v, 0;"
            " @p atom.acq_rel.gpu.global.add.u32 v, [$1], 1; bar.warp.sync 0xffffffff;"
            " shfl.sync.idx.b32 $0, v, 0, 31, 0xffffffff; }",
            ptr,
            flag,
            result=self.i32,
        )

    def load_fresh(self, ptr: Any) -> list[Any]:
        """Four float32 that another block has written."""
        return list(self.ptx("ld.relaxed.gpu.global.v4.f32 {$0, $1, $2, $3}, [$4];", ptr, result=[self.f32] * 4))

    def fold(self, count: Any, state: list[Any], step: Callable[[Any, list[Any]], list[Any]]) -> list[Any]:
        """state = step(i, state) for i below count, which threads need not agree on."""
        return list(self.utils.fori(count, state)(step).results)

    def fragment(self, N: int) -> list[tuple[int, int]]:
        """(n tile, row half) of each register, a pair of columns, of a [64, N] array in the WGMMA layout."""
        return [(tile, half) for tile in range(N // 8) for half in range(2)]

    def unpack(self, array: Any) -> list[tuple[Any, Any]]:
        """The two float32 of each register of such an array."""
        extract = lambda v, i: self.m.llvm.extractelement(v, self.c(i))  # noqa: E731
        return [(extract(v, 0), extract(v, 1)) for v in array.registers.flat]

    def pack(self, pairs: Sequence[tuple[Any, Any]], shape: tuple[int, ...]) -> Any:
        """The inverse of `unpack`, of float32."""
        layout = mosaic.plgpu().Layout.WGMMA.to_mgpu()
        registers = np.empty(layout.registers_shape(shape), dtype=object)
        kind = self.m.ir.VectorType.get((2,), self.f32)
        registers.flat[:] = [self.m.vector.from_elements(kind, list(pair)) for pair in pairs]
        return self.m.mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def inline(arg_types: Sequence[Any], return_type: Any = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """inline_mgpu for functions of (Emitter, *args); scalars arrive as plain MLIR values."""
    plgpu = mosaic.plgpu()
    named = {"i32": plgpu.Layout.WG_SPLAT(()), "ref": plgpu.RefType(), "tiled": plgpu.RefType(swizzled())}
    types = tuple(named[t] if isinstance(t, str) else t for t in arg_types)

    def wrap(f: Callable[..., Any]) -> Callable[..., Any]:
        def emit(ctx: Any, *args: Any) -> Any:
            plain = [a.registers.item() if t == "i32" else a for a, t in zip(args, arg_types, strict=True)]
            return f(Emitter(), *plain)

        return plgpu.inline_mgpu(arg_types=types, return_type=return_type)(emit)  # type: ignore[no-any-return]

    return wrap


def together() -> None:
    """The four warps of a warpgroup wait for one another."""
    inline([])(lambda e: e.barrier())()


def finish(total: Any, every: bool = False) -> None:
    """One warpgroup: before a place in shared memory is given back to the copy engine, wait for the loads from it that `total`
    [64, N] float32, in the WGMMA layout, needs (of a number for a row, say; `every`: and of one for a column). An mbarrier does
    not: the engine's writes are of another proxy, and a load that is still under way may find them (as in DeepGEMM's pull
    request 389)."""
    # A condition that ptxas cannot know to be false, or it would be left out; where it is true, harmless.
    code = "{ .reg .pred p; .reg .b32 v; xor.b32 v, $0, $1; setp.eq.b32 p, v, -2; @p fence.proxy.async.shared::cta; }"
    plgpu = mosaic.plgpu()

    @inline([plgpu.Layout.WGMMA])
    def wait(e: Emitter, total: Any) -> None:
        halves = e.unpack(total)
        for i in range(0, len(halves) if every else 2, 2):
            e.ptx(code, halves[i][0], halves[i + 1][0])

    wait(total)


def wgmma_fence() -> None:
    """Before products in a loop: where ptxas does not see that threads go together, it orders wgmma one after another unless
    told that the accumulator is settled."""
    inline([])(lambda e: e.ptx("wgmma.fence.sync.aligned;"))()


def launches_seen(sync: Any) -> Any:
    """The word of `sync` that counts arrivals, asked for but not waited for."""
    plgpu = mosaic.plgpu()

    @inline(["ref"], plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT(())))
    def read(e: Emitter, sync: Any) -> Any:
        seen = e.ptx("ld.relaxed.gpu.global.b32 $0, [$1];", e.ptr(sync, 0, 4), result=e.i32)
        return e.m.mgpu.FragmentedArray.splat(seen, (), is_signed=True)

    return read(sync)


def launch_number(sync: Any, seen: Any, arrivals: int, count: int) -> Any:
    """How many launches have begun with this `sync`, this one included. Every warpgroup calls it once and counts for `count` of
    `arrivals` in all, a power of two, so that nothing breaks when the counter wraps."""
    plgpu = mosaic.plgpu()

    @inline(["ref", "i32"], plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT(())))
    def arrive(e: Emitter, sync: Any, seen: Any) -> Any:
        e.ptx("{ .reg .pred p; setp.eq.b32 p, $0, -1; @p trap; }", seen)  # never true: the load is over before the barrier
        e.barrier()
        e.utils.inline_ptx(
            "red.relaxed.gpu.global.add.u32 [$0], $1;",
            e.ptr(sync, 0, 4),
            e.c(count),
            predicate=e.first_thread(),
            has_side_effects=True,
        )
        return e.m.mgpu.FragmentedArray.splat(e.add(e.div(seen, arrivals), 1), (), is_signed=True)

    return arrive(sync, seen)


# ---------------------------------------------------------------- int8: a column's rows together, as wgmma reads them


def tile_int8(values: Any, columns: int) -> Any:
    """int8 [K, O] → [O/columns, K/128, columns, 128]: units whose columns are 128 bytes each, swizzled for wgmma.

    Piece 2l + i of a column's 16-byte pieces is what thread l of four widens of half i of the rows (`widen_int8`): of each of
    four steps of 16 rows it takes rows 2l and 2l + 1 and those 8 further, by turns, as four bytes are unpacked to two pairs of
    bf16. Piece c of column o is in place c ^ o % 8. What is multiplied with it in int8 must come in the same order
    (fixed_point.keep).
    """
    K, O = values.shape  # noqa: E741
    # K: unit, half i, step q, eight h, thread of four l, one of a pair j.
    parts = values.reshape(K // 128, 2, 4, 2, 4, 2, O // columns, columns)
    ordered = parts.transpose(6, 0, 7, 4, 1, 2, 5, 3).reshape(O // columns, K // 128, columns, 8, 16)  # …, l, i, q, j, h
    return _exchange(ordered).reshape(O // columns, K // 128, columns, 128)


def untile_int8(tiles: Any) -> Any:
    """The inverse of tile_int8: [O/columns, K/128, columns, 128] → [K, O]."""
    T, U, columns, _ = tiles.shape
    parts = _exchange(tiles.reshape(T, U, columns, 8, 16)).reshape(T, U, columns, 4, 2, 4, 2, 2)
    return parts.transpose(1, 4, 5, 7, 3, 6, 0, 2).reshape(U * 128, T * columns)


def _exchange(pieces: Any) -> Any:
    """[…, columns, 8, 16]: a column's piece c to place c ^ column % 8, bit by bit; its own inverse."""
    *rest, columns, _, _ = pieces.shape
    x, bits = pieces.reshape(*rest, columns // 8, 2, 2, 2, 2, 2, 2, 16), len(rest) + 1
    for bit in range(bits, bits + 3):
        zero, one = jnp.split(x, 2, axis=bit)
        x = jnp.concatenate([zero, jnp.flip(one, bit + 3)], axis=bit)
    return x.reshape(pieces.shape)


def widen_int8(weights: Any, unit: Any, half: Any) -> Any:
    """64 of the 128 columns of a unit of int8 in shared memory [..., 128, 128], as tile_int8 has it → [64 columns, 128 rows] in
    bf16, as wgmma takes its left side in registers. unit: its number in `weights`.

    A byte is widened without conversion instructions: 0x4300 | low seven bits is the bf16 128 + those, 0x4300 | the sign bit is
    128 or 256, and the difference of the two is the byte's value, exactly. Two bytes at a time.
    """
    plgpu = mosaic.plgpu()

    @inline(["ref", "i32", "i32"], plgpu.ShapeDtypeStruct((64, 128), jnp.bfloat16, layout=plgpu.Layout.WGMMA))
    def widen(e: Emitter, weights: Any, unit: Any, half: Any) -> Any:
        layout = plgpu.Layout.WGMMA.to_mgpu()
        regs = np.empty(layout.registers_shape((64, 128)), dtype=object)
        flat = regs.reshape(16, 2)  # eights of rows, columns 8 apart
        pair = e.m.ir.VectorType.get((2,), e.bf16)
        convert = (
            "{ .reg .b32 v, s; lop3.b32 v, $1, 0x007f007f, 0x43004300, 0xea; "
            "lop3.b32 s, $1, 0x00800080, 0x43004300, 0xea; sub.rn.bf16x2 $0, v, s; }"
        )
        r, l = e.div(e.lane, 4), e.rem(e.lane, 4)  # noqa: E741
        for c in range(2):
            column = e.add(e.mul(e.add(e.mul(unit, 2), half), 64), e.mul(e.warp, 16), r, 8 * c)
            for i in range(2):
                piece = e.m.arith.xori(e.add(e.mul(l, 2), i), r)
                at = e.ptr(weights, e.add(e.mul(column, 128), e.mul(piece, 16)), 1)
                words = e.ptx("ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];", at, result=[e.i32] * 4)
                for q, word in enumerate(words):
                    for h, x in enumerate((word, e.m.arith.shrui(word, e.c(8)))):
                        flat[8 * i + 2 * q + h, c] = e.utils.bitcast(e.ptx(convert, x, result=e.i32), pair)
        return e.m.mgpu.FragmentedArray(_registers=regs, _layout=layout, _is_signed=None)

    return widen(weights, unit, half)


def swizzled(bits: int = 16) -> Any:
    """How wgmma wants matrices in shared memory: tiles of 8 rows of 128 bytes, 16-byte pieces exchanged by row."""
    plgpu = mosaic.plgpu()
    return (plgpu.TilingTransform((8, 1024 // bits)), plgpu.SwizzleTransform(128))


def aligned_bytes(sizes: Sequence[int]) -> int:
    """What buffers take, each aligned to 1024 bytes."""
    return sum(math.ceil(size / 1024) * 1024 for size in sizes)


def shared_bytes(sizes: Sequence[int]) -> int:
    """What a block allocates: its buffers, the barriers in a last kilobyte."""
    return aligned_bytes(sizes) + 1024
