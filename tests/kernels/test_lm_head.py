"""The head with its choice of tokens: the reference against a float64 account, the kernel against both.

The kernel runs on the CPU in Mosaic's interpret mode (jax 0.11 and newer; two blocks) and, marked gpu, on a Hopper GPU in
every configuration of the search space.
"""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import lm_head as lh
from pallas_kernels import tuning

NEW_JAX = tuple(int(x) for x in jax.__version__.split(".")[:2]) >= (0, 11)
needs_new_jax = pytest.mark.skipif(not NEW_JAX, reason="Mosaic GPU's lowering and interpret mode need jax 0.11 or newer")
HOPPER = jax.default_backend() == "gpu" and getattr(jax.devices()[0], "compute_capability", "") == "9.0"


@dataclasses.dataclass
class Case:
    """Random operands; padding of the vocabulary is NaN, and so is row `bad` of x. `twins`: rows of the head that are equal."""

    B: int
    V: int
    D: int = 128
    candidates: int = 1
    valid: int | None = None
    bad: int | None = None
    twins: tuple[int, ...] = ()
    dtype: str = "bfloat16"
    config: lh.Config = dataclasses.field(default_factory=lambda: lh.Config(2, 64, 2))

    def operands(self) -> tuple[jax.Array, jax.Array]:
        rng = np.random.default_rng(self.V + self.B)
        x, head = rng.normal(size=(self.B, self.D)), rng.normal(size=(self.V, self.D))
        for row in self.twins:
            head[row] = 4 * np.sign(x[0])  # row 0's largest logit, several times
        if self.valid is not None:
            head[self.valid :] = np.nan
        if self.bad is not None:
            x[self.bad] = np.nan
        return jnp.asarray(x, self.dtype), jnp.asarray(head, self.dtype)

    def check(self, out: tuple[jax.Array, jax.Array]) -> None:
        x, head = (np.asarray(a.astype(jnp.float32), np.float64) for a in self.operands())
        logits = x @ head.T
        logits[np.isnan(logits)] = -np.inf
        value, id = (np.asarray(a) for a in out)
        assert value.dtype == np.float32 and id.dtype == np.int32 and value.shape == id.shape == (self.B, self.candidates)
        expected_id = np.argsort(-logits, axis=1, kind="stable")[:, : self.candidates]
        expected = np.take_along_axis(logits, expected_id, axis=1)
        expected_id[(expected == -np.inf) & (np.arange(self.candidates) > 0)] = -1
        np.testing.assert_allclose(value, expected, rtol=1e-3, atol=1e-3 * self.D**0.5)
        same = id == expected_id  # float32 sums may order two logits the other way round; only close ones
        places = np.nonzero(~same)
        assert same.mean() > 0.95
        np.testing.assert_allclose(logits[places[0], id[places]], expected[places], rtol=1e-4)
        assert (id < (self.valid or self.V)).all() and (id[:, 0] >= 0).all()


CASES = {
    "one row": Case(1, 300),
    "valid": Case(3, 300, valid=140),
    "nothing valid in the second block": Case(3, 300, valid=7, candidates=3),
    "candidates": Case(9, 300, candidates=5),
    "more candidates than logits": Case(3, 300, valid=4, bad=1, candidates=6, dtype="float16"),
    "a row of NaN": Case(3, 300, bad=2),
    "equal logits": Case(2, 1000, twins=(900, 131, 560), candidates=3),
    "equal logits, one candidate": Case(2, 1000, twins=(900, 131, 560)),
    "rows no multiple of eight": Case(2, 301, candidates=4, config=lh.Config(3, 128, 3)),
    "sixty-four rows": Case(64, 130, config=lh.Config(1, 64, 2)),
}


@pytest.mark.parametrize("name", CASES)
def test_reference_matches_float64(name: str) -> None:
    case = CASES[name]
    case.check(lh.reference(*case.operands(), case.valid, candidates=case.candidates))


@needs_new_jax
@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernel_matches_float64(name: str) -> None:
    case = CASES[name]
    how = dict(config=case.config, implementation="mosaic", interpret=lh._plgpu().InterpretGPUParams())
    case.check(lh.lm_head(*case.operands(), case.valid, candidates=case.candidates, **how))  # type: ignore[arg-type]


