"""Softmax of attention scores: the reference against a float64 account, the kernel against both.

The kernel runs on the CPU in Mosaic's interpret mode (jax 0.11 and newer) and, marked gpu, on a Hopper GPU in every
configuration of the search space.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from simulator import simulated

from pallas_kernels import mosaic, tuning
from pallas_kernels import softmax as sm

NEW_JAX = tuple(int(x) for x in jax.__version__.split(".")[:2]) >= (0, 11)
needs_new_jax = pytest.mark.skipif(not NEW_JAX, reason="Mosaic GPU's lowering and interpret mode need jax 0.11 or newer")
HOPPER = jax.default_backend() == "gpu" and getattr(jax.devices()[0], "compute_capability", "") == "9.0"
SCALE = 0.3


@dataclasses.dataclass
class Case:
    """Rows of (start, length); scores of keys that a row does not see are NaN."""

    rows: list[tuple[int, int]]
    N: int = 2
    T: int = 4
    S: int = 512
    dtype: str = "float32"
    out_dtype: str = "float32"
    config: sm.Config = dataclasses.field(default_factory=lambda: sm.Config(4, 2, 256))

    def seen(self) -> np.ndarray:
        start, length = np.asarray(self.rows).T
        position = np.arange(self.S)
        seen_BTS = (position <= (start[:, None] + np.arange(self.T))[:, :, None]) & (position < length[:, None, None])
        return np.broadcast_to(seen_BTS[:, None], (len(self.rows), self.N, self.T, self.S))

    def operands(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        scores = np.random.default_rng(self.S).normal(size=self.seen().shape) * 5
        scores[~self.seen()] = np.nan
        start, length = jnp.asarray(self.rows, jnp.int32).T
        return jnp.asarray(scores, self.dtype), start, length

    def check(self, out: jax.Array) -> None:
        scores = np.asarray(self.operands()[0].astype(jnp.float32), np.float64) * SCALE
        weights = np.exp(np.where(self.seen(), scores, -np.inf))
        total = weights.sum(-1, keepdims=True)
        expected = np.divide(weights, total, where=total > 0, out=np.zeros_like(weights))
        got = np.asarray(out.astype(jnp.float32), np.float64)
        assert out.dtype == self.out_dtype
        assert np.linalg.norm(got - expected) <= (1e-2 if self.out_dtype == "bfloat16" else 1e-5) * np.linalg.norm(expected)
        assert not got[~self.seen()].any()


CASES = {
    "decode": Case([(511, 512), (0, 1), (300, 0), (77, 60)], T=1),
    "a chunk": Case([(100, 104), (255, 259)]),
    "ends within": Case([(100, 102), (0, 512)], out_dtype="bfloat16"),
    "bf16 scores": Case([(508, 512)], dtype="bfloat16", out_dtype="bfloat16"),
    "f16, one row a block": Case([(50, 53)], dtype="float16", config=sm.Config(1, 1, 128)),
    "copies that do not divide evenly": Case([(380, 384)], S=384, config=sm.Config(8, 3, 1024)),
}


@pytest.mark.parametrize("name", CASES)
def test_reference_matches_float64(name: str) -> None:
    case = CASES[name]
    case.check(sm.reference(*case.operands(), scale=SCALE, dtype=case.out_dtype))


@needs_new_jax
@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernel_matches_float64(name: str) -> None:
    case = CASES[name]
    case.check(simulated(sm.softmax, *case.operands(), scale=SCALE, dtype=case.out_dtype, config=case.config))


@needs_new_jax
def test_rows_of_minus_infinity_are_zero() -> None:
    operands = (jnp.full((1, 1, 4, 256), -jnp.inf), jnp.zeros((1,), jnp.int32), jnp.full((1,), 256, jnp.int32))
    assert not sm.reference(*operands, scale=1.0).any()
    seen = jnp.tri(4, 256, dtype=bool)
    assert not jnp.where(seen, 0.0, simulated(sm.softmax, *operands, scale=1.0, config=sm.Config(4, 1, 128))).any()


@needs_new_jax
@pytest.mark.parametrize("config", [sm.Config(), sm.Config(8, 3, 2048), sm.Config(1, 1, 512)], ids=str)
def test_lowers_for_cuda_without_a_gpu(config: sm.Config) -> None:
    kernel = sm._kernel(1, 8, 64, 2048, 0.1, jnp.dtype("float32"), jnp.dtype("bfloat16"), config)
    shape = jax.ShapeDtypeStruct
    row = shape((1,), jnp.int32)
    lowered = jax.jit(kernel).trace(shape((512, 16, 128), jnp.float32), row, row).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


@pytest.mark.skipif(HOPPER, reason="this is a Hopper GPU")
def test_kernel_named_where_unsupported_raises_and_none_falls_back() -> None:
    case = CASES["a chunk"]
    with pytest.raises(ValueError, match=r"jax 0\.11 or newer|no Hopper GPU"):
        sm.softmax(*case.operands(), scale=SCALE, implementation="mosaic")
    case.check(sm.softmax(*case.operands(), scale=SCALE))


@needs_new_jax
@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((1, 1, 4, 200), "float32", "rows of 200 scores"),
        ((1, 1, 4, 256), "int32", "scores are int32"),
        ((1, 1, 4, 1 << 16), "float32", "rows of 65536 scores"),
    ],
)
def test_reasons_are_named(shape: tuple[int, ...], dtype: str, reason: str) -> None:
    why = sm.why_unsupported(jax.ShapeDtypeStruct(shape, dtype), interpret=mosaic.plgpu().InterpretGPUParams())
    assert why is not None and reason in why


def test_default_configs_fit_every_row_that_can() -> None:
    for S in (128, 640, 2048, 8192, 32768, 56 * 1024):
        assert sm.fits(sm.default_config(6, S, jnp.float32, "nvidia_h200"), S, jnp.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"implementation": "triton"}, "implementation='triton'"),
        ({"length_B": jnp.zeros((3,), jnp.int32)}, r"length \(3,\)"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, object], message: str) -> None:
    arguments = dict(zip(("scores_BNTS", "start_B", "length_B"), CASES["a chunk"].operands())) | change
    with pytest.raises(ValueError, match=message):
        sm.softmax(**arguments, scale=SCALE)  # type: ignore[arg-type]


def test_config_refuses_what_no_kernel_has() -> None:
    with pytest.raises(ValueError, match="rows=3"):
        sm.Config(rows=3)


def test_tuned_configs_are_valid() -> None:
    for path in tuning.FOLDER.glob("*.json"):
        for entry in tuning._load(path.stem).get("softmax", ()):
            assert set(entry["when"]) <= {"keys"}
            sm.Config(**entry["config"])


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("name", CASES)
def test_every_config_on_gpu(name: str) -> None:
    case = dataclasses.replace(CASES[name], N=16, T=8)
    for config in sm.search_space(len(case.rows) * 128, case.S, case.dtype):
        run = jax.jit(lambda *x, config=config: sm.softmax(*x, scale=SCALE, dtype=case.out_dtype, config=config))
        out = run(*case.operands())
        case.check(out)
        for _ in range(10):  # a result that moves is a race
            np.testing.assert_array_equal(np.asarray(run(*case.operands())), np.asarray(out))
