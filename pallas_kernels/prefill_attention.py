"""Causal attention of a step's new tokens, sequence after sequence, over a paged KV cache (flash attention), for Hopper GPUs.

    q_TKGH          bf16 or f16   query heads of the step's T tokens, G to a kv head; rope applied, not scaled
    keys_XKPH       as q          pages of keys: page, kv head, position within the page, head dimension
    values_XKPH     as q
    pages_RM        int32         page m of row r holds its positions m·P … m·P + P-1
    offset_R        int32         row r's tokens are the flat ones offset … offset + length - 1: contiguous, offset[0] = 0
    start_R         int32         position of the row's first token of this step: what the cache held before
    length_R        int32         the row's tokens of this step; 0: a padding row
    → out_TKGH      as q          zeros for flat tokens past the last row

Token i of row r stands at position start + i and attends to positions max(0, own - window + 1) … own of its sequence, with
scale H**-0.5; the keys and values of this step are in the pages already. A chunk of a longer prompt is the same call with
start > 0. Pages past a row's tokens, and steps of `tile` positions before its window, are never read; no page-table entry
and no cached number (NaN included) outside the positions that a row's tokens attend to can reach the row. Offsets that fit,
tables wide enough and page ids below X are the caller's to keep.

What bounds it: the tensor cores, 4·H operations a query head and pair of positions (2048 tokens of Llama-3-8B: 34 GFLOP a
layer, 43 µs at 794 TFLOP/s). A block a multiprocessor walks a list of (tile of 64·warpgroups tokens, head) items, longest
first. One warpgroup asks for keys and values, `stages` tiles of `tile` positions ahead and across items; the others take
64 tokens each: scores from shared memory, online softmax in registers, probabilities straight from registers into the second
product. Two such warpgroups take turns, one's softmax under the other's products. Tiles of tokens start at multiples of 8
flat tokens, as the copy engine's swizzled layout needs: up to 7 tokens of the row before are computed again, and not stored.
The method: Dao, "FlashAttention-2", 2023; Shah et al., "FlashAttention-3", 2024.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import mosaic, tuning

ROWS = 64  # query tokens a warpgroup takes: the rows of one wgmma
ALIGN = 8  # flat tokens a tile's start is a multiple of: the rows of a swizzled tile
BLOCKS = 132  # multiprocessors of an H100 or H200: blocks that walk the list
MASKED = -1e30  # a finite stand-in for -inf, so that a query with nothing to attend to yet gives no NaN
IMPLEMENTATIONS = ("mosaic", "reference")
SHARED_MEMORY = 227 * 1024  # bytes a block may have


@dataclasses.dataclass(frozen=True)
class Config:
    """Warpgroups that compute, each 64 tokens of a block; kv positions a step takes; steps in flight."""

    warpgroups: int = 2
    tile: int = 128
    stages: int = 2

    def __post_init__(self) -> None:
        for field, allowed in (("warpgroups", (1, 2, 3)), ("tile", (64, 128)), ("stages", (2, 3, 4))):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field}={getattr(self, field)!r}: allowed are {allowed}")


def reference(
    q_TKGH: jax.Array,
    keys_XKPH: jax.Array,
    values_XKPH: jax.Array,
    pages_RM: jax.Array,
    offset_R: jax.Array,
    start_R: jax.Array,
    length_R: jax.Array,
    *,
    window: int | None = None,
) -> jax.Array:
    """The same in plain jnp: tile by tile of 64 tokens of a row against every page of its table, scores in float32."""
    T, K, G, H = q_TKGH.shape
    R, P = len(offset_R), keys_XKPH.shape[2]
    S, Q = pages_RM.shape[1] * P, min(T, ROWS)
    position_S = jnp.arange(S)
    tiles_R = (length_R + Q - 1) // Q
    end_R = jnp.cumsum(tiles_R)

    def tile(i: jax.Array, out_TKGH: jax.Array) -> jax.Array:
        r = jnp.minimum(jnp.sum(i >= end_R), R - 1)
        index_Q = (i - end_R[r] + tiles_R[r]) * Q + jnp.arange(Q)  # within the row's tokens
        token_Q = jnp.where(index_Q < length_R[r], offset_R[r] + index_Q, T)
        own_Q = start_R[r] + index_Q
        seen_QS = position_S <= own_Q[:, None]
        valid_S = position_S < start_R[r] + length_R[r]
        if window is not None:
            seen_QS &= position_S > own_Q[:, None] - window
            valid_S &= position_S > start_R[r] - window
        keys_KSH, values_KSH = (c[pages_RM[r]].swapaxes(0, 1).reshape(K, S, H) for c in (keys_XKPH, values_XKPH))
        q_KQgH = q_TKGH.at[token_Q].get(mode="clip").swapaxes(0, 1).reshape(K, Q * G, H)
        scores_KQgS = jnp.einsum("KQH,KSH->KQS", q_KQgH, keys_KSH, preferred_element_type=jnp.float32)
        scores_KQgS = jnp.where(jnp.repeat(seen_QS, G, axis=0), scores_KQgS * H**-0.5, MASKED)
        probs_KQgS = jax.nn.softmax(scores_KQgS, axis=-1).astype(q_TKGH.dtype)
        values_KSH = jnp.where(valid_S[:, None], values_KSH, 0)  # 0·NaN is NaN
        new_KQgH = jnp.einsum("KQS,KSH->KQH", probs_KQgS, values_KSH, preferred_element_type=jnp.float32)
        new_QKGH = new_KQgH.reshape(K, Q, G, H).swapaxes(0, 1).astype(out_TKGH.dtype)
        return out_TKGH.at[token_Q].set(new_QKGH, mode="drop")

    return lax.fori_loop(0, end_R[-1], tile, jnp.zeros_like(q_TKGH))


def num_tiles(T: int, R: int, queries: int) -> int:
    """The most tiles of `queries` tokens that R rows and the padding after them can need: each starts up to 7 early."""
    return (T + (ALIGN - 2) * (R + 1)) // queries + R + 1


FIELDS = ("first_token", "row", "low", "high", "shift", "first", "last", "context", "lowest")


def work_list(
    offset_R: jax.Array, start_R: jax.Array, length_R: jax.Array, T: int, queries: int, tile: int, window: int | None
) -> tuple[jax.Array, jax.Array]:
    """The tiles of tokens, most kv steps first: (int32 [num_tiles, FIELDS], int32 [1], the number of them in use).

    A tile is flat tokens first_token … first_token + queries - 1, of which low … high - 1 are its row's; position = token +
    shift; kv steps first … last - 1; the row's positions lowest … context - 1 may be read. Tokens past the last row are one
    more row, without steps.
    """
    R = offset_R.shape[0]
    end = offset_R[-1] + length_R[-1]
    one = lambda x: jnp.reshape(x, (1,)).astype(jnp.int32)  # noqa: E731
    offset = jnp.concatenate([offset_R.astype(jnp.int32), one(end)])
    start = jnp.concatenate([start_R.astype(jnp.int32), one(0)])
    length = jnp.concatenate([length_R.astype(jnp.int32), one(T - end)])
    base = offset // ALIGN * ALIGN
    tiles = jnp.where(length > 0, (offset + length - base + queries - 1) // queries, 0)
    row_ids = jnp.arange(R + 1)
    ends = jnp.sum(jnp.where(row_ids[None] <= row_ids[:, None], tiles[None], 0), axis=1)
    ids = jnp.arange(num_tiles(T, R, queries))
    row = jnp.minimum(jnp.sum(ids[:, None] >= ends[None], axis=1), R)
    live = ids < ends[-1]
    first_token = base[row] + (ids - ends[row] + tiles[row]) * queries
    low = jnp.maximum(first_token, offset[row])
    high = jnp.minimum(first_token + queries, offset[row] + length[row])
    shift = start[row] - offset[row]
    attends = live & (row < R)
    first = jnp.zeros_like(low) if window is None else jnp.maximum(low + shift - window + 1, 0) // tile
    first = jnp.where(attends, first, 0)
    last = jnp.where(attends, (high - 1 + shift) // tile + 1, 0)
    context = start[row] + length[row]
    lowest = jnp.zeros_like(low) if window is None else jnp.maximum(start[row] - window + 1, 0)
    steps = jnp.where(live, last - first, -1)
    before = (steps[None] > steps[:, None]) | ((steps[None] == steps[:, None]) & (ids[None] < ids[:, None]))
    rank = jnp.sum(before, axis=1)
    table = jnp.stack([first_token, row, low, high, shift, first, last, context, lowest], axis=1).astype(jnp.int32)
    chosen = rank[None, :] == ids[:, None]  # [place, tile]
    return jnp.sum(jnp.where(chosen[:, :, None], table[None], 0), axis=1), one(ends[-1])


def _store_rows(x: Any, out: Any, low: Any, high: Any) -> None:
    """Stores rows low … high - 1 of a warpgroup's [64, H] from its registers to device memory; any alignment of rows."""
    from jax._src.lib.mlir import ir
    from jax._src.lib.mlir.dialects import arith, llvm
    from jax.experimental.mosaic.gpu import utils

    plgpu = mosaic.plgpu()

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType(), plgpu.Layout.WG_SPLAT, plgpu.Layout.WG_SPLAT))
    def store(ctx: Any, x: Any, ref: Any, low: Any, high: Any) -> None:
        i32 = ir.IntegerType.get_signless(32)
        low, high = low.registers.flat[0], high.registers.flat[0]
        strides, _ = ir.MemRefType(ref.type).get_strides_and_offset()
        pointer = utils.memref_ptr(ref)
        for (row, column), at in zip(x.layout.thread_idxs(x.shape), np.ndindex(x.registers.shape), strict=True):
            row, column = arith.index_castui(i32, row), arith.index_castui(i32, column)
            inside = arith.andi(arith.cmpi(arith.CmpIPredicate.sge, row, low), arith.cmpi(arith.CmpIPredicate.slt, row, high))
            with utils.when(inside):
                index = arith.addi(arith.muli(row, utils.c(strides[0], i32)), column)
                llvm.store(x.registers[at], utils.getelementptr(pointer, [index], x.mlir_dtype))

    store(x, out, low, high)


