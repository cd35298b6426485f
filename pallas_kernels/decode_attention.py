"""Attention of one new token a sequence over a paged KV cache (flash decoding), for Hopper GPUs.

    q_BKGH          bf16 or f16   the new token's query heads, G to a kv head; rope applied, not scaled
    keys_XKPH       as q          pages of keys: page, kv head, position within the page, head dimension
    values_XKPH     as q
    pages_BM        int32         page m of row b holds its positions m·P … m·P + P-1
    length_B        int32         tokens of the row that are in the cache, the newest included; 0: a padding row, output 0
    → out_BKGH      as q

Row b attends to its positions max(0, length - window) … length - 1 with scale H**-0.5. Pages past the
length, and tiles of 64 positions before the window, are never read; no page-table entry and no cached number (NaN
included) outside the range can reach the output. length ≤ M·P and page ids below X are the caller's to keep.

What bounds it: reading the keys and values once, 4·K·S·H bytes a row (1 MB for Llama-3-8B at S = 256: 0.24 µs), so with
short contexts nothing but latency: launch, length and page id, the first pages from memory, two small products, a
reduction. Hence one kernel, and no second one to combine: a block has `warpgroups` warpgroups, each taking every n-th tile
of 64 positions with its own TMA pipeline of `stages` tiles; their softmax states are combined through shared memory and,
where `cluster` > 1 blocks share a (row, kv head), through the leader's shared memory. Both products are transposed so
that the long axis fills wgmma's 64 rows: scores_TG = K_TH·q_GHᵀ, out_HG += V_THᵀ·p_TG. The method is online softmax over
split keys: Dao et al., "Flash-Decoding for long-context inference", 2023. Blocks start row by row: of many rows, the longest
had better come first, so that the last blocks are short ones.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic, new_token, tuning

TILE = 64  # kv positions a product takes: the rows of one wgmma
MASKED = -1e30  # a finite stand-in for -inf, so that a row with nothing to attend to gives 0 and not NaN
IMPLEMENTATIONS = ("mosaic", "reference")
SHARED_MEMORY = 227 * 1024  # bytes a block may have


@dataclasses.dataclass(frozen=True)
class Config:
    """How one (row, kv head) is spread: blocks of a cluster, warpgroups of a block, tiles in flight a warpgroup."""

    cluster: int = 1
    warpgroups: int = 4
    stages: int = 1

    def __post_init__(self) -> None:
        for field, allowed in (("cluster", (1, 2, 4, 8)), ("warpgroups", tuple(range(1, 8))), ("stages", (1, 2, 3, 4))):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field}={getattr(self, field)!r}: allowed are {allowed}")


def reference(
    q_BKGH: jax.Array,
    keys_XKPH: jax.Array,
    values_XKPH: jax.Array,
    pages_BM: jax.Array,
    length_B: jax.Array,
    *,
    window: int | None = None,
) -> jax.Array:
    """The same in plain jnp: gathers every page of the table, scores in float32."""
    B, K, _, H = q_BKGH.shape
    P, M = keys_XKPH.shape[2], pages_BM.shape[1]
    keys_BKSH = keys_XKPH[pages_BM].swapaxes(1, 2).reshape(B, K, M * P, H)
    values_BKSH = values_XKPH[pages_BM].swapaxes(1, 2).reshape(B, K, M * P, H)
    position_S = jnp.arange(M * P)
    seen_BS = position_S < length_B[:, None]
    if window is not None:
        seen_BS &= position_S >= length_B[:, None] - window
    seen_BKGS = seen_BS[:, None, None]
    scores_BKGS = jnp.einsum("BKGH,BKSH->BKGS", q_BKGH, keys_BKSH, preferred_element_type=jnp.float32)
    scores_BKGS = jnp.where(seen_BKGS, scores_BKGS * H**-0.5, MASKED)
    probs_BKGS = jnp.where(seen_BKGS, jax.nn.softmax(scores_BKGS, axis=-1), 0.0).astype(q_BKGH.dtype)
    values_BKSH = jnp.where(seen_BS[:, None, :, None], values_BKSH, 0)  # 0·NaN is NaN
    out_BKGH = jnp.einsum("BKGS,BKSH->BKGH", probs_BKGS, values_BKSH, preferred_element_type=jnp.float32)
    return out_BKGH.astype(q_BKGH.dtype)


@functools.lru_cache(maxsize=256)
def _kernel(
    B: int,
    K: int,
    G: int,
    H: int,
    P: int,
    N: int,
    window: int | None,
    dtype: Any,
    config: Config,
    appends: bool = False,
    interpret: Any = None,
) -> Any:
    """The Mosaic GPU kernel: (q of whole blocks of 8 rows, pages, lengths, keys, values) → out. N: q rows a block has.

    appends: (qkv, cos, sin, pages, lengths, keys, values) → (out, keys, values), as `append_and_attend` has them.
    """
    from jax.experimental import pallas as pl

    plgpu = mosaic.plgpu()

    C, W, S = config.cluster, config.warpgroups, config.stages
    scale = H**-0.5 * math.log2(math.e)
    copies = max(1, TILE // P)  # pages a tile
    rows = min(TILE, P)

    def body(*refs, qbuf, kbuf, vbuf, pbuf, obuf, red, near, far, bars):  # type: ignore[no-untyped-def]
        *new, pages, length, keys, values, out = refs
        qfull, kfull, vfull, done = bars
        k, b, w = lax.axis_index("k"), lax.axis_index("b"), lax.axis_index("w")
        c = lax.axis_index("c") if C > 1 else 0
        first_row = jnp.int32(0) if appends else (b * K + k) * (G if N % G == 0 else N)
        if not appends:
            plgpu.copy_gmem_to_smem(new[0].at[pl.ds(lax.div(first_row, N) * N, N)], qbuf.at[w], qfull.at[w])
        M = pages.shape[1]

        def page_ids(tile):  # type: ignore[no-untyped-def]
            return [pages[b, jnp.minimum(lax.div(tile * TILE + j * rows, P), M - 1)] for j in range(copies)]

        n = length[b]
        if window is None:
            lo: Any = 0
            tile0 = c * W + w
            first_ids = [page_ids(tile0 + s * (C * W)) for s in range(S)]
            # No page id is that small: this only makes the loads of ids and length travel together.
            for ids in first_ids:
                n = functools.reduce(lambda x, y: x + (y < -(2**30)).astype(jnp.int32), ids, n)
        else:
            lo = jnp.maximum(n - window, 0)
            tile0 = lax.div(lo, TILE) + c * W + w
            first_ids = [page_ids(tile0 + s * (C * W)) for s in range(S)]
        tiles = jnp.maximum(lax.div(n + (TILE - 1) - tile0 * TILE + (C * W - 1) * TILE, C * W * TILE), 0)

        def tile_of(i):  # type: ignore[no-untyped-def]
            return tile0 + i * (C * W)

        def copy(src, dst, bar, i, slot, ids=None):  # type: ignore[no-untyped-def]
            start = tile_of(i) * TILE
            ids = ids or page_ids(tile_of(i))
            for j in range(copies):
                page = ids[0] if j == 0 else jnp.where(start + j * rows < n, ids[j], ids[0])  # only valid pages are read
                at = src.at[page, k] if P <= TILE else src.at[page, k, pl.ds(lax.rem(start, P), TILE)]
                to = dst.at[w, slot] if copies == 1 else dst.at[w, slot, pl.ds(j * rows, rows)]
                plgpu.copy_gmem_to_smem(at, to, bar.at[w * S + slot])

        for s in range(S):

            @pl.when(tiles > s)
            def _fill(s=s):  # type: ignore[no-untyped-def]
                copy(keys, kbuf, kfull, s, s, first_ids[s])
                copy(values, vbuf, vfull, s, s, first_ids[s])

        if appends:
            token = NewToken(new, qbuf, (K, G, H, P), b, k, w, interpret)
            token.rotate()
            plgpu.commit_smem()
        else:
            plgpu.barrier_wait(qfull.at[w])

        def step(i, carry):  # type: ignore[no-untyped-def]
            acc_HN, m_N, l_TN = carry
            slot = lax.rem(i, S)
            plgpu.barrier_wait(kfull.at[w * S + slot])
            base = tile_of(i) * TILE
            if appends:

                @pl.when(base + TILE >= n)
                def _new_key():  # type: ignore[no-untyped-def]
                    token.append(0, keys, kbuf, slot, pages[b, lax.div(n - 1, P)], lax.rem(n - 1, P), n - 1 - base)
                    plgpu.commit_smem()

            def scores(ref):  # type: ignore[no-untyped-def]
                plgpu.wgmma(ref, kbuf.at[w, slot], qbuf.at[w].T)
                return ref[...]

            s_TN = pl.run_scoped(scores, plgpu.ACC((TILE, N), jnp.float32))

            def seen(shape):  # type: ignore[no-untyped-def]
                position = base + plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
                mask = position < n
                return mask & (position >= lo) if window is not None else mask

            seen_TN = seen((TILE, N))
            s_TN = jnp.where(seen_TN, s_TN * scale, MASKED)
            new_m_N = jnp.maximum(m_N, mosaic.reduce_rows("max", N, interpret=interpret)(s_TN, red.at[w]))

            # The reduction's barrier lies behind us: every warp's product has read the keys.
            @pl.when(i + S < tiles)
            def _next_keys():  # type: ignore[no-untyped-def]
                copy(keys, kbuf, kfull, i + S, slot)

            alpha_N = jnp.exp2(m_N - new_m_N)
            p_TN = jnp.where(seen_TN, jnp.exp2(s_TN - lax.broadcast_in_dim(new_m_N, (TILE, N), [1])), 0.0)
            l_TN = l_TN * lax.broadcast_in_dim(alpha_N, (TILE, N), [1]) + p_TN
            pbuf.at[w].T[...] = plgpu.layout_cast(p_TN.astype(dtype), plgpu.Layout.WGMMA_TRANSPOSED)
            plgpu.barrier_wait(vfull.at[w * S + slot])

            # Values outside the range may be NaN, and 0·NaN is NaN: zero those rows of a tile that has some.
            @pl.when((base + TILE > n) | (base < lo))
            def _zero():  # type: ignore[no-untyped-def]
                v_TH = plgpu.load(vbuf.at[w, slot], layout=plgpu.Layout.WGMMA)
                vbuf[w, slot] = jnp.where(seen((TILE, H)), v_TH, jnp.zeros_like(v_TH))

            if appends:

                @pl.when(base + TILE >= n)
                def _new_value():  # type: ignore[no-untyped-def]
                    plgpu.commit_smem()  # a barrier: the zeros have been written
                    token.append(1, values, vbuf, slot, pages[b, lax.div(n - 1, P)], lax.rem(n - 1, P), n - 1 - base)

            plgpu.commit_smem()

            def weighed(ref):  # type: ignore[no-untyped-def]
                plgpu.wgmma(ref, vbuf.at[w, slot].T, pbuf.at[w].T)
                return ref[...]

            more_HN = pl.run_scoped(weighed, plgpu.ACC((H, N), jnp.float32))
            acc_HN = acc_HN * lax.broadcast_in_dim(alpha_N, (H, N), [1]) + more_HN

            @pl.when(i + S < tiles)
            def _next_values():  # type: ignore[no-untyped-def]
                plgpu.commit_smem()  # a barrier: every warp's product has read the values
                copy(values, vbuf, vfull, i + S, slot)

            return acc_HN, new_m_N, l_TN

        by_column = plgpu.Layout.WGMMA.reduce(0)
        acc_HN, m_N, l_TN = lax.fori_loop(
            0,
            tiles,
            step,
            (
                plgpu.layout_cast(jnp.zeros((H, N), jnp.float32), plgpu.Layout.WGMMA),
                plgpu.layout_cast(jnp.full((N,), MASKED, jnp.float32), by_column),
                plgpu.layout_cast(jnp.zeros((TILE, N), jnp.float32), plgpu.Layout.WGMMA),
            ),
        )
        l_N = mosaic.reduce_rows("add", N, interpret=interpret)(l_TN, red.at[w])

        def combine(states, count):  # type: ignore[no-untyped-def]
            m_ref, l_ref, acc_ref = states
            ms = [plgpu.load(m_ref.at[i], layout=by_column, optimized=False) for i in range(count)]
            ls = [plgpu.load(l_ref.at[i], layout=by_column, optimized=False) for i in range(count)]
            m = functools.reduce(jnp.maximum, ms)
            weights = [jnp.exp2(x - m) for x in ms]
            total = functools.reduce(jnp.add, [x * y for x, y in zip(weights, ls)])
            acc = None
            for i in range(count):
                part = plgpu.load(acc_ref.at[i], layout=plgpu.Layout.WGMMA, optimized=False)
                part = part * lax.broadcast_in_dim(weights[i], (H, N), [1])
                acc = part if acc is None else acc + part
            return m, total, acc

        def finish(acc, total):  # type: ignore[no-untyped-def]
            scaled = acc * lax.broadcast_in_dim(jnp.where(total > 0.0, 1.0 / total, 0.0), (H, N), [1])
            mosaic.store(obuf.T, plgpu.layout_cast(scaled.astype(dtype), plgpu.Layout.WGMMA_TRANSPOSED))
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(obuf.at[pl.ds(lax.rem(first_row, N), G)], out.at[b, k])
            plgpu.wait_smem_to_gmem(0)

        if W > 1:
            for ref, mine in zip(near, (m_N, l_N, acc_HN), strict=True):
                ref[w] = mine
            plgpu.barrier_arrive(done)
            plgpu.barrier_wait(done)

        @pl.when(w == 0)
        def _combine():  # type: ignore[no-untyped-def]
            m, total, acc = combine(near, W) if W > 1 else (m_N, l_N, acc_HN)
            if C == 1:
                finish(acc, total)
            else:
                far_m, far_l, far_acc = (plgpu.cluster_ref(r.at[c], {"c": 0}) for r in far)
                far_m[...] = m
                far_l[...] = total
                far_acc[...] = acc

        if C > 1:
            mosaic.cluster_sync()

            @pl.when((w == 0) & (c == 0))
            def _leader():  # type: ignore[no-untyped-def]
                _, total, acc = combine(far, C)
                finish(acc, total)

    tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    states = lambda count: (  # noqa: E731
        plgpu.SMEM((count, N), jnp.float32),
        plgpu.SMEM((count, N), jnp.float32),
        plgpu.SMEM((count, H, N), jnp.float32),
    )
    body.__name__ = f"{'append_and_attend' if appends else 'decode_attention'}_c{C}w{W}s{S}"
    cluster: dict[str, Any] = dict(cluster=(C,), cluster_names=("c",)) if C > 1 else {}
    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((B, K, G, H), dtype),
        grid=(B, K),
        grid_names=("b", "k"),
        **cluster,
        num_threads=W,
        thread_name="w",
        scratch_types=dict(
            qbuf=plgpu.SMEM((W, N, H), dtype, transforms=tiled),
            kbuf=plgpu.SMEM((W, S, TILE, H), dtype, transforms=tiled),
            vbuf=plgpu.SMEM((W, S, TILE, H), dtype, transforms=tiled),
            pbuf=plgpu.SMEM((W, N, TILE), dtype, transforms=tiled),
            obuf=plgpu.SMEM((N, H), dtype),
            red=plgpu.SMEM((W, mosaic.scratch_words(N)), jnp.float32),
            near=states(W) if W > 1 else (),
            far=states(C) if C > 1 else (),
            bars=(
                plgpu.Barrier(num_barriers=W),
                plgpu.Barrier(num_arrivals=copies, num_barriers=W * S),
                plgpu.Barrier(num_arrivals=copies, num_barriers=W * S),
                plgpu.Barrier(num_arrivals=W),
            ),
        ),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
        interpret=interpret,
    )
    if not appends:
        return jax.jit(kernel)  # lowered once in a program, however many layers call it

    @jax.jit  # the references stay inside, so that here too a program holds the kernel once
    def run(*operands: jax.Array) -> tuple[jax.Array, ...]:
        keys, values = (jax.new_ref(pages) for pages in operands[-2:])
        return kernel(*operands[:-2], keys, values), jax.freeze(keys), jax.freeze(values)

    return run


class NewToken:
    """What `append_and_attend` does with a new token's qkv of one (row, kv head): each warpgroup for itself, all threads of it.

    Key and value stay in two of the rows that pad the queries, whose scores nobody reads: when the tile they belong to
    arrives, there is nothing to fetch.
    """

    def __init__(self, new: Any, qbuf: Any, dims: tuple[int, ...], row: Any, head: Any, w: Any, interpret: Any):
        self.new, self.qbuf, self.dims, self.row, self.head, self.w, self.interpret = new, qbuf, dims, row, head, w, interpret

    def rotate(self) -> None:
        """Rotated queries, rotated key, value, zeros into the warpgroup's part of qbuf."""
        K, G, H, _ = self.dims
        N = self.qbuf.shape[1]
        if self.interpret is None:
            new_token.rotate_new_token((*self.new, self.qbuf), K, G, H, N, self.row, self.head, self.w)
            return
        qkv, cos, sin = self.new
        x, c, s = qkv[self.row, self.head].astype(jnp.float32), cos[self.row], sin[self.row]
        a, b = jnp.split(x[:-1], 2, axis=-1)
        x = jnp.concatenate([jnp.concatenate([a * c - b * s, b * c + a * s], axis=-1), x[-1:]])
        self.qbuf[self.w] = jnp.pad(x.astype(qkv.dtype), ((0, N - len(x)), (0, 0)))

    def append(self, which: int, pages: Any, tiles: Any, slot: Any, page: Any, offset: Any, line: Any) -> None:
        """The key (which = 0) or value (1) into the cache, and into line `line` of the tile that was read before."""
        G, N, S = self.dims[1], self.qbuf.shape[1], tiles.shape[1]
        if self.interpret is None:
            refs = (self.qbuf, pages, tiles)
            place = (page, offset, self.w * S + slot, line)
            new_token.append_kept(refs, self.dims, TILE, N, G + which, self.w, self.head, *place)
            return
        pages[page, self.head, offset] = tiles[self.w, slot, line] = self.qbuf[self.w, G + which]


