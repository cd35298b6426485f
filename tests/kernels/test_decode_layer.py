"""The persistent decode kernels: how work is dealt out, each phase's threads in numpy, references, lowering, and the GPU.

What waits on flags cannot run in Mosaic's interpret mode, which runs one block after another; so the phases are run thread by
thread in numpy (simulated_threads.py), and the whole only on a Hopper GPU, against float32.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax
from simulated_threads import run_in_numpy

from pallas_kernels import decode_layer as dl
from pallas_kernels import layer_phases, persistent, tuning
from pallas_kernels.layer_kernel import Config, Dims, layer_kernel
from pallas_kernels.persistent import Product

NEW_JAX = tuple(int(x) for x in jax.__version__.split(".")[:2]) >= (0, 11)
needs_new_jax = pytest.mark.skipif(not NEW_JAX, reason="Mosaic GPU's lowering needs jax 0.11 or newer")
HOPPER = jax.default_backend() == "gpu" and getattr(jax.devices()[0], "compute_capability", "") == "9.0"
BF16 = ml_dtypes.bfloat16
RNG = np.random.default_rng(0)
LAUNCH = 3


def normal(*shape: int, dtype: Any = BF16) -> np.ndarray:
    return RNG.normal(size=shape).astype(dtype)


def wide(x: Any) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def close(got: Any, expected: Any, tolerance: float = 1e-2) -> None:
    assert np.linalg.norm(wide(got) - wide(expected)) <= tolerance * np.linalg.norm(wide(expected))


# ---------------------------------------------------------------- how the work is dealt out


@pytest.mark.parametrize(
    "product",
    [
        Product(4096, 28672, 128, 128, 128),
        Product(14336, 4096, 128, 128, 128),
        Product(14336, 4096, 128, 128, 128, parts=8),
        Product(4096, 6144, 256, 128, 132),
        Product(4096, 22016, 128, 128, 128),
        Product(512, 256, 64, 128, 6, parts=2),
        Product(128, 128, 64, 128, 8),
    ],
    ids=str,
)
def test_every_unit_is_one_blocks_and_every_tile_has_one_owner(product: Product) -> None:
    taken = np.zeros((product.tiles, product.K // product.rows), int)
    sharers: dict[int, list[int]] = {}
    for block in range(product.blocks):
        run = product.run(block)
        assert sum(end - start for _, start, end in run) <= product.units
        for tile, start, end in run:
            taken[tile, start:end] += 1
            part, within = divmod(block, product.part_blocks)
            me = part * product.sharers + within - product.first(tile)
            assert 0 <= within - product.first(tile) <= product.last(tile) - product.first(tile) < product.sharers
            assert (me == 0) == (start == 0)
            sharers.setdefault(tile, []).append(me)
    assert (taken == 1).all()
    assert all(len(set(numbers)) == len(numbers) and 0 in numbers for numbers in sharers.values())


def test_parts_are_the_fewest_that_fit() -> None:
    args = (14336, 4096, 128, 128, 128)
    assert persistent.choose_parts(*args, piece=2048, budget=64 * 1024) == 1
    assert persistent.choose_parts(*args, piece=4096, budget=64 * 1024) == 8
    with pytest.raises(ValueError, match="no split of K=14336"):
        persistent.choose_parts(*args, piece=1 << 20, budget=64 * 1024)


# ---------------------------------------------------------------- int8 weights


def test_tiles_hold_each_threads_bytes_together() -> None:
    values = RNG.integers(-127, 128, (384, 256)).astype(np.int8)
    tiles = np.asarray(persistent.tile_int8(values, 128))
    np.testing.assert_array_equal(persistent.untile_int8(tiles), values)
    at = np.arange(64 * 128)
    quarter, thread, step, byte = at // 2048, at % 2048 // 16, at % 16 // 4, at % 4
    k = 32 * quarter + 8 * step + 2 * (thread % 4) + byte // 2
    column = 16 * (thread // 32) + 8 * (byte % 2) + thread % 32 // 4
    np.testing.assert_array_equal(tiles[1, 2, 64:].reshape(-1), values[2 * 128 + k, 128 + 64 + column])


def test_quantized_weight_is_near_and_a_zero_column_stays_zero() -> None:
    weight = normal(256, 128)
    weight[:, 5] = 0
    got = dl.plain(dl.tile_weight(jnp.asarray(weight)))
    close(got, weight)
    assert not np.asarray(got)[:, 5].any()


# ---------------------------------------------------------------- phases, thread by thread


@pytest.fixture
def numpy_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    run_in_numpy(monkeypatch)


def rms(x: np.ndarray, eps: float) -> np.ndarray:
    return 1 / np.sqrt((wide(x) ** 2).mean(-1) + eps)


@pytest.mark.parametrize(("B", "N"), [(1, 8), (8, 8), (11, 16)])
def test_add_and_norm(numpy_threads: None, B: int, N: int) -> None:
    D = 384
    residual, delta, weight = normal(B, D), normal(B, D), normal(D)
    total, xs = np.full((B, D), np.nan, BF16), np.full((N, D), np.nan, BF16)
    squares, sync = np.full((D // 32, N), np.nan, np.float32), np.zeros(64, np.int32)
    scales = np.full(N, np.nan, np.float32)
    for piece in range(D // layer_phases.SLICE):
        refs = (residual, delta, weight, total, xs, squares, sync)
        layer_phases.add_and_square(refs, B, N, D, (LAUNCH - 1) * 100 + 7, 100, piece, 40)
    layer_phases.norm_scales(squares, scales, N, D, 32, 1e-5)
    np.testing.assert_array_equal(total, residual + delta)
    close(wide(xs[:B]) * scales[:B, None], wide(total) * rms(total, 1e-5)[:, None] * wide(weight))
    assert not wide(xs[B:]).any()
    assert (sync[40 : 40 + 3] == LAUNCH).all()


class Shared:
    """A product of two tiles whose rows are summed from several blocks' shares, by both warpgroups, through `finish`."""

    def __init__(self, N: int):
        self.N = N
        self.product = Product(4 * 128, 2 * 128, 128, 128, 8)
        assert self.product.sharers == 4
        self.partials = np.full(2 * 4 * 128 * N, np.nan, np.float32)
        self.sync = np.zeros(64, np.int32)

    def finish(self, tile: int, sums: list[np.ndarray], epilogue: Any, refs: tuple[Any, ...]) -> None:
        """sums: each sharer's [128, N], the owner's first; it finishes last."""
        for me in (*range(1, len(sums)), 0):
            for w in range(2):
                place = (LAUNCH, tile, me, len(sums), w)
                part = sums[me][64 * w : 64 * w + 64]
                layer_phases.finish(part, self.product, self.N, self.partials, self.sync, 0, place, epilogue, refs)


