"""Small-batch products: the reference against float64, the kernel against both.

On the CPU the bf16 kernel runs in Mosaic's interpret mode (jax 0.11 and newer), one block to a cluster; of the int8 one what
threads do is in test_linear_int8.py. Marked gpu, every configuration of the search space runs on a Hopper GPU.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from simulator import simulated

from pallas_kernels import linear as ln
from pallas_kernels import linear_int8, persistent, tuning

NEW_JAX = tuple(int(x) for x in jax.__version__.split(".")[:2]) >= (0, 11)
needs_new_jax = pytest.mark.skipif(not NEW_JAX, reason="Mosaic GPU's lowering and interpret mode need jax 0.11 or newer")
HOPPER = jax.default_backend() == "gpu" and getattr(jax.devices()[0], "compute_capability", "") == "9.0"
KINDS = ("bf16", "int8")
EPILOGUES = ("none", "residual", "silu", "float32")


def operands(I: int, O: int, B: int, kind: str, seed: int = 0):  # noqa: E741
    """x, the weight, the weight in float64, and a residual."""
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(B, I)), jnp.bfloat16)
    residual = jnp.asarray(rng.normal(size=(B, O)), jnp.bfloat16)
    if kind == "bf16":
        weight = jnp.asarray(rng.normal(size=(I, O)) * I**-0.5, jnp.bfloat16)
        return x, weight, float64(weight), residual
    values = rng.integers(-127, 128, (I, O))
    scales = jnp.asarray(rng.uniform(0.5, 1.5, (I // 128, O)) * I**-0.5 / 73, jnp.bfloat16)
    tiles = persistent.tile_int8(jnp.asarray(values, jnp.int8), 128)
    weight = (tiles, scales.reshape(I // 128, O // 128, 128).swapaxes(0, 1))
    return x, weight, values * np.repeat(float64(scales), 128, axis=0), residual


def float64(x: jax.Array) -> np.ndarray:
    return np.asarray(x.astype(jnp.float32), np.float64)


def run(case, epilogue: str, **kwargs) -> jax.Array:
    x, weight, _, residual = case
    extra = {"residual": {"residual_NO": residual}, "silu": {"silu": True}, "float32": {"out_dtype": jnp.float32}}
    return ln.linear(x, weight, **extra.get(epilogue, {}), **kwargs)


def assert_close(out: jax.Array, case, epilogue: str) -> None:
    x, _, weight64, residual = case
    expected = float64(x) @ weight64
    if epilogue == "residual":
        expected = expected + float64(residual)
    if epilogue == "silu":
        gate, up = expected[:, 0::2], expected[:, 1::2]
        expected = gate / (1 + np.exp(-gate)) * up
    assert out.dtype == (jnp.float32 if epilogue == "float32" else jnp.bfloat16)
    assert out.shape == expected.shape
    assert np.linalg.norm(float64(out) - expected) <= 1e-2 * np.linalg.norm(expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_reference_matches_float64(kind: str, epilogue: str) -> None:
    case = operands(256, 384, 5, kind)
    assert_close(run(case, epilogue, implementation="reference"), case, epilogue)


@needs_new_jax
@pytest.mark.parametrize(
    ("epilogue", "B", "config"),
    [
        ("none", 3, ln.Config(stages=2)),
        ("residual", 9, ln.Config(tiles=2, stages=4, splits=2)),  # the last cluster has one tile of three
        ("silu", 8, ln.Config(tiles=3, units=2, stages=2, splits=2)),
        ("float32", 1, ln.Config(tiles=3, stages=2)),
    ],
    ids=EPILOGUES,
)
def test_interpreted_kernel_matches_float64(epilogue: str, B: int, config: ln.Config) -> None:
    case = operands(512, 384, B, "bf16")
    out = simulated(run, case, epilogue, config=config)
    assert_close(out, case, epilogue)


@needs_new_jax
def test_turns_may_fall_otherwise_in_the_second_tile() -> None:
    """Three stages to a tile and two pairs: each looks at every piece of x in its first two tiles."""
    case, config = operands(384, 384, 2, "bf16"), ln.Config(tiles=3, stages=2, splits=2)
    assert ln.resident_pieces(384, 8, config, False) == 3
    out = simulated(run, case, "none", config=config)
    assert_close(out, case, "none")


@needs_new_jax
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(("B", "I", "O"), [(1, 4096, 28672), (16, 14336, 4096), (64, 8192, 57344), (8, 11008, 4096)])
def test_lowers_for_cuda_without_a_gpu(B: int, I: int, O: int, int8: bool) -> None:  # noqa: E741
    """Layout inference and the shared-memory check run at lowering; shapes of Llama 3 8B and 70B, Llama 2 7B."""
    shape, x = jax.ShapeDtypeStruct, jax.ShapeDtypeStruct((B, I), jnp.bfloat16)
    weight: Any = shape((I, O), jnp.bfloat16)
    if int8:
        weight = shape((O // 128, I // 128, 128, 128), jnp.int8), shape((O // 128, I // 128, 128), jnp.bfloat16)
    configs = [linear_int8.default_config(B, I, O, "nvidia_h200"), *linear_int8.search_space(B, I, O)] if int8 else []
    for config in configs or [ln.default_config(B, I, O, False, "nvidia_h200")]:
        if int8:
            lowered = jax.jit(functools.partial(linear_int8.product, config=config)).trace(x, weight)
        else:
            kernel = ln._kernel(B, I, O, False, False, False, jnp.dtype("bfloat16"), config)
            lowered = kernel.trace(shape((ln.padded_rows(B), I), jnp.bfloat16), weight)
        assert "mosaic_gpu" in lowered.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("steps", [1, 4, 86, 112])
@pytest.mark.parametrize("tiles", [1, 32, 33, 48, 224, 448, 1002])
def test_spread_covers_every_tile_and_gives_each_block_a_stage(tiles: int, steps: int) -> None:
    cluster, each = ln.spread(tiles, steps)
    assert cluster <= steps
    assert -(-tiles // each) * cluster <= ln.MULTIPROCESSORS  # all at once


@pytest.mark.skipif(HOPPER, reason="this is a Hopper GPU")
def test_kernel_named_where_unsupported_raises_and_none_falls_back() -> None:
    case = operands(128, 128, 2, "int8")
    with pytest.raises(tuning.Unsupported, match="the simulator knows no int8 product"):
        run(case, "none", implementation="mosaic", interpret=object())
    with pytest.raises(ValueError, match=r"jax 0\.11 or newer|no Hopper GPU"):
        run(case, "none", implementation="mosaic")
    np.testing.assert_array_equal(float64(run(case, "none")), float64(run(case, "none", implementation="reference")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"implementation": "triton"}, "implementation='triton'"),
        ({"x_NI": jnp.zeros((2, 64), jnp.bfloat16)}, r"x \(2, 64\)"),
        ({"residual_NO": jnp.zeros((3, 256), jnp.bfloat16)}, r"residual \(3, 256\)"),
        ({"residual_NO": jnp.zeros((2, 256), jnp.bfloat16), "silu": True}, "silu=True"),
        ({"residual_NO": jnp.zeros((2, 256), jnp.float32)}, r"residual \(2, 256\) float32"),
        ({"weight": (jnp.zeros((4, 1, 64, 128), jnp.int8), jnp.zeros((4, 1, 64), jnp.bfloat16))}, r"tiles \(4, 1, 64, 128\)"),
        ({"out_dtype": jnp.float16}, "out_dtype=float16"),
        ({"config": linear_int8.Config()}, r"must be a pallas_kernels\.linear\.Config"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, object], message: str) -> None:
    x, weight, _, _ = operands(128, 256, 2, "bf16")
    with pytest.raises(ValueError, match=message):
        ln.linear(**({"x_NI": x, "weight": weight} | change))  # type: ignore[arg-type]


@pytest.mark.parametrize("field", [{"cluster": 3}, {"units": 3}, {"splits": 3}, {"tiles": 0}, {"stages": 3, "splits": 2}])
def test_config_refuses_what_no_kernel_has(field: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(field))}={next(iter(field.values()))}"):
        ln.Config(**field)


def test_what_is_tuned_for_few_rows_is_made_to_fit_more(monkeypatch: pytest.MonkeyPatch) -> None:
    for config in (*ln.search_space(1, 4096, 6144, False), *linear_int8.search_space(1, 4096, 6144)):
        entry = {"when": {}, "config": dataclasses.asdict(config)}
        monkeypatch.setattr(tuning, "_load", lambda device, entry=entry: {"linear_bf16": [entry], "linear_int8": [entry]})
        for I, O in ((4096, 6144), (1024, 8192), (384, 384)):  # noqa: E741
            if isinstance(config, ln.Config):
                found = ln.default_config(64, I, O, False, "card")
                assert ln.fits(I, 64, found, False)
                ln._check_config(found, I)
            else:
                of_int8 = linear_int8.default_config(64, I, O, "card")
                assert linear_int8.shared_memory_bytes(64, of_int8) <= ln.SHARED_MEMORY and I // 128 % of_int8.units == 0


def test_default_configs_fit_for_every_device_with_a_table() -> None:
    for device in [path.stem for path in tuning.FOLDER.glob("*.json")] + ["no_such_device"]:
        for B in (1, 16, 64):
            for I, O in ((4096, 28672), (28672, 8192), (8192, 128256), (4096, 128256), (128, 128), (11008, 4096)):  # noqa: E741
                of_int8 = linear_int8.default_config(B, I, O, device)
                assert linear_int8.shared_memory_bytes(linear_int8.rows(B), of_int8) <= ln.SHARED_MEMORY
                assert I // 128 % of_int8.units == 0
                for int8 in (False, True):
                    config = ln.default_config(B, I, O, int8, device)
                    pieces = ln.resident_pieces(I, ln.padded_rows(B), config, int8)
                    assert ln.shared_memory_bytes(ln.padded_rows(B), config, int8, pieces) <= ln.SHARED_MEMORY
                    assert I // 128 % config.units == 0 and I // 128 // config.units >= config.cluster


@pytest.mark.parametrize("B", [1, 16, 64])
@pytest.mark.parametrize(("I", "O"), [(4096, 28672), (3584, 4608), (18944, 3584)])
def test_what_is_tuned_is_what_runs(B: int, I: int, O: int, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: E741
    bf16 = functools.partial(ln.default_config, int8=False)
    for found, kernel, configs in (
        (bf16, "linear_bf16", ln.search_space(B, I, O, False)),
        (linear_int8.default_config, "linear_int8", linear_int8.search_space(B, I, O)),
    ):
        for config in configs:
            entry = {"when": {"rows": B, "inputs": [I], "columns": [O]}, "config": dataclasses.asdict(config)}
            monkeypatch.setattr(tuning, "_load", lambda device, entry=entry, kernel=kernel: {kernel: [entry]})
            assert found(B, I, O, device="card") == config
            of_others = found(B, I, 2 * O, device="card")
            monkeypatch.setattr(tuning, "_load", lambda device: {})
            assert of_others == found(B, I, 2 * O, device="card")  # the entry names its columns


def check_on_gpu(I: int, O: int, B: int, kind: str, epilogue: str, config: Any) -> None:  # noqa: E741
    case = operands(I, O, B, kind)
    out = run(case, epilogue, config=config, implementation="mosaic")
    assert_close(out, case, epilogue)
    for _ in range(20):  # a result that moves is a race
        again = run(case, epilogue, config=config, implementation="mosaic")
        np.testing.assert_array_equal(np.asarray(again), np.asarray(out))


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_every_config_on_gpu(kind: str) -> None:
    for B, O in ((3, 4224), (16, 256), (24, 4224), (64, 4352)):  # noqa: E741
        found = linear_int8.search_space(B, 2048, O) if kind == "int8" else ln.search_space(B, 2048, O, False)
        for config in found:
            check_on_gpu(2048, O, B, kind, "none", config)


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("B", [1, 8, 16, 17, 33, 64])
def test_every_epilogue_on_gpu(kind: str, epilogue: str, B: int) -> None:
    check_on_gpu(11008, 4096, B, kind, epilogue, None)


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("B", [4, 40])
def test_what_is_not_finite_stays_in_its_row_on_gpu(B: int) -> None:
    x, weight, weight64, residual = operands(1024, 512, B, "int8")
    for row, value in enumerate((np.nan, np.inf, -np.inf)):
        x = x.at[row, 100 * row + 7].set(value)
    out = run((x, weight, weight64, residual), "float32", implementation="mosaic")
    assert np.isnan(np.asarray(out[:3])).all()
    assert_close(out[3:], (x[3:], weight, weight64, residual[3:]), "float32")


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
def test_products_that_share_counters_on_gpu() -> None:
    """Several in one program, none of which needs another's result, of as many columns: they follow one another."""
    cases = [operands(I, 4096, B, "int8", seed=B) for I, B in ((4096, 1), (2048, 8), (4096, 16), (2048, 64))]  # noqa: E741

    def all_of(xs: list[jax.Array], weights: list[Any]) -> list[jax.Array]:
        return [ln.linear(x, weight, implementation="mosaic") for x, weight in zip(xs, weights, strict=True)]

    program, given = jax.jit(all_of), ([case[0] for case in cases], [case[1] for case in cases])
    first = program(*given)
    for out, case in zip(first, cases, strict=True):
        assert_close(out, case, "none")
    for _ in range(50):
        for again, out in zip(program(*given), first, strict=True):
            np.testing.assert_array_equal(np.asarray(again), np.asarray(out))