@functools.lru_cache(maxsize=256)
def _kernel(
    T: int, K: int, G: int, H: int, P: int, window: int | None, dtype: Any, config: Config, blocks: int, interpret: Any = None
) -> Any:
    """The Mosaic GPU kernel: (q, keys, values, pages, table, count) → out of T tokens; `blocks` walk the list."""
    from jax.experimental import pallas as pl

    plgpu = mosaic.plgpu()

    W, BK, S = config.warpgroups, config.tile, config.stages
    scale = H**-0.5 * math.log2(math.e)
    rows = math.gcd(P, BK)  # positions a copy takes: within one page
    copies = BK // rows

    def body(q, keys, values, pages, table, count, out, *, qbuf, kbuf, vbuf, obuf, pbuf, bars):  # type: ignore[no-untyped-def]
        qfull, kfull, vfull, kfree, vfree, turn = bars
        b, w = lax.axis_index("b"), lax.axis_index("w")
        M = pages.shape[1]
        items = count[0] * (K * G)
        rounds = lax.div(items, blocks)
        # Every other round goes backwards: who had the longest item of one round gets the shortest of the next.
        place = lambda j: jnp.where(lax.rem(j, 2) == 0, b, blocks - 1 - b)  # noqa: E731
        mine = rounds + (place(rounds) < items - rounds * blocks).astype(jnp.int32)

        def item(j):  # type: ignore[no-untyped-def]
            index = j * blocks + place(j)
            at = lax.div(index, K * G)
            head = lax.rem(index, K * G)
            fields = {name: table[at, i] for i, name in enumerate(FIELDS)}
            return fields, lax.div(head, G), lax.rem(head, G)

        def take_turns():  # type: ignore[no-untyped-def]
            if W == 2:
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(turn)

        @pl.when(w == W)
        def _produce():  # type: ignore[no-untyped-def]
            plgpu.set_max_registers(40 if W < 3 else 32, action="decrease")

            def one(j, done):  # type: ignore[no-untyped-def]
                f, k, _ = item(j)

                def step(i, _):  # type: ignore[no-untyped-def]
                    n = done + i - f["first"]
                    slot = lax.rem(n, S)
                    ids = [pages[f["row"], jnp.minimum(lax.div(i * BK + c * rows, P), M - 1)] for c in range(copies)]
                    for src, dst, full, free in ((keys, kbuf, kfull, kfree), (values, vbuf, vfull, vfree)):

                        @pl.when(n >= S)
                        def _wait(free=free):  # type: ignore[no-untyped-def]
                            plgpu.barrier_wait(free.at[slot])

                        for c in range(copies):
                            at = i * BK + c * rows
                            page = ids[0] if c == 0 else jnp.where(at < f["context"], ids[c], ids[0])
                            here = src.at[page, k] if rows == P else src.at[page, k, pl.ds(lax.rem(at, P), rows)]
                            there = dst.at[slot] if copies == 1 else dst.at[slot, pl.ds(c * rows, rows)]
                            plgpu.copy_gmem_to_smem(here, there, full.at[slot])
                    return _

                lax.fori_loop(f["first"], f["last"], step, 0)
                return done + f["last"] - f["first"]

            done = lax.fori_loop(0, mine, one, jnp.int32(0))
            for s in range(S):

                @pl.when(done > s)
                def _drain(s=s):  # type: ignore[no-untyped-def]
                    slot = lax.rem(done - 1 - s, S)
                    plgpu.barrier_wait(kfree.at[slot])
                    plgpu.barrier_wait(vfree.at[slot])

        @pl.when(w < W)
        def _compute():  # type: ignore[no-untyped-def]
            plgpu.set_max_registers({1: 232, 2: 232, 3: 160}[W], action="increase")

            def ask(j):  # type: ignore[no-untyped-def]
                f, k, g = item(j)
                tokens = pl.ds(f["first_token"] + w * ROWS, ROWS)
                half = lax.rem(j, 2) * W + w
                plgpu.copy_gmem_to_smem(q.at[tokens, k, g], qbuf.at[half], qfull.at[half])

            @pl.when(mine > 0)
            def _first():  # type: ignore[no-untyped-def]
                ask(0)

            pl.when(w == 1)(take_turns)

            def one(j, done):  # type: ignore[no-untyped-def]
                f, k, g = item(j)
                half = lax.rem(j, 2) * W + w
                base = f["first_token"] + w * ROWS
                low, high = jnp.maximum(base, f["low"]), jnp.minimum(base + ROWS, f["high"])
                first, last = f["first"], f["last"]
                lowest_query, highest_query = low + f["shift"], high - 1 + f["shift"]
                end = jnp.where(high > low, jnp.minimum(last, lax.div(highest_query, BK) + 1), first)
                plain = first
                if window is not None:
                    plain = jnp.clip(lax.div(jnp.maximum(highest_query - window + BK, 0), BK), first, end)
                edge = jnp.clip(lax.div(lowest_query + 1, BK), plain, end)
                plgpu.barrier_wait(qfull.at[half])

                def step(i, carry, masked):  # type: ignore[no-untyped-def]
                    acc, m, total = carry
                    slot = lax.rem(done + i - first, S)
                    plgpu.barrier_wait(kfull.at[slot])

                    def product(ref):  # type: ignore[no-untyped-def]
                        plgpu.wgmma(ref, qbuf.at[half], kbuf.at[slot].T)
                        take_turns()
                        return ref[...]

                    s = pl.run_scoped(product, plgpu.ACC((ROWS, BK), jnp.float32))
                    plgpu.barrier_arrive(kfree.at[slot])
                    if masked:
                        iota = functools.partial(plgpu.broadcasted_iota, jnp.int32, (ROWS, BK), layout=plgpu.Layout.WGMMA)
                        query, position = iota(0) + (base + f["shift"]), iota(1) + i * BK
                        seen = position <= query
                        if window is not None:
                            seen &= position > query - window
                        s = jnp.where(seen, s, MASKED)
                    new_m = jnp.maximum(m, s.max(axis=1) * scale)
                    alpha = jnp.exp2(m - new_m)
                    p = jnp.exp2(s * scale - lax.broadcast_in_dim(new_m, s.shape, [0]))
                    if masked and window is not None:  # a query may see nothing of its tile's first steps
                        p = jnp.where(seen, p, 0.0)
                    acc *= lax.broadcast_in_dim(alpha, acc.shape, [0])
                    total = total * alpha + p.sum(axis=1)
                    p = p.astype(dtype)
                    if interpret is None:
                        acc, total, new_m, p = lax.optimization_barrier((acc, total, new_m, p))
                    if W == 2:
                        plgpu.barrier_arrive(turn)
                    plgpu.barrier_wait(vfull.at[slot])
                    if masked:
                        # Values outside the row's may be NaN, and 0·NaN is NaN. Every warpgroup writes the same zeros.
                        for r in range(0, BK, ROWS):

                            @pl.when((i * BK + r + ROWS > f["context"]) | (i * BK + r < f["lowest"]))
                            def _zero(r=r):  # type: ignore[no-untyped-def]
                                for h in range(0, H, 64):
                                    part = vbuf.at[slot, pl.ds(r, ROWS), pl.ds(h, 64)]
                                    v = plgpu.load(part, layout=plgpu.Layout.WGMMA)
                                    position = plgpu.broadcasted_iota(jnp.int32, v.shape, 0, layout=plgpu.Layout.WGMMA)
                                    position += i * BK + r
                                    valid = (position < f["context"]) & (position >= f["lowest"])
                                    part[...] = jnp.where(valid, v, jnp.zeros_like(v))
                                plgpu.commit_smem()

                    if W == 2:
                        plgpu.barrier_wait(turn)
                    if interpret is None:
                        acc = pl.run_state(lambda ref: plgpu.wgmma(ref, p, vbuf.at[slot]))(plgpu.ACC.init(acc))
                    else:  # the simulator has neither run_state nor a product with its left side in registers
                        pbuf[w] = p

                        def weighed(ref):  # type: ignore[no-untyped-def]
                            plgpu.wgmma(ref, pbuf.at[w], vbuf.at[slot])
                            return ref[...]

                        acc += pl.run_scoped(weighed, plgpu.ACC((ROWS, H), jnp.float32))
                    plgpu.barrier_arrive(vfree.at[slot])
                    return acc, new_m, total

                by_row = plgpu.Layout.WGMMA.reduce(1)
                carry = (
                    plgpu.layout_cast(jnp.zeros((ROWS, H), jnp.float32), plgpu.Layout.WGMMA),
                    plgpu.layout_cast(jnp.full((ROWS,), MASKED, jnp.float32), by_row),
                    plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), by_row),
                )
                if window is not None:
                    carry = lax.fori_loop(first, plain, functools.partial(step, masked=True), carry)
                carry = lax.fori_loop(plain, edge, functools.partial(step, masked=False), carry)

                @pl.when(j + 1 < mine)
                def _next():  # type: ignore[no-untyped-def]
                    ask(j + 1)  # early enough to arrive under the last steps

                acc, _, total = lax.fori_loop(edge, end, functools.partial(step, masked=True), carry)

                def skip(i, _):  # type: ignore[no-untyped-def]
                    slot = lax.rem(done + i - first, S)
                    plgpu.barrier_wait(kfull.at[slot])
                    plgpu.barrier_arrive(kfree.at[slot])
                    take_turns()
                    plgpu.barrier_wait(vfull.at[slot])
                    plgpu.barrier_arrive(vfree.at[slot])
                    take_turns()
                    return _

                lax.fori_loop(end, last, skip, 0)
                plgpu.commit_smem()  # a barrier: every warp's products have read the queries
                result = acc * lax.broadcast_in_dim(jnp.where(total > 0.0, 1.0 / total, 0.0), acc.shape, [0])
                result = result.astype(dtype)
                whole = (low == base) & (high == base + ROWS)

                @pl.when(whole)
                def _store():  # type: ignore[no-untyped-def]
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    obuf[w] = result
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(obuf.at[w], out.at[pl.ds(base, ROWS), k, g])

                @pl.when(jnp.logical_not(whole) & (high > low))
                def _store_some():  # type: ignore[no-untyped-def]
                    if interpret is None:
                        _store_rows(result, out.at[pl.ds(base, ROWS), k, g], low - base, high - base)
                    else:
                        plgpu.wait_smem_to_gmem(0)
                        obuf[w] = result

                        @pl.loop(low, high)
                        def _row(t):  # type: ignore[no-untyped-def]
                            out[t, k, g] = obuf[w, t - base]

                return done + last - first

            lax.fori_loop(0, mine, one, jnp.int32(0))
            pl.when(w == 0)(take_turns)
            plgpu.wait_smem_to_gmem(0)

    tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    body.__name__ = f"prefill_attention_w{W}t{BK}s{S}"
    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((T, K, G, H), dtype),
        grid=(blocks,),
        grid_names=("b",),
        num_threads=W + 1,
        thread_name="w",
        scratch_types=dict(
            qbuf=plgpu.SMEM((2 * W, ROWS, H), dtype, transforms=tiled),
            kbuf=plgpu.SMEM((S, BK, H), dtype, transforms=tiled),
            vbuf=plgpu.SMEM((S, BK, H), dtype, transforms=tiled),
            obuf=plgpu.SMEM((W, ROWS, H), dtype, transforms=tiled),
            pbuf=() if interpret is None else plgpu.SMEM((W, ROWS, BK), dtype),
            bars=(
                plgpu.Barrier(num_barriers=2 * W),
                plgpu.Barrier(num_arrivals=copies, num_barriers=S),
                plgpu.Barrier(num_arrivals=copies, num_barriers=S),
                plgpu.Barrier(num_arrivals=W, num_barriers=S),
                plgpu.Barrier(num_arrivals=W, num_barriers=S),
                plgpu.Barrier(num_arrivals=2) if W == 2 else (),
            ),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
    )
    return jax.jit(kernel)  # lowered once in a program, however many layers call it


