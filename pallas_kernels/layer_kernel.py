"""The Mosaic GPU kernel of decode_layer.py: one persistent kernel for a block's half, or for a whole block, at decode.

A block of the grid is a producer warpgroup, which fills the ring and waits for other blocks' results, and two consumer
warpgroups, which multiply. In order: add and norm, qkv, attention, o, add and norm, gate and up, down; a half has its own of
those. The ring holds 32 KB units: of a weight, or a tile of 64 positions' keys and values.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import layer_phases as phases
from pallas_kernels import persistent
from pallas_kernels.layer_phases import MASKED, SLICE
from pallas_kernels.persistent import Product

FLAGS = 1 << 14  # int32 words of `sync`
GROUP = 128  # rows of an int8 weight that share a scale
TILE = 64  # positions of a tile of keys and values
COLUMNS = 128  # of a unit of weight


@dataclasses.dataclass(frozen=True)
class Config:
    """blocks: of the grid, at most one a multiprocessor; rows: of a unit of weight; stages: units in the ring; flight: how many
    of those are asked for and not yet there, at most; x_bytes: shared memory for a product's activations."""

    blocks: int = 128
    rows: int = 128
    stages: int = 4
    flight: int = 3
    x_bytes: int = 80 * 1024

    def __post_init__(self) -> None:
        if self.rows not in (64, 128, 256):
            raise ValueError(f"rows={self.rows}: allowed are 64, 128 and 256")
        if not 1 <= self.flight <= self.stages:
            raise ValueError(f"flight={self.flight}: allowed is 1 to stages={self.stages}")


