"""The head of a language model with the choice of the best tokens in its epilogue, for Hopper GPUs.

    x_BD       bf16 or f16       last hidden states, normed; B ≤ 64
    head_VD    as x              output-major, one row a token: a device's shard of the vocabulary; or an int8 [D, V] as
                                 `linear` takes it, (tiles, scales), x then in bf16
    valid      int32             rows of head_VD that are vocabulary; those from there on are padding
    → value_BC, id_BC            float32, int32: each row's C = `candidates` largest logits in falling order, and their rows

Of equal logits the lowest id comes first; NaN counts as -inf. Where a row has fewer than C logits above -inf, the rest is
(-inf, -1), save that the first id is always one of head_VD's. The logits, float32 sums of products, are never written to
memory: with the vocabulary sharded, a device's candidates are all that has to leave it.

What bounds it: reading the head once, 2·V·D bytes (1.05 GB for Llama-3-8B: 0.236 ms at 4.46 TB/s). A block a multiprocessor
owns one range of rows, its `warpgroups` that compute a part of it each, 64 rows at a time; one more asks for `columns` columns
of everybody's rows and of x, `stages` steps ahead and across rows. The head is wgmma's left side and the batch, padded to 8s,
the narrow right one. For one candidate each thread keeps its best as rows go by; for more all logits of a block stay in
registers, and the candidates are taken out one by one. What is left of a shard, C a warpgroup, XLA reduces.

An int8 head has linear.py's kernel, one candidate only: each warpgroup keeps the best of its sums as tiles go by.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import linear, mosaic, tuning
from pallas_kernels.argmax import NO_ID, among, argmax, argmax_of_rows, better, over_rows

ROWS = 64  # rows of the head a warpgroup takes at a time: those of one wgmma
BLOCKS = 132  # multiprocessors of an H100 or H200
MAX_BATCH, MAX_CANDIDATES = 64, 64
MAX_REGISTERS = 64  # a thread may spend on a block's logits
IMPLEMENTATIONS = ("mosaic", "reference")
SHARED_MEMORY = 227 * 1024  # bytes a block may have

Head = Any  # bf16 or f16 [V, D], or (int8 tiles, bf16 scales) of a [D, V]


@dataclasses.dataclass(frozen=True)
class Config:
    """Warpgroups that compute, each 64 rows of the head a step; columns a step takes; steps in flight."""

    warpgroups: int = 2
    columns: int = 128
    stages: int = 5

    def __post_init__(self) -> None:
        for field, allowed in (("warpgroups", (1, 2, 3, 4)), ("columns", (64, 128, 256)), ("stages", tuple(range(2, 17)))):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field}={getattr(self, field)!r}: allowed are {allowed}")


def reference(
    x_BD: jax.Array, head: Head, valid: int | jax.Array | None = None, *, candidates: int = 1
) -> tuple[jax.Array, jax.Array]:
    """The same in plain jnp: the logits in float32, then their maximum or XLA's top_k."""
    if isinstance(head, tuple):
        logits_BV = linear.reference(x_BD, head, out_dtype=jnp.float32)
    else:
        logits_BV = jnp.einsum("BD,VD->BV", x_BD, head, preferred_element_type=jnp.float32)
    return of_logits(logits_BV, valid, candidates)


def of_logits(logits_BV: jax.Array, valid: int | jax.Array | None, candidates: int = 1) -> tuple[jax.Array, jax.Array]:
    """What `lm_head` returns, of logits that are there: float32 [B, V]."""
    id_V = jnp.arange(logits_BV.shape[1], dtype=jnp.int32)
    allowed_BV = ~jnp.isnan(logits_BV)
    if valid is not None:
        allowed_BV &= id_V < valid
    logits_BV = jnp.where(allowed_BV, logits_BV, -jnp.inf)
    if candidates == 1:
        value_B, id_B = argmax(logits_BV, jnp.broadcast_to(id_V, logits_BV.shape))
        return value_B[:, None], id_B[:, None]
    value_BC, id_BC = lax.top_k(logits_BV, candidates)
    return value_BC, _without_the_lowest(value_BC, id_BC)