@needs_new_jax
@pytest.mark.parametrize(("B", "N", "sharers"), [(1, 8, 1), (5, 8, 2), (16, 16, 3)])
def test_shares_are_summed_and_stored(numpy_threads: None, B: int, N: int, sharers: int) -> None:
    shared = Shared(N)
    out = np.full((B, 256), np.nan, BF16)
    sums = [[normal(128, N, dtype=np.float32) for _ in range(sharers)] for _ in range(2)]
    for tile in range(2):
        shared.finish(tile, sums[tile], layer_phases.store(N, B, 256, 128), (out,))
    close(out, np.concatenate([sum(s) for s in sums]).T[:B])


@needs_new_jax
def test_an_owner_waits_for_its_sharers(numpy_threads: None) -> None:
    shared, out = Shared(8), np.zeros((1, 256), BF16)
    place = (LAUNCH, 0, 0, 2, 0)
    args = (shared.product, 8, shared.partials, shared.sync, 0, place, layer_phases.store(8, 1, 256, 128), (out,))
    with pytest.raises(AssertionError, match="would wait for ever"):
        layer_phases.finish(normal(64, 8, dtype=np.float32), *args)


@needs_new_jax
@pytest.mark.parametrize("N", [8, 16])
def test_gate_and_up(numpy_threads: None, N: int) -> None:
    shared, F = Shared(N), 128
    h, scales = np.full((N, F), np.nan, BF16), np.abs(normal(N, dtype=np.float32))
    sums = [[2 * normal(128, N, dtype=np.float32) for _ in range(2)] for _ in range(2)]
    for tile in range(2):
        shared.finish(tile, sums[tile], layer_phases.gate_up(N, F, 128, 50), (h, scales))
    products = wide(np.concatenate([sum(s) for s in sums])) * scales
    gate, up = products[0::2], products[1::2]
    close(h, (gate / (1 + np.exp(-gate)) * up).T)
    assert (shared.sync[50:54] == LAUNCH).all()