def test_equal_logits_give_the_lowest_id() -> None:
    for name in ("equal logits", "equal logits, one candidate"):
        case = CASES[name]
        _, id = lh.lm_head(*case.operands(), candidates=case.candidates)
        assert id[0].tolist() == [131, 560, 900][: case.candidates]


@needs_new_jax
@pytest.mark.parametrize("config", [lh.Config(2, 128, 6), lh.Config(4, 64, 6)], ids=str)
@pytest.mark.parametrize("candidates", [1, 64])
def test_lowers_for_cuda_without_a_gpu(config: lh.Config, candidates: int) -> None:
    """Layout inference and the shared-memory check run at lowering; Llama-3-8B's shape."""
    V, D = 128256, 4096
    kernel = lh._kernel(V, D, 8, candidates, jnp.dtype("bfloat16"), config, lh.BLOCKS)
    shape = jax.ShapeDtypeStruct
    lowered = (
        jax.jit(kernel)
        .trace(shape((8, D), jnp.bfloat16), shape((V, D), jnp.bfloat16), shape((1,), jnp.int32))
        .lower(lowering_platforms=("cuda",))
    )
    assert "mosaic_gpu" in lowered.as_text()


@pytest.mark.skipif(HOPPER, reason="this is a Hopper GPU")
def test_kernel_named_where_unsupported_raises_and_none_falls_back() -> None:
    case = CASES["candidates"]
    with pytest.raises(ValueError, match=r"jax 0\.11 or newer|no Hopper GPU"):
        lh.lm_head(*case.operands(), implementation="mosaic")
    case.check(lh.lm_head(*case.operands(), candidates=case.candidates))


@needs_new_jax
@pytest.mark.parametrize(
    ("x", "head", "candidates", "reason"),
    [
        ((1, 128), (40, 128), 1, "a head of 40 rows"),
        ((65, 128), (4000, 128), 1, "65 rows"),
        ((1, 100), (4000, 100), 1, "100 columns"),
        ((64, 128), (4000, 128), 2, "2 candidates of 4000 logits for 64 rows"),
    ],
)
def test_reasons_are_named(x: tuple[int, int], head: tuple[int, int], candidates: int, reason: str) -> None:
    shapes = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in (x, head))
    why = lh.why_unsupported(*shapes, candidates, interpret=lh._plgpu().InterpretGPUParams())
    assert why is not None and reason in why


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"implementation": "triton"}, "implementation='triton'"),
        ({"candidates": 0}, "candidates=0"),
        ({"candidates": 65}, "candidates=65"),
        ({"x_BD": jnp.zeros((1, 64))}, r"x \(1, 64\)"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, object], message: str) -> None:
    arguments = dict(zip(("x_BD", "head_VD"), CASES["one row"].operands())) | change
    with pytest.raises(ValueError, match=message):
        lh.lm_head(**arguments)  # type: ignore[arg-type]


def test_config_refuses_what_no_kernel_has() -> None:
    with pytest.raises(ValueError, match="columns=32"):
        lh.Config(columns=32)


def test_tuned_configs_are_valid_and_fit() -> None:
    """Whatever the tables say must construct, and what is made of it must divide the columns and fit in shared memory."""
    for device in [path.stem for path in tuning.FOLDER.glob("*.json")] + ["no_such_device"]:
        for entry in tuning._load(device).get("lm_head", ()):
            assert set(entry["when"]) <= {"batch", "vocabulary", "candidates"}
            lh.Config(**entry["config"])
        for B, D, candidates in itertools.product((1, 16, 64), (576, 3584, 4096), (1, 64)):
            config = lh.default_config(B, D, 128256, candidates, device)
            assert D % config.columns == 0
            assert lh.shared_memory_bytes(config, lh.batch_columns(B), candidates) <= lh.SHARED_MEMORY
    assert lh.default_config(1, 4096, 128256, 1, "no_such_device") == lh.Config()


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("name", CASES)
def test_every_config_on_gpu(name: str) -> None:
    case = dataclasses.replace(CASES[name], V=-(-CASES[name].V // 8) * 8 + 9000, D=512)
    for config in lh.search_space(case.B, case.D, case.V, case.candidates):
        how = dict(candidates=case.candidates, config=config, implementation="mosaic")
        run = jax.jit(lambda x, head, how=how: lh.lm_head(x, head, case.valid, **how))
        out = run(*case.operands())
        case.check(out)
        for _ in range(10):  # a result that moves is a race
            jax.tree.map(np.testing.assert_array_equal, run(*case.operands()), out)
