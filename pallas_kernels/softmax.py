"""Softmax over attention scores with scale, causal mask and ragged lengths in one pass, for Hopper GPUs.

    scores_BNTS   float32, bf16 or f16   row t of sequence b is the query at position start[b] + t; not scaled
    start_B       int32                  position of the sequence's first query: what came before this step
    length_B      int32                  keys of the sequence; those from there on are padding
    → probs_BNTS  `dtype`

probs = softmax(scale · scores) over the keys 0 … min(start + t, length - 1) of the row, and 0 at the others; a row that sees
no key is 0 throughout. Scores of keys that a row does not see never reach it (NaN included).

What bounds it: reading the scores that are seen and writing every probability, once each (32 heads × 2048 × 2048: half of
0.54 GB in float32 and 0.27 GB in bf16, 0.12 ms at 4.46 TB/s). XLA reads all of them. A block of one warpgroup takes `rows` rows
one after another; the copy engine brings a row, as far as it is seen, into shared memory, `chunk` numbers at a time and
`stages` rows ahead; maximum and sum are kept online (Milakov & Gimelshein, 2018) a thread, and combined once a row.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic, tuning

LANES = 128  # threads of a warpgroup: a row is a multiple of that
MASKED = -1e30  # a finite stand-in for -inf, so that a row that sees nothing gives 0 and not NaN
IMPLEMENTATIONS = ("mosaic", "reference")
SHARED_MEMORY = 227 * 1024  # bytes a block may have
MAX_BARRIERS = 32  # copies in flight a block can tell apart
SCORES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Config:
    """Rows a block takes, rows in flight, and the most numbers a copy brings."""

    rows: int = 4
    stages: int = 2
    chunk: int = 1024

    def __post_init__(self) -> None:
        for field, allowed in (("rows", (1, 2, 4, 8, 16)), ("stages", (1, 2, 3, 4)), ("chunk", (128, 256, 512, 1024, 2048))):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field}={getattr(self, field)!r}: allowed are {allowed}")


def reference(scores_BNTS: jax.Array, start_B: jax.Array, length_B: jax.Array, *, scale: float, dtype: Any = None) -> jax.Array:
    """The same in plain jnp, in float32."""
    _, _, T, S = scores_BNTS.shape
    position_S = jnp.arange(S)
    seen_BTS = (position_S <= (start_B[:, None] + jnp.arange(T))[:, :, None]) & (position_S < length_B[:, None, None])
    seen_B1TS = seen_BTS[:, None]
    scaled_BNTS = jnp.where(seen_B1TS, scores_BNTS.astype(jnp.float32) * scale, MASKED)
    probs_BNTS = jnp.where(seen_B1TS, jax.nn.softmax(scaled_BNTS, axis=-1), 0.0)
    return probs_BNTS.astype(dtype or scores_BNTS.dtype)


def _chunk(S: int, config: Config) -> int:
    """The largest chunk that divides a row."""
    return math.gcd(S, config.chunk)


@functools.lru_cache(maxsize=256)
def _kernel(
    B: int, N: int, T: int, S: int, scale: float, dtype: Any, out_dtype: Any, config: Config, interpret: Any = None
) -> Any:
    """The Mosaic GPU kernel: (scores [B·N·T, S/128, 128], start, length) → probabilities of the same shape."""
    from jax.experimental import pallas as pl

    plgpu = mosaic.plgpu()

    Q = config.rows
    chunk = _chunk(S, config)
    chunks, lines = S // chunk, chunk // LANES
    stages = min(config.stages, Q)
    factor = scale * math.log2(math.e)
    shape = (lines, LANES)
    strided = plgpu.Layout.WG_STRIDED(shape, vec_size=math.gcd(lines, 4))

    def body(scores, start, length, probs, *, buf, full):  # type: ignore[no-untyped-def]
        block = lax.axis_index("r")

        def row_of(j):  # type: ignore[no-untyped-def]
            """(row, the keys that it sees, chunks with any of them) of the block's row j."""
            row = block * Q + j
            b, t = lax.div(row, N * T), lax.rem(row, T)
            seen = jnp.clip(jnp.minimum(start[b] + t + 1, length[b]), 0, S)
            return row, seen, lax.div(seen + chunk - 1, chunk)

        def piece(c):  # type: ignore[no-untyped-def]
            return pl.ds(c * lines, lines)

        def ask(j):  # type: ignore[no-untyped-def]
            row, _, count = row_of(j)
            stage = lax.rem(j, stages)

            def one(c, _):  # type: ignore[no-untyped-def]
                plgpu.copy_gmem_to_smem(scores.at[row, piece(c)], buf.at[stage, piece(c)], full.at[stage * chunks + c])
                return _

            lax.fori_loop(0, count, one, 0)

        for j in range(stages):
            ask(j)

        def one_row(j, _):  # type: ignore[no-untyped-def]
            row, seen, count = row_of(j)
            stage = lax.rem(j, stages)

            def scaled(c):  # type: ignore[no-untyped-def]
                """A chunk's scores, and which of them the row sees."""
                x = plgpu.load(buf.at[stage, piece(c)], layout=strided).astype(jnp.float32) * factor
                iota = functools.partial(plgpu.broadcasted_iota, jnp.int32, shape, layout=strided)
                visible = iota(0) * LANES + iota(1) + c * chunk < seen
                return jnp.where(visible, x, MASKED), visible

            def online(c, carry):  # type: ignore[no-untyped-def]
                most, total = carry
                plgpu.barrier_wait(full.at[stage * chunks + c])
                x, visible = scaled(c)
                higher = jnp.maximum(most, x)
                return higher, total * jnp.exp2(most - higher) + jnp.where(visible, jnp.exp2(x - higher), 0.0)

            constant = lambda value: plgpu.layout_cast(jnp.full(shape, value, jnp.float32), strided)  # noqa: E731
            most, total = lax.fori_loop(0, count, online, (constant(MASKED), constant(0.0)))
            top = jnp.max(most)
            inverse = 1.0 / jnp.sum(total * jnp.exp2(most - top))

            def write(c, _):  # type: ignore[no-untyped-def]
                x, visible = scaled(c)
                probs[row, piece(c)] = jnp.where(visible, jnp.exp2(x - top) * inverse, 0.0).astype(out_dtype)
                return _

            def zero(c, _):  # type: ignore[no-untyped-def]
                probs[row, piece(c)] = constant(0.0).astype(out_dtype)
                return _

            lax.fori_loop(0, count, write, 0)

            @pl.when(j + stages < Q)
            def _next():  # type: ignore[no-untyped-def]
                plgpu.commit_smem()  # a barrier: every thread has read the row
                ask(j + stages)

            lax.fori_loop(count, chunks, zero, 0)
            return _

        lax.fori_loop(0, Q, one_row, 0)

    body.__name__ = f"softmax_r{Q}s{stages}c{chunk}"
    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((B * N * T, S // LANES, LANES), out_dtype),
        grid=(B * N * T // Q,),
        grid_names=("r",),
        scratch_types=dict(
            buf=plgpu.SMEM((stages, S // LANES, LANES), dtype),
            full=plgpu.Barrier(num_barriers=stages * chunks),
        ),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
        interpret=interpret,
    )
    return jax.jit(kernel)  # lowered once in a program, however many layers call it


def shared_memory_bytes(config: Config, S: int, dtype: Any) -> int:
    """What a block of the kernel allocates: the rows in flight, and a kilobyte for the barriers and the reductions."""
    return min(config.stages, config.rows) * S * jnp.dtype(dtype).itemsize + 1024


def fits(config: Config, S: int, dtype: Any) -> bool:
    """Whether a block has the shared memory and the barriers for rows of S scores."""
    copies = min(config.stages, config.rows) * (S // _chunk(S, config))
    return copies <= MAX_BARRIERS and shared_memory_bytes(config, S, dtype) <= SHARED_MEMORY


Operand = jax.Array | jax.ShapeDtypeStruct


def why_unsupported(scores_BNTS: Operand, config: Config | None = None, interpret: Any = None) -> str | None:
    """Why the Mosaic kernel cannot take these scores (an array, or its shape) here, or None where it can."""
    B, N, T, S = scores_BNTS.shape
    if why := tuning.why_no_mosaic(interpret):
        return why
    if scores_BNTS.dtype not in SCORES:
        return f"scores are {scores_BNTS.dtype}: {', '.join(SCORES)} are supported"
    if S % LANES:
        return f"rows of {S} scores: multiples of {LANES} are supported"
    config = config or default_config(B * N * T, S, scores_BNTS.dtype)
    if B * N * T % config.rows:
        return f"{B * N * T} rows: {config} takes {config.rows} a block"
    if not fits(config, S, scores_BNTS.dtype):
        return f"rows of {S} scores in {scores_BNTS.dtype}: too much for the shared memory or the barriers of {config}"
    return None


def default_config(rows: int, S: int, dtype: Any, device: str | None = None) -> Config:
    """The tuned config of this device for `rows` rows of S scores, cut to what divides the rows and fits."""
    found = tuning.lookup("softmax", device, keys=S)
    config = Config(**found) if found else Config()
    config = dataclasses.replace(config, rows=math.gcd(config.rows, rows))
    while config.stages > 1 and not fits(config, S, dtype):
        config = dataclasses.replace(config, stages=config.stages - 1)
    return config if fits(config, S, dtype) else dataclasses.replace(config, chunk=2048)


def softmax(
    scores_BNTS: jax.Array,
    start_B: jax.Array,
    length_B: jax.Array,
    *,
    scale: float,
    dtype: Any = None,
    config: Config | None = None,
    implementation: str | None = None,
    interpret: Any = None,
) -> jax.Array:
    """Causal probabilities of attention scores; shapes and meaning as in the module's docstring.

    dtype: of the probabilities; None: the scores'. implementation: "mosaic", "reference", or None for the kernel where it
    supports device, dtypes and shapes and was measured to win (more than one query a sequence), else the reference.
    interpret: plgpu.InterpretGPUParams() simulates the kernel on the CPU (with implementation="mosaic").
    Raises ValueError for an unknown implementation, for shapes that do not fit together, and where "mosaic" is named and
    not supported: it never falls back silently.
    """
    if scores_BNTS.ndim != 4 or {start_B.shape, length_B.shape} != {scores_BNTS.shape[:1]}:
        shapes = f"scores {scores_BNTS.shape}, start {start_B.shape}, length {length_B.shape}"
        raise ValueError(f"{shapes}: they must be [B, N, T, S], [B] and [B]")
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation={implementation!r}: allowed are {IMPLEMENTATIONS} and None")
    why = why_unsupported(scores_BNTS, config, interpret) if implementation != "reference" else None
    if implementation == "mosaic" and why:
        raise tuning.Unsupported("softmax", why)
    B, N, T, S = scores_BNTS.shape
    if implementation == "reference" or why or (implementation is None and T == 1):
        return reference(scores_BNTS, start_B, length_B, scale=scale, dtype=dtype)

    config = config or default_config(B * N * T, S, scores_BNTS.dtype)
    out_dtype = jnp.dtype(dtype or scores_BNTS.dtype)
    run = _kernel(B, N, T, S, scale, jnp.dtype(scores_BNTS.dtype), out_dtype, config, interpret)
    lines = scores_BNTS.reshape(B * N * T, S // LANES, LANES)
    probs_BNTS: jax.Array = run(lines, start_B.astype(jnp.int32), length_B.astype(jnp.int32)).reshape(B, N, T, S)
    return probs_BNTS


def search_space(rows: int, S: int, dtype: Any) -> list[Config]:
    """Every config worth measuring that fits."""
    configs = [Config(q, s, c) for q in (1, 4, 8) for s in (1, 2, 3) if s <= q for c in (512, 1024, 2048)]
    return [c for c in configs if rows % c.rows == 0 and fits(c, S, dtype)]