@needs_new_jax
@pytest.mark.parametrize("bias", [False, True])
def test_qkv_rows(numpy_threads: None, bias: bool) -> None:
    shared, B, N = Shared(8), 3, 8
    out, scales, shift = np.full((B, 256), np.nan, BF16), np.abs(normal(N, dtype=np.float32)), normal(256)
    sums = [[normal(128, N, dtype=np.float32)] for _ in range(2)]
    for tile in range(2):
        epilogue = layer_phases.qkv_rows(N, B, 256, 128, 50, bias)
        shared.finish(tile, sums[tile], epilogue, (out, scales, *([shift] if bias else [])))
    expected = (wide(np.concatenate([s[0] for s in sums])) * scales).T[:B] + (wide(shift) if bias else 0)
    close(out, expected)
    assert (shared.sync[50:54] == LAUNCH).all()


@needs_new_jax
@pytest.mark.parametrize(("B", "N"), [(3, 8), (16, 16)])
def test_residual_rows_and_their_norm(numpy_threads: None, B: int, N: int) -> None:
    shared, D = Shared(N), 256
    before, weight = normal(B, D), normal(D)
    after, xs = np.full((B, D), np.nan, BF16), np.full((N, D), np.nan, BF16)
    squares, scales = np.full((D // 16, N), np.nan, np.float32), np.full(N, np.nan, np.float32)
    sums = [[normal(128, N, dtype=np.float32) for _ in range(2)] for _ in range(2)]
    for tile in range(2):
        epilogue = layer_phases.residual_rows(N, B, D, 128, 50)
        shared.finish(tile, sums[tile], epilogue, (before, after, weight, xs, squares))
    layer_phases.norm_scales(squares, scales, N, D, 16, 1e-5)
    close(after, wide(before) + np.concatenate([sum(s) for s in sums]).T[:B])
    close(wide(xs[:B]) * scales[:B, None], wide(after) * rms(after, 1e-5)[:, None] * wide(weight))
    assert not wide(xs[B:]).any()
    assert (shared.sync[50:54] == LAUNCH).all()


def swizzled_place(row: int, column: int, columns: int) -> int:
    """Element of a 16-bit matrix kept in 8 × 64 tiles with 128-byte swizzling."""
    tile = row // 8 * (columns // 64) + column // 64
    return tile * 512 + row % 8 * 64 + (column % 64 // 8 ^ row % 8) * 8 + column % 8


@pytest.mark.parametrize(("G", "H", "Q"), [(4, 128, 8), (11, 64, 16)])
def test_rotated_queries_and_the_new_position(numpy_threads: None, G: int, H: int, Q: int) -> None:
    B, K, P, X, row, head, slot, page, offset = 3, 2, 128, 4, 1, 1, 2, 3, 77
    qkv = normal(B, K, G + 2, H)
    angle = RNG.normal(size=(B, H // 2))
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    a, b = wide(qkv[row, head]).reshape(G + 2, 2, H // 2).swapaxes(0, 1)
    turned = np.concatenate([a * cos[row] - b * sin[row], b * cos[row] + a * sin[row]], axis=-1)
    queries = np.full((2, Q * H), np.nan, BF16)
    layer_phases.rotate_queries((qkv, cos, sin, queries), K, G, H, Q, row, head, 1)
    got = np.array([[queries[1, swizzled_place(g, h, H)] for h in range(H)] for g in range(Q)])
    close(got[:G], turned[:G])
    assert not wide(got[G:]).any()

    keys, values, stages = normal(X, K, P, H), normal(X, K, P, H), normal(3, 128 * 128)
    old = keys.copy(), values.copy(), stages.copy()
    dims = (K, G, H, P, 128, 128)
    layer_phases.new_position((qkv, cos, sin, keys, values, stages), dims, row, head, page, offset, slot)
    close(keys[page, head, offset], turned[G])
    np.testing.assert_array_equal(values[page, head, offset], qkv[row, head, G + 1])
    for line, expected in ((offset % 64, keys[page, head, offset]), (64 + offset % 64, values[page, head, offset])):
        places = [swizzled_place(line, h, 128) for h in range(H)]
        np.testing.assert_array_equal(stages[slot, places], expected)
        stages[slot, places] = old[2][slot, places]
    keys[page, head, offset], values[page, head, offset] = old[0][page, head, offset], old[1][page, head, offset]
    for now, before in zip((keys, values, stages), old, strict=True):  # nothing else was touched
        np.testing.assert_array_equal(now, before)


@needs_new_jax
@pytest.mark.parametrize(("G", "H", "splits"), [(4, 128, 16), (1, 64, 2), (11, 128, 1)])
def test_states_combine_to_softmax(numpy_threads: None, G: int, H: int, splits: int) -> None:
    B, N, K, row, head, W = 3, 8, 2, 0, 1, 2
    Q, shares = -(-G // 8) * 8, splits * W
    scores, values = 3 * RNG.normal(size=(Q, shares, 5)), RNG.normal(size=(shares, 5, H))
    used = RNG.random(shares) < 0.7  # a share without a tile: nothing summed
    used[0] = True
    first = 2 * shares
    outs = np.full(3 * shares * H * Q, np.nan, np.float32)
    states = np.full(3 * shares * 2 * Q, np.nan, np.float32)
    attended, sync = np.full((N, K * G * H), np.nan, BF16), np.zeros(8 * shares + 64, np.int32)
    for s in range(shares):
        p = np.exp2(scores[:, s] - scores[:, s].max(-1, keepdims=True)) * used[s]
        top = scores[:, s].max(-1) if used[s] else np.full(Q, layer_phases.MASKED)
        acc = np.einsum("qt,th->hq", p, values[s])
        as32 = [x.astype(np.float32) for x in (acc, top, p.sum(-1))]
        layer_phases.keep_state((outs, states, sync), *as32, H, Q, first + s, first + s, LAUNCH)
    assert (sync[first : first + shares] == LAUNCH).all()
    for split in range(splits):
        dims = (B, N, K, G, H, Q, splits, shares)
        layer_phases.combine_states((outs, states, attended), dims, first, row, head, split)
    p = np.exp2(scores - scores[:, used].max((1, 2), keepdims=True)) * used[:, None]
    expected = np.einsum("qst,sth->qh", p, values) / p.sum((1, 2))[:, None]
    columns = slice(head * G * H, (head + 1) * G * H)
    close(attended[row, columns].reshape(G, H), expected[:G])
    assert not wide(attended[B:, columns]).any()
    assert np.isnan(wide(attended[:, : head * G * H])).all() and np.isnan(wide(attended[1:B])).all()


# ---------------------------------------------------------------- the whole, in references, lowering, and on the GPU


@dataclasses.dataclass
class Case:
    """Random operands; every number of the cache that no row may see is NaN."""

    lengths: list[int]
    int8: bool = False
    D: int = 512
    F: int = 768
    K: int = 2
    G: int = 2
    H: int = 64
    P: int = 64
    bias: bool = False
    window: int | None = None

    def operands(self, dtype: str = "bfloat16") -> dict[str, Any]:
        rng = np.random.default_rng(1)
        B, M = len(self.lengths), max(1, -(-max(self.lengths) // self.P))
        X, O = B * M + 1, self.K * (self.G + 2) * self.H  # noqa: E741
        cast = lambda *shape: jnp.asarray(rng.normal(size=shape), "bfloat16").astype(dtype)  # noqa: E731

        def weight(K: int, O: int) -> Any:  # noqa: E741
            w = jnp.asarray(rng.normal(size=(K, O)) * K**-0.5, "bfloat16")
            if not self.int8:
                return w.astype(dtype)
            tiles, scales = dl.tile_weight(w)
            if dtype == "bfloat16":
                return tiles, scales
            steps = scales.swapaxes(0, 1).reshape(K // 128, O).astype(dtype)
            return persistent.untile_int8(tiles).astype(dtype) * jnp.repeat(steps, 128, axis=0)

        pages = rng.permutation(np.arange(1, X)).reshape(B, M).astype(np.int32)
        unseen = np.ones((X, self.P), bool)
        for b, n in enumerate(self.lengths):
            for position in range(max(0, n - (self.window or n)), n - 1):
                unseen[pages[b, position // self.P], position % self.P] = False
        caches = [np.where(unseen[:, None, :, None], np.nan, rng.normal(size=(X, self.K, self.P, self.H))) for _ in range(2)]
        angle = np.maximum(self.lengths, 1)[:, None] * 10000.0 ** -np.linspace(0, 1, self.H // 2, endpoint=False)
        small = dict(cos_Bh=jnp.asarray(np.cos(angle), "float32"), sin_Bh=jnp.asarray(np.sin(angle), "float32"))
        return dict(
            residual=3 * cast(B, self.D),
            delta=cast(B, self.D),
            norms=[1 + 0.2 * cast(self.D) for _ in range(2)],
            attention=[weight(self.D, O), weight(self.K * self.G * self.H, self.D)],
            mlp=[weight(self.D, 2 * self.F), weight(self.F, self.D)],
            bias=cast(O) if self.bias else None,
            small=[*small.values()],
            caches=[jnp.asarray(c, "bfloat16").astype(dtype) for c in caches],
            places=[jnp.asarray(pages), jnp.asarray(self.lengths, jnp.int32)],
        )

    def run(self, kind: str, x: dict[str, Any], sync: jax.Array, **how: Any) -> tuple[Any, ...]:
        """(residual, delta, keys, values, sync) of one call."""
        stream = (x["residual"], x["delta"])
        rest = (*x["small"], *x["caches"], *x["places"], sync)
        how |= dict(eps=1e-5)
        if kind == "mlp":
            *out, sync = dl.mlp_half(*stream, x["norms"][1], *x["mlp"], sync, **how)
            return *out, *x["caches"], sync
        elif kind == "attention":
            return dl.attention_half(
                *stream, x["norms"][0], *x["attention"], *rest, bias_O=x["bias"], window=self.window, **how
            )
        else:
            weights = (x["norms"][0], *x["attention"], x["norms"][1], *x["mlp"])
            return dl.layer(*stream, *weights, *rest, bias_O=x["bias"], window=self.window, **how)

    def expected(self, kind: str) -> tuple[Any, ...]:
        with jax.default_matmul_precision("highest"):
            return self.compiled(kind, implementation="reference")(self.operands("float32"), dl.new_sync())

    def compiled(self, kind: str, **how: Any) -> Any:
        return jax.jit(lambda x, sync: self.run(kind, x, sync, **how))


CASES = {
    "one row": Case([70]),
    "ragged": Case([130, 0, 64, 1, 65]),
    "int8": Case([70, 1, 0], int8=True),
    "bias and window": Case([200, 5, 64], bias=True, window=50),
    "heads of 128, pages of 128": Case([300, 1], K=1, G=4, H=128, P=128),
    "sixteen rows": Case([65] * 16),
}


def assert_alike(kind: str, case: Case, got: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    live = np.asarray(case.lengths) > 0
    for a, b in zip(got[:2], expected[:2], strict=True):
        close(np.asarray(a, np.float32)[live], np.asarray(b)[live])
    if kind == "mlp":
        return
    for a, b in zip(got[2:4], expected[2:4], strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b)
        np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
        close(a[~np.isnan(a)], b[~np.isnan(b)])


@pytest.mark.parametrize("name", CASES)
def test_reference_in_bf16_is_near_float32(name: str) -> None:
    case = CASES[name]
    got = case.compiled("layer", implementation="reference")(case.operands(), dl.new_sync())
    assert_alike("layer", case, got, case.expected("layer"))


def test_reference_attention_by_hand() -> None:
    """One head, no rotation, identity-like weights: the new token attends to itself alone, and its value comes out."""
    case = Case([1], K=1, G=1, H=64, D=128)
    x = case.operands("float32")
    x["small"] = [jnp.ones((1, 32)), jnp.zeros((1, 32))]
    total, out, keys, values, _ = case.run("attention", x, dl.new_sync(), implementation="reference")
    np.testing.assert_array_equal(total, x["residual"] + x["delta"])
    normed = total * lax.rsqrt(jnp.mean(total**2) + 1e-5) * x["norms"][0]
    qkv = (normed @ x["attention"][0]).reshape(3, 64)
    np.testing.assert_allclose(values[x["places"][0][0, 0], 0, 0], qkv[2], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(keys[x["places"][0][0, 0], 0, 0], qkv[1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(out[0], qkv[2] @ x["attention"][1], rtol=1e-4, atol=1e-4)


REAL = {
    "llama3-8b": Dims("layer", False, 1e-5, 1, 4096, 14336, 8, 4, 128, 64),
    "llama3-8b int8, 16 rows": Dims("layer", True, 1e-5, 16, 4096, 14336, 8, 4, 128, 64),
    "llama2-7b int8": Dims("layer", True, 1e-5, 1, 4096, 11008, 32, 1, 128, 64),
    "qwen2.5-7b": Dims("layer", False, 1e-6, 8, 3584, 18944, 4, 7, 128, 64, bias=True),
    "llama3-8b attention, a quarter": Dims("attention", False, 1e-5, 1, 4096, 0, 2, 4, 128, 64),
    "llama3-8b mlp int8, an eighth": Dims("mlp", True, 1e-5, 1, 4096, 1792),
}


@needs_new_jax
@pytest.mark.parametrize("name", REAL)
def test_lowers_for_cuda_without_a_gpu(name: str) -> None:
    """Layout inference and the check of shared memory run at lowering."""
    dims = REAL[name]
    config = Config(rows=256 if dims.int8 else 128)
    assert dl.why_unsupported_shape(dims, config) is None
    shape, bf16, B, D = jax.ShapeDtypeStruct, jnp.bfloat16, dims.B, dims.D
    operands: list[Any] = [*2 * [shape((B, D), bf16)]]
    if dims.kind != "mlp":
        half = shape((B, dims.H // 2), jnp.float32)
        operands += [shape((D,), bf16), half, half, shape((B, 16), jnp.int32), shape((B,), jnp.int32)]
        operands += [shape((dims.sizes["qkv"][1],), bf16)] if dims.bias else []
    operands += [shape((D,), bf16)] if dims.kind != "attention" else []
    for K, O in dims.sizes.values():  # noqa: E741
        tiles = [shape((O // 128, K // 128, 128, 128), jnp.int8), shape((O // 128, K // 128, 128), bf16)]
        operands += tiles if dims.int8 else [shape((K, O), bf16)]
    caches = 0 if dims.kind == "mlp" else 2
    operands += caches * [shape((B * 16 + 1, dims.K, dims.P, dims.H), bf16)]
    operands += [shape((dl.FLAGS,), jnp.int32)]

    lowered = jax.jit(layer_kernel(dims, config)).trace(*operands).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(D=4000), "hidden size 4000"),
        (dict(H=80), "head dimension 80"),
        (dict(P=16), "16 tokens a page"),
        (dict(G=17), "17 query heads"),
        (dict(B=200), "lets x fit|shared memory"),
        (dict(F=1000), "units must divide"),
    ],
)
def test_unsupported_shapes_are_named(change: dict[str, int], message: str) -> None:
    dims = dataclasses.replace(REAL["llama3-8b"], **change)
    why = dl.why_unsupported_shape(dims, Config())
    assert why is not None and re.search(message, why)
    assert "rows=64" in str(dl.why_unsupported_shape(REAL["llama2-7b int8"], Config(rows=64)))


@pytest.mark.skipif(HOPPER, reason="this is a Hopper GPU")
def test_kernel_named_where_unsupported_raises_and_none_falls_back() -> None:
    case = CASES["one row"]
    x = case.operands()
    with pytest.raises(ValueError, match=r"jax 0\.11 or newer|no Hopper GPU"):
        case.run("mlp", x, dl.new_sync(), implementation="mosaic")
    chosen, reference = (case.run("layer", x, dl.new_sync(), implementation=i) for i in (None, "reference"))
    np.testing.assert_array_equal(np.asarray(chosen[1], np.float32), np.asarray(reference[1], np.float32))


def test_wrong_arguments_are_named() -> None:
    case = CASES["one row"]
    x = case.operands()
    with pytest.raises(ValueError, match="implementation='triton'"):
        case.run("mlp", x, dl.new_sync(), implementation="triton")
    with pytest.raises(ValueError, match=r"down is \(768, 512\).*|gate_up is \(512, 1024\): .* \(512, 1536\)"):
        case.run("mlp", x | dict(mlp=[x["mlp"][0][:, :1024], x["mlp"][1]]), dl.new_sync())
    with pytest.raises(ValueError, match="all must be of one kind"):
        case.run("mlp", x | dict(mlp=[dl.tile_weight(x["mlp"][0]), x["mlp"][1]]), dl.new_sync())
    with pytest.raises(ValueError, match=r"cos \(1, 16\)"):
        case.run("attention", x | dict(small=2 * [jnp.zeros((1, 16))]), dl.new_sync())
    with pytest.raises(ValueError, match="window=0"):
        dataclasses.replace(case, window=0).run("attention", x, dl.new_sync())
    with pytest.raises(ValueError, match="flight=5"):
        Config(flight=5)


def test_tuned_configs_are_valid_and_fit() -> None:
    for path in tuning.FOLDER.glob("*.json"):
        for entry in tuning._load(path.stem).get("decode_layer", ()):
            assert set(entry["when"]) <= {"rows", "bf16"}
            for dims in REAL.values():
                inside = tuning.lookup("decode_layer", path.stem, rows=dims.B, bf16=int(not dims.int8)) == entry["config"]
                assert not inside or dl.why_unsupported_shape(dims, Config(**entry["config"])) is None
    assert dl.tuned_config(REAL["llama3-8b"], "no_such_device") is None


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("kind", ["mlp", "attention", "layer"])
@pytest.mark.parametrize("name", CASES)
def test_kernel_matches_float32_and_itself_on_gpu(name: str, kind: str) -> None:
    case = CASES[name]
    x = case.operands()
    config = Config(rows=256 if case.int8 else 128)
    run = case.compiled(kind, config=config, implementation="mosaic")
    first = run(x, dl.new_sync())
    assert_alike(kind, case, first, case.expected(kind))
    sync = first[4]
    for _ in range(20):  # a result that moves is a race
        again = run(x, sync)
        sync = again[4]
        for a, b in zip(again[:2], first[:2], strict=True):
            np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
