"""The head with its choice of tokens: the reference against a float64 account, the kernel against both.

The kernel runs on the CPU in Mosaic's interpret mode (jax 0.11 and newer; two blocks) and, marked gpu, on a Hopper GPU in
every configuration of the search space.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from simulator import simulated

from pallas_kernels import linear as ln
from pallas_kernels import lm_head as lh
from pallas_kernels import mosaic, tuning
from pallas_kernels.decode_layer import tile_weight

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
    config: lh.Config | ln.Config = dataclasses.field(default_factory=lambda: lh.Config(2, 64, 2))

    @property
    def int8(self) -> bool:
        return isinstance(self.config, ln.Config)

    def operands(self) -> tuple[jax.Array, Any]:
        rng = np.random.default_rng(self.V + self.B)
        x, head = rng.normal(size=(self.B, self.D)), rng.normal(size=(self.V, self.D))
        for row in self.twins:
            head[row] = 4 * np.sign(x[0])  # row 0's largest logit, several times
        if self.valid is not None:
            head[self.valid :] = 9 * np.sign(x[0]) if self.int8 else np.nan
        if self.bad is not None:
            x[self.bad] = np.nan
        return jnp.asarray(x, self.dtype), tile_weight(jnp.asarray(head.T)) if self.int8 else jnp.asarray(head, self.dtype)

    def check(self, out: tuple[jax.Array, jax.Array]) -> None:
        x, head = self.operands()
        head = ln.plain(head, jnp.float32).T if self.int8 else head
        logits = np.asarray(x, np.float64) @ np.asarray(head, np.float64).T
        logits[np.isnan(logits)] = -np.inf
        if self.int8 and self.valid is not None:
            logits[:, self.valid :] = -np.inf
        value, id = (np.asarray(a) for a in out)
        assert value.dtype == np.float32 and id.dtype == np.int32 and value.shape == id.shape == (self.B, self.candidates)
        expected_id = np.argsort(-logits, axis=1, kind="stable")[:, : self.candidates]
        expected = np.take_along_axis(logits, expected_id, axis=1)
        expected_id[(expected == -np.inf) & (np.arange(self.candidates) > 0)] = -1
        loose = 4 if self.int8 else 1  # the reference rounds an int8 head to bf16
        np.testing.assert_allclose(value, expected, rtol=1e-3 * loose, atol=1e-3 * loose * self.D**0.5)
        same = id == expected_id  # float32 sums may order two logits the other way round; only close ones
        places = np.nonzero(~same)
        assert same.mean() > 0.95
        np.testing.assert_allclose(logits[places[0], id[places]], expected[places], rtol=5e-3 if self.int8 else 1e-4)
        assert (id < (self.valid or self.V)).all() and (id[:, 0] >= 0).all()  # also where nothing is valid


CASES = {
    "one row": Case(1, 300),
    "valid": Case(3, 300, valid=140),
    "nothing valid": Case(3, 300, valid=0),
    "nothing valid in the second block": Case(3, 300, valid=7, candidates=3),
    "candidates": Case(9, 300, candidates=5),
    "more candidates than logits": Case(3, 300, valid=4, bad=1, candidates=6, dtype="float16"),
    "a row of NaN": Case(3, 300, bad=2),
    "equal logits": Case(2, 1000, twins=(900, 131, 560), candidates=3),
    "equal logits, one candidate": Case(2, 1000, twins=(900, 131, 560)),
    "equal logits in one warpgroup": Case(2, 1000, twins=(131, 67, 195)),  # 64 rows apart: by the same threads
    "rows no multiple of eight": Case(2, 301, candidates=4, config=lh.Config(3, 128, 3)),
    "sixty-four rows": Case(64, 130, config=lh.Config(1, 64, 2)),
    "int8, one row": Case(1, 384, 256, config=ln.Config(stages=2)),
    "int8, valid": Case(3, 384, 256, valid=140, config=ln.Config(tiles=2, stages=2)),  # the last cluster has one tile of three
    "int8, nothing valid in the second cluster": Case(3, 512, 256, valid=7, config=ln.Config(tiles=2, units=2, stages=2)),
    "int8, nothing valid": Case(3, 384, 128, valid=0, config=ln.Config(tiles=3, stages=2)),
    "int8, a row of NaN": Case(9, 384, 512, bad=2, config=ln.Config(tiles=3, units=2, stages=3)),
    "int8, equal logits": Case(2, 640, 128, twins=(515, 131, 259), config=ln.Config(tiles=5, stages=2)),  # by the same threads
    "int8, equal logits in both halves": Case(2, 640, 128, twins=(520, 131, 200), config=ln.Config(tiles=5, stages=2)),
    "int8, equal logits in two clusters": Case(2, 640, 128, twins=(131, 387), config=ln.Config(tiles=2, stages=2)),
}


@pytest.mark.parametrize("name", CASES)
def test_reference_matches_float64(name: str) -> None:
    case = CASES[name]
    case.check(lh.reference(*case.operands(), case.valid, candidates=case.candidates))


INT8 = tile_weight(jnp.ones((128, 384)))


@needs_new_jax
@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernel_matches_float64(name: str) -> None:
    case = CASES[name]
    case.check(simulated(lh.lm_head, *case.operands(), case.valid, candidates=case.candidates, config=case.config))


def test_equal_logits_give_the_lowest_id() -> None:
    for name in ("equal logits", "equal logits, one candidate", "int8, equal logits"):
        case = CASES[name]
        _, id = lh.lm_head(*case.operands(), candidates=case.candidates)
        assert id[0].tolist() == sorted(case.twins)[: case.candidates]


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


@needs_new_jax
@pytest.mark.parametrize("B", [1, 16, 64])
def test_the_int8_head_lowers_for_cuda_without_a_gpu(B: int) -> None:
    V, D, shape = 128256, 4096, jax.ShapeDtypeStruct
    weight = shape((V // 128, D // 128, 128, 128), jnp.int8), shape((V // 128, D // 128, 128), jnp.bfloat16)
    config = ln.default_config(B, D, V, True, "nvidia_h200")
    x = shape((lh.batch_columns(B), D), jnp.bfloat16)
    kernel = jax.jit(ln.argmax_kernel(B, D, V, config))
    lowered = kernel.trace(x, *weight, shape((1,), jnp.int32)).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()
    lists = 2 * -(-V // 128 // config.tiles)
    assert lists <= 264 and [out.shape for out in lowered.out_info] == [(lists, 1, lh.batch_columns(B))] * 2  # and no logits


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
        ((65, 128), None, 1, "65 rows"),
        ((1, 128), None, 2, "2 candidates of an int8 head"),
    ],
)
def test_reasons_are_named(x: tuple[int, int], head: tuple[int, int] | None, candidates: int, reason: str) -> None:
    shape = jax.ShapeDtypeStruct
    int8 = shape((40, 1, 128, 128), jnp.int8), shape((40, 1, 128), jnp.bfloat16)
    shapes = shape(x, jnp.bfloat16), shape(head, jnp.bfloat16) if head else int8
    why = lh.why_unsupported(*shapes, candidates, interpret=mosaic.plgpu().InterpretGPUParams())
    assert why is not None and reason in why


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"implementation": "triton"}, "implementation='triton'"),
        ({"config": ln.Config()}, "takes a pallas_kernels.lm_head.Config"),
        ({"head": INT8, "config": lh.Config()}, "takes a pallas_kernels.linear.Config"),
        ({"head": (INT8[0], INT8[1][:1])}, "scales must be"),
        ({"head": jnp.zeros((2, 300, 128))}, r"head \(2, 300, 128\)"),
        ({"candidates": 0}, "candidates=0"),
        ({"candidates": 65}, "candidates=65"),
        ({"x_BD": jnp.zeros((1, 64))}, r"x \(1, 64\)"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, object], message: str) -> None:
    arguments = dict(zip(("x_BD", "head"), CASES["one row"].operands())) | change
    with pytest.raises(ValueError, match=message):
        lh.lm_head(**arguments)  # type: ignore[arg-type]


def test_an_int8_head_takes_configs_with_whole_sums_only() -> None:
    for name, config in (("cluster=2", ln.Config(cluster=2)), ("splits=2", ln.Config(stages=2, splits=2))):
        with pytest.raises(ValueError, match=f"{name}.*cluster=1 and splits=1 are allowed"):
            ln.argmax_kernel(1, 512, 1024, config)
    for B in (1, 16, 64):
        found = lh.search_space(B, 4096, 128256, int8=True)
        assert found and all(config.cluster == config.splits == 1 for config in found)
        whole = [ln.resident_pieces(4096, lh.batch_columns(B), config, True) > 0 for config in found]
        assert any(whole) == (B < 64) and not all(whole)


def test_config_refuses_what_no_kernel_has() -> None:
    with pytest.raises(ValueError, match="columns=32"):
        lh.Config(columns=32)


def test_tuned_configs_are_valid_and_fit() -> None:
    """Whatever the tables say must construct, and what is made of it must divide the columns and fit in shared memory."""
    for device in [path.stem for path in tuning.FOLDER.glob("*.json")] + ["no_such_device"]:
        for entry in tuning._load(device).get("lm_head", ()):
            assert set(entry["when"]) <= {"batch", "vocabulary", "candidates"}
            lh.Config(**entry["config"])
        for entry in tuning._load(device).get("lm_head_int8", ()):  # of sizes by name: of others nobody knows that it wins
            assert isinstance(entry["when"]["inputs"], list) and isinstance(entry["when"]["columns"], list)
            assert entry["when"]["rows"] <= ln.MAX_ROWS and not {"cluster", "splits"} & set(entry["config"])
            ln.Config(**entry["config"])
        for B, D, candidates in itertools.product((1, 16, 64), (576, 3584, 4096), (1, 64)):
            config = lh.default_config(B, D, 128256, candidates, device)
            assert D % config.columns == 0
            assert lh.shared_memory_bytes(config, lh.batch_columns(B), candidates) <= lh.SHARED_MEMORY
            of_int8 = ln.default_config(B, -(-D // 128) * 128, 128256, True, device)
            assert ln.fits(-(-D // 128) * 128, ln.padded_rows(B), of_int8, True)
    assert lh.default_config(1, 4096, 128256, 1, "no_such_device") == lh.Config()


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("name", CASES)
def test_every_config_on_gpu(name: str) -> None:
    case = dataclasses.replace(CASES[name], V=-(-CASES[name].V // 8) * 8 + 9000, D=512)
    if case.int8:
        case = dataclasses.replace(case, V=CASES[name].V + 9088)  # multiples of 128
    for config in lh.search_space(case.B, case.D, case.V, case.candidates, case.int8):
        how = dict(candidates=case.candidates, config=config, implementation="mosaic")
        run = jax.jit(lambda x, head, how=how: lh.lm_head(x, head, case.valid, **how))
        out = run(*case.operands())
        case.check(out)
        for _ in range(10):  # a result that moves is a race
            jax.tree.map(np.testing.assert_array_equal, run(*case.operands()), out)
