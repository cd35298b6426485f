"""Product of a few rows with a large int8 weight (W8A16) as it is, x in fixed point, for Hopper GPUs: one persistent kernel.

    x_NI          bf16          1 to 64 rows
    tiles         int8 [O/128, I/128, 128, 128]   `persistent.tile_int8`
    scales        bf16 [O/128, I/128, 128]        symmetric, one for 128 rows of a column
    residual_NO   bf16          added to the product, or None
    → out_NO      bf16 or f32;  with silu=True out_Nf, f = O/2: silu(gate)·up of columns 2f and 2f+1

What bounds it: reading the weight once. linear.py chooses it, and has the reference.

A unit is 128 rows of a tile of 128 columns, a stage some units of a tile. All stages, tile after tile, are dealt out evenly to
as many blocks as there are multiprocessors ("stream-K", Osama et al., 2023): a block may begin and end within a tile. It then
leaves its sums in device memory and counts itself; who comes last adds all that the tile has, in one order, whoever it is. One
warpgroup keeps a ring of shared memory full of weights and of the x that they are multiplied with, two multiply, 64 columns
each. Up to 32 rows a fourth one makes x fixed-point where it lies (fixed_point.py); with more rows each block doing so for
itself is too much for shared memory, and a small kernel before does it for all.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import fixed_point, mosaic, persistent, tuning
from pallas_kernels.persistent import Emitter

GROUP = 128  # rows of an int8 weight that share a scale
COLUMNS = 128  # of a tile
SHARED_MEMORY = 227 * 1024  # bytes a block may have
CONSUMERS = 2  # warpgroups that multiply
CONVERTED = 32  # rows that are made fixed-point by the kernel, at most
TOGETHER = 8  # rows of pieces of x that a warp converts at a time


@dataclasses.dataclass(frozen=True)
class Config:
    """blocks: of the grid, at most one a multiprocessor; units: along the reduced axis in a stage; stages: in the ring."""

    blocks: int = 132
    units: int = 1
    stages: int = 4

    def __post_init__(self) -> None:
        if self.units not in (1, 2, 4):
            raise ValueError(f"units={self.units}: allowed are 1, 2 and 4")
        if self.blocks < 1:
            raise ValueError(f"blocks={self.blocks}: it must be at least 1")
        if not 1 <= self.stages <= 32:
            raise ValueError(f"stages={self.stages}: allowed is 1 to 32")


@dataclasses.dataclass(frozen=True)
class Dims:
    """What a kernel is compiled for."""

    B: int
    I: int  # noqa: E741
    O: int  # noqa: E741
    residual: bool
    silu: bool
    out_dtype: Any

    @property
    def converts(self) -> bool:
        """Whether the kernel makes x fixed-point."""
        return self.B <= CONVERTED

    @property
    def N(self) -> int:
        """Rows that the product takes."""
        return rows(self.B)

    @property
    def pieces(self) -> int:
        """Of x, 128 columns each."""
        return self.I // GROUP


def rows(B: int) -> int:
    """B, padded: wgmma's narrow side is a multiple of 8, and where x comes in fixed point its steps are copied, 128 bytes of
    them at least."""
    return -(-B // 8) * 8 if B <= CONVERTED else -(-B // 32) * 32


@functools.lru_cache(maxsize=256)
def kernel(dims: Dims, config: Config) -> Any:
    """(tiles, scales, residual if any, x of N rows, or what `planes` makes of it) → out."""
    from jax.experimental import pallas as pl

    plgpu = mosaic.plgpu()
    N, U, S, W, converts = dims.N, config.units, config.stages, CONSUMERS, dims.converts
    # Of a thread: no more in all than a block begins with, 128 a thread or 168, or who asks waits for ever.
    of_producer, of_converter, of_consumer = (40, 88, 192) if converts else (40, 0, 232)
    steps = dims.pieces // U
    total = dims.O // COLUMNS * steps
    G = min(config.blocks, total)  # each has something, or `store` would count in vain on those that have not
    shape, f32, bf16 = jax.ShapeDtypeStruct, jnp.float32, jnp.bfloat16

    def body(tiles, scales, *refs, wbufs, xbufs, sbuf, tbuf, full, ready, empty):  # type: ignore[no-untyped-def]
        residual, (x, *x_steps), (counts, out, parts) = refs[: int(dims.residual)], refs[int(dims.residual) : -3], refs[-3:]
        (raw, weights), (x_bf16, x_int8) = wbufs, xbufs
        b, w = lax.axis_index("b"), lax.axis_index("w")
        begin, end = lax.div(b * total, G), lax.div((b + 1) * total, G)
        count = end - begin

        @pl.when(w == W)
        def _producer():  # type: ignore[no-untyped-def]
            plgpu.set_max_registers(of_producer, action="decrease")

            def ask(i):  # type: ignore[no-untyped-def]
                slot, tile, k = lax.rem(i, S), lax.div(begin + i, steps), lax.rem(begin + i, steps)
                pl.when(i >= S)(lambda: plgpu.barrier_wait(empty.at[slot]))
                units = pl.ds(k * U, U)
                copies = [(tiles.at[tile, units], raw.at[slot]), (scales.at[tile, units], sbuf.at[slot])]
                if converts:
                    columns = [pl.ds((k * U + u) * GROUP, GROUP) for u in range(U)]
                    copies += [(x.at[:, here], x_bf16.at[slot, u]) for u, here in enumerate(columns)]
                else:
                    copies += [(x.at[units], x_int8.at[slot]), (x_steps[0].at[units], tbuf.at[slot])]
                for j, (source, to) in enumerate(copies):
                    # What is in one piece, and promised to be in bounds, needs no descriptor, and comes a little sooner.
                    mode = dict(oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS) if j < 2 else {}
                    plgpu.copy_gmem_to_smem(source, to, full.at[slot], **mode)

            pl.loop(0, count)(ask)

            @pl.loop(jnp.maximum(count - S, 0), count)  # leave no barrier with an arrival that nobody saw
            def _(i):  # type: ignore[no-untyped-def]
                plgpu.barrier_wait(empty.at[lax.rem(i, S)])

        def convert_all():  # type: ignore[no-untyped-def]
            plgpu.set_max_registers(of_converter, action="decrease")

            @pl.loop(0, count)
            def _(i):  # type: ignore[no-untyped-def]
                slot = lax.rem(i, S)
                plgpu.barrier_wait(full.at[slot])
                convert((x_bf16, tbuf), (dims.B, N, U), slot)
                plgpu.commit_smem()
                plgpu.barrier_arrive(ready.at[slot])

        if converts:
            pl.when(w == W + 1)(convert_all)

        @pl.when(w < W)
        def _consumers():  # type: ignore[no-untyped-def]
            plgpu.set_max_registers(of_consumer, action="increase")

            def step(at):  # type: ignore[no-untyped-def]
                def take(i, sums):  # type: ignore[no-untyped-def]
                    slot = lax.rem(at + i, S)
                    plgpu.barrier_wait(full.at[slot])
                    if converts:
                        plgpu.barrier_wait(ready.at[slot])

                    def multiply(*products):  # type: ignore[no-untyped-def]
                        for u, product in enumerate(products):
                            plgpu.wgmma(product, weights.at[slot, u, pl.ds(w * 64, 64)], x_int8.at[slot, u].T)
                        out = sums
                        for u, product in enumerate(products):  # of one while those of the next run
                            product = plgpu.wgmma_accumulator_load(product, wait_n=U - 1 - u)
                            out = fixed_point.add_scaled((sbuf, tbuf), N, product, out, w, slot * U + u, slot * U + u)
                        return out

                    sums = pl.run_scoped(multiply, *(plgpu.ACC((64, 2 * N), jnp.int32) for _ in range(U)))
                    persistent.finish(sums, every=not converts)  # the scales are loaded, and the steps that were copied
                    plgpu.barrier_arrive(empty.at[slot])
                    return sums

                return take

            first = lax.div(begin, steps)

            def segment(j, at):  # type: ignore[no-untyped-def]
                tile = first + j
                stages = jnp.minimum((tile + 1) * steps, end) - (begin + at)
                zeros = plgpu.layout_cast(jnp.zeros((64, N), f32), plgpu.Layout.WGMMA)
                sums = lax.fori_loop(0, stages, step(at), zeros)
                store((parts, counts, out, *residual), sums, dims, (steps, total, G), (b, tile, w))
                return at + stages

            lax.fori_loop(0, lax.div(end - 1, steps) - first + 1, segment, jnp.int32(0))

    body.__name__ = f"linear_int8_{dims.I}x{dims.O}_n{N}"
    swizzled, ring = persistent.swizzled(8), (S, U, COLUMNS, GROUP)
    xs = [((S, U, N, GROUP), bf16, persistent.swizzled()), ((S, U, 2 * N, GROUP), jnp.int8, swizzled)]  # the same bytes
    run = plgpu.kernel(
        body,
        out_type=[
            shape((dims.B, dims.O // 2 if dims.silu else dims.O), dims.out_dtype),
            shape((G * 2 * COLUMNS * N,), f32),
        ],
        grid=(G,),
        grid_names=("b",),
        num_threads=W + 1 + converts,
        thread_name="w",
        scratch_types=dict(
            wbufs=plgpu.RefUnion(plgpu.SMEM(ring, jnp.int8), plgpu.SMEM(ring, jnp.int8, transforms=swizzled)),
            xbufs=plgpu.RefUnion(*(plgpu.SMEM(shape, dtype, transforms=how) for shape, dtype, how in xs)),
            sbuf=plgpu.SMEM((S, U, COLUMNS), bf16),
            tbuf=plgpu.SMEM((S, U, N), f32),
            full=plgpu.Barrier(num_arrivals=2 + (U if converts else 2), num_barriers=S),
            ready=plgpu.Barrier(num_barriers=S),
            empty=plgpu.Barrier(num_arrivals=W, num_barriers=S),
        ),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
    )

    # The kernel leaves them as it finds them, so they may be a constant, which nobody need make zero: XLA would make anything
    # else by a launch of its own, also zeros alone. All launches of as many columns on a device share it, so they must follow
    # one another, as XLA's do: it has one stream for programs, and runs a CUDA graph's kernels in order unless it is told
    # --xla_gpu_command_buffer_scheduling_mode=CONCURRENT.
    counters = np.append(np.zeros(dims.O // 64 * 4, np.int32), np.int32(1))

    @jax.jit  # lowered once in a program, however many layers call it
    def call(*operands: Any) -> jax.Array:
        result: jax.Array = run(*operands, counters)[0]
        return result

    return call


@functools.lru_cache(maxsize=256)
def planes(B: int, N: int, I: int) -> Any:  # noqa: E741
    """x [B, I] → pieces [I/128, 2·N, 128] int8 and their steps [I/128, N] f32, as `fixed_point.keep` says; nothing is written
    of rows that x does not have."""
    plgpu, shape = mosaic.plgpu(), jax.ShapeDtypeStruct

    def body(x, pieces, steps):  # type: ignore[no-untyped-def]
        convert_piece((x, pieces, steps), (B, N, I), lax.axis_index("p"))

    body.__name__ = f"fixed_point_{N}x{I}"
    run = plgpu.kernel(
        body,
        out_type=[shape((I // GROUP, 2 * N, GROUP), jnp.int8), shape((I // GROUP, N), jnp.float32)],
        grid=(I // GROUP,),
        grid_names=("p",),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
    )
    return jax.jit(run)


# ---------------------------------------------------------------- per-thread code


def convert(refs: tuple[Any, Any], sizes: tuple[int, int, int], slot: Any) -> None:
    """One warpgroup: the x of a stage of the ring to fixed point, where it lies. refs: x, its steps [stages, units, N] f32.
    sizes: B, N, units."""
    B, N, U = sizes

    @persistent.inline(["tiled", "ref", "i32"])
    def run(e: Emitter, x, steps, slot):  # type: ignore[no-untyped-def]
        def pair(piece, n, column):  # type: ignore[no-untyped-def]
            places = [e.tiled_ptr(x, e.mul(piece, N * 256), n, e.add(column, 8 * i), GROUP) for i in range(2)]
            return tuple(e.ptx("ld.shared.b32 $0, [$1];", place, result=e.i32) for place in places)

        where = lambda item: (e.add(e.mul(slot, U), e.div(item, B)), e.rem(item, B))  # noqa: E731
        convert_rows(e, (x, steps), N, U * B, where, pair, True)

    run(*refs, slot)


def convert_piece(refs: tuple[Any, Any, Any], sizes: tuple[int, int, int], piece: Any) -> None:
    """One warpgroup: a piece of x to fixed point, in device memory. refs: x [B, I], pieces, steps. sizes: B, N, I."""
    B, N, I = sizes  # noqa: E741

    @persistent.inline(["ref"] * 3 + ["i32"])
    def run(e: Emitter, x, pieces, steps, piece):  # type: ignore[no-untyped-def]
        def pair(_, n, column):  # type: ignore[no-untyped-def]
            at = e.add(e.mul(n, I), e.mul(piece, GROUP), column)
            return tuple(e.load_32(e.ptr(x, e.add(at, 8 * i), 2))[0] for i in range(2))

        convert_rows(e, (pieces, steps), N, B, lambda item: (piece, item), pair, False)

    run(*refs, piece)


def convert_rows(
    e: Emitter, refs: tuple[Any, Any], N: int, count: int, where: Callable[..., Any], pair: Callable[..., Any], swizzled: bool
) -> None:
    """One warpgroup: so many rows of pieces of x to fixed point. where: of the i-th, its piece and row. pair: of a piece, a row
    and a column, the bits of that column and the next and of those 8 further."""
    each = -(-count // 4)  # of a warp
    together = min(TOGETHER, each)
    l = e.rem(e.lane, 4)  # noqa: E741
    column = e.add(e.mul(e.div(e.lane, 16), 64), e.mul(e.rem(e.div(e.lane, 4), 4), 16), e.mul(l, 2))

    def step(j, none):  # type: ignore[no-untyped-def]
        parts = []
        for k in range(together):
            item = e.add(e.mul(e.add(e.mul(j, together), k), 4), e.warp)
            there = e.cmp("ult", item, count)
            piece, n = where(e.select(there, item, 0))
            parts.append((piece, n, pair(piece, n, column), there))
        fixed_point.keep(e, refs, N, l, parts, swizzled)
        return none

    e.fold(e.c(-(-each // together)), [], step)


def store(refs: tuple[Any, ...], sums: Any, dims: Dims, plan: tuple[int, ...], place: tuple[Any, ...]) -> None:
    """One warpgroup: the sums [64, N] of a block's part of a tile. Where that is all of it, to the output; else to `parts`, and
    the warp that comes last adds those of all blocks. refs: parts, counters, out, residual if any. plan: stages of a tile, of
    all, and blocks. place: block, tile, which half of its columns."""
    plgpu = mosaic.plgpu()
    steps, total, blocks = plan
    N = dims.N
    at_once = max(2, 64 // N)  # parts that are asked for together

    @persistent.inline([plgpu.Layout.WGMMA] + ["ref"] * len(refs) + ["i32"] * 3)
    def run(e: Emitter, sums, parts, counts, out, *more):  # type: ignore[no-untyped-def]
        *residual, b, tile, half = more
        mine = [x for pair in e.unpack(sums) for x in pair]

        def part(block, i):  # type: ignore[no-untyped-def]
            """Where a block leaves four numbers of each thread: of the tile that it did not begin, or of another."""
            begun = e.cmp("ne", e.div(e.div(e.mul(block, total), blocks), steps), tile)
            at = e.add(e.mul(e.add(e.mul(block, 2), e.select(begun, 1, 0)), 2), half)
            return e.ptr(parts, e.add(e.mul(e.add(e.mul(at, N // 8), i), 512), e.mul(e.thread, 4)), 4)

        def owner(stage):  # type: ignore[no-untyped-def]
            return e.div(e.sub(e.mul(e.add(stage, 1), blocks), 1), total)

        first, last = owner(e.mul(tile, steps)), owner(e.sub(e.mul(e.add(tile, 1), steps), 1))
        count = e.add(e.sub(last, first), 1)
        shared = e.cmp("ult", 1, count)
        with e.when(shared):
            for i in range(N // 8):
                e.ptx("st.global.v4.f32 [$0], {$1, $2, $3, $4};", part(b, i), *mine[4 * i : 4 * i + 4])
        counter = e.ptr(counts, e.add(e.mul(e.add(e.mul(tile, 2), half), 4), e.warp), 4)
        # Who has all of a tile counts nothing, and finds none before it.
        whole = e.cmp("eq", e.count(counter, shared), e.sub(count, 1))
        with e.when(e.both(e.both(whole, shared), e.cmp("eq", e.lane, 0))):
            e.ptx("st.global.b32 [$0], $1;", counter, e.c(0))

        def add(j, state):  # type: ignore[no-untyped-def]
            found = []
            for k in range(at_once):
                i = e.add(e.mul(j, at_once), k)
                there = e.cmp("ult", i, count)
                block = e.add(first, e.select(there, i, 0))
                found.append((there, [x for k in range(N // 8) for x in e.load_fresh(part(block, k))]))
            for there, theirs in found:
                state = [e.fadd(a, e.select(there, c, 0.0)) for a, c in zip(state, theirs, strict=True)]
            return state

        rounds = e.div(e.add(count, at_once - 1), at_once)
        begin = [e.select(shared, 0.0, x) for x in mine]
        state = e.fold(e.select(e.both(shared, whole), rounds, 0), begin, add)
        odd = e.cmp("ne", e.rem(e.div(e.lane, 4), 2), 0)
        columns = e.add(e.mul(e.add(e.mul(tile, 2), half), 64), e.mul(e.warp, 16), e.mul(e.div(e.lane, 8), 2))
        row = e.add(e.mul(e.rem(e.lane, 4), 2), e.select(odd, 1, 0))
        for i in range(N // 8):
            for eight in range(2):
                a, c = state[4 * i + 2 * eight : 4 * i + 2 * eight + 2]
                # Lanes 4 apart have neighbouring columns of two rows: they exchange, so that each has two columns of one.
                other = e.shuffle(e.select(odd, a, c), 4)
                values = e.select(odd, other, a), e.select(odd, c, other)
                n, column = e.add(row, 8 * i), e.add(columns, 8 * eight)
                with e.when(e.both(whole, e.cmp("ult", n, dims.B))):
                    write(e, out, residual, dims, n, column, values)

    run(sums, *refs, *place)


def write(e: Emitter, out: Any, residual: list[Any], dims: Dims, n: Any, column: Any, values: tuple[Any, Any]) -> None:
    """A thread: two neighbouring columns of a row of the output."""
    at = e.add(e.mul(n, dims.O), column)
    if residual:
        old = e.halves(e.load_32(e.ptr(residual[0], at, 2))[0])
        values = e.fadd(values[0], old[0]), e.fadd(values[1], old[1])
    if dims.silu:
        h, at = e.silu_up(*values), e.div(at, 2)
        if dims.out_dtype == jnp.float32:
            e.ptx("st.global.f32 [$0], $1;", e.ptr(out, at, 4), h)
        else:
            e.store_16(e.ptr(out, at, 2), e.narrow(h))
    elif dims.out_dtype == jnp.float32:
        e.ptx("st.global.v2.f32 [$0], {$1, $2};", e.ptr(out, at, 4), *values)
    else:
        e.ptx("st.global.b32 [$0], $1;", e.ptr(out, at, 2), e.pair(*values))


def shared_memory_bytes(N: int, config: Config) -> int:
    """What a block of the kernel allocates."""
    units = config.stages * config.units
    return persistent.shared_bytes([units * size for size in (COLUMNS * GROUP, N * GROUP * 2, COLUMNS * 2, N * 4)])


def multiprocessors() -> int:
    """Of this device; of an H200 where there is none."""
    device = jax.devices()[0]
    return device.core_count if device.platform == "gpu" else 132  # type: ignore[no-any-return]


def stage_units(B: int, I: int, O: int, blocks: int) -> int:  # noqa: E741
    """Units of a stage where nothing is tuned: four, or two with more than 16 rows, as was best where stages are many (README);
    fewer where they are so few that some blocks would have one more than others for long."""
    pieces = I // GROUP

    def busy(units: int) -> float:
        stages = O // COLUMNS * pieces // units
        return stages / (-(-stages // blocks) * blocks)

    allowed = [units for units in (4, 2, 1) if units <= (4 if B <= 16 else 2) and pieces % units == 0]
    return next((units for units in allowed if busy(units) >= 0.9), max(allowed, key=busy))


def default_config(B: int, I: int, O: int, device: str | None = None) -> Config:  # noqa: E741
    """The tuned config of this device, else one by `stage_units`; what does not fit is made smaller."""
    found = tuning.lookup("linear_int8", device, rows=B, inputs=I, columns=O) or {}
    N, blocks = rows(B), found.get("blocks", multiprocessors())
    units = found.get("units") or stage_units(B, I, O, blocks)
    while I // GROUP % units:
        units //= 2
    config = Config(blocks, units, found.get("stages", 12))
    while shared_memory_bytes(N, config) > SHARED_MEMORY:
        config = dataclasses.replace(config, stages=config.stages - 1)
    return config


def search_space(B: int, I: int, O: int) -> list[Config]:  # noqa: E741
    """Every config worth measuring that fits: for each stage, as many as there is room for."""
    configs, N = [], rows(B)
    for units in (1, 2, 4):
        if I // GROUP % units or units * N > 128:  # the products' int32 sums are in registers
            continue
        fitting = [Config(multiprocessors(), units, S) for S in range(12, 1, -1)]
        configs += [config for config in fitting if shared_memory_bytes(N, config) <= SHARED_MEMORY][:1]
    return configs


def product(
    x_NI: jax.Array,
    weight: tuple[jax.Array, jax.Array],
    *,
    residual_NO: jax.Array | None = None,
    silu: bool = False,
    out_dtype: Any = None,
    config: Config | None = None,
) -> jax.Array:
    """x times a weight, by the kernel; what linear.linear takes and has checked. Raises ValueError for a config that does not
    divide the weight, or whose stages do not fit."""
    tiles, scales = weight
    B, I = x_NI.shape  # noqa: E741
    O = tiles.shape[0] * COLUMNS  # noqa: E741
    dims = Dims(B, I, O, residual_NO is not None, silu, jnp.dtype(out_dtype or x_NI.dtype))
    config = config or default_config(B, I, O)
    if dims.pieces % config.units:
        raise ValueError(f"{config}: {dims.pieces} units of 128 rows must be divisible by units")
    if (needed := shared_memory_bytes(dims.N, config)) > SHARED_MEMORY:
        raise ValueError(f"{config}: {B} rows need {needed} bytes of shared memory, and a block may have {SHARED_MEMORY}")
    x = (jnp.pad(x_NI, ((0, dims.N - B), (0, 0))),) if dims.converts else planes(B, dims.N, I)(x_NI)
    out: jax.Array = kernel(dims, config)(tiles, scales, *([] if residual_NO is None else [residual_NO]), *x)
    return out