@dataclasses.dataclass(frozen=True)
class Dims:
    """What a kernel is compiled for. kind: "attention", "mlp" or "layer"; sizes of the half that is absent are 0."""

    kind: str
    int8: bool
    eps: float
    B: int
    D: int
    F: int = 0
    K: int = 0
    G: int = 0
    H: int = 0
    P: int = 0
    bias: bool = False
    window: int | None = None

    @property
    def N(self) -> int:
        """Rows that the products take: wgmma's narrow side is a multiple of 8, and threads share rows evenly."""
        return max(8, 1 << (self.B - 1).bit_length())

    @property
    def Q(self) -> int:
        """Queries of a group, padded likewise."""
        return -(-self.G // 8) * 8

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """The products' weights, [in, out]."""
        J, D = self.K * self.H, self.D
        attention = {"qkv": (D, J * (self.G + 2)), "o": (J * self.G, D)}
        mlp = {"gate_up": (D, 2 * self.F), "down": (self.F, D)}
        return {"attention": attention, "mlp": mlp, "layer": attention | mlp}[self.kind]

    def products(self, config: Config) -> dict[str, Product]:
        def product(K: int, O: int) -> Product:  # noqa: E741
            args = (K, O, config.rows, COLUMNS, config.blocks)
            return Product(*args, persistent.choose_parts(*args, 2 * self.N * config.rows, config.x_bytes))

        return {name: product(*size) for name, size in self.sizes.items()}


@dataclasses.dataclass(frozen=True)
class Run:
    """A block's share of a product, and where in the ring its units begin (traced)."""

    product: Product
    part: Any
    block: Any
    start: Any
    count: Any
    ring: Any

    @classmethod
    def of(cls, product: Product, block: Any, ring: Any) -> Run:
        part = lax.div(block, product.part_blocks) if product.parts > 1 else jnp.int32(0)
        block = block - part * product.part_blocks
        start = block * product.units
        return cls(product, part, block, start, jnp.clip(product.tiles * product.part_rows - start, 0, product.units), ring)

    def along(self, i: Any) -> Any:
        """Which unit along K the i-th is."""
        return self.part * self.product.part_rows + lax.rem(self.start + i, self.product.part_rows)


@functools.lru_cache(maxsize=64)
def layer_kernel(dims: Dims, config: Config) -> Any:
    """The kernel of one kind and shape: operands as `inputs` lists them, results as `outputs` does, then the operands that it
    writes in place: keys and values, sync."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu_

    from pallas_kernels.decode_attention import _reduce_rows

    plgpu: Any = plgpu_
    B, N, D, F, K, G, H, P, Q = dims.B, dims.N, dims.D, dims.F, dims.K, dims.G, dims.H, dims.P, dims.Q
    int8, attention, mlp = dims.int8, dims.kind != "mlp", dims.kind != "attention"
    blocks, rows, S, flight = config.blocks, config.rows, config.stages, config.flight
    W = COLUMNS // 64  # consumer warpgroups, 64 of a unit's columns each
    arrivals = blocks * (W + 1)
    products = dims.products(config)
    names = list(products)
    arrays = 2 if int8 else 1  # of a weight
    copies = 2 if int8 or attention else 1  # into a stage of the ring
    pieces = -(-max(p.slots for p in products.values()) // 32)  # of x to a barrier: a group has at most 32 barriers
    X = max(-(-p.slots // pieces) * pieces for p in products.values())

    # Attention: items (row, kv head, split), each with tiles of 64 positions, each tile a stage of the ring.
    pairs = B * K
    item_splits = max(min(blocks // pairs, 32 // W), 1) if attention else 1
    items, shares = pairs * item_splits, item_splits * W

    # Flags: words of `sync`, after one that counts launches.
    places, words = {}, 32
    for name, size in [
        ("x", D // SLICE),
        *((f"{n}_shares", p.tiles * p.parts * p.sharers * W) for n, p in products.items()),
        *((n, p.tiles * W) for n, p in products.items()),
        ("states", items * W),
        ("items", items),
    ]:
        places[name], words = words, words + -(-size // 32) * 32
    if words > FLAGS:
        raise ValueError(f"{dims} needs {words} flags, and sync has {FLAGS}")

    bf16, f32 = jnp.bfloat16, jnp.float32
    shape = jax.ShapeDtypeStruct
    outputs: dict[str, Any] = dict(total=shape((B, D), bf16), out=shape((B, D), bf16))
    if dims.kind == "layer":
        outputs |= dict(total2=shape((B, D), bf16), xs2=shape((N, D), bf16), squares2=shape((D // 16, N), f32))
    outputs |= dict(xs=shape((N, D), bf16), squares=shape((D // 32, N), f32))
    if attention:
        outputs |= dict(
            qkv=shape((B, dims.sizes["qkv"][1]), bf16),
            attended=shape((N, K * G * H), bf16),
            outs=shape((items * W * H * Q,), f32),
            states=shape((items * W * 2 * Q,), f32),
        )
    if mlp:
        outputs |= dict(h=shape((N, F), bf16))
    for name, p in products.items():
        outputs[f"{name}_partials"] = shape((p.tiles * p.parts * p.sharers * COLUMNS * N,), f32)
    inputs = ["residual", "delta"]
    if attention:
        inputs += ["norm", "cos", "sin", "pages", "length", *(["bias"] if dims.bias else [])]
    inputs += ["mlp_norm"] if mlp else []
    inputs += [f"{name}{i}" for name in names for i in range(arrays)]
    inputs += ["keys", "values"] if attention else []
    inputs += ["sync"]

    def body(*refs, wbuf, xbuf, scales, full, empty, xfull, xfree, scaled, **more):  # type: ignore[no-untyped-def]
        g = dict(zip([*inputs, *outputs], refs, strict=True))
        weights = {name: [g[f"{name}{i}"] for i in range(arrays)] for name in names}
        sync = g["sync"]
        if int8:
            wbuf, kvbuf = wbuf if attention else (wbuf, wbuf)
        else:
            kvbuf = wbuf
        b, w = lax.axis_index("b"), lax.axis_index("w")
        seen = persistent.launches_seen(sync)

        # ------------------------------------------------ the producer: everything that enters the ring, in order

        def enter(at, copy):  # type: ignore[no-untyped-def]
            """The ring's at-th stage: wait until its slot is free, then copy into it."""
            slot = lax.rem(at, S)

            @pl.when(at >= S)
            def _():  # type: ignore[no-untyped-def]
                plgpu.barrier_wait(empty.at[slot])

            # More in flight would only make everything else that goes to memory wait behind it.
            if flight < S:

                @pl.when(at >= flight)
                def _():  # type: ignore[no-untyped-def]
                    plgpu.barrier_wait(full.at[lax.rem(at - flight, S)])

            copy(slot)

        def send(name, run, lo, hi):  # type: ignore[no-untyped-def]
            @pl.loop(lo, hi)
            def _(i):  # type: ignore[no-untyped-def]
                tile, k = lax.div(run.start + i, run.product.part_rows), run.along(i)

                def copy(slot):  # type: ignore[no-untyped-def]
                    source = weights[name]
                    if int8:
                        here = pl.ds(k * (rows // GROUP), rows // GROUP)
                        plgpu.copy_gmem_to_smem(source[0].at[tile, here], wbuf.at[slot], full.at[slot])
                        plgpu.copy_gmem_to_smem(source[1].at[tile, here], more["sbuf"].at[slot], full.at[slot])
                        return
                    part = rows // copies
                    for j in range(copies):
                        at = source[0].at[pl.ds(k * rows + j * part, part), pl.ds(tile * COLUMNS, COLUMNS)]
                        to = wbuf.at[slot] if copies == 1 else wbuf.at[slot, pl.ds(j * part, part)]
                        plgpu.copy_gmem_to_smem(at, to, full.at[slot])

                enter(run.ring + i, copy)

        def send_x(x, run):  # type: ignore[no-untyped-def]
            @pl.loop(0, lax.div(jnp.minimum(run.count, run.product.part_rows) + (pieces - 1), pieces) * pieces)
            def _(i):  # type: ignore[no-untyped-def]
                source = x.at[:, pl.ds(run.along(i) * rows, rows)]
                plgpu.copy_gmem_to_smem(source, xbuf.at[i], xfull.at[lax.div(i, pieces)])

        def wait_columns(launch, run, flag, grain):  # type: ignore[no-untyped-def]
            first_unit = lax.rem(run.start, run.product.part_rows)
            persistent.wait_for_columns(sync, launch, places[flag], grain, run.product, first_unit, run.part)

        def norm(squares, grain):  # type: ignore[no-untyped-def]
            phases.norm_scales(squares, scales, N, D, grain, dims.eps)
            plgpu.barrier_arrive(scaled)

        def warm(name, run, *small):  # type: ignore[no-untyped-def]
            """Into L2: what the end of this product, and the start of the next phase, will look at."""
            persistent.prefetch(sync, 4 * words)
            tile = lax.div(run.start + jnp.maximum(run.count, 1) - 1, run.product.part_rows)
            partials = g[f"{name}_partials"]
            persistent.prefetch_shares(partials, run.product, N, jnp.minimum(tile, run.product.tiles - 1))
            for ref, nbytes in small:
                persistent.prefetch(g[ref], nbytes)

        def item_tiles(item):  # type: ignore[no-untyped-def]
            """Row, kv head, split, length, first position, first tile and number of tiles of an item."""
            pair, split = lax.div(item, item_splits), lax.rem(item, item_splits)
            row, head = lax.div(pair, K), lax.rem(pair, K)
            n = g["length"][row]
            lo = jnp.int32(0) if dims.window is None else jnp.maximum(n - dims.window, 0)
            first = lax.div(lo, TILE) + split
            count = jnp.maximum(lax.div(lax.div(n + (TILE - 1), TILE) - first + (item_splits - 1), item_splits), 0)
            return row, head, split, n, lo, first, count

        def page_of(row, tile):  # type: ignore[no-untyped-def]
            return g["pages"][row, lax.div(tile * TILE, P)]

        def send_items(ring):  # type: ignore[no-untyped-def]
            def one(j, ring):  # type: ignore[no-untyped-def]
                row, head, *_unused, first, count = item_tiles(b + j * blocks)

                @pl.loop(0, count)
                def _(i):  # type: ignore[no-untyped-def]
                    tile = first + i * item_splits
                    page = page_of(row, tile)

                    def copy(slot):  # type: ignore[no-untyped-def]
                        for side, at in ((g["keys"], 0), (g["values"], TILE)):
                            positions = pl.ds(lax.rem(tile * TILE, P), TILE)
                            source = side.at[page, head] if P == TILE else side.at[page, head, positions]
                            plgpu.copy_gmem_to_smem(source, kvbuf.at[slot, pl.ds(at, TILE), pl.ds(0, H)], full.at[slot])

                    enter(ring + i, copy)

                return ring + count

            return lax.fori_loop(0, lax.div(items - b + (blocks - 1), blocks), one, ring)

        @pl.when(w == W)
        def _producer():  # type: ignore[no-untyped-def]
            persistent.prefetch(sync, 4 * words)
            ring, launch = jnp.int32(0), None
            for i, name in enumerate(names):
                run = Run.of(products[name], b, ring)
                ahead = jnp.minimum(run.count, S)
                send(name, run, 0, ahead)
                if launch is None:
                    launch = persistent.launch_number(sync, seen, arrivals)
                else:
                    plgpu.barrier_wait(xfree)
                if i == 0:
                    wait_columns(launch, run, "x", SLICE)
                    send_x(g["xs"], run)
                    norm(g["squares"], 32)
                elif name == "o":
                    persistent.wait_for_flags(sync, launch, jnp.int32(places["items"]), items)
                    send_x(g["attended"], run)
                elif name == "gate_up":
                    wait_columns(launch, run, "o", 64)
                    send_x(g["xs2"], run)
                    norm(g["squares2"], 16)
                else:
                    wait_columns(launch, run, "gate_up", 32)
                    send_x(g["h"], run)
                send(name, run, ahead, run.count)
                ring = ring + run.count
                small = {"qkv": [("cos", 2 * B * H), ("sin", 2 * B * H), ("length", 4 * B)], "o": [("mlp_norm", 2 * D)]}
                warm(name, run, *(small.get(name, []) if mlp or name != "o" else []))
                if name == "qkv":
                    ring = send_items(ring)

        # ------------------------------------------------ the consumers

        def consume(name, launch, ring, before, epilogue, refs):  # type: ignore[no-untyped-def]
            run = Run.of(products[name], b, ring)
            p = run.product

            def unit(i):  # type: ignore[no-untyped-def]
                slot = lax.rem(run.ring + i, S)

                @pl.when((i < p.part_rows) & (lax.rem(i, pieces) == 0))
                def _():  # type: ignore[no-untyped-def]
                    plgpu.barrier_wait(xfull.at[lax.div(i, pieces)])

                plgpu.barrier_wait(full.at[slot])
                return slot, i if p.units <= p.part_rows else lax.rem(i, p.part_rows)

            def stretch(lo, hi):  # type: ignore[no-untyped-def]
                if not int8:

                    def multiply(acc):  # type: ignore[no-untyped-def]
                        @pl.loop(lo, hi)
                        def _(i):  # type: ignore[no-untyped-def]
                            slot, piece = unit(i)
                            plgpu.wgmma(acc, wbuf.at[slot, :, pl.ds(w * 64, 64)].T, xbuf.at[piece].T)
                            plgpu.wgmma_wait(0)
                            plgpu.barrier_arrive(empty.at[slot])

                        return acc[...]

                    return pl.run_scoped(multiply, plgpu.ACC((64, N), f32))

                groups = rows // GROUP

                def step(i, total):  # type: ignore[no-untyped-def]
                    slot, piece = unit(i)

                    def multiply(*accs):  # type: ignore[no-untyped-def]
                        # A group's bytes are widened while the product of the one before runs.
                        factors = []
                        for j, acc in enumerate(accs):
                            raw = plgpu.load(
                                wbuf.at[slot, j, pl.ds(w * 64, 64)], layout=plgpu.Layout.WG_STRIDED((64, GROUP), vec_size=16)
                            )
                            scale = more["sbuf"].at[slot, j, pl.ds(w * 64, 64)]
                            scale = plgpu.load(scale, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
                            factors.append(lax.broadcast_in_dim(scale.astype(f32), (64, N), [0]))
                            x = xbuf.at[piece, :, pl.ds(j * GROUP, GROUP)]
                            plgpu.wgmma(acc, persistent.widen_int8(GROUP)(raw), x.T)
                        return [
                            plgpu.wgmma_accumulator_load(acc, wait_n=groups - 1 - j) * f
                            for j, (acc, f) in enumerate(zip(accs, factors))
                        ]

                    products = pl.run_scoped(multiply, *(plgpu.ACC((64, N), f32) for _ in range(groups)))
                    plgpu.barrier_arrive(empty.at[slot])
                    for product in products:
                        total = total + product
                    return total

                zero = plgpu.layout_cast(jnp.zeros((64, N), f32), plgpu.Layout.WGMMA)
                return lax.fori_loop(lo, hi, step, zero)

            first_tile = lax.div(run.start, p.part_rows)

            last_unit = run.start + run.count - 1

            @pl.loop(first_tile, jnp.where(run.count > 0, lax.div(last_unit, p.part_rows) + 1, first_tile))
            def _(tile):  # type: ignore[no-untyped-def]
                lo = jnp.maximum(tile * p.part_rows - run.start, 0)
                hi = jnp.minimum((tile + 1) * p.part_rows - run.start, run.count)
                value = stretch(lo, hi)
                head = lax.div(tile * p.part_rows, p.units)
                sharers = lax.div((tile + 1) * p.part_rows - 1, p.units) - head + 1
                place = (launch, tile, run.part * p.sharers + run.block - head, sharers, w)
                pl.when(tile == first_tile)(before)
                partials, flag = g[f"{name}_partials"], places[f"{name}_shares"]
                phases.finish(value, p, N, partials, sync, flag, place, epilogue, refs)

            pl.when(run.count == 0)(before)
            if name != names[-1]:
                plgpu.barrier_arrive(xfree)
            return ring + run.count

        def foreign(ring, i, count):  # type: ignore[no-untyped-def]
            """A tile that another warpgroup takes: seen, and given back."""

            @pl.when(i < count)
            def _():  # type: ignore[no-untyped-def]
                slot = lax.rem(ring + i, S)
                plgpu.barrier_wait(full.at[slot])
                plgpu.barrier_arrive(empty.at[slot])

        def attend(launch, ring):  # type: ignore[no-untyped-def]
            queries, probabilities, scratch = more["queries"], more["probabilities"], more["scratch"]
            scale = H**-0.5 * 1.4426950408889634
            J = G + 2
            per_head = J * H // 64

            def one(j, ring):  # type: ignore[no-untyped-def]
                item = b + j * blocks
                row, head, split, n, lo, first, count = item_tiles(item)

                share(row, head, split, n, lo, first, count, ring, item)
                return ring + count

            def share(row, head, split, n, lo, first, count, ring, item):  # type: ignore[no-untyped-def]
                persistent.wait_for_flags(sync, launch, places["qkv"] + head * per_head, per_head)
                phases.rotate_queries((g["qkv"], g["cos"], g["sin"], queries), K, G, H, Q, row, head, w)
                plgpu.commit_smem()

                def step(jj, carry):  # type: ignore[no-untyped-def]
                    acc_HQ, m_Q, l_TQ = carry
                    for other in range(W):
                        pl.when(other < w)(functools.partial(foreign, ring, jj * W + other, count))
                    i = jj * W + w
                    slot = lax.rem(ring + i, S)
                    tile = first + i * item_splits
                    base = tile * TILE
                    plgpu.barrier_wait(full.at[slot])

                    @pl.when(base + TILE >= n)
                    def _():  # type: ignore[no-untyped-def]
                        refs = (g["qkv"], g["cos"], g["sin"], g["keys"], g["values"], kvbuf)
                        offset = lax.rem(n - 1, P)
                        phases.new_position(refs, (K, G, H, P, 128, COLUMNS), row, head, page_of(row, tile), offset, slot)
                        plgpu.commit_smem()

                    keys = kvbuf.at[slot, pl.ds(0, TILE), pl.ds(0, H)]
                    values = kvbuf.at[slot, pl.ds(TILE, TILE), pl.ds(0, H)]

                    def scores(ref):  # type: ignore[no-untyped-def]
                        plgpu.wgmma(ref, keys, queries.at[w].T)
                        return ref[...]

                    s_TQ = pl.run_scoped(scores, plgpu.ACC((TILE, Q), f32))

                    def visible(shape):  # type: ignore[no-untyped-def]
                        position = base + plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
                        return (position < n) & (position >= lo)

                    seen_TQ = visible((TILE, Q))
                    s_TQ = jnp.where(seen_TQ, s_TQ * scale, MASKED)
                    new_m_Q = jnp.maximum(m_Q, _reduce_rows("max", (TILE, Q), None)(s_TQ, scratch.at[w]))
                    alpha_Q = jnp.exp2(m_Q - new_m_Q)
                    p_TQ = jnp.where(seen_TQ, jnp.exp2(s_TQ - lax.broadcast_in_dim(new_m_Q, (TILE, Q), [1])), 0.0)
                    l_TQ = l_TQ * lax.broadcast_in_dim(alpha_Q, (TILE, Q), [1]) + p_TQ
                    probabilities.at[w].T[...] = plgpu.layout_cast(p_TQ.astype(bf16), plgpu.Layout.WGMMA_TRANSPOSED)

                    # Values outside the range may be NaN, and 0·NaN is NaN: zero those rows of a tile that has some.
                    @pl.when((base + TILE > n) | (base < lo))
                    def _():  # type: ignore[no-untyped-def]
                        v_TH = plgpu.load(values, layout=plgpu.Layout.WGMMA)
                        kvbuf[slot, pl.ds(TILE, TILE), pl.ds(0, H)] = jnp.where(visible((TILE, H)), v_TH, jnp.zeros_like(v_TH))

                    plgpu.commit_smem()

                    def weighed(ref):  # type: ignore[no-untyped-def]
                        plgpu.wgmma(ref, values.T, probabilities.at[w].T)
                        return ref[...]

                    more_HQ = pl.run_scoped(weighed, plgpu.ACC((H, Q), f32))
                    acc_HQ = acc_HQ * lax.broadcast_in_dim(alpha_Q, (H, Q), [1]) + more_HQ
                    plgpu.barrier_arrive(empty.at[slot])
                    for other in range(W):
                        pl.when(other > w)(functools.partial(foreign, ring, jj * W + other, count))
                    return acc_HQ, new_m_Q, l_TQ

                by_column = plgpu.Layout.WGMMA.reduce(0)
                mine = lax.div(jnp.maximum(count - w + (W - 1), 0), W)
                acc_HQ, m_Q, l_TQ = lax.fori_loop(
                    0,
                    mine,
                    step,
                    (
                        plgpu.layout_cast(jnp.zeros((H, Q), f32), plgpu.Layout.WGMMA),
                        plgpu.layout_cast(jnp.full((Q,), MASKED, f32), by_column),
                        plgpu.layout_cast(jnp.zeros((TILE, Q), f32), plgpu.Layout.WGMMA),
                    ),
                )
                for other in range(W):
                    pl.when(other < w)(functools.partial(foreign, ring, mine * W + other, count))
                l_Q = _reduce_rows("add", (TILE, Q), None)(l_TQ, scratch.at[w])
                kept = (g["outs"], g["states"], sync)
                number = item * W + w
                phases.keep_state(kept, acc_HQ, m_Q, l_Q, H, Q, number, places["states"] + number, launch)

                @pl.when(w == 0)
                def _():  # type: ignore[no-untyped-def]
                    start = (item - split) * W
                    persistent.wait_for_flags(sync, launch, places["states"] + start, shares)
                    sizes = (B, N, K, G, H, Q, item_splits, shares)
                    phases.combine_states((g["outs"], g["states"], g["attended"]), sizes, start, row, head, split)
                    persistent.raise_flag(sync, places["items"] + item, launch)

            return lax.fori_loop(0, lax.div(items - b + (blocks - 1), blocks), one, ring)

        @pl.when(w < W)
        def _consumers():  # type: ignore[no-untyped-def]
            @pl.when(w == 0)
            def _():  # type: ignore[no-untyped-def]
                refs = [
                    g[n] for n in ("residual", "delta", "norm" if attention else "mlp_norm", "total", "xs", "squares", "sync")
                ]

                @pl.loop(b, D // SLICE, step=blocks)
                def _(piece):  # type: ignore[no-untyped-def]
                    phases.add_and_square(tuple(refs), B, N, D, seen, arrivals, piece, places["x"])

            launch = persistent.launch_number(sync, seen, arrivals)
            ring = jnp.int32(0)
            wait_scales = lambda: plgpu.barrier_wait(scaled)  # noqa: E731
            nothing = lambda: None  # noqa: E731
            last = phases.store(N, B, D, COLUMNS)
            if attention:
                epilogue = phases.qkv_rows(N, B, dims.sizes["qkv"][1], COLUMNS, places["qkv"], dims.bias)
                refs = (g["qkv"], scales, *([g["bias"]] if dims.bias else []))
                ring = consume("qkv", launch, ring, wait_scales, epilogue, refs)
                ring = attend(launch, ring)
                if mlp:
                    epilogue = phases.residual_rows(N, B, D, COLUMNS, places["o"])
                    refs = tuple(g[n] for n in ("total", "total2", "mlp_norm", "xs2", "squares2"))
                    ring = consume("o", launch, ring, nothing, epilogue, refs)
                else:
                    consume("o", launch, ring, nothing, last, (g["out"],))
            if mlp:
                ring = consume(
                    "gate_up", launch, ring, wait_scales, phases.gate_up(N, F, COLUMNS, places["gate_up"]), (g["h"], scales)
                )
                consume("down", launch, ring, nothing, last, (g["out"],))

    body.__name__ = f"decode_{dims.kind}_{'int8' if int8 else 'bf16'}_n{N}"
    swizzled = persistent.swizzled()
    ring_bf16 = plgpu.SMEM((S, rows if not int8 else 128, COLUMNS), bf16, transforms=swizzled)
    ring_int8 = plgpu.SMEM((S, rows // GROUP, COLUMNS, GROUP), jnp.int8)
    scratch: dict[str, Any] = dict(
        wbuf=ring_bf16 if not int8 else plgpu.RefUnion(ring_int8, ring_bf16) if attention else ring_int8,
        xbuf=plgpu.SMEM((X, N, rows), bf16, transforms=swizzled),
        scales=plgpu.SMEM((N,), f32),
        full=plgpu.Barrier(num_arrivals=copies, num_barriers=S),
        empty=plgpu.Barrier(num_arrivals=W, num_barriers=S),
        xfull=plgpu.Barrier(num_arrivals=pieces, num_barriers=X // pieces),
        xfree=plgpu.Barrier(num_arrivals=W),
        scaled=plgpu.Barrier(),
    )
    if int8:
        scratch |= dict(sbuf=plgpu.SMEM((S, rows // GROUP, COLUMNS), bf16))
    if attention:
        scratch |= dict(
            queries=plgpu.SMEM((W, Q, H), bf16, transforms=swizzled),
            probabilities=plgpu.SMEM((W, Q, TILE), bf16, transforms=swizzled),
            scratch=plgpu.SMEM((W, 256 * (Q // 8)), f32),
        )
    kernel = plgpu.kernel(
        body,
        out_type=list(outputs.values()),
        grid=(blocks,),
        grid_names=("b",),
        num_threads=W + 1,
        thread_name="w",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
    )
    written = 3 if attention else 1  # keys, values, sync

    # The references stay inside: so the function is pure, and a program holds it once, however many layers call it. With
    # the caller's references every call would be a kernel of its own, to be compiled by itself.
    @jax.jit
    def run(*operands: Any) -> list[Any]:
        refs = [jax.new_ref(x) for x in operands[-written:]]
        return [*kernel(*operands[:-written], *refs), *(jax.freeze(ref) for ref in refs)]

    return run
