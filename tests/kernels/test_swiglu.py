"""SwiGLU in one kernel: the reference against float64, the kernel against it.

On the CPU the kernel runs in Mosaic's interpret mode (jax 0.11 and newer), one block to a cluster, and is lowered for a GPU;
marked gpu, every configuration of the search space runs on a Hopper GPU.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from simulator import simulated

from pallas_kernels import swiglu as sg
from pallas_kernels import tuning

NEW_JAX = tuple(int(x) for x in jax.__version__.split(".")[:2]) >= (0, 11)
needs_new_jax = pytest.mark.skipif(not NEW_JAX, reason="Mosaic GPU's lowering and interpret mode need jax 0.11 or newer")
HOPPER = jax.default_backend() == "gpu" and getattr(jax.devices()[0], "compute_capability", "") == "9.0"


def operands(T: int, D: int, F: int, dtype=jnp.bfloat16, seed: int = 0):
    """x, the weight, and what comes out, in float64."""
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(T, D)), dtype)
    weight = jnp.asarray(rng.normal(size=(D, 2 * F)) * 2 * D**-0.5, dtype)
    product = float64(x) @ float64(weight)
    gate, up = product[:, 0::2], product[:, 1::2]
    return x, weight, gate / (1 + np.exp(-gate)) * up


def float64(x: jax.Array) -> np.ndarray:
    return np.asarray(x.astype(jnp.float32), np.float64)


def assert_close(out: jax.Array, expected: np.ndarray) -> None:
    assert out.dtype == jnp.bfloat16 and out.shape == expected.shape
    assert np.linalg.norm(float64(out) - expected) <= 1e-2 * np.linalg.norm(expected)


def test_reference() -> None:
    x, weight, expected = operands(5, 96, 24, jnp.float32)
    np.testing.assert_allclose(np.asarray(sg.reference(x, weight)), expected, rtol=1e-4, atol=1e-5)
    x, weight, expected = operands(5, 96, 24)
    assert_close(sg.swiglu(x, weight), expected)  # no GPU, no such shape: the reference


@needs_new_jax
@pytest.mark.parametrize(
    ("T", "D", "F", "band"),
    [(128, 128, 128, 1), (256, 64, 384, 8), (328, 192, 256, 2)],
    ids=["one tile", "one step", "rows computed twice, bands"],
)
def test_kernel_in_interpret_mode(T: int, D: int, F: int, band: int) -> None:
    x, weight, expected = operands(T, D, F)
    out = simulated(sg.swiglu, x, weight, config=sg.Config(cluster=1, stages=3, band=band))
    assert_close(out, expected)


@needs_new_jax
def test_a_program_holds_the_kernel_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sg, "why_unsupported", lambda *args: None)
    monkeypatch.setattr(sg, "tuned_config", lambda *args: sg.Config())
    x, weight = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((512, 256), (256, 512)))

    def layers(x: jax.Array, weight: jax.Array) -> jax.Array:
        for _ in range(3):
            x = sg.swiglu(x, weight)
        return x

    text = jax.jit(layers).trace(x, weight).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu_v2") == 1


def test_every_configuration_of_the_search_space_fits() -> None:
    space = sg.search_space()
    assert sg.Config() in space
    assert all(sg.shared_memory_bytes(config) <= sg.SHARED_MEMORY for config in space)


def test_tuned() -> None:
    table = tuning._load("nvidia_h200")["swiglu"]
    assert {sg.Config(**entry["config"]) for entry in table if entry["config"]} <= set(sg.search_space())
    assert sg.tuned_config(128, 4096, 14336, "nvidia_h200") is None
    assert sg.tuned_config(256, 4096, 1792, "nvidia_h200") is None  # an eighth of 8B: too few tiles for the card
    assert sg.tuned_config(4096, 4096, 14336, "nvidia_h200") is not None
    assert sg.tuned_config(4096, 4096, 14336, "unknown") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"implementation": "triton"}, "implementation='triton': allowed are"),
        ({"x": (4, 65)}, "they must be"),
        ({"weight": (64, 255)}, "they must be"),
        ({"implementation": "mosaic"}, "pass None or 'reference'"),
    ],
)
def test_bad_operands_are_refused(change: dict, message: str) -> None:
    x, weight = (jnp.zeros(change.get(name, shape), jnp.bfloat16) for name, shape in (("x", (4, 64)), ("weight", (64, 256))))
    with pytest.raises(ValueError, match=message):
        sg.swiglu(x, weight, implementation=change.get("implementation"))


@pytest.mark.parametrize(("field", "value"), [("cluster", 3), ("stages", 9), ("band", 0)])
def test_bad_configurations_are_refused(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{field}={value}: allowed are"):
        sg.Config(**{field: value})


@needs_new_jax
@pytest.mark.parametrize(
    ("T", "D", "F", "dtype", "message"),
    [
        (120, 128, 128, jnp.bfloat16, "120 rows"),
        (132, 128, 128, jnp.bfloat16, "132 rows"),
        (128, 96, 128, jnp.bfloat16, "a weight of 96"),
        (128, 128, 64, jnp.bfloat16, "128 × 128: multiples"),
        (128, 128, 128, jnp.float32, "float32"),
    ],
)
def test_why_unsupported_names_it(T: int, D: int, F: int, dtype, message: str) -> None:
    x, weight = jax.ShapeDtypeStruct((T, D), dtype), jax.ShapeDtypeStruct((D, 2 * F), dtype)
    assert message in str(sg.why_unsupported(x, weight, interpret=object()))


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("config", sg.search_space(), ids=str)
def test_kernel_on_gpu(config: sg.Config) -> None:
    for T, D, F in ((128, 128, 128), (328, 192, 256), (1024, 4096, 1792), (4096, 512, 3584)):
        x, weight, expected = operands(T, D, F)
        outs = [sg.swiglu(x, weight, config=config, implementation="mosaic") for _ in range(3)]
        assert_close(outs[0], expected)
        assert all(bool((out == outs[0]).all()) for out in outs)