def _merge(values: jax.Array, ids: jax.Array, candidates: int) -> tuple[jax.Array, jax.Array]:
    """The first `candidates` of sorted lists [lists, C, N] → [N, candidates].

    In a total order an entry has its list's earlier ones before it, and so have the first entries of all lists that begin
    before its own: entry j of the list that begins r-th can be among the first k only if j + r < k.
    """
    lists, C, N = values.shape
    rank, place = (np.asarray(x) for x in zip(*[(r, j) for r in range(min(candidates, lists)) for j in range(C) if r + j < C]))
    index_NL = jnp.broadcast_to(jnp.arange(lists), (N, lists))
    order_NL = lax.sort((-values[:, 0].T, ids[:, 0].T, index_NL), dimension=1, num_keys=2)[2]
    at = (order_NL[:, rank], place[None], jnp.arange(N)[:, None])
    value_NP, id_NP = lax.sort((-values[at], ids[at]), dimension=1, num_keys=2)
    return -value_NP[:, :candidates], id_NP[:, :candidates]


def _without_the_lowest(value_BC: jax.Array, id_BC: jax.Array) -> jax.Array:
    """id -1 where the value is -inf, but for the first."""
    return jnp.where((value_BC == -jnp.inf) & (jnp.arange(value_BC.shape[1]) > 0), -1, id_BC)


