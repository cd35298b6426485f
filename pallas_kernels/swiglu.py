"""silu(x·gate)·(x·up) of many rows in one kernel, for Hopper GPUs: the product never leaves the chip.

    x_TD       bf16   128 rows or more, in 8s
    weight_DE  bf16   input-major, gate and up of each f side by side: E = 2·F; D in 64s, F in 128s
    → h_TF     bf16   silu(gate)·up, both kept in float32 until here

What bounds it: arithmetic, 4·T·D·F operations. XLA multiplies at the same rate, then reads the product back for a kernel of its
own: 6·T·F bytes more to move, 3 % of Llama-3-8B's prefill.

One block a multiprocessor walks over tiles of 128 rows × 256 columns of the product (128 of h): a warpgroup asks for steps of
64 along D, `stages` ahead and across tiles; two others multiply 64 rows each. A pair of blocks (`cluster` 2) takes two tiles
of rows with the same columns: each asks for half of the weights' step and the copy engine gives both halves to both blocks.
wgmma's layout leaves neighbouring columns in one thread, so silu(gate)·up needs no exchange. Tiles are walked in bands of
`band` cluster's rows, column by column, so that what runs at once shares rows and columns in L2. The last rows that fill no
tile are computed with rows before them once more, to the same values.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic, persistent, tuning
from pallas_kernels.persistent import Emitter

ROWS, COLUMNS, STEP = 128, 256, 64  # of a block's tile of the product, and along D
MULTIPROCESSORS = 132
IMPLEMENTATIONS = ("mosaic", "reference")
SHARED_MEMORY = 227 * 1024  # bytes a block may have


@dataclasses.dataclass(frozen=True)
class Config:
    """cluster: blocks that share weights; stages: steps along D in flight; band: clusters' rows walked together."""

    cluster: int = 2
    stages: int = 4
    band: int = 8

    def __post_init__(self) -> None:
        for field, allowed in (("cluster", (1, 2)), ("stages", (2, 3, 4)), ("band", tuple(range(1, 65)))):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field}={getattr(self, field)!r}: allowed are {allowed}")


def reference(x_TD: jax.Array, weight_DE: jax.Array) -> jax.Array:
    """The same in plain jnp; XLA rounds the product to x's dtype in between."""
    gate_up_TFC = jnp.dot(x_TD, weight_DE).reshape(x_TD.shape[0], -1, 2)
    return jax.nn.silu(gate_up_TFC[..., 0]) * gate_up_TFC[..., 1]


