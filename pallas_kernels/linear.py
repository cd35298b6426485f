"""Product of a few rows with a large weight, in bf16 or int8 (W8A16), for Hopper GPUs.

    x_NI          bf16          1 to 64 rows
    weight        bf16 [I, O]   input-major, or a pair (tiles, scales):
      tiles       int8 [O/128, I/128, 128, 128]   `persistent.tile_int8`: a unit of 128 × 128 is 16 KB in one piece
      scales      bf16 [O/128, I/128, 128]        symmetric, one for 128 rows of a column
    residual_NO   bf16          added to the product, or None
    → out_NO      bf16 or f32;  with silu=True out_Nf, f = O/2: silu(gate)·up of columns 2f and 2f+1

I and O are multiples of 128. What bounds it: reading the weight once: 235 MB (int8: 119 with its scales), 53 (27) µs for
Llama-3-8B's gate and up. An int8 product is linear_int8.py's kernel. The one here is for bf16, and for the best column of each
row of an int8 product that is not written (lm_head.py).

A cluster of blocks takes `tiles` tiles of 128 columns, one after another; each of its blocks has its own part of the reduced
axis. One warpgroup keeps a ring of shared memory full of weights, `units`·128 rows a stage; `splits` pairs of others multiply
in turn: weights are wgmma's left side, the rows of x its narrow right side. int8 is widened to bf16 in registers, exactly; a
group's product is scaled in float32. Sums go to the shared memory of the block that finishes those 64 columns, and are added
there in a fixed order.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import linear_int8, mosaic, persistent, tuning
from pallas_kernels.argmax import NO_ID, among, argmax_of_rows, better
from pallas_kernels.linear_int8 import COLUMNS, GROUP, SHARED_MEMORY
from pallas_kernels.persistent import Emitter

MAX_ROWS = 64
MULTIPROCESSORS = 132
IMPLEMENTATIONS = ("mosaic", "reference")

Weight = Any  # bf16 [I, O], or (int8 tiles, bf16 scales)


@dataclasses.dataclass(frozen=True)
class Config:
    """cluster: blocks that share the reduced axis; tiles: of a cluster, one after another; units: of 128 rows in a stage;
    stages: in the ring; splits: pairs of warpgroups that take stages in turn."""

    cluster: int = 1
    tiles: int = 1
    units: int = 1
    stages: int = 8
    splits: int = 1

    def __post_init__(self) -> None:
        for field, allowed in (("cluster", (1, 2, 4, 8)), ("units", (1, 2, 4)), ("splits", (1, 2))):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field}={getattr(self, field)!r}: allowed are {allowed}")
        if self.tiles < 1:
            raise ValueError(f"tiles={self.tiles}: it must be at least 1")
        if not 1 <= self.stages <= 32 or self.stages % self.splits:
            raise ValueError(f"stages={self.stages}: it must be a multiple of splits={self.splits}, at most 32")


def plain(weight: Weight, dtype: Any = jnp.bfloat16) -> jax.Array:
    """A weight as [I, O], whichever kind it is."""
    if not isinstance(weight, tuple):
        return weight
    tiles, scales = weight
    values_IO = persistent.untile_int8(tiles).astype(jnp.float32)
    scales_gO = scales.swapaxes(0, 1).reshape(scales.shape[1], -1).astype(jnp.float32)
    g, O = scales_gO.shape  # noqa: E741
    return (values_IO.reshape(g, GROUP, O) * scales_gO[:, None]).reshape(g * GROUP, O).astype(dtype)


def _epilogue(out_NO: jax.Array, residual_NO: jax.Array | None, silu: bool, out_dtype: Any) -> jax.Array:
    if residual_NO is not None:
        out_NO = out_NO + residual_NO.astype(jnp.float32)
    if silu:
        out_NO = jax.nn.silu(out_NO[:, 0::2]) * out_NO[:, 1::2]
    return out_NO.astype(out_dtype)


def reference(
    x_NI: jax.Array, weight: Weight, *, residual_NO: jax.Array | None = None, silu: bool = False, out_dtype: Any = None
) -> jax.Array:
    """The same in plain jnp: an int8 weight is dequantized to x's dtype first."""
    out_NO = jnp.dot(x_NI, plain(weight, x_NI.dtype), preferred_element_type=jnp.float32)
    return _epilogue(out_NO, residual_NO, silu, out_dtype or x_NI.dtype)