def shared_memory_bytes(config: Config, H: int, N: int) -> int:
    """What a block of the kernel allocates: each buffer aligned to 1024 bytes, the barriers in a last kilobyte."""
    C, W, S = config.cluster, config.warpgroups, config.stages
    states = [4 * N, 4 * N, 4 * H * N]
    buffers = [2 * W * N * H, *2 * [2 * W * S * TILE * H], 2 * W * N * TILE, 2 * N * H, W * N * 128]
    buffers += [count * size for count in (W, C) if count > 1 for size in states]
    return sum(-(-size // 1024) * 1024 for size in buffers) + 1024


Operand = jax.Array | jax.ShapeDtypeStruct


def why_unsupported(q_BKGH: Operand, keys_XKPH: Operand, values_XKPH: Operand, interpret: Any = None) -> str | None:
    """Why the Mosaic kernel cannot take these operands (arrays, or their shapes) here, or None where it can."""
    _, _, G, H = q_BKGH.shape
    P = keys_XKPH.shape[2]
    if why := tuning.why_no_mosaic(interpret):
        return why
    if q_BKGH.dtype not in (jnp.bfloat16, jnp.float16) or {keys_XKPH.dtype, values_XKPH.dtype} != {q_BKGH.dtype}:
        return f"q is {q_BKGH.dtype}, keys {keys_XKPH.dtype}, values {values_XKPH.dtype}: all must be bfloat16, or all float16"
    if not 1 <= G <= 16:
        return f"{G} query heads to a kv head: 1 to 16 are supported"
    if H not in (64, 128):
        return f"head dimension {H}: 64 and 128 are supported"
    if P not in (8, 16, 32) and P % TILE:
        return f"{P} tokens a page: 8, 16, 32 and multiples of {TILE} are supported"
    return None


def default_config(B: int, K: int, M: int, P: int, device: str | None = None) -> Config:
    """The tuned config of this device for B·K (row, kv head) pairs and tables of M pages of P tokens."""
    found = tuning.lookup("decode_attention", device, pairs=B * K, positions=M * P)
    return Config(**found) if found else Config()


def _check(
    B: int,
    K: int,
    H: int,
    keys_XKPH: jax.Array,
    values_XKPH: jax.Array,
    pages_BM: jax.Array,
    length_B: jax.Array,
    window: int | None,
    implementation: str | None,
) -> None:
    """Raises ValueError where the operands do not fit together, or a setting is unknown."""
    X, _, P, _ = keys_XKPH.shape
    if keys_XKPH.shape != (X, K, P, H) or values_XKPH.shape != keys_XKPH.shape:
        raise ValueError(f"keys {keys_XKPH.shape} and values {values_XKPH.shape}: both must be [X, K={K}, P, H={H}]")
    if pages_BM.ndim != 2 or pages_BM.shape[0] != B or length_B.shape != (B,):
        raise ValueError(f"pages {pages_BM.shape} and length {length_B.shape}: they must be [B={B}, M] and [B={B}]")
    if window is not None and window < 1:
        raise ValueError(f"window={window}: it must be at least 1, or None for no window")
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation={implementation!r}: allowed are {IMPLEMENTATIONS} and None")


def decode_attention(
    q_BKGH: jax.Array,
    keys_XKPH: jax.Array,
    values_XKPH: jax.Array,
    pages_BM: jax.Array,
    length_B: jax.Array,
    *,
    window: int | None = None,
    config: Config | None = None,
    implementation: str | None = None,
    interpret: Any = None,
) -> jax.Array:
    """Attention of one new token a row; shapes and meaning as in the module's docstring.

    implementation: "mosaic", "reference", or None for the kernel where it supports device, dtypes and shapes, else the
    reference. interpret: plgpu.InterpretGPUParams() simulates the kernel on the CPU (with implementation="mosaic").
    Raises ValueError for an unknown implementation, for shapes that do not fit together, for window < 1, and where
    "mosaic" is named and not supported: it never falls back silently.
    """
    B, K, G, H = q_BKGH.shape
    P = keys_XKPH.shape[2]
    _check(B, K, H, keys_XKPH, values_XKPH, pages_BM, length_B, window, implementation)
    why = why_unsupported(q_BKGH, keys_XKPH, values_XKPH, interpret) if implementation != "reference" else None
    if implementation == "mosaic" and why:
        raise tuning.Unsupported("decode_attention", why)
    if implementation == "reference" or why:
        return reference(q_BKGH, keys_XKPH, values_XKPH, pages_BM, length_B, window=window)

    N = 8 if G <= 8 else 16
    padded_G = G if N % G == 0 else N  # so that a group never straddles two blocks of N rows
    config = config or default_config(B, K, pages_BM.shape[1], P)
    q_RH = jnp.pad(q_BKGH, ((0, 0), (0, 0), (0, padded_G - G), (0, 0))).reshape(B * K * padded_G, H)
    q_RH = jnp.pad(q_RH, ((0, -q_RH.shape[0] % N), (0, 0)))
    run = _kernel(B, K, G, H, P, N, window, jnp.dtype(q_BKGH.dtype), config, False, interpret)
    out_BKGH: jax.Array = run(q_RH, pages_BM.astype(jnp.int32), length_B.astype(jnp.int32), keys_XKPH, values_XKPH)
    return out_BKGH


def append_reference(
    qkv_BKJH: jax.Array,
    cos_Bh: jax.Array,
    sin_Bh: jax.Array,
    keys_XKPH: jax.Array,
    values_XKPH: jax.Array,
    pages_BM: jax.Array,
    length_B: jax.Array,
    *,
    window: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`append_and_attend` in plain jnp."""
    a, b = jnp.split(qkv_BKJH[:, :, :-1].astype(jnp.float32), 2, axis=-1)
    cos, sin = cos_Bh[:, None, None], sin_Bh[:, None, None]
    turned_BKjH = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(qkv_BKJH.dtype)
    X, _, P, _ = keys_XKPH.shape
    position_B = jnp.maximum(length_B - 1, 0)
    page_B = jnp.take_along_axis(pages_BM, position_B[:, None] // P, axis=1)[:, 0]
    page_B = jnp.where(length_B > 0, page_B, X)  # out of range: a padding row writes nothing
    keys_XKPH = keys_XKPH.at[page_B, :, position_B % P].set(turned_BKjH[:, :, -1], mode="drop")
    values_XKPH = values_XKPH.at[page_B, :, position_B % P].set(qkv_BKJH[:, :, -1], mode="drop")
    out_BKGH = reference(turned_BKjH[:, :, :-1], keys_XKPH, values_XKPH, pages_BM, length_B, window=window)
    return out_BKGH, keys_XKPH, values_XKPH


def append_and_attend(
    qkv_BKJH: jax.Array,
    cos_Bh: jax.Array,
    sin_Bh: jax.Array,
    keys_XKPH: jax.Array,
    values_XKPH: jax.Array,
    pages_BM: jax.Array,
    length_B: jax.Array,
    *,
    window: int | None = None,
    config: Config | None = None,
    implementation: str | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rotary embedding of a new token's queries and key, its key and value into the cache, and attention, in one kernel.

    qkv_BKJH: bf16, J = G + 2: a kv head's queries, its key, its value, none of them rotated. cos_Bh, sin_Bh: float32, h = H/2,
    halves paired (h, h + H/2). The other operands, implementation, interpret and errors as in `decode_attention`; the new
    token is the last of length_B, and no two rows share its page. Returns the output and the cache with the token in it: in
    place, where the caller donates it.
    """
    B, K, J, H = qkv_BKJH.shape
    G, P = J - 2, keys_XKPH.shape[2]
    _check(B, K, H, keys_XKPH, values_XKPH, pages_BM, length_B, window, implementation)
    if cos_Bh.shape != (B, H // 2) or sin_Bh.shape != cos_Bh.shape:
        raise ValueError(f"cos {cos_Bh.shape} and sin {sin_Bh.shape}: both must be [B={B}, {H // 2}]")
    why = why_cannot_append(qkv_BKJH, keys_XKPH, values_XKPH, interpret) if implementation != "reference" else None
    if implementation == "mosaic" and why:
        raise tuning.Unsupported("append_and_attend", why)
    operands = (keys_XKPH, values_XKPH, pages_BM.astype(jnp.int32), length_B.astype(jnp.int32))
    if implementation == "reference" or why:
        return append_reference(qkv_BKJH, cos_Bh, sin_Bh, *operands, window=window)
    config = config or default_config(B, K, pages_BM.shape[1], P)
    run = _kernel(B, K, G, H, P, -(-J // 8) * 8, window, jnp.dtype(qkv_BKJH.dtype), config, True, interpret)
    keys_values, small = operands[:2], operands[2:]
    out, keys, values = run(qkv_BKJH, cos_Bh.astype(jnp.float32), sin_Bh.astype(jnp.float32), *small, *keys_values)
    return out, keys, values


def why_cannot_append(qkv_BKJH: Operand, keys_XKPH: Operand, values_XKPH: Operand, interpret: Any = None) -> str | None:
    """Why `append_and_attend`'s kernel cannot take these operands here, or None where it can."""
    B, K, J, H = qkv_BKJH.shape
    q_BKGH = jax.ShapeDtypeStruct((B, K, J - 2, H), qkv_BKJH.dtype)
    if qkv_BKJH.dtype != jnp.bfloat16:
        return f"qkv is {qkv_BKJH.dtype}: bfloat16 is supported"
    if J > 16:
        return f"{J - 2} query heads to a kv head: up to 14 are supported, as key and value take rows beside them"
    return why_unsupported(q_BKGH, keys_XKPH, values_XKPH, interpret)


def search_space(H: int, N: int) -> list[Config]:
    """Every config worth measuring that fits: one warpgroup or a few, and no more tiles in flight than memory holds."""
    configs = [Config(c, w, s) for c in (1, 2, 4, 8) for w in (1, 2, 3, 4) for s in (1, 2, 3)]
    return [config for config in configs if shared_memory_bytes(config, H, N) <= SHARED_MEMORY]