def shared_memory_bytes(config: Config, H: int) -> int:
    """What a block of the kernel allocates: queries twice, outputs, keys and values, the barriers in a last kilobyte."""
    return 2 * H * (3 * config.warpgroups * ROWS + 2 * config.stages * config.tile) + 1024


Operand = jax.Array | jax.ShapeDtypeStruct


def why_unsupported(q_TKGH: Operand, keys_XKPH: Operand, values_XKPH: Operand, interpret: Any = None) -> str | None:
    """Why the Mosaic kernel cannot take these operands (arrays, or their shapes) here, or None where it can."""
    _, _, G, H = q_TKGH.shape
    P = keys_XKPH.shape[2]
    if why := tuning.why_no_mosaic(interpret):
        return why
    if q_TKGH.dtype not in (jnp.bfloat16, jnp.float16) or {keys_XKPH.dtype, values_XKPH.dtype} != {q_TKGH.dtype}:
        return f"q is {q_TKGH.dtype}, keys {keys_XKPH.dtype}, values {values_XKPH.dtype}: all must be bfloat16, or all float16"
    if not 1 <= G <= 16:
        return f"{G} query heads to a kv head: 1 to 16 are supported"
    if H not in (64, 128):
        return f"head dimension {H}: 64 and 128 are supported"
    if P not in (8, 16, 32) and P % 64:
        return f"{P} tokens a page: 8, 16, 32 and multiples of 64 are supported"
    return None


