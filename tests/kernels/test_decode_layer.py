"""The persistent decode kernels: how work is dealt out, references, lowering, and the GPU.

What waits on words cannot run in Mosaic's interpret mode, which runs one block after another; so phases are run thread by
thread in numpy (test_layer_phases.py), the whole in numpy too (test_layer_protocol.py), and here on a Hopper GPU.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax

from pallas_kernels import decode_layer as dl
from pallas_kernels import persistent, tuning
from pallas_kernels.layer_kernel import layer_kernel
from pallas_kernels.layer_plan import Config, Dims
from pallas_kernels.persistent import RANKS, Product

NEW_JAX = tuple(int(x) for x in jax.__version__.split(".")[:2]) >= (0, 11)
needs_new_jax = pytest.mark.skipif(not NEW_JAX, reason="Mosaic GPU's lowering needs jax 0.11 or newer")
HOPPER = jax.default_backend() == "gpu" and getattr(jax.devices()[0], "compute_capability", "") == "9.0"
BF16 = ml_dtypes.bfloat16
RNG = np.random.default_rng(0)


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
        Product(4096, 28672, 128, 128, 16),
        Product(14336, 4096, 256, 128, 16),
        Product(11008, 4096, 128, 128, 16),
        Product(3584, 4608, 128, 128, 8),
        Product(512, 256, 64, 128, 4),
        Product(128, 128, 64, 128, 16),
        Product(14336, 4096, 128, 128, 16, apart=True),
        Product(1344, 256, 64, 128, 2, apart=True),
        Product(128, 128, 64, 128, 1, apart=True),
    ],
    ids=str,
)
def test_every_unit_is_one_blocks(product: Product) -> None:
    taken = np.zeros((product.tiles, product.units), int)
    for team in range(product.teams):
        for rank in range(RANKS):
            units = [product.unit(rank, i) for i in range(product.units_of(rank))]
            assert len(units) <= product.slots
            for i in range(product.tiles_of(team)):
                taken[product.tile(team, i), units] += 1
    assert (taken == 1).all()


# ---------------------------------------------------------------- int8 weights


def test_tiles_hold_each_threads_bytes_together() -> None:
    values = RNG.integers(-127, 128, (384, 256)).astype(np.int8)
    tiles = np.asarray(persistent.tile_int8(values, 128))
    np.testing.assert_array_equal(persistent.untile_int8(tiles), values)
    column, place, step, byte = np.indices((128, 8, 4, 4)).reshape(4, -1)
    piece = place ^ column % 8
    k = 64 * (piece % 2) + 16 * step + 8 * (byte % 2) + 2 * (piece // 2) + byte // 2
    np.testing.assert_array_equal(tiles[1, 2].reshape(-1), values[2 * 128 + k, 128 + column])


def test_quantized_weight_is_near_and_a_zero_column_stays_zero() -> None:
    weight = normal(256, 128)
    weight[:, 5] = 0
    got = dl.plain(dl.tile_weight(jnp.asarray(weight)))
    close(got, weight)
    assert not np.asarray(got)[:, 5].any()


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
    H: int = 128
    P: int = 64
    bias: bool = False
    window: int | None = None
    layers: int = 1

    @jax.default_device(jax.devices("cpu")[0])  # a GPU would compile a program for each of these lines
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

        def layer() -> dict[str, Any]:
            return dict(
                norms=[1 + 0.2 * cast(self.D) for _ in range(2)],
                attention=[weight(self.D, O), weight(self.K * self.G * self.H, self.D)],
                mlp=[weight(self.D, 2 * self.F), weight(self.F, self.D)],
                bias=cast(O) if self.bias else None,
            )

        common = dict(
            residual=cast(B, self.D),
            delta=cast(B, self.D),
            small=[*small.values()],
            caches=[jnp.asarray(c, "bfloat16").astype(dtype) for c in caches],
            places=[jnp.asarray(pages), jnp.asarray(self.lengths, jnp.int32)],
        )
        return common | layer() | dict(more=[layer() for _ in range(self.layers - 1)])

    def run(self, kind: str, x: dict[str, Any], sync: jax.Array, **how: Any) -> tuple[Any, ...]:
        """(residual, delta, keys, values, sync) of one call; of a "layer" or more, or of their "halves", (stream, keys of each,
        values of each, sync)."""
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
            each = [x, *x["more"]]
            weights = [dl.Layer(y["norms"][0], *y["attention"], y["norms"][1], *y["mlp"], y["bias"]) for y in each]
            keys, values = ([cache + i for i in range(len(each))] for cache in x["caches"])  # in each layer others
            args = (x["residual"], weights, *x["small"], keys, values, *x["places"], sync)
            reduce = (lambda delta_BD: delta_BD) if kind == "halves" else None
            return dl.layers(*args, window=self.window, reduce=reduce, **how)

    def expected(self, kind: str) -> tuple[Any, ...]:
        with jax.default_device(jax.devices("cpu")[0]):
            return self.compiled(kind, implementation="reference")(self.operands("float32"), dl.new_sync())

    def compiled(self, kind: str, **how: Any) -> Any:
        return jax.jit(lambda x, sync: self.run(kind, x, sync, **how))


CASES = {
    "one row": Case([70]),
    "ragged": Case([130, 0, 64, 1, 65]),
    "int8": Case([70, 1, 0], int8=True),
    "bias and window": Case([200, 5, 64], bias=True, window=50),
    "pages of 128": Case([300, 1], K=1, G=4, P=128),
    "sixteen rows": Case([65] * 16),
    "three layers": Case([70, 0, 130], layers=3),
    "five layers in int8": Case([70], int8=True, bias=True, window=50, layers=5),
    "sixteen rows, two layers": Case([65] * 16, layers=2),
    "sixteen rows in int8, two layers": Case([65, 700, *[130] * 14], int8=True, layers=2),
    "two layers as wide as llama3-8b's": Case([700, 3000], int8=True, D=4096, F=4096, K=8, G=4, layers=2),
}


def assert_alike(kind: str, case: Case, got: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    live = np.asarray(case.lengths) > 0
    streams, tolerance, before = 2, 1e-2, np.zeros(())
    if kind in ("layer", "halves"):  # what the layers add to the stream, which is rounded twice a layer
        streams, tolerance, before = 1, 1.5e-2, wide(case.operands()["residual"])
    for a, b in zip(got[:streams], expected[:streams], strict=True):
        close((wide(a) - before)[live], (wide(b) - before)[live], tolerance)
    if kind == "mlp":
        return
    for a, b in zip(jax.tree.leaves(got[streams:-1]), jax.tree.leaves(expected[streams:-1]), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b)
        np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
        close(a[~np.isnan(a)], b[~np.isnan(b)])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.D <= 1024])  # wider ones are for the GPU
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
    "llama3-8b, 8 rows": Dims("layer", False, 1e-5, 8, 4096, 14336, 8, 4, 128, 64),
    "llama3-8b int8, 16 rows": Dims("layer", True, 1e-5, 16, 4096, 14336, 8, 4, 128, 64),
    "llama2-7b": Dims("layer", False, 1e-5, 1, 4096, 11008, 32, 1, 128, 64),
    "llama2-7b int8": Dims("layer", True, 1e-5, 1, 4096, 11008, 32, 1, 128, 64),
    "llama2-13b int8, 16 rows": Dims("layer", True, 1e-5, 16, 5120, 13824, 40, 1, 128, 64),
    "llama2-13b": Dims("layer", False, 1e-5, 2, 5120, 13824, 40, 1, 128, 64),
    "llama3-70b int8, 8 rows": Dims("layer", True, 1e-5, 8, 8192, 28672, 8, 8, 128, 64),
    "qwen2.5-7b": Dims("layer", False, 1e-6, 8, 3584, 18944, 4, 7, 128, 64, bias=True),
    "llama3-8b attention, a quarter": Dims("attention", False, 1e-5, 1, 4096, 0, 2, 4, 128, 64),
    "llama3-8b mlp int8, an eighth": Dims("mlp", True, 1e-5, 1, 4096, 1792),
    "four layers of llama3-8b int8": Dims("layer", True, 1e-5, 1, 4096, 14336, 8, 4, 128, 64, layers=4),
    "two layers of qwen2.5-7b": Dims("layer", False, 1e-6, 2, 3584, 18944, 4, 7, 128, 64, bias=True, layers=2),
}


@needs_new_jax
@pytest.mark.parametrize("name", REAL)
def test_lowers_for_cuda_without_a_gpu(name: str) -> None:
    """Layout inference and the check of shared memory run at lowering."""
    dims = REAL[name]
    default = Config(blocks=64 if dims.D == 3584 else 128, rows=256 if dims.int8 else 128, layers=dims.layers)
    config = dl.tuned_config(dims, "nvidia_h200") or default
    assert dl.why_unsupported_shape(dims, config) is None
    shape, bf16, B, D, L = jax.ShapeDtypeStruct, jnp.bfloat16, dims.B, dims.D, dims.layers
    stream = shape((B, D), bf16)
    operands: list[Any] = [shape((1,), jnp.int32)] if dims.kind == "layer" else 2 * [stream]
    if dims.kind != "mlp":
        half = shape((B, dims.H // 2), jnp.float32)
        operands += [shape((L, D), bf16), half, half, shape((B, 16), jnp.int32), shape((B,), jnp.int32)]
        operands += [shape((L, dims.sizes["qkv"][1]), bf16)] if dims.bias else []
    operands += [shape((L, D), bf16)] if dims.kind != "attention" else []
    for K, O in dims.sizes.values():  # noqa: E741
        tiles = L * [shape((O // 128, K // 128, 128, 128), jnp.int8)], L * [shape((O // 128, K // 128, 128), bf16)]
        operands += [x for part in tiles for x in part] if dims.int8 else L * [shape((K, O), bf16)]
    caches = 0 if dims.kind == "mlp" else 2 * L
    operands += caches * [shape((B * 16 + 1, dims.K, dims.P, dims.H), bf16)]
    operands += [stream] if dims.kind == "layer" else []
    operands += [shape((dl.WORDS,), jnp.int32)]

    lowered = jax.jit(layer_kernel(dims, config)).trace(*operands).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(D=4000), "units must divide"),
        (dict(H=64), "head dimension 64"),
        (dict(P=16), "16 tokens a page"),
        (dict(G=17), "17 query heads"),
        (dict(B=17), "17 rows"),
        (dict(F=1000), "units must divide"),
    ],
)
def test_unsupported_shapes_are_named(change: dict[str, int], message: str) -> None:
    dims = dataclasses.replace(REAL["llama3-8b"], **change)
    why = dl.why_unsupported_shape(dims, Config())
    assert why is not None and re.search(message, why)


def test_unsupported_configs_are_named() -> None:
    assert "qkv has 12 tiles for 16 teams" in str(
        dl.why_unsupported_shape(dataclasses.replace(REAL["llama3-8b"], K=2), Config(layers=2))
    )
    assert "bytes of parameters" in str(dl.why_unsupported_shape(REAL["llama3-8b"], Config(layers=64)))
    int8 = REAL["llama2-7b int8"]
    assert "tags in a launch" in str(dl.why_unsupported_shape(int8, Config(blocks=8, rows=256, stages=2, flight=2, layers=16)))
    assert "rows=64" in str(dl.why_unsupported_shape(REAL["llama2-7b int8"], Config(rows=64)))


@pytest.mark.skipif(HOPPER, reason="this is a Hopper GPU")
def test_kernel_named_where_unsupported_raises_and_none_falls_back() -> None:
    case = CASES["one row"]
    x = case.operands()
    with pytest.raises(ValueError, match=r"jax 0\.11 or newer|no Hopper GPU"):
        case.run("mlp", x, dl.new_sync(), implementation="mosaic")
    chosen, reference = (case.run("layer", x, dl.new_sync(), implementation=i) for i in (None, "reference"))
    np.testing.assert_array_equal(np.asarray(chosen[0], np.float32), np.asarray(reference[0], np.float32))


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
    with pytest.raises(ValueError, match="layers=0"):
        Config(layers=0)
    layers = [dl.Layer(x["norms"][0], *x["attention"], x["norms"][1], *x["mlp"])] * 2
    keys, values = ([cache] * 2 for cache in x["caches"])
    rest = (*x["places"], dl.new_sync())
    with pytest.raises(ValueError, match=r"2 layers, keys of 1 and values of 2: as many of each"):
        dl.layers(x["residual"], layers, *x["small"], keys[:1], values, *rest, eps=1e-5)
    with pytest.raises(ValueError, match=r"layers of 2 kinds, .*bias=False.* and .*bias=True.*: .* must be alike"):
        other = layers[0]._replace(bias_O=jnp.zeros(x["attention"][0].shape[1], jnp.bfloat16))
        dl.layers(x["residual"], [layers[0], other], *x["small"], keys, values, *rest, eps=1e-5)


def test_sync_is_as_large_as_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """`layers` makes one of the words that its kernel uses, hands it on, and refuses one that is too small."""
    case, config = Case([1]), Config()
    x, seen = case.operands(), []

    def kernel(dims: dl.Dims, config: Config) -> Any:
        def run(*operands: jax.Array) -> list[jax.Array]:
            seen.append((len(operands[-1]), dl.places(dims, config).words))
            if dims.kind == "layer":
                return list(operands[-(2 * dims.layers + 2) :])
            return [*operands[:2], *operands[-1 if dims.kind == "mlp" else -3 :]]

        return run

    monkeypatch.setattr(dl, "layer_kernel", kernel)
    monkeypatch.setattr(dl, "_chosen", lambda *args, **halves: config)
    layers = [dl.Layer(x["norms"][0], *x["attention"], x["norms"][1], *x["mlp"])] * 2
    caches = ([cache] * 2 for cache in x["caches"])
    args = (x["residual"], layers, *x["small"], *caches, *x["places"])
    sync = dl.layers(*args, None, eps=1e-5)[-1]
    assert len(seen) == 2 and all(given == needed < dl.WORDS for given, needed in seen)
    assert dl.layers(*args, sync, eps=1e-5)[-1] is sync
    del seen[:]
    dl.layers(*args, None, eps=1e-5, reduce=lambda delta_BD: delta_BD)
    [(given, attention), (_, mlp)] = seen[:2]
    assert seen[2:] == seen[:2] and {length for length, _ in seen} == {given}
    assert given == max(attention, mlp) > min(attention, mlp)
    for kind in ("layer", "attention", "mlp"):
        with pytest.raises(ValueError, match=rf"sync has 5 words: {kind} needs at least \d+"):
            case.run(kind, x, dl.new_sync(5))


def test_tuned_configs_are_valid_and_fit() -> None:
    for path in tuning.FOLDER.glob("*.json"):
        table = tuning._load(path.stem)
        for entry in table.get("decode_halves", ()):
            assert set(entry["when"]) <= {"rows", "bf16", "D", "F", "K", "G"} and Config(**entry["config"])
        for entry in table.get("decode_layer", ()):
            assert set(entry["when"]) <= {"rows", "bf16", "D", "F", "K", "G"}
            for dims in REAL.values():
                inside = tuning.lookup("decode_layer", path.stem, **dl.tuning_sizes(dims)) == entry["config"]
                assert not inside or dl.why_unsupported_shape(dims, Config(**entry["config"])) is None
    assert dl.tuned_config(REAL["llama3-8b"], "no_such_device") is None


SPOKEN_FOR = [("llama3-8b", False, 16), ("llama3-8b", True, 16), ("llama2-7b", False, 2), ("llama2-7b", True, 16)]


@pytest.mark.parametrize(
    ("name", "int8", "rows"),
    [*SPOKEN_FOR, ("llama2-13b", False, 2), ("llama2-13b", True, 16), ("llama3-70b int8, 8 rows", True, 8)],
)
def test_which_rows_the_table_speaks_for(name: str, int8: bool, rows: int) -> None:
    for B in range(1, rows + 2):
        dims = dataclasses.replace(REAL[name], int8=int8, B=B)
        config = dl.tuned_config(dims, "nvidia_h200")
        assert (config is not None) == (rows >= B)
        if config:
            assert dl.why_unsupported_shape(dataclasses.replace(dims, layers=config.layers), config) is None


def test_halves_apply_where_both_kernels_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dl, "why_unsupported", dl.why_unsupported_shape)
    chosen = functools.partial(dl._chosen, implementation=None, halves=True)
    several, quarter = Config(stages=4, layers=8), Dims("layer", False, 1e-5, 16, 8192, 7168, 2, 8, 128, 64)
    assert chosen(quarter, several) == Config(stages=4), "a launch has no more than a half"
    assert chosen(dataclasses.replace(quarter, F=7168 + 64), several) is None, "no kernel for its MLP"
    assert chosen(dataclasses.replace(quarter, P=48), several) is None, "nor for its attention"
    few = dataclasses.replace(quarter, D=256, F=256, K=1)  # in layers that follow one another every team needs a tile
    assert dl._chosen(few, several, None) is None and chosen(few, several) is not None


def test_a_tuned_entry_may_name_the_sizes_it_speaks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    when = {"rows": 8, "bf16": 0, "D": [4096], "F": [11008, 14336], "K": [8], "G": [4]}
    monkeypatch.setattr(tuning, "_load", lambda device: {"decode_layer": [{"when": when, "config": {"stages": 4}}]})
    dims = dataclasses.replace(REAL["llama3-8b"], int8=True, B=1)
    assert dl.tuned_config(dims, "card") == Config(stages=4)
    assert dl.tuned_config(dataclasses.replace(dims, F=11008), "card") is not None
    for other in (dict(F=28672), dict(F=8192), dict(B=9), dict(int8=False), dict(K=32, G=1)):
        assert dl.tuned_config(dataclasses.replace(dims, **other), "card") is None


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("kind", ["mlp", "attention", "layer"])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.layers == 1])
def test_kernel_on_gpu(name: str, kind: str) -> None:
    check_on_gpu(name, kind)


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("kind", ["layer", "halves"])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.layers > 1])
def test_several_layers_on_gpu(name: str, kind: str) -> None:
    check_on_gpu(name, kind)


def check_on_gpu(name: str, kind: str) -> None:
    """The kernel matches float32, and itself."""
    case = CASES[name]
    x = case.operands()
    blocks, layers = 128 if case.layers == 1 or case.D > 1024 else 32, 1 if case.layers == 1 else 3
    stages = 5 if case.int8 and len(case.lengths) < 9 else 4
    config = Config(blocks=blocks, rows=256 if case.int8 else 128, stages=stages, flight=stages, layers=layers)
    run = case.compiled(kind, config=config, implementation="mosaic")
    first = run(x, dl.new_sync())
    assert_alike(kind, case, first, case.expected(kind))
    sync = first[-1]
    for _ in range(20):  # a result that moves is a race
        again = run(x, sync)
        sync = again[-1]
        for a, b in zip(jax.tree.leaves(again[:-1]), jax.tree.leaves(first[:-1]), strict=True):
            np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("int8", [False, True])
def test_hundreds_of_launches_are_alike_on_gpu(int8: bool) -> None:
    """At Llama-3-8B's sizes with sixteen rows, where most happens at once: a race may show in one launch of a hundred only."""
    dims = Dims("layer", int8, 1e-5, 16, 4096, 14336, 8, 4, 128, 64, layers=2)
    tuned = dl.tuned_config(dims)
    assert tuned is not None
    assert differing_launches(dims, 300, dataclasses.replace(tuned, layers=2), "mosaic") == 0