@functools.lru_cache(maxsize=256)
def _kernel(T: int, D: int, F: int, config: Config, interpret: Any = None) -> Any:
    """The Mosaic GPU kernel: (x, weight) → h."""
    from jax.experimental import pallas as pl

    plgpu = mosaic.plgpu()
    C, S = config.cluster, config.stages
    steps, columns = D // STEP, 2 * F // COLUMNS
    groups = -(-T // (C * ROWS))  # of rows, a cluster's each
    tiles = groups * columns
    clusters = min(MULTIPROCESSORS // C if interpret is None else 2, tiles)
    bf16, f32 = jnp.bfloat16, jnp.float32

    def body(x, weight, out, *, xbuf, wbuf, obuf, full, empty):  # type: ignore[no-untyped-def]
        b, w = lax.axis_index("b"), lax.axis_index("w")
        c = lax.axis_index("c") if C > 1 else jnp.int32(0)
        mine = lax.div(tiles - b + (clusters - 1), clusters)

        def place(j):  # type: ignore[no-untyped-def]
            """The first row and the column of this block's tile j."""
            index = b + j * clusters
            first = lax.div(index, config.band * columns) * config.band
            within = index - first * columns
            height = jnp.minimum(config.band, groups - first)
            row = ((first + lax.rem(within, height)) * C + c) * ROWS
            return jnp.minimum(row, T - ROWS), lax.div(within, height)

        @pl.when(w == 2)
        def _produce():  # type: ignore[no-untyped-def]
            plgpu.set_max_registers(40, action="decrease")

            @pl.loop(0, mine)
            def _tile(j):  # type: ignore[no-untyped-def]
                row, column = place(j)

                @pl.loop(0, steps)
                def _step(k):  # type: ignore[no-untyped-def]
                    n = j * steps + k
                    slot = lax.rem(n, S)

                    @pl.when(n >= S)
                    def _wait():  # type: ignore[no-untyped-def]
                        plgpu.barrier_wait(empty.at[slot])

                    along = pl.ds(k * STEP, STEP)
                    shared = dict(collective_axes="c") if C > 1 else {}
                    plgpu.copy_gmem_to_smem(x.at[pl.ds(row, ROWS), along], xbuf.at[slot], full.at[slot])
                    there = pl.ds(column * COLUMNS, COLUMNS)
                    plgpu.copy_gmem_to_smem(weight.at[along, there], wbuf.at[slot], full.at[slot], **shared)

            for s in range(S):  # leave no arrival that nobody saw

                @pl.when(mine * steps > s)
                def _drain(s=s):  # type: ignore[no-untyped-def]
                    plgpu.barrier_wait(empty.at[lax.rem(mine * steps - jnp.minimum(mine * steps, S) + s, S)])

        @pl.when(w < 2)
        def _compute():  # type: ignore[no-untyped-def]
            plgpu.set_max_registers(232, action="increase")

            def free(n):  # type: ignore[no-untyped-def]
                if C > 1:
                    _warpgroup_sync()  # one thread arrives for all where the barrier is a cluster's
                plgpu.barrier_arrive(empty.at[lax.rem(n, S)])

            @pl.loop(0, mine)
            def _tile(j):  # type: ignore[no-untyped-def]
                row, column = place(j)

                def multiply(acc):  # type: ignore[no-untyped-def]
                    @pl.loop(0, steps)
                    def _step(k):  # type: ignore[no-untyped-def]
                        n = j * steps + k
                        slot = lax.rem(n, S)
                        plgpu.barrier_wait(full.at[slot])
                        plgpu.wgmma(acc, xbuf.at[slot, pl.ds(w * 64, 64)], wbuf.at[slot])
                        plgpu.wgmma_wait(1)

                        pl.when(k > 0)(lambda: free(n - 1))

                    plgpu.wgmma_wait(0)
                    free(j * steps + steps - 1)
                    return acc[...]

                product = pl.run_scoped(multiply, plgpu.ACC((64, COLUMNS), f32))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                if interpret is None:
                    _store_gated(product, obuf, w)
                else:
                    obuf[w] = (jax.nn.silu(product[:, 0::2]) * product[:, 1::2]).astype(bf16)
                plgpu.commit_smem()
                there = out.at[pl.ds(row + w * 64, 64), pl.ds(column * (COLUMNS // 2), COLUMNS // 2)]
                plgpu.copy_smem_to_gmem(obuf.at[w], there)

            plgpu.wait_smem_to_gmem(0)

        if C > 1:
            mosaic.cluster_sync()  # no block leaves while another may still write or arrive there

    body.__name__ = f"swiglu_{T}x{D}x{F}"
    swizzled = persistent.swizzled()
    cluster: dict[str, Any] = dict(cluster=(C,), cluster_names=("c",)) if C > 1 else {}
    empty = dict(num_arrivals=2, num_barriers=S)
    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((T, F), bf16),
        grid=(clusters,),
        grid_names=("b",),
        **cluster,
        num_threads=3,
        thread_name="w",
        scratch_types=dict(
            xbuf=plgpu.SMEM((S, ROWS, STEP), bf16, transforms=swizzled),
            wbuf=plgpu.SMEM((S, STEP, COLUMNS), bf16, transforms=swizzled),
            obuf=plgpu.SMEM((2, 64, COLUMNS // 2), bf16, transforms=swizzled),
            full=plgpu.Barrier(num_arrivals=2, num_barriers=S),
            empty=plgpu.ClusterBarrier(collective_axes=("c",), **empty) if C > 1 else plgpu.Barrier(**empty),
        ),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
        interpret=interpret,
    )
    return jax.jit(kernel)  # lowered once in a program, however many layers call it


def _warpgroup_sync() -> None:
    persistent.inline([])(Emitter.barrier)()


def _store_gated(product: Any, obuf: Any, w: Any) -> None:
    """One warpgroup: silu(gate)·up of its product's columns, two by two, to its part of obuf."""
    plgpu = mosaic.plgpu()

    @persistent.inline([plgpu.Layout.WGMMA, "tiled", "i32"])
    def run(e: Emitter, product: Any, obuf: Any, w: Any) -> None:
        half_columns = COLUMNS // 2
        row = e.add(e.mul(e.warp, 16), e.div(e.lane, 4))
        for (tile, half), (gate, up) in zip(e.fragment(COLUMNS), e.unpack(product), strict=True):
            value = e.narrow(e.silu_up(gate, up))
            column = e.add(e.rem(e.lane, 4), 4 * tile)
            at = e.tiled_ptr(obuf, e.mul(w, 64 * half_columns * 2), e.add(row, 8 * half), column, half_columns)
            e.ptx("st.shared.b16 [$0], $1;", at, value)

    run(product, obuf, w)


def shared_memory_bytes(config: Config) -> int:
    """What a block of the kernel allocates."""
    return persistent.shared_bytes([config.stages * STEP * (ROWS + COLUMNS) * 2, ROWS * COLUMNS])


def why_unsupported(x_TD: Any, weight_DE: Any, interpret: Any = None) -> str | None:
    """Why the Mosaic kernel cannot take these operands (arrays, or their shapes) here, or None where it can."""
    if why := tuning.why_no_mosaic(interpret):
        return why
    if x_TD.dtype != jnp.bfloat16 or weight_DE.dtype != jnp.bfloat16:
        return f"x is {x_TD.dtype}, the weight {weight_DE.dtype}: both must be bfloat16"
    (T, D), E = x_TD.shape, weight_DE.shape[1]
    if T < ROWS or T % 8:
        return f"{T} rows: multiples of 8 from {ROWS} on are supported"
    if D % STEP or E % COLUMNS:
        return f"a weight of {D} × {E}: multiples of {STEP} × {COLUMNS} are supported"
    return None


def tuned_config(T: int, D: int, F: int, device: str | None = None) -> Config | None:
    """The config with which the kernel was measured to beat XLA on this device for so many rows and tiles, or None."""
    tiles = -(-T // (2 * ROWS)) * (2 * F // COLUMNS)  # of pairs of blocks, 66 of which run at once
    found = tuning.lookup("swiglu", device, rows=T, tiles=tiles)
    return Config(**found) if found else None


def swiglu(
    x_TD: jax.Array,
    weight_DE: jax.Array,
    *,
    config: Config | None = None,
    implementation: str | None = None,
    interpret: Any = None,
) -> jax.Array:
    """silu(gate)·up of x times a weight; shapes and meaning as in the module's docstring (SwiGLU, Shazeer 2020).

    implementation: "mosaic", "reference", or None for the kernel where it was measured to win and supports device, dtypes and
    shapes, else the reference. interpret: plgpu.InterpretGPUParams() simulates the kernel on the CPU (with
    implementation="mosaic"). Raises ValueError for an unknown implementation, for shapes that do not fit together, and where
    "mosaic" is named and not supported: it never falls back silently.
    """
    if x_TD.ndim != 2 or weight_DE.ndim != 2 or x_TD.shape[1] != weight_DE.shape[0] or weight_DE.shape[1] % 2:
        raise ValueError(f"x {x_TD.shape} and weight {weight_DE.shape}: they must be [T, D] and [D, 2·F]")
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation={implementation!r}: allowed are {IMPLEMENTATIONS} and None")
    (T, D), F = x_TD.shape, weight_DE.shape[1] // 2
    why = why_unsupported(x_TD, weight_DE, interpret) if implementation != "reference" else None
    if implementation == "mosaic" and why:
        raise tuning.Unsupported("swiglu", why)
    if implementation != "reference" and not why:
        config = config or tuned_config(T, D, F) or (Config() if implementation == "mosaic" else None)
    if implementation == "reference" or why or config is None:
        return reference(x_TD, weight_DE)
    h_TF: jax.Array = _kernel(T, D, F, config, interpret)(x_TD, weight_DE)
    return h_TF


def search_space() -> list[Config]:
    """Every config worth measuring that fits."""
    configs = [Config(c, s, band) for c in (1, 2) for s in (3, 4) for band in (4, 8, 16)]
    return [config for config in configs if shared_memory_bytes(config) <= SHARED_MEMORY]