def rows_a_block(V: int, blocks: int) -> int:
    """Rows of the head that a block owns: an equal share in eights."""
    return -(-V // (8 * blocks)) * 8


def tiles_a_warpgroup(V: int, config: Config, blocks: int = BLOCKS) -> int:
    """How many times a warpgroup takes up to 64 rows."""
    most = -(-rows_a_block(V, blocks) // (8 * config.warpgroups)) * 8
    return -(-most // ROWS)


@functools.lru_cache(maxsize=256)
def _kernel(V: int, D: int, N: int, C: int, dtype: Any, config: Config, blocks: int, interpret: Any = None) -> Any:
    """The Mosaic GPU kernel: (x of N rows, head, valid) → (values, ids) [lists, C, N], in falling order, a list a warpgroup.

    The lists follow one another as the ids do, so that the first of equal values is the lowest id throughout.
    """
    from jax.experimental import pallas as pl

    plgpu = mosaic.plgpu()

    W, KT, S = config.warpgroups, config.columns, config.stages
    R, T = rows_a_block(V, blocks), tiles_a_warpgroup(V, config, blocks)
    share, more = divmod(R // 8, W)  # a warpgroup's rows: `share` eights, the first `more` one more
    own = [8 * (share + (w < more)) for w in range(W)]
    blocks = -(-V // R)
    steps = D // KT

    def rows_of(t, w):  # type: ignore[no-untyped-def]
        """Rows that warpgroup w (static) has in its tile t: never none, since every step fills the same barriers."""
        return max(8, min(ROWS, own[w] - t * ROWS))

    def first_row(b, t, w):  # type: ignore[no-untyped-def]
        return b * R + 8 * (w * share + jnp.minimum(w, more)) + t * ROWS

    def body(x, head, valid, values, ids, *, wbuf, xbuf, vbuf, ibuf, vred, ired, full, empty):  # type: ignore[no-untyped-def]
        b, w = lax.axis_index("b"), lax.axis_index("w")

        @pl.when(w == W)
        def _produce():  # type: ignore[no-untyped-def]
            plgpu.set_max_registers(40 if W < 3 else 32, action="decrease")

            def ask(t, rows):  # type: ignore[no-untyped-def]
                def step(i, _):  # type: ignore[no-untyped-def]
                    n = t * steps + i
                    slot = lax.rem(n, S)

                    @pl.when(n >= S)
                    def _wait():  # type: ignore[no-untyped-def]
                        plgpu.barrier_wait(empty.at[slot])

                    columns = pl.ds(i * KT, KT)
                    plgpu.copy_gmem_to_smem(x.at[:, columns], xbuf.at[slot], full.at[slot])
                    for u in range(W):
                        start = jnp.minimum(first_row(b, t, u), V - rows[u])  # rows past the end: others once more
                        there = wbuf.at[slot, u] if rows[u] == ROWS else wbuf.at[slot, u, pl.ds(0, rows[u])]
                        plgpu.copy_gmem_to_smem(head.at[pl.ds(start, rows[u]), columns], there, full.at[slot])
                    return _

                lax.fori_loop(0, steps, step, 0)

            whole = min(own) // ROWS
            if whole:

                @pl.loop(0, whole)
                def _tile(t):  # type: ignore[no-untyped-def]
                    ask(t, [ROWS] * W)

            for t in range(whole, T):
                ask(t, [rows_of(t, u) for u in range(W)])
            for n in range(max(0, T * steps - S), T * steps):  # leave no barrier with an arrival that nobody saw
                plgpu.barrier_wait(empty.at[n % S])

        @pl.when(w < W)
        def _compute():  # type: ignore[no-untyped-def]
            plgpu.set_max_registers({1: 232, 2: 232, 3: 160, 4: 112}[W], action="increase")
            iota = plgpu.broadcasted_iota(jnp.int32, (ROWS, N), 0, layout=plgpu.Layout.WGMMA)
            mine = 8 * (share + (w < more).astype(jnp.int32))
            limit = valid[0]

            def logits(t):  # type: ignore[no-untyped-def]
                """The warpgroup's logits of its tile t and their ids; (-inf, NO_ID) where the tile has no row of its own."""

                def product(acc):  # type: ignore[no-untyped-def]
                    @pl.loop(0, steps)
                    def _step(i):  # type: ignore[no-untyped-def]
                        slot = lax.rem(t * steps + i, S)
                        plgpu.barrier_wait(full.at[slot])
                        plgpu.wgmma(acc, wbuf.at[slot, w], xbuf.at[slot].T)
                        plgpu.wgmma_wait(0)
                        plgpu.barrier_arrive(empty.at[slot])

                    return acc[...]

                value = pl.run_scoped(product, plgpu.ACC((ROWS, N), jnp.float32))
                rows = jnp.maximum(jnp.minimum(mine - t * ROWS, ROWS), 8)
                nominal = first_row(b, t, w)
                row = iota + jnp.minimum(nominal, V - rows)
                here = (row >= nominal) & (row < jnp.minimum(nominal + (mine - t * ROWS), limit)) & (iota < rows)
                return among(value, row, here)

            if C == 1:
                lowest = plgpu.layout_cast(jnp.full((ROWS, N), -jnp.inf, jnp.float32), plgpu.Layout.WGMMA)
                nobody = plgpu.layout_cast(jnp.full((ROWS, N), NO_ID, jnp.int32), plgpu.Layout.WGMMA)
                tiles = [lax.fori_loop(0, T, lambda t, so_far: better(logits(t), so_far), (lowest, nobody))]
            else:
                tiles = [logits(t) for t in range(T)]
            id_tiles = [id for _, id in tiles]

            def take(c, value_tiles):  # type: ignore[no-untyped-def]
                """Write the largest logit of each column, the lowest id of equals, and leave it out from now on."""
                value_N, id_N = argmax_of_rows(value_tiles, id_tiles, (vred.at[w], ired.at[w]), interpret)
                vbuf[w, c] = value_N
                ibuf[w, c] = id_N
                return [jnp.where(i == over_rows(id_N), -jnp.inf, v) for v, i in zip(value_tiles, id_tiles)]

            lax.fori_loop(0, C, take, [value for value, _ in tiles])
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(vbuf.at[w], values.at[b * W + w])
            plgpu.copy_smem_to_gmem(ibuf.at[w], ids.at[b * W + w])
            plgpu.wait_smem_to_gmem(0)

    tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    body.__name__ = f"lm_head_w{W}k{KT}s{S}c{C}"
    kernel = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((blocks * W, C, N), jnp.float32), jax.ShapeDtypeStruct((blocks * W, C, N), jnp.int32)],
        grid=(blocks,),
        grid_names=("b",),
        num_threads=W + 1,
        thread_name="w",
        scratch_types=dict(
            wbuf=plgpu.SMEM((S, W, ROWS, KT), dtype, transforms=tiled),
            xbuf=plgpu.SMEM((S, N, KT), dtype, transforms=tiled),
            vbuf=plgpu.SMEM((W, C, N), jnp.float32),
            ibuf=plgpu.SMEM((W, C, N), jnp.int32),
            vred=plgpu.SMEM((W, mosaic.scratch_words(N)), jnp.float32),
            ired=plgpu.SMEM((W, mosaic.scratch_words(N)), jnp.int32),
            full=plgpu.Barrier(num_arrivals=W + 1, num_barriers=S),
            empty=plgpu.Barrier(num_arrivals=W, num_barriers=S),
        ),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True),
        interpret=interpret,
    )
    return jax.jit(kernel)  # lowered once in a program, however often it is called


def shared_memory_bytes(config: Config, N: int, C: int) -> int:
    """What a block of the kernel allocates: each buffer aligned to 1024 bytes, the barriers in a last kilobyte."""
    W, KT, S = config.warpgroups, config.columns, config.stages
    buffers = [2 * S * W * ROWS * KT, 2 * S * N * KT, *2 * [4 * W * C * N], *2 * [4 * W * mosaic.scratch_words(N)]]
    return sum(-(-size // 1024) * 1024 for size in buffers) + 1024


def batch_columns(B: int) -> int:
    """B as wgmma's narrow side: the next multiple of 8."""
    return -(-B // 8) * 8


def why_unsupported(
    x_BD: jax.Array | jax.ShapeDtypeStruct,
    head: Head,
    candidates: int = 1,
    config: Config | linear.Config | None = None,
    interpret: Any = None,
) -> str | None:
    """Why the Mosaic kernel cannot take these operands (arrays, or their shapes) here, or None where it can."""
    if isinstance(head, tuple):
        many = f"{candidates} candidates of an int8 head: 1 is supported" if candidates > 1 else None
        return many or linear.why_unsupported(x_BD, head, interpret)
    (B, D), (V, _) = x_BD.shape, head.shape
    if why := tuning.why_no_mosaic(interpret):
        return why
    if x_BD.dtype not in (jnp.bfloat16, jnp.float16) or head.dtype != x_BD.dtype:
        return f"x is {x_BD.dtype}, the head {head.dtype}: both must be bfloat16, or both float16"
    if not 1 <= B <= MAX_BATCH:
        return f"{B} rows: 1 to {MAX_BATCH} are supported"
    blocks, N = _blocks(interpret), batch_columns(B)
    config = config if isinstance(config, Config) else default_config(B, D, V, candidates)
    if D % config.columns:
        return f"{D} columns: a multiple of {config.columns} is needed"
    fewest = ROWS * blocks // 2
    if fewest > V:
        return f"a head of {V} rows: at least {fewest} are needed"
    if interpret is None and V % 8:
        return f"a head of {V} rows: the copy engine takes multiples of 8"
    if shared_memory_bytes(config, N, candidates) > SHARED_MEMORY:
        return f"{config} with {B} rows does not fit shared memory"
    if candidates > 1 and tiles_a_warpgroup(V, config, blocks) * N // 2 > MAX_REGISTERS:
        return f"{candidates} candidates of {V} logits for {B} rows: a block's logits do not fit its registers"
    return None


def _blocks(interpret: Any) -> int:
    return BLOCKS if interpret is None else 2


def default_config(B: int, D: int, V: int, candidates: int = 1, device: str | None = None) -> Config:
    """The tuned config of this device for B rows and a head of V × D, made smaller where it would not divide or fit."""
    found = tuning.lookup("lm_head", device, batch=B, vocabulary=V, candidates=candidates)
    config = Config(**found) if found else Config()
    while config.columns > 64 and D % config.columns:
        config = dataclasses.replace(config, columns=config.columns // 2)
    while config.stages > 2 and shared_memory_bytes(config, batch_columns(B), candidates) > SHARED_MEMORY:
        config = dataclasses.replace(config, stages=config.stages - 1)
    return config


def lm_head(
    x_BD: jax.Array,
    head: Head,
    valid: int | jax.Array | None = None,
    *,
    candidates: int = 1,
    config: Config | linear.Config | None = None,
    implementation: str | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """The `candidates` largest logits of each row and their ids; shapes and meaning as in the module's docstring.

    valid: rows of head_VD that are vocabulary (None: all); may be an array, since shards differ in it. config: an int8 head
    takes linear's. implementation: "mosaic", "reference", or None for the kernel where it supports device, dtypes and shapes,
    else the reference; of an int8 head where tuned/ says that it wins, else `linear` and their maximum after it.
    interpret: plgpu.InterpretGPUParams() simulates the kernel on the CPU (with implementation="mosaic").
    Raises ValueError for an unknown implementation, for shapes that do not fit together, for candidates outside 1 … 64 or
    more than the head has rows, and where "mosaic" is named and not supported: it never falls back silently.
    """
    int8 = isinstance(head, tuple)
    of_head = linear.size(head)[::-1] if int8 else head.shape
    if x_BD.ndim != 2 or len(of_head) != 2 or x_BD.shape[1] != of_head[1]:
        raise ValueError(f"x {x_BD.shape} and head {of_head}: they must be [B, D] and [V, D]")
    V, D = of_head
    if config is not None and not isinstance(config, kind := linear.Config if int8 else Config):
        raise ValueError(f"config={config}: a head {'in int8' if int8 else 'of this kind'} takes a {kind.__module__}.Config")
    B = x_BD.shape[0]
    if not 1 <= candidates <= min(MAX_CANDIDATES, V):
        raise ValueError(f"candidates={candidates}: 1 to {min(MAX_CANDIDATES, V)} are allowed")
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation={implementation!r}: allowed are {IMPLEMENTATIONS} and None")
    why = why_unsupported(x_BD, head, candidates, config, interpret) if implementation != "reference" else None
    if implementation == "mosaic" and why:
        raise tuning.Unsupported("lm_head", why)
    if implementation == "reference" or (why and not int8):
        return reference(x_BD, head, valid, candidates=candidates)

    N = batch_columns(B)
    if int8:
        measured = tuning.lookup("lm_head_int8", rows=B, inputs=D, columns=V) is not None
        if implementation is None and (why or not (config or measured)):
            return of_logits(linear.linear(x_BD, head, out_dtype=jnp.float32), valid, candidates)
        run = linear.argmax_kernel(B, D, V, config, interpret)  # type: ignore[arg-type]
    else:
        config = config or default_config(B, D, V, candidates)
        run = _kernel(V, D, N, candidates, jnp.dtype(x_BD.dtype), config, _blocks(interpret), interpret)
    x_ND = jnp.pad(x_BD, ((0, N - B), (0, 0)))
    valid_1 = jnp.reshape(jnp.asarray(V if valid is None else valid, jnp.int32), (1,))
    values, ids = (lists[:, :, :B] for lists in run(x_ND, *(head if int8 else (head,)), valid_1))
    if candidates == 1:
        value_B, id_B = argmax(values[:, 0].T, ids[:, 0].T)
        return value_B[:, None], jnp.where(id_B == NO_ID, 0, id_B)[:, None]  # where nothing is valid
    value_BC, id_BC = _merge(values, ids, candidates)
    return value_BC, _without_the_lowest(value_BC, id_BC)


def search_space(B: int, D: int, V: int, candidates: int = 1, int8: bool = False) -> list[Any]:
    """Every config worth measuring that fits: 32 to 64 KB a step, as many in flight as there is room for; or `linear`'s."""
    N = batch_columns(B)
    if int8:
        return linear.search_space(B, D, V, True)
    found = []
    for warpgroups, columns in ((1, 256), (2, 128), (2, 256), (3, 128), (4, 64), (4, 128)):
        fits = [
            s
            for s in range(2, 17)
            if shared_memory_bytes(Config(warpgroups, columns, s), N, candidates) <= SHARED_MEMORY and D % columns == 0
        ]
        if fits and (candidates == 1 or tiles_a_warpgroup(V, Config(warpgroups)) * N // 2 <= MAX_REGISTERS):
            found.append(Config(warpgroups, columns, fits[-1]))
    return found