def differing_launches(dims: Dims, launches: int, config: Config | None, implementation: str) -> int:
    """How many launches give another stream than the first; random weights, and rows whose lengths differ by 7."""
    B, D, K, H, P = dims.B, dims.D, dims.K, dims.H, dims.P
    lengths = 1056 - 7 * jnp.arange(B, dtype=jnp.int32)
    each = -(-1056 // P)
    pages = 1 + jnp.arange(B * each, dtype=jnp.int32).reshape(B, each)
    angle = lengths[:, None] / (1 + jnp.arange(H // 2))
    cos, sin = jnp.cos(angle), jnp.sin(angle)

    def weight(key: jax.Array, rows: int, columns: int) -> Any:
        if not dims.int8:
            return jax.random.normal(key, (rows, columns), jnp.bfloat16) * jnp.bfloat16(rows**-0.5)
        values, steps = jax.random.split(key)
        tiles = jax.random.randint(values, (columns // 128, rows // 128, 128, 128), -127, 128, jnp.int8)
        scales = jax.random.uniform(steps, tiles.shape[:3], minval=0.5, maxval=1.5) * rows**-0.5 / 73
        return tiles, scales.astype(jnp.bfloat16)

    @jax.jit
    def layer(key: jax.Array) -> tuple[dl.Layer, jax.Array, jax.Array]:
        *keys, k, v = jax.random.split(key, 6)
        qkv, o, gate_up, down = (weight(*args) for args in zip(keys, *zip(*dims.sizes.values(), strict=True), strict=True))
        ones, cache = jnp.ones((D,), jnp.bfloat16), (1 + B * each, K, P, H)
        random = functools.partial(jax.random.normal, shape=cache, dtype=jnp.bfloat16)
        return dl.Layer(ones, qkv, o, ones, gate_up, down), random(k), random(v)

    weights, keys, values = zip(*map(layer, jax.random.split(jax.random.key(0), dims.layers)), strict=True)
    x = jax.random.normal(jax.random.key(1), (B, D), jnp.bfloat16)

    @jax.jit
    def launch(x: jax.Array, weights: Any, keys: Any, values: Any, sync: jax.Array) -> tuple[jax.Array, jax.Array]:
        how: dict[str, Any] = dict(eps=dims.eps, config=config, implementation=implementation)
        stream, *_, sync = dl.layers(x, weights, cos, sin, keys, values, pages, lengths, sync, **how)
        return stream, sync

    first, sync = launch(x, weights, keys, values, dl.new_sync())
    assert np.isfinite(np.asarray(first, np.float32)).all()
    count = 0
    for _ in range(launches):
        again, sync = launch(x, weights, keys, values, sync)
        count += not jnp.array_equal(again, first)
    return count