def default_config(T: int, H: int, device: str | None = None) -> Config:
    """The tuned config of this device for steps of T tokens and heads of H."""
    found = tuning.lookup("prefill_attention", device, tokens=T, head=H)
    return Config(**found) if found else Config()


def prefill_attention(
    q_TKGH: jax.Array,
    keys_XKPH: jax.Array,
    values_XKPH: jax.Array,
    pages_RM: jax.Array,
    offset_R: jax.Array,
    start_R: jax.Array,
    length_R: jax.Array,
    *,
    window: int | None = None,
    config: Config | None = None,
    implementation: str | None = None,
    interpret: Any = None,
) -> jax.Array:
    """Causal attention of a ragged step of new tokens; shapes and meaning as in the module's docstring.

    implementation: "mosaic", "reference", or None for the kernel where it supports device, dtypes and shapes, else the
    reference. interpret: plgpu.InterpretGPUParams() simulates the kernel on the CPU (with implementation="mosaic").
    Raises ValueError for an unknown implementation, for shapes that do not fit together, for window < 1, and where
    "mosaic" is named and not supported: it never falls back silently.
    """
    T, K, G, H = q_TKGH.shape
    X, _, P, _ = keys_XKPH.shape
    R = offset_R.shape[0]
    if keys_XKPH.shape != (X, K, P, H) or values_XKPH.shape != keys_XKPH.shape:
        raise ValueError(f"keys {keys_XKPH.shape} and values {values_XKPH.shape}: both must be [X, K={K}, P, H={H}]")
    if pages_RM.ndim != 2 or {pages_RM.shape[:1], offset_R.shape, start_R.shape, length_R.shape} != {(R,)}:
        shapes = f"pages {pages_RM.shape}, offset {offset_R.shape}, start {start_R.shape}, length {length_R.shape}"
        raise ValueError(f"{shapes}: they must be [R, M], [R], [R] and [R]")
    if window is not None and window < 1:
        raise ValueError(f"window={window}: it must be at least 1, or None for no window")
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation={implementation!r}: allowed are {IMPLEMENTATIONS} and None")
    why = why_unsupported(q_TKGH, keys_XKPH, values_XKPH, interpret) if implementation != "reference" else None
    if implementation == "mosaic" and why:
        raise tuning.Unsupported("prefill_attention", why)
    if implementation == "reference" or why:
        return reference(q_TKGH, keys_XKPH, values_XKPH, pages_RM, offset_R, start_R, length_R, window=window)

    config = config or default_config(T, H)
    queries = config.warpgroups * ROWS
    table, count = work_list(offset_R, start_R, length_R, T, queries, config.tile, window)
    blocks = min(BLOCKS if interpret is None else 2, num_tiles(T, R, queries) * K * G)
    # The copy engine fills what lies past the end with zeros; the simulator does not. Whole swizzled tiles of 8 tokens.
    q_TKGH = jnp.pad(q_TKGH, ((0, -T % ALIGN if interpret is None else queries), (0, 0), (0, 0), (0, 0)))
    run = _kernel(q_TKGH.shape[0], K, G, H, P, window, jnp.dtype(q_TKGH.dtype), config, blocks, interpret)
    out_TKGH: jax.Array = run(q_TKGH, keys_XKPH, values_XKPH, pages_RM.astype(jnp.int32), table, count)
    return out_TKGH[:T]


def search_space(H: int) -> list[Config]:
    """Every config worth measuring that fits."""
    configs = [Config(w, t, s) for w in (2, 3) for t in (64, 128) for s in (2, 3, 4)]
    return [config for config in configs if shared_memory_bytes(config, H) <= SHARED_MEMORY]
