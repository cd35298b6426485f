"""Residual add and RMSNorm in one kernel: the reference against float64, the kernel against the reference.

On the CPU the kernel runs in Mosaic's interpret mode (jax 0.11 and newer), with rows read as arrays; where its threads read and
write is checked in numpy, and it is lowered for a GPU; marked gpu, it runs on a Hopper GPU.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from simulated_threads import Threads
from simulator import simulated

from pallas_kernels import add_rms_norm as an

NEW_JAX = tuple(int(x) for x in jax.__version__.split(".")[:2]) >= (0, 11)
needs_new_jax = pytest.mark.skipif(not NEW_JAX, reason="Mosaic GPU's lowering and interpret mode need jax 0.11 or newer")
HOPPER = jax.default_backend() == "gpu" and getattr(jax.devices()[0], "compute_capability", "") == "9.0"
EPS = 1e-5


def operands(T: int, D: int, dtype=jnp.bfloat16, seed: int = 0) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=shape) * 3, dtype) for shape in ((T, D), (T, D), (D,)))


def wide(x: jax.Array) -> np.ndarray:
    return np.asarray(x.astype(jnp.float32), np.float64)


def assert_close(out: tuple[jax.Array, ...], residual: jax.Array, delta: jax.Array, weight: jax.Array) -> None:
    """The sum is exact but for its rounding, and the norm that of the rounded sum, but for two roundings."""
    total, normed = out
    assert total.dtype == normed.dtype == residual.dtype and total.shape == normed.shape == residual.shape
    np.testing.assert_array_equal(wide(total), wide((residual.astype(jnp.float32) + delta).astype(residual.dtype)))
    x = wide(total)
    expected = x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * wide(weight)
    np.testing.assert_allclose(wide(normed), expected, rtol=2.2 * 2.0 ** (-8 if residual.dtype == jnp.bfloat16 else -22))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_reference(dtype) -> None:
    args = operands(5, 96, dtype)
    assert_close(an.add_rms_norm(*args, eps=EPS), *args)  # no GPU, no such shape: the reference


@needs_new_jax
@pytest.mark.parametrize(("T", "D"), [(1, 1024), (3, 896), (2, 512)])
def test_kernel_in_interpret_mode(T: int, D: int) -> None:
    args = operands(T, D)
    assert_close(simulated(an.add_rms_norm, *args, eps=EPS), *args)


@pytest.mark.parametrize("D", [128, 896, 3584, 4096, 8192])
def test_threads_share_a_row(D: int) -> None:
    rows, size = np.zeros((3, D), np.uint16), min(8, (D // 128) & -(D // 128))
    places = np.concatenate([at for _, at in an._pieces(Threads(), rows, Threads.c(2), D)])
    assert (places % (2 * size) == 0).all()
    assert sorted(places // (2 * size)) == list(range(2 * D // size, 3 * D // size))


@needs_new_jax
def test_a_program_holds_the_kernel_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(an, "why_unsupported", lambda *args: None)
    x, weight = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((7, 512), (512,)))

    def layers(residual: jax.Array, x: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        for _ in range(3):
            residual, x = an.add_rms_norm(residual, x, weight, eps=EPS)
        return residual, x

    text = jax.jit(layers).trace(x, x, weight).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu_v2") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"implementation": "triton"}, "implementation='triton': allowed are"),
        ({"delta": (3, 64)}, "they must be"),
        ({"weight": (65,)}, "they must be"),
        ({"dtype": jnp.float32}, "they must be the same"),
        ({"implementation": "mosaic"}, "pass None or 'reference'"),
    ],
)
def test_bad_operands_are_refused(change: dict, message: str) -> None:
    shapes = {"residual": (4, 64), "delta": (4, 64), "weight": (64,)}
    args = [jnp.zeros(change.get(name, shape), jnp.bfloat16) for name, shape in shapes.items()]
    args[1] = args[1].astype(change.get("dtype", jnp.bfloat16))
    with pytest.raises(ValueError, match=message):
        an.add_rms_norm(*args, eps=EPS, implementation=change.get("implementation"))


@needs_new_jax
@pytest.mark.parametrize(
    ("D", "dtype", "message"),
    [(96, jnp.bfloat16, "rows of 96"), (8320, jnp.bfloat16, "rows of 8320"), (128, jnp.float32, "float32")],
)
def test_why_unsupported_names_it(D: int, dtype, message: str) -> None:
    residual, weight = jax.ShapeDtypeStruct((4, D), dtype), jax.ShapeDtypeStruct((D,), dtype)
    assert message in str(an.why_unsupported(residual, weight, interpret=object()))


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize(("T", "D"), [(1, 4096), (7, 896), (64, 3584), (4096, 4096), (3, 8192)])
def test_kernel_on_gpu(T: int, D: int) -> None:
    args = operands(T, D)
    first, second = (an.add_rms_norm(*args, eps=EPS, implementation="mosaic") for _ in range(2))
    assert_close(first, *args)
    assert all(bool((a == b).all()) for a, b in zip(first, second, strict=True))