def _unit_in_interpret(raw: jax.Array) -> jax.Array:
    """A unit of int8 as it is stored → [128 columns, 128 rows], in bf16."""
    return persistent.untile_int8(raw[None, None]).T.astype(jnp.bfloat16)


@functools.lru_cache(maxsize=256)
def _kernel(
    B: int,
    I: int,  # noqa: E741
    O: int,  # noqa: E741
    int8: bool,
    residual: bool,
    silu: bool,
    out_dtype: Any,
    config: Config,
    interpret: Any = None,
) -> Any:
    """The Mosaic GPU kernel: (x of whole blocks of 8 rows, bf16 weight, residual if any) → out. Of an int8 weight (x, tiles,
    scales, valid [1]) → (values, ids) [lists, 1, rows], the best column of each of `lists` parts, below `valid` ones; of one
    block to a cluster and one pair of warpgroups, which then has a tile's whole sums and keeps the best as tiles go by."""
    from jax.experimental import pallas as pl

    plgpu = mosaic.plgpu()
    C, T, U, S, R = config.cluster, config.tiles, config.units, config.stages, config.splits
    N, W = padded_rows(B), 2 * config.splits
    tiles, steps = O // COLUMNS, I // GROUP // U
    X = resident_pieces(I, N, config, int8)
    bf16, f32 = jnp.bfloat16, jnp.float32
    owned = -(-2 * T // C)  # pieces of 64 columns that a block finishes

    def body(x, *refs, wbuf, sbuf, xbuf, ends, full, empty, xfull, done):  # type: ignore[no-untyped-def]
        weight, out = refs[: 1 + int8], refs[-1]
        part: Any = None if int8 else ends[0]
        w = lax.axis_index("w")
        c = lax.axis_index("c") if C > 1 else jnp.int32(0)
        tile0 = lax.axis_index("g") * T
        count = T if tiles % T == 0 else jnp.minimum(T, tiles - tile0)
        first = lax.div(c * steps, C)
        n = lax.div((c + 1) * steps, C) - first

        @pl.when(w == W)
        def _producer():  # type: ignore[no-untyped-def]
            if int8:
                plgpu.set_max_registers(40, action="decrease")

            def tile(j, at):  # type: ignore[no-untyped-def]
                def stage(i, at):  # type: ignore[no-untyped-def]
                    slot = lax.rem(at, S)

                    @pl.when(at >= S)
                    def _():  # type: ignore[no-untyped-def]
                        plgpu.barrier_wait(empty.at[slot])

                    if int8:
                        here = pl.ds((first + i) * U, U)
                        plgpu.copy_gmem_to_smem(weight[0].at[tile0 + j, here], wbuf.at[slot], full.at[slot])
                        plgpu.copy_gmem_to_smem(weight[1].at[tile0 + j, here], sbuf.at[slot], full.at[slot])
                    else:
                        rows, columns = pl.ds((first + i) * U * GROUP, U * GROUP), pl.ds((tile0 + j) * COLUMNS, COLUMNS)
                        plgpu.copy_gmem_to_smem(weight[0].at[rows, columns], wbuf.at[slot], full.at[slot])
                    x_rows = x.at[:, pl.ds((first + i) * U * GROUP, U * GROUP)]
                    if X:
                        pl.when(j == 0)(lambda: plgpu.copy_gmem_to_smem(x_rows, xbuf.at[i], xfull.at[i]))
                    else:
                        plgpu.copy_gmem_to_smem(x_rows, xbuf.at[slot], full.at[slot])
                    return at + 1

                return lax.fori_loop(0, n, stage, at)

            sent = lax.fori_loop(0, count, tile, jnp.int32(0))

            @pl.loop(jnp.maximum(sent - S, 0), sent)  # leave no barrier with an arrival that nobody saw
            def _(at):  # type: ignore[no-untyped-def]
                plgpu.barrier_wait(empty.at[lax.rem(at, S)])

        @pl.when(w < W)
        def _consumers():  # type: ignore[no-untyped-def]
            if int8:  # a best value, its id and a sum for each place; no more in all than the block begins with, 168 a thread
                plgpu.set_max_registers(232, action="increase")
            half, turn = lax.rem(w, 2), lax.div(w, 2)

            def x_of(piece, u):  # type: ignore[no-untyped-def]
                return xbuf.at[piece, :, pl.ds(u * GROUP, GROUP)] if U > 1 else xbuf.at[piece]

            def scales_of(slot, u):  # type: ignore[no-untyped-def]
                scale = sbuf.at[slot, u, pl.ds(half * 64, 64)]
                scale = plgpu.load(scale, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False).astype(f32)
                return lax.broadcast_in_dim(scale, (64, N), [0])

            def groups(slot, piece, total):  # type: ignore[no-untyped-def]
                def multiply(*accs):  # type: ignore[no-untyped-def]
                    # A group is widened while the product of the one before runs.
                    scales = []
                    for u, acc in enumerate(accs):
                        scales.append(scales_of(slot, u))
                        plgpu.wgmma(acc, persistent.widen_int8(wbuf, slot * U + u, half), x_of(piece, u).T)
                    return [
                        plgpu.wgmma_accumulator_load(acc, wait_n=U - 1 - u) * scale
                        for u, (acc, scale) in enumerate(zip(accs, scales, strict=True))
                    ]

                return functools.reduce(jnp.add, pl.run_scoped(multiply, *(plgpu.ACC((64, N), f32) for _ in range(U))), total)

            def groups_in_interpret(slot, piece, total):  # type: ignore[no-untyped-def]
                for u in range(U):
                    weights = lax.dynamic_slice_in_dim(_unit_in_interpret(wbuf[slot, u]), half * 64, 64)
                    product = jnp.dot(weights, x_of(piece, u)[...].T, preferred_element_type=f32)
                    total += product * scales_of(slot, u)
                return total

            def tile(j, carry):  # type: ignore[no-untyped-def]
                at, best = carry
                before = lax.rem(turn + (R - lax.rem(at, R)), R)  # stages until this pair's turn

                # With an odd number of stages to a tile, turns fall otherwise in the second one.
                unseen = (j == 0) | ((j == 1) & (lax.rem(n, 2) == 1)) if R == 2 else j == 0

                def ready(i):  # type: ignore[no-untyped-def]
                    slot = lax.rem(at + i, S)
                    if X:
                        pl.when(unseen)(lambda: plgpu.barrier_wait(xfull.at[i]))
                    plgpu.barrier_wait(full.at[slot])
                    return slot, i if X else slot

                def steps_of(take, init):  # type: ignore[no-untyped-def]
                    return lax.fori_loop(
                        0, lax.div(n - before + (R - 1), R), lambda k, total: take(before + k * R, total), init
                    )

                if int8:

                    def take(i, total):  # type: ignore[no-untyped-def]
                        slot, piece = ready(i)
                        if interpret is None:
                            total = groups(slot, piece, total)
                            persistent.finish(total)  # the unit's scales are loaded
                        else:
                            total = groups_in_interpret(slot, piece, total)
                        plgpu.barrier_arrive(empty.at[slot])
                        return total

                    zero = plgpu.layout_cast(jnp.zeros((64, N), f32), plgpu.Layout.WGMMA)
                    total = steps_of(take, zero)
                else:

                    def accumulate(acc):  # type: ignore[no-untyped-def]
                        def take(i, _):  # type: ignore[no-untyped-def]
                            slot, piece = ready(i)
                            plgpu.wgmma(acc, wbuf.at[slot, :, pl.ds(half * 64, 64)].T, xbuf.at[piece].T)
                            plgpu.wgmma_wait(0)
                            plgpu.barrier_arrive(empty.at[slot])
                            return _

                        steps_of(take, jnp.int32(0))
                        return acc[...]

                    total = pl.run_scoped(accumulate, plgpu.ACC((64, N), f32))
                if int8:
                    id = plgpu.broadcasted_iota(jnp.int32, (64, N), 0, layout=plgpu.Layout.WGMMA)
                    id += (tile0 + j) * COLUMNS + half * 64
                    return at + n, better(among(total, id, id < valid), best)
                piece = 2 * j + half
                place = part.at[lax.div(piece, C), c * R + turn]
                if C > 1:
                    place = plgpu.cluster_ref(place, {"c": lax.rem(piece, C)})
                mosaic.store(place, total)
                return at + n, best

            best = valid = None
            if int8:
                valid = refs[1 + int8][0]
                lowest = plgpu.layout_cast(jnp.full((64, N), -jnp.inf, f32), plgpu.Layout.WGMMA)
                best = lowest, plgpu.layout_cast(jnp.full((64, N), NO_ID, jnp.int32), plgpu.Layout.WGMMA)
            _, best = lax.fori_loop(0, count, tile, (jnp.int32(0), best))
            if int8:
                values, ids = refs[2 + int8 :]
                vbuf, ibuf, *scratch = ends
                vbuf[w, 0], ibuf[w, 0] = argmax_of_rows([best[0]], [best[1]], [s.at[w] for s in scratch], interpret)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(vbuf.at[w], values.at[lax.axis_index("g") * W + w])
                plgpu.copy_smem_to_gmem(ibuf.at[w], ids.at[lax.axis_index("g") * W + w])
                plgpu.wait_smem_to_gmem(0)
            elif C == 1:
                plgpu.barrier_arrive(done)
                plgpu.barrier_wait(done)

        if C > 1:
            mosaic.cluster_sync()

        def finish():  # type: ignore[no-untyped-def]
            @pl.loop(w, owned, step=W)
            def _(m):  # type: ignore[no-untyped-def]
                piece = m * C + c

                @pl.when(lax.div(piece, 2) < count)
                def _():  # type: ignore[no-untyped-def]
                    column = tile0 * COLUMNS + piece * 64
                    if interpret is None:
                        _store(part, refs[1 + int8] if residual else None, out, m, column, (B, N, O, C * R, silu, out_dtype))
                    else:
                        total = functools.reduce(jnp.add, [part[m, s] for s in range(C * R)]).T[:B]
                        old = refs[1 + int8][:, pl.ds(column, 64)] if residual else None
                        at, size = (lax.div(column, 2), 32) if silu else (column, 64)
                        out[:, pl.ds(at, size)] = _epilogue(total, old, silu, out_dtype)

        if not int8:
            pl.when(w < W)(finish)

    body.__name__ = f"{'argmax_int8' if int8 else 'linear_bf16'}_{I}x{O}_n{N}"
    swizzled = persistent.swizzled()
    cluster: dict[str, Any] = dict(cluster=(C,), cluster_names=("c",)) if C > 1 else {}
    clusters = -(-tiles // T)
    out_type: Any = jax.ShapeDtypeStruct((B, O // 2 if silu else O), out_dtype)
    ends = [plgpu.SMEM((owned, C * R, 64, N), f32)]
    if int8:
        out_type = [jax.ShapeDtypeStruct((clusters * W, 1, N), dtype) for dtype in (f32, jnp.int32)]
        ends = [plgpu.SMEM((W, *shape), dtype) for shape in ((1, N), (mosaic.scratch_words(N),)) for dtype in (f32, jnp.int32)]
    kernel = plgpu.kernel(
        body,
        out_type=out_type,
        grid=(clusters,),
        grid_names=("g",),
        **cluster,
        num_threads=W + 1,
        thread_name="w",
        scratch_types=dict(
            wbuf=plgpu.SMEM((S, U, COLUMNS, GROUP), jnp.int8)
            if int8
            else plgpu.SMEM((S, U * GROUP, COLUMNS), bf16, transforms=swizzled),
            sbuf=plgpu.SMEM((S, U, COLUMNS) if int8 else (8,), bf16),
            xbuf=plgpu.SMEM((X or S, N, U * GROUP), bf16, transforms=swizzled),
            ends=ends,
            full=plgpu.Barrier(num_arrivals=1 + int8 + (not X), num_barriers=S),
            empty=plgpu.Barrier(num_arrivals=2, num_barriers=S),
            xfull=plgpu.Barrier(num_barriers=X or 1),
            done=plgpu.Barrier(num_arrivals=W),
        ),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
        interpret=interpret,
    )
    return jax.jit(kernel)  # lowered once in a program, however many layers call it


def _store(part: Any, residual: Any, out: Any, m: Any, column: Any, dims: tuple[Any, ...]) -> None:
    """One warpgroup: 64 columns of the output, two at a time, from the sums of all who had a part of them."""
    B, N, O, sources, silu, out_dtype = dims  # noqa: E741

    @persistent.inline(["ref"] * (2 + (residual is not None)) + ["i32"] * 2)
    def run(e: Emitter, part, *rest):  # type: ignore[no-untyped-def]
        *old, out, m, column = rest
        for start in range(0, 32 * N, 128):
            i = e.add(e.thread, start)
            n, pair = e.rem(i, N), e.mul(e.div(i, N), 2)
            a, b = e.c(0.0), e.c(0.0)
            for s in range(sources):
                at = e.add(e.mul(e.add(e.mul(e.add(e.mul(m, sources), s), 64), pair), N), n)
                a = e.fadd(a, e.ptx("ld.shared.f32 $0, [$1];", e.ptr(part, at, 4), result=e.f32))
                b = e.fadd(b, e.ptx("ld.shared.f32 $0, [$1];", e.ptr(part, e.add(at, N), 4), result=e.f32))
            with e.when(e.cmp("ult", n, B)):
                at = e.add(e.mul(n, O), column, pair)
                if old:
                    a = e.fadd(a, e.load_bf16(e.ptr(old[0], at, 2)))
                    b = e.fadd(b, e.load_bf16(e.ptr(old[0], e.add(at, 1), 2)))
                if silu:
                    a, at = e.silu_up(a, b), e.div(at, 2)
                if out_dtype == jnp.float32:
                    values = [a] if silu else [a, b]
                    for k, value in enumerate(values):
                        e.ptx("st.global.f32 [$0], $1;", e.ptr(out, e.add(at, k), 4), value)
                elif silu:
                    e.store_16(e.ptr(out, at, 2), e.narrow(a))
                else:
                    low, high = (e.m.arith.extui(e.i32, e.narrow(value)) for value in (a, b))
                    both = e.m.arith.ori(low, e.m.arith.shli(high, e.c(16)))
                    e.ptx("st.global.b32 [$0], $1;", e.ptr(out, at, 2), both)

    run(part, *([] if residual is None else [residual]), out, m, column)


def padded_rows(B: int) -> int:
    """wgmma's narrow side is a multiple of 8."""
    return -(-B // 8) * 8


def resident_pieces(I: int, N: int, config: Config, int8: bool) -> int:  # noqa: E741
    """Pieces of x that a block keeps for all its tiles; 0 where it reads them with the weights, because it has one tile
    only, or more pieces than there are barriers or shared memory for."""
    pieces = -(-(I // GROUP // config.units) // config.cluster)
    if config.tiles == 1 or pieces > 32:
        return 0
    return pieces if shared_memory_bytes(N, config, int8, pieces) <= SHARED_MEMORY else 0


def fits(I: int, N: int, config: Config, int8: bool) -> bool:  # noqa: E741
    """Whether a block has the shared memory."""
    pieces = resident_pieces(I, N, config, int8)
    return shared_memory_bytes(N, config, int8, pieces) <= SHARED_MEMORY


def shared_memory_bytes(N: int, config: Config, int8: bool, pieces: int) -> int:
    """What a block of the kernel allocates, with so many pieces of x kept (0: a ring of them)."""
    U, S, sources = config.units, config.stages, config.cluster * config.splits
    owned = -(-2 * config.tiles // config.cluster)
    weights = [S * U * COLUMNS * GROUP, S * U * COLUMNS * 2] if int8 else [S * U * COLUMNS * GROUP * 2, 16]
    sums = [2 * 4 * words for words in (N, N, *2 * [mosaic.scratch_words(N)])] if int8 else [owned * sources * 64 * N * 4]
    return persistent.shared_bytes([*weights, (pieces or S) * N * U * GROUP * 2, *sums])


Operand = jax.Array | jax.ShapeDtypeStruct


def size(weight: Any) -> tuple[int, int]:
    """[in, out] of either kind of weight. Raises ValueError where scales are not those of their tiles."""
    if not isinstance(weight, tuple):
        return weight.shape  # type: ignore[no-any-return]
    if weight[0].ndim != 4 or weight[0].shape[2:] != (COLUMNS, GROUP):
        raise ValueError(f"tiles {weight[0].shape}: they must be [O/128, I/128, 128, 128]; persistent.tile_int8 makes them")
    if weight[1].shape != weight[0].shape[:3]:
        raise ValueError(f"tiles {weight[0].shape} and scales {weight[1].shape}: scales must be {weight[0].shape[:3]}")
    tiles, units, columns, rows = weight[0].shape
    return units * rows, tiles * columns


def why_unsupported(x_NI: Operand, weight: Any, interpret: Any = None) -> str | None:
    """Why the Mosaic kernel cannot take these operands (arrays, or their shapes) here, or None where it can."""
    if why := tuning.why_no_mosaic(interpret):
        return why
    if not 1 <= x_NI.shape[0] <= MAX_ROWS:
        return f"{x_NI.shape[0]} rows: 1 to {MAX_ROWS} are supported"
    dtypes = [x.dtype for x in (weight if isinstance(weight, tuple) else (weight,))]
    if x_NI.dtype != jnp.bfloat16 or dtypes not in ([jnp.bfloat16], [jnp.int8, jnp.bfloat16]):
        return f"x is {x_NI.dtype}, the weight {', '.join(map(str, dtypes))}: x must be bfloat16, the weight bfloat16 or int8"
    I, O = size(weight)  # noqa: E741
    if I % GROUP or O % COLUMNS or not I or not O:
        return f"a weight of {I} × {O}: multiples of 128 are supported"
    return None


def spread(tiles: int, steps: int) -> tuple[int, int]:
    """(cluster, tiles of a cluster) where nothing is tuned: the smallest cluster of those that leave the fewest blocks idle, on
    paper. Measured, clusters of four and eight are slower than this counts (README)."""

    def busy(C: int) -> float:
        return tiles * C / (tiles_each(tiles, C) * -(-MULTIPROCESSORS // C) * C)

    C = max((C for C in (1, 2, 4, 8) if steps >= C), key=lambda C: round(busy(C), 2))
    return C, tiles_each(tiles, C)


def tiles_each(tiles: int, cluster: int) -> int:
    """Tiles of a cluster when all run at once. Clusters of four and more leave the odd multiprocessors of a GPC out."""
    return -(-tiles // (MULTIPROCESSORS // cluster if cluster <= 2 else 128 // cluster))


def default_config(B: int, I: int, O: int, int8: bool, device: str | None = None) -> Config:  # noqa: E741
    """The tuned config of this device, else one by `spread`; what does not fit is made smaller. int8: for the best columns."""
    found = dict(tuning.lookup("lm_head_int8" if int8 else "linear_bf16", device, rows=B, inputs=I, columns=O) or {})
    found |= {"cluster": 1, "splits": 1} if int8 else {}
    N, units, splits, stages = padded_rows(B), found.get("units", 1), found.get("splits", 1), found.get("stages", 8)
    while I // GROUP % units:
        units //= 2
    C, T = spread(O // COLUMNS, I // GROUP // units)
    if found.get("cluster", C) <= I // GROUP // units:
        C = found.get("cluster", C)
        T = found.get("tiles") or tiles_each(O // COLUMNS, C)
    if not (int8 or found.get("tiles")):
        T = min(T, max(1, 64 * 1024 // (COLUMNS * N * 4 * splits)))  # for their sums
    config = Config(C, T, units, stages // splits * splits, splits)
    while not fits(I, N, config, int8):
        if config.stages > config.splits:
            config = dataclasses.replace(config, stages=config.stages - config.splits)
        elif config.units > 1:
            config = dataclasses.replace(config, stages=8, units=config.units // 2)
        else:
            config = dataclasses.replace(config, stages=8, splits=1, tiles=1)
    if int8 and "stages" not in found:  # as many as there is room for beside all of x, if that leaves four
        fewer = [dataclasses.replace(config, stages=stages) for stages in range(config.stages, 3, -1)]
        config = next((each for each in fewer if resident_pieces(I, N, each, int8)), config)
    return config


def _check_config(config: Config, I: int) -> None:  # noqa: E741
    if I // GROUP % config.units or I // GROUP // config.units < config.cluster:
        raise ValueError(f"{config}: {I // GROUP} units of 128 rows must be divisible by units, and give each block one stage")


def linear(
    x_NI: jax.Array,
    weight: Weight,
    *,
    residual_NO: jax.Array | None = None,
    silu: bool = False,
    out_dtype: Any = None,
    config: Config | linear_int8.Config | None = None,
    implementation: str | None = None,
    interpret: Any = None,
) -> jax.Array:
    """x times a weight; shapes and meaning as in the module's docstring.

    out_dtype: x's dtype by default, or float32. implementation: "mosaic", "reference", or None for the kernel where the
    weight is int8 and it supports device, dtypes and shapes, else the reference: in bf16 XLA was faster (README). interpret:
    plgpu.InterpretGPUParams() simulates the bf16 kernel on the CPU (with implementation="mosaic"). Raises ValueError for an
    unknown implementation, for shapes and dtypes that do not fit together, for residual and silu together, for a config of
    another kernel, and where "mosaic" is named and not supported: it never falls back silently.
    """
    I, O = size(weight)  # noqa: E741
    out_dtype = jnp.dtype(out_dtype or x_NI.dtype)
    if x_NI.ndim != 2 or x_NI.shape[1] != I:
        raise ValueError(f"x {x_NI.shape} and weight [{I}, {O}]: x must be [N, I={I}]")
    if residual_NO is not None and (silu or residual_NO.shape != (len(x_NI), O) or residual_NO.dtype != x_NI.dtype):
        of_residual = f"residual {residual_NO.shape} {residual_NO.dtype}, silu={silu}"
        raise ValueError(f"{of_residual}: it must be [{len(x_NI)}, {O}] {x_NI.dtype}, without silu")
    if out_dtype not in (x_NI.dtype, jnp.float32):
        raise ValueError(f"out_dtype={out_dtype}: allowed are {x_NI.dtype} and float32")
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation={implementation!r}: allowed are {IMPLEMENTATIONS} and None")
    if config is not None and not isinstance(config, kind := linear_int8.Config if isinstance(weight, tuple) else Config):
        raise ValueError(f"config={config!r}: of such a weight it must be a {kind.__module__}.Config")
    why = why_unsupported(x_NI, weight, interpret) if implementation != "reference" else None
    if isinstance(weight, tuple) and interpret is not None:
        why = "the simulator knows no int8 product"
    if implementation == "mosaic" and why:
        raise tuning.Unsupported("linear", why)
    if implementation == "reference" or why or (implementation is None and not isinstance(weight, tuple)):
        return reference(x_NI, weight, residual_NO=residual_NO, silu=silu, out_dtype=out_dtype)

    if isinstance(weight, tuple):
        return linear_int8.product(x_NI, weight, residual_NO=residual_NO, silu=silu, out_dtype=out_dtype, config=config)  # type: ignore[arg-type]
    B, config = len(x_NI), config or default_config(len(x_NI), I, O, False)
    _check_config(config, I)  # type: ignore[arg-type]
    x_NI = jnp.pad(x_NI, ((0, padded_rows(B) - B), (0, 0)))
    run = _kernel(B, I, O, False, residual_NO is not None, silu, out_dtype, config, interpret)  # type: ignore[arg-type]
    out: jax.Array = run(x_NI, weight, *([] if residual_NO is None else [residual_NO]))
    return out


def argmax_kernel(B: int, I: int, O: int, config: Config | None = None, interpret: Any = None) -> Any:  # noqa: E741
    """The kernel for an int8 weight that writes no product, but each row's best column: see `_kernel`. For lm_head.py.
    Raises ValueError for a config that does not divide the weight, or shares a column's sum."""
    config = config or default_config(B, I, O, True)
    _check_config(config, I)
    if config.cluster > 1 or config.splits > 1:
        raise ValueError(f"{config}: the maximum is taken of whole sums; cluster=1 and splits=1 are allowed")
    return _kernel(B, I, O, True, False, False, jnp.dtype(jnp.float32), config, interpret)


def search_space(B: int, I: int, O: int, int8: bool) -> list[Config]:  # noqa: E741
    """Every config worth measuring that fits: for each cluster, stage and split, as many stages as there is room for; for the
    best columns, `int8`, also as many as there is room for beside all of x."""
    configs: list[Config] = []
    N = padded_rows(B)
    for C, splits in [(1, 1)] if int8 else itertools.product((1, 2, 4, 8), (1, 2)):
        for T, units in itertools.product(sorted({1, tiles_each(O // COLUMNS, C)}), (1, 2, 4)):
            if I // GROUP % units or I // GROUP // units < C:
                continue
            found = [Config(C, T, units, stages, splits) for stages in ((12, 8, 6, 5, 4, 3, 2) if int8 else (12, 8, 6, 4, 2))]
            found = [config for config in found if fits(I, N, config, int8)]
            whole = [config for config in found if resident_pieces(I, N, config, int8)]
            configs += dict.fromkeys([*found[:1], *(whole[:1] if int8 else [])])
    return configs
