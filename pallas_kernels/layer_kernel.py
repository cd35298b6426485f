"""The Mosaic GPU kernel of decode_layer.py: one persistent kernel for a block's half, or for several whole blocks, at decode.

A block of the grid is two consumer warpgroups, which multiply, a messenger, which makes the sums of products and x of what
other blocks send, and a producer, which fills the ring. In order: norm, qkv, attention, o, norm, gate and up, down; a half has
its own of those, and adds its delta first; whole blocks add the sums of o and of down to the stream as they are taken. The ring
holds 32 KB units: of a weight, or a tile of 64 positions' keys and values. Int8 weights are multiplied as they are, with x in
fixed point (fixed_point.py). What of h is complete is taken while the rest of gate and up is multiplied.

Blocks of the model follow one another without a launch between: the ring fills with the next one's weights while the sums of
`down` go around. What a place in `sync` held for the last block is read before it is written for the next: nobody has any of
a block's h before everybody has multiplied by o, and nobody any of the next block's qkv before everybody has multiplied by
down and had all of the stream, since sums are over all of K. (Squares: a rank's messenger has read them before its consumers
may send the sums of the tile after next.) That takes a tile of every product for each team (`why_unsupported_shape`). The
residual stream is updated in place: nobody adds to it before everybody who multiplies by qkv has read it, since o waits for
states, and these for all of qkv (where all rows are of length 0 that does not hold, and only padding is computed).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import fixed_point, mosaic, persistent
from pallas_kernels import layer_phases as phases
from pallas_kernels.layer_phases import MASKED
from pallas_kernels.layer_plan import COLUMNS, GROUP, GROUPS, TAGS, TILE, Config, Dims, Run, pieces, places
from pallas_kernels.persistent import RANKS


@functools.lru_cache(maxsize=64)
def layer_kernel(dims: Dims, config: Config) -> Any:
    """The kernel of one kind and shape: operands as `inputs` lists them, results as `outputs` does, then the operands that it
    writes in place: each layer's keys, each one's values, of whole layers the residual stream, sync. Norms and biases of all
    layers of the model are one array each, and `first` [1] says where the launch's begin."""
    from jax.experimental import pallas as pl

    plgpu = mosaic.plgpu()
    B, N, D, K, G, H, P, Q = dims.B, dims.N, dims.D, dims.K, dims.G, dims.H, dims.P, dims.Q
    int8, attention, mlp, whole, L = dims.int8, dims.kind != "mlp", dims.kind != "attention", dims.kind == "layer", dims.layers
    blocks, rows, S, flight = config.blocks, config.rows, config.stages, config.flight
    W = COLUMNS // 64  # consumer warpgroups, 64 of a unit's columns each
    arrivals = blocks * 2 * W
    products = dims.products(config)
    names = list(products)
    x_plan = pieces(dims, config)
    width, per_unit = x_plan.width, x_plan.per_unit
    arrays = 2 if int8 else 1  # of a weight
    copies = 2 if int8 or attention else 1  # into a stage of the ring
    # Units of x come in groups: multiplication begins with the first.
    group = {name: p.slots if name == "o" else -(-p.slots // GROUPS) for name, p in products.items()}
    if mlp:
        group["down"] = phases.h_group(B, rows, products["down"].slots)
    arrivals_of_x = {name: -(-p.slots // group[name]) for name, p in products.items()}
    first_piece = {name: 0 if name == "down" else x_plan.x for name in names}
    first_of_h = max(arrivals_of_x[name] for name in names if name != "down")  # of the barriers that tell of x
    layout = places(dims, config)
    place, turns, item_splits = layout.at, layout.turns, layout.item_splits
    # Attention: items (row, kv head, split), each with tiles of 64 positions, each tile a stage of the ring.
    items = B * K * item_splits

    bf16, f32 = jnp.bfloat16, jnp.float32
    shape = jax.ShapeDtypeStruct
    outputs: dict[str, Any] = {} if whole else dict(total=shape((B, D), bf16), out=shape((B, D), bf16))
    inputs = ["first"] if whole else ["residual", "delta"]
    if attention:
        inputs += ["norm", "cos", "sin", "pages", "length", *(["bias"] if dims.bias else [])]
    inputs += ["mlp_norm"] if mlp else []
    inputs += [f"{name}{i}.{layer}" for name in names for i in range(arrays) for layer in range(L)]
    in_place = [f"{side}.{layer}" for side in ("keys", "values") for layer in range(L) if attention]
    in_place += ["stream", "sync"] if whole else ["sync"]
    inputs += in_place

    def body(*refs, wbufs, xbufs, scales, full, empty, xfull, xfree, summed, **more):  # type: ignore[no-untyped-def]
        g = dict(zip([*inputs, *outputs], refs, strict=True))
        sync = g["sync"]
        keys, values = ([g[f"{side}.{layer}"] for layer in range(L) if attention] for side in ("keys", "values"))
        rings: Any = (*wbufs, None)[:3] if int8 else (wbufs, None, wbufs)
        wbuf, w_int8, kvbuf = rings
        xbuf, *others = xbufs
        x_int8: Any = others.pop(0) if int8 else None
        attending: Any = others[0] if attention else None
        handed, merged = more.get("handed"), more.get("merged")
        x_steps = (more["steps"],) if int8 else ()
        b, w = lax.axis_index("b"), lax.axis_index("w")
        team, rank = lax.div(b, RANKS), lax.rem(b, RANKS)
        seen = persistent.launches_seen(sync)

        def every_layer(act, carry):  # type: ignore[no-untyped-def]
            """carry = act(layer, carry) for all layers, one after another."""
            return act(jnp.int32(0), carry) if L == 1 else lax.fori_loop(0, L, act, carry)

        # ------------------------------------------------ the producer: everything that enters the ring, in order

        def of_layer(layer, copy):  # type: ignore[no-untyped-def]
            """copy(layer), the layer's number being known where its arrays are chosen."""
            if L == 1:
                copy(0)
            else:
                lax.switch(layer, [functools.partial(copy, i) for i in range(L)])

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

        def send(name, run, layer):  # type: ignore[no-untyped-def]
            @pl.loop(0, run.count)
            def _(i):  # type: ignore[no-untyped-def]
                tile, k = run.tile(lax.div(i, run.units)), run.unit(lax.rem(i, run.units))

                def copy(slot, layer):  # type: ignore[no-untyped-def]
                    source = [g[f"{name}{i}.{layer}"] for i in range(arrays)]
                    if int8:
                        here = pl.ds(k * per_unit, per_unit)
                        for array, buffer in zip(source, (wbuf, more["sbuf"]), strict=True):
                            # In bounds, so that what is contiguous needs no descriptor: there is no room for hundreds.
                            mode = plgpu.OOBFillMode.PROMISE_IN_BOUNDS
                            plgpu.copy_gmem_to_smem(array.at[tile, here], buffer.at[slot], full.at[slot], oob_mode=mode)
                        return
                    part = rows // copies
                    for j in range(copies):
                        at = source[0].at[pl.ds(k * rows + j * part, part), pl.ds(tile * COLUMNS, COLUMNS)]
                        to = wbuf.at[slot] if copies == 1 else wbuf.at[slot, pl.ds(j * part, part)]
                        plgpu.copy_gmem_to_smem(at, to, full.at[slot])

                enter(run.ring + i, lambda slot: of_layer(layer, functools.partial(copy, slot)))

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

        def send_items(ring, layer):  # type: ignore[no-untyped-def]
            def one(j, ring):  # type: ignore[no-untyped-def]
                row, head, *_unused, first, count = item_tiles(b + j * blocks)

                @pl.loop(0, count)
                def _(i):  # type: ignore[no-untyped-def]
                    tile = first + i * item_splits
                    page = page_of(row, tile)

                    def copy(slot, layer):  # type: ignore[no-untyped-def]
                        for side, at in ((keys[layer], 0), (values[layer], TILE)):
                            positions = pl.ds(lax.rem(tile * TILE, P), TILE)
                            source = side.at[page, head] if P == TILE else side.at[page, head, positions]
                            plgpu.copy_gmem_to_smem(source, kvbuf.at[slot, pl.ds(at, TILE), pl.ds(0, H)], full.at[slot])

                    enter(ring + i, lambda slot: of_layer(layer, functools.partial(copy, slot)))

                return ring + count

            return lax.fori_loop(0, lax.div(items - b + (blocks - 1), blocks), one, ring)

        @pl.when(w == W + 1)
        def _producer():  # type: ignore[no-untyped-def]
            def one(layer, ring):  # type: ignore[no-untyped-def]
                for name in names:
                    run = Run.of(products[name], team, rank, ring)
                    send(name, run, layer)
                    ring = ring + run.count
                    if name == "qkv":
                        ring = send_items(ring, layer)
                return ring

            every_layer(one, jnp.int32(0))

        # ------------------------------------------------ the messenger

        def place_of(use):  # type: ignore[no-untyped-def]
            """Where the sums of the team's use-th tile go."""
            return place["sums"] + (turns * team + lax.rem(use, turns)) * phases.sums_words(W)

        def arrived(i):  # type: ignore[no-untyped-def]
            """The i-th group of the units' x is there; h's begin with `first_of_h`."""
            plgpu.commit_smem()
            plgpu.barrier_arrive(xfull.at[i])

        def groups_of(name, units):  # type: ignore[no-untyped-def]
            """How often pieces of x come; an empty group where there are none, lest consumers run ahead of the messenger."""
            return jnp.maximum(lax.div(units + (group[name] - 1), group[name]), 1)

        def fill_normed(half, layer, tag, base):  # type: ignore[no-untyped-def]
            name = "qkv" if attention else "gate_up"  # the other is the same here
            run, groups = Run.of(products[name], team, rank, 0), arrivals_of_x[name]
            squares = place["squares"] + (2 * team + half) * phases.squares_words(N)
            norms = [g[norm] for norm in ("norm", "mlp_norm") if norm in g]
            added = () if whole else (g["delta"], g["total"])
            which = jnp.int32(half) if whole else jnp.int32(0)

            def fill(stream, is_there):  # type: ignore[no-untyped-def]
                @pl.loop(0, groups)
                def _(i):  # type: ignore[no-untyped-def]
                    at = (rank, run.units, i * group[name], i, tag, jnp.int32(stream), squares, which, (base + layer) * D)
                    sizes = (B, N, D, rows, group[name], groups)
                    refs = (g["stream" if whole else "residual"], norms, sync, xbuf, x_steps, added)
                    phases.normed_x(refs, sizes, (width, x_plan.x), is_there, (team == 0).astype(jnp.int32), at)
                    pl.when(i < groups_of(name, run.units))(lambda: arrived(i))

            if whole:  # one after another, with the code of all but the first in one place
                pl.when((layer == 0) & (half == 0))(lambda: fill(0, True))
                pl.when((layer > 0) | (half > 0))(lambda: fill(jnp.where(half == 0, place["next"], place["stream"]), False))
            else:
                fill(0, True)
            phases.norm_scales(sync, scales, B, D, dims.eps, squares, tag)

        def fill_attended(tag):  # type: ignore[no-untyped-def]
            run = Run.of(products["o"], team, rank, 0)
            sizes = (B, N, G, rows, run.product.slots, item_splits)
            at = (jnp.int32(place["states"]), run.unit(0) * rows, run.units * rows, tag)
            phases.attended_x((g["length"], sync, xbuf, *x_steps), sizes, (width, x_plan.x), dims.window, at)
            arrived(0)

        def fill_h(run, tag, i):  # type: ignore[no-untyped-def]
            at = (jnp.int32(place["h"]), rank, run.units, i * group["down"], tag)
            phases.h_x((sync, xbuf, *x_steps), (B, N, dims.F, rows, group["down"]), (width, 0), at)
            arrived(first_of_h + i)

        def h_is_due(t, i, run, tiles):  # type: ignore[no-untyped-def]
            """Whether the i-th group of h is next, t of this team's `tiles` of gate and up being done: when all are, and what
            they were multiplied with is free. Before, where h has a place of its own, once every tile that it comes from is
            two rounds behind: nobody waits for one who has done less, so somebody can always go on, and hardly any wait (of one
            round behind some did, while sums lay there). The last is never early: consumers would outrun `xfree`."""
            last = jnp.minimum((i + 1) * group["down"], run.units) - 1
            round_ = lax.div((run.unit(last) + 1) * (2 * rows // COLUMNS) - 1, run.product.teams)
            groups = groups_of("down", run.units)
            early = ((last + 1) * per_unit <= x_plan.x) & (round_ + 2 < t) & (i + 1 < groups)
            return (i < groups) & (early | (t > tiles))

        @pl.when(w == W)
        def _messenger():  # type: ignore[no-untyped-def]
            base = g["first"][0] if whole else jnp.int32(0)
            launch = persistent.launch_number(sync, seen, arrivals, W)

            def one(layer, half, used):  # type: ignore[no-untyped-def]
                """The half of a block: 0 is attention, 1 the MLP."""
                tag = launch * TAGS + layer

                def taker(tiles, used, *to, epilogue, refs, patient=False):  # type: ignore[no-untyped-def]
                    def take(t):  # type: ignore[no-untyped-def]
                        watch = (t + 1 < tiles).astype(jnp.int32) if patient else 0
                        at = (place_of(used + t), team + t * config.teams, rank, launch * TAGS + used + t, base + layer, watch)
                        phases.take_sums(sync, B, N, COLUMNS, at, to, epilogue, refs)
                        plgpu.barrier_arrive(summed.at[lax.rem(used + t, turns // 2)])

                    return take

                if whole:
                    pl.when((layer > 0) | (half > 0))(lambda: plgpu.barrier_wait(xfree))
                fill_normed(half, layer, tag, base)
                tiles = [products[name].tiles_of(team) for name in names]  # of qkv and o, or gate_up and down, or all four
                first, second = (jnp.where(half == 0, tiles[i], tiles[i + 2]) for i in (0, 1)) if whole else tiles

                def attention_between():  # type: ignore[no-untyped-def]
                    epilogue, bias = phases.qkv_rows(dims.sizes["qkv"][1], dims.bias), [g["bias"]] if dims.bias else []
                    take = taker(first, used, tag, jnp.int32(place["qkv"]), epilogue=epilogue, refs=(scales, *bias))
                    pl.loop(0, first)(take)
                    plgpu.barrier_wait(xfree)
                    fill_attended(tag)

                def mlp_between():  # type: ignore[no-untyped-def]
                    # An int8 tile comes in half the time: there the trip that patience costs is one too many.
                    to, epilogue = (tag, jnp.int32(place["h"])), phases.gate_up(dims.F)
                    take = taker(first, used, *to, epilogue=epilogue, refs=(scales,), patient=not int8)
                    run = Run.of(products["down"], team, rank, 0)

                    def take_and_fill(t, filled):  # type: ignore[no-untyped-def]
                        pl.when(t < first)(lambda: take(t))
                        pl.when(t == first)(lambda: plgpu.barrier_wait(xfree))
                        due = h_is_due(t + 1, filled, run, first)
                        pl.when(due)(lambda: fill_h(run, tag, filled))
                        return filled + due.astype(jnp.int32)

                    lax.fori_loop(0, first + groups_of("down", run.units), take_and_fill, jnp.int32(0))

                if whole:
                    pl.when(half == 0)(attention_between)
                    pl.when(half == 1)(mlp_between)
                    # What is sent after the MLP is read in the next layer.
                    to = tag + half, jnp.where(half == 0, place["stream"], place["next"])
                    epilogue, refs = phases.residual_rows(B, D), (g["stream"],)
                else:
                    (attention_between if attention else mlp_between)()
                    to, epilogue, refs = (tag, jnp.int32(0)), phases.store(B, D), (g["out"],)
                pl.loop(0, second)(taker(second, used + first, *to, epilogue=epilogue, refs=refs))
                return used + first + second

            def both(layer, used):  # type: ignore[no-untyped-def]
                if not whole:
                    return one(layer, 1 if mlp else 0, used)
                return lax.fori_loop(0, 2, lambda half, used: one(layer, half, used), used)

            every_layer(both, jnp.int32(0))

        # ------------------------------------------------ the consumers

        def consume(which, launch, ring, used):  # type: ignore[no-untyped-def]
            """The which-th product: a number that is known as the kernel runs, so that all have the same code. Instructions
            that are no longer in the multiprocessor's cache come through L2, behind the weights."""

            def of_product(first, *others):  # type: ignore[no-untyped-def]
                for i, other in enumerate(others, 1):
                    first = jnp.where(which == i, other, first)
                return first

            tiles = of_product(*(p.tiles_of(team) for p in products.values()))
            units = of_product(*(p.units_of(rank) for p in products.values()))
            of_group = of_product(*(jnp.int32(group[name]) for name in names))
            first_x = of_product(*(jnp.int32(first_piece[name] // per_unit) for name in names))
            told = of_product(*(jnp.int32(first_of_h if name == "down" else 0) for name in names))

            def unit(t, i):  # type: ignore[no-untyped-def]
                at = t * units + i
                slot = lax.rem(ring + at, S)

                @pl.when(t == 0)
                def _():  # type: ignore[no-untyped-def]
                    new = lax.div(i, of_group)
                    pl.when(i == new * of_group)(lambda: plgpu.barrier_wait(xfull.at[told + new]))

                plgpu.barrier_wait(full.at[slot])
                return slot, first_x + i

            def multiplied(t):  # type: ignore[no-untyped-def]
                if not int8:

                    def multiply(acc):  # type: ignore[no-untyped-def]
                        @pl.loop(0, units)
                        def _(i):  # type: ignore[no-untyped-def]
                            slot, piece = unit(t, i)
                            persistent.wgmma_fence()
                            plgpu.wgmma(acc, wbuf.at[slot, :, pl.ds(w * 64, 64)].T, xbuf.at[piece].T)
                            # Given back at once: with two units at wgmma the ring would be one shorter.
                            plgpu.wgmma_wait(0)
                            plgpu.barrier_arrive(empty.at[slot])

                        return acc[...]

                    return pl.run_scoped(multiply, plgpu.ACC((64, N), f32))

                def step(i, total):  # type: ignore[no-untyped-def]
                    slot, unit_of_x = unit(t, i)

                    def multiply(*products):  # type: ignore[no-untyped-def]
                        for j, product in enumerate(products):
                            piece = x_int8.at[unit_of_x * per_unit + j]
                            plgpu.wgmma(product, w_int8.at[slot, j, pl.ds(w * 64, 64)], piece.T)
                        sum_ = total
                        for j, product in enumerate(products):
                            product = plgpu.wgmma_accumulator_load(product, wait_n=per_unit - 1 - j)
                            at = (w, slot * per_unit + j, unit_of_x * per_unit + j)
                            sum_ = fixed_point.add_scaled((more["sbuf"], more["steps"]), N, product, sum_, *at)
                        return sum_

                    total = pl.run_scoped(multiply, *(plgpu.ACC((64, 2 * N), jnp.int32) for _ in range(per_unit)))
                    persistent.finish(total)  # the unit's scales are loaded
                    plgpu.barrier_arrive(empty.at[slot])
                    return total

                zero = plgpu.layout_cast(jnp.zeros((64, N), f32), plgpu.Layout.WGMMA)
                return lax.fori_loop(0, units, step, zero)

            # Whoever sends the sums of a tile has seen its own messenger take those of the last but one: so what it sends says
            # to all that the places of that one are read, and two tiles later they are written again.
            @pl.loop(0, tiles)
            def _(t):  # type: ignore[no-untyped-def]
                value = multiplied(t)
                use = used + t

                # All four warps, before any sends: the messenger needs the words of one of them only to go on, and were it two
                # tiles further, the others would wait for a phase that they can no longer tell from the one after it.
                @pl.when(use >= turns // 2)
                def _():  # type: ignore[no-untyped-def]
                    plgpu.barrier_wait(summed.at[lax.rem(use, turns // 2)])
                    persistent.together()

                phases.send_sums(value, sync, B, N, W, place_of(use), w, rank, launch * TAGS + use)

            # Who has nothing to multiply waits all the same, lest the messenger miss one of two arrivals.
            @pl.when(tiles * units == 0)
            def _():  # type: ignore[no-untyped-def]
                @pl.loop(0, jnp.maximum(lax.div(units + (of_group - 1), of_group), 1))
                def _(i):  # type: ignore[no-untyped-def]
                    plgpu.barrier_wait(xfull.at[told + i])

            plgpu.barrier_arrive(xfree)
            return ring + tiles * units, used + tiles

        def foreign(ring, i, count):  # type: ignore[no-untyped-def]
            """A tile that another warpgroup takes: seen, and given back."""

            @pl.when(i < count)
            def _():  # type: ignore[no-untyped-def]
                slot = lax.rem(ring + i, S)
                plgpu.barrier_wait(full.at[slot])
                plgpu.barrier_arrive(empty.at[slot])

        def attend(tag, ring, layer):  # type: ignore[no-untyped-def]
            queries, probabilities, scratch, fresh, halved = attending
            scale = H**-0.5 * 1.4426950408889634

            def one(j, ring):  # type: ignore[no-untyped-def]
                item = b + j * blocks
                row, head, split, n, lo, first, count = item_tiles(item)

                share(row, head, split, n, lo, first, count, ring, item)
                return ring + count

            def share(row, head, split, n, lo, first, count, ring, item):  # type: ignore[no-untyped-def]
                newest = page_of(row, lax.div(jnp.maximum(n - 1, 0), TILE))  # asked for while qkv is waited for
                refs = (sync, g["cos"], g["sin"], queries, fresh)
                phases.rotate(refs, (K, G, H, Q), (jnp.int32(place["qkv"]), tag, row, head, w))
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
                        refs = (fresh, kvbuf, *keys, *values)
                        at = (head, newest, lax.rem(n - 1, P), slot, w, layer)
                        phases.new_position(refs, (K, H, P, 128, COLUMNS), at)
                        plgpu.commit_smem()

                    k_TH = kvbuf.at[slot, pl.ds(0, TILE), pl.ds(0, H)]
                    v_TH = kvbuf.at[slot, pl.ds(TILE, TILE), pl.ds(0, H)]

                    def scores(ref):  # type: ignore[no-untyped-def]
                        plgpu.wgmma(ref, k_TH, queries.at[w].T)
                        return ref[...]

                    s_TQ = pl.run_scoped(scores, plgpu.ACC((TILE, Q), f32))

                    def visible(shape):  # type: ignore[no-untyped-def]
                        position = base + plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
                        return (position < n) & (position >= lo)

                    seen_TQ = visible((TILE, Q))
                    s_TQ = jnp.where(seen_TQ, s_TQ * scale, MASKED)
                    new_m_Q = jnp.maximum(m_Q, mosaic.reduce_rows("max", Q)(s_TQ, scratch.at[w]))
                    alpha_Q = jnp.exp2(m_Q - new_m_Q)
                    p_TQ = jnp.where(seen_TQ, jnp.exp2(s_TQ - lax.broadcast_in_dim(new_m_Q, (TILE, Q), [1])), 0.0)
                    l_TQ = l_TQ * lax.broadcast_in_dim(alpha_Q, (TILE, Q), [1]) + p_TQ
                    probabilities.at[w].T[...] = plgpu.layout_cast(p_TQ.astype(bf16), plgpu.Layout.WGMMA_TRANSPOSED)

                    # Values outside the range may be NaN, and 0·NaN is NaN: zero those rows of a tile that has some.
                    @pl.when((base + TILE > n) | (base < lo))
                    def _():  # type: ignore[no-untyped-def]
                        v = plgpu.load(v_TH, layout=plgpu.Layout.WGMMA)
                        kvbuf[slot, pl.ds(TILE, TILE), pl.ds(0, H)] = jnp.where(visible((TILE, H)), v, jnp.zeros_like(v))

                    plgpu.commit_smem()

                    def weighed(ref):  # type: ignore[no-untyped-def]
                        plgpu.wgmma(ref, v_TH.T, probabilities.at[w].T)
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
                l_Q = mosaic.reduce_rows("add", Q)(l_TQ, scratch.at[w])
                state = place["states"] + ((head * B + row) * item_splits + split) * phases.states_words(G, H)

                # The second warpgroup hands its half to the first, which sends both as one.
                @pl.when((w == 1) & (count > 1))
                def _():  # type: ignore[no-untyped-def]
                    plgpu.barrier_wait(merged)
                    phases.hand_state(halved, acc_HQ, m_Q, l_Q)
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(handed)

                @pl.when((w == 0) & (count > 0))
                def _():  # type: ignore[no-untyped-def]
                    pl.when(count > 1)(lambda: plgpu.barrier_wait(handed))
                    phases.send_state((sync, halved), acc_HQ, m_Q, l_Q, (G, H, Q), (state, tag, (count > 1).astype(jnp.int32)))
                    pl.when(count > 1)(lambda: plgpu.barrier_arrive(merged))

            return lax.fori_loop(0, lax.div(items - b + (blocks - 1), blocks), one, ring)

        @pl.when(w < W)
        def _consumers():  # type: ignore[no-untyped-def]
            launch = persistent.launch_number(sync, seen, arrivals, 1)
            if attention:
                pl.when(w == 0)(lambda: plgpu.barrier_arrive(merged))  # there is room for the first half

            def one(layer, carry):  # type: ignore[no-untyped-def]
                def product(which, carry):  # type: ignore[no-untyped-def]
                    ring, used = consume(which, launch, *carry)
                    if attention:
                        attends = functools.partial(attend, launch * TAGS + layer, layer=layer)
                        ring = lax.cond(which == 0, attends, lambda ring: ring, ring)
                    return ring, used

                return lax.fori_loop(0, len(names), product, carry)

            every_layer(one, (jnp.int32(0), jnp.int32(0)))

    body.__name__ = f"decode_{dims.kind}_{'int8' if int8 else 'bf16'}_n{N}_x{L}"
    swizzled, swizzled_int8 = persistent.swizzled(), persistent.swizzled(8)
    ring = plgpu.SMEM((S, rows if not int8 else 128, COLUMNS), bf16, transforms=swizzled)
    xs: list[Any] = [plgpu.SMEM((x_plan.count, N, width), bf16, transforms=swizzled)]
    in_int8: dict[str, Any] = {}
    attending_barriers: dict[str, Any] = {}
    if int8:  # the same bytes, read another way
        stage = (S, per_unit, COLUMNS, GROUP)
        ring_int8 = plgpu.SMEM(stage, jnp.int8), plgpu.SMEM(stage, jnp.int8, transforms=swizzled_int8)
        ring = plgpu.RefUnion(*ring_int8, *([ring] if attention else []))
        xs += [plgpu.SMEM((x_plan.count, 2 * N, GROUP), jnp.int8, transforms=swizzled_int8)]
        in_int8 = dict(sbuf=plgpu.SMEM((S, per_unit, COLUMNS), bf16), steps=plgpu.SMEM((x_plan.count, N), f32))
    if attention:
        queries, probabilities = (plgpu.SMEM((W, Q, size), bf16, transforms=swizzled) for size in (H, TILE))
        newest = plgpu.SMEM((W, 2, H), bf16)  # key and value
        halved = plgpu.SMEM(phases.halved_shape(H, Q), f32)
        xs += [(queries, probabilities, plgpu.SMEM((W, 256 * (Q // 8)), f32), newest, halved)]
        attending_barriers = dict(handed=plgpu.Barrier(), merged=plgpu.Barrier())
    scratch = dict(
        wbufs=ring,
        xbufs=plgpu.RefUnion(*xs),
        scales=plgpu.SMEM((N,), f32),
        full=plgpu.Barrier(num_arrivals=copies, num_barriers=S),
        empty=plgpu.Barrier(num_arrivals=W, num_barriers=S),
        xfull=plgpu.Barrier(num_barriers=first_of_h + arrivals_of_x.get("down", 0)),
        xfree=plgpu.Barrier(num_arrivals=W),
        summed=plgpu.Barrier(num_barriers=turns // 2),
        **in_int8,
        **attending_barriers,
    )
    kernel = plgpu.kernel(
        body,
        out_type=list(outputs.values()),
        grid=(blocks,),
        grid_names=("b",),
        num_threads=W + 2,
        thread_name="w",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
    )
    written = len(in_place)

    # The references stay inside: so the function is pure, and a program holds it once, however many layers call it. With
    # the caller's references every call would be a kernel of its own, to be compiled by itself.
    @jax.jit
    def run(*operands: Any) -> list[Any]:
        refs = [jax.new_ref(x) for x in operands[-written:]]
        return [*kernel(*operands[:-written], *refs), *(jax.freeze(ref) for ref in refs)]

    return run
