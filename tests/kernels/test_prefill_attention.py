"""Paged prefill attention: the reference against a float64 account, the kernel against both.

The kernel runs on the CPU in Mosaic's interpret mode (jax 0.11 and newer; that mode takes the probabilities through shared
memory and stores partial tiles row by row) and, marked gpu, on a Hopper GPU in every configuration of the search space.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from simulator import simulated

from pallas_kernels import prefill_attention as pa
from pallas_kernels import tuning

NEW_JAX = tuple(int(x) for x in jax.__version__.split(".")[:2]) >= (0, 11)
needs_new_jax = pytest.mark.skipif(not NEW_JAX, reason="Mosaic GPU's lowering and interpret mode need jax 0.11 or newer")
HOPPER = jax.default_backend() == "gpu" and getattr(jax.devices()[0], "compute_capability", "") == "9.0"


@dataclasses.dataclass
class Case:
    """Rows of (start, length) in T flat tokens; every number of the cache that no row may see is NaN, and so is page 0."""

    rows: list[tuple[int, int]]
    T: int = 192
    K: int = 1
    G: int = 1
    H: int = 64
    P: int = 64
    M: int = 4
    window: int | None = None
    dtype: str = "bfloat16"
    config: pa.Config = dataclasses.field(default_factory=pa.Config)

    def operands(self, seed: int = 0) -> tuple[jax.Array, ...]:
        rng = np.random.default_rng(seed)
        R, X = len(self.rows), len(self.rows) * self.M + 1
        q = rng.normal(size=(self.T, self.K, self.G, self.H))
        keys, values = (rng.normal(size=(X, self.K, self.P, self.H)) for _ in range(2))
        pages = rng.permutation(np.arange(1, X)).reshape(R, self.M)
        unseen = np.ones((X, self.P), bool)
        for r, (start, length) in enumerate(self.rows):
            lowest = 0 if self.window is None else max(0, start - self.window + 1)
            for position in range(lowest, start + length) if length else ():
                unseen[pages[r, position // self.P], position % self.P] = False
            pages[r, -(-(start + length) // self.P) if length else 0 :] = 0
        for cache in (keys, values):
            cache[np.broadcast_to(unseen[:, None, :, None], cache.shape)] = np.nan
        start, length = np.asarray(self.rows).T
        offset = np.cumsum(length) - length
        q[length.sum() :] = np.nan
        cast = lambda x: jnp.asarray(x, self.dtype)  # noqa: E731
        whole = lambda x: jnp.asarray(x, jnp.int32)  # noqa: E731
        return cast(2 * q), cast(keys), cast(values), whole(pages), whole(offset), whole(start), whole(length)

    def expected(self, operands: tuple[jax.Array, ...]) -> np.ndarray:
        q, keys, values = (np.asarray(x.astype(jnp.float32), np.float64) for x in operands[:3])
        pages, out, t = np.asarray(operands[3]), np.zeros(q.shape), 0
        for r, (start, length) in enumerate(self.rows):
            for own in range(start, start + length):
                at = np.arange(0 if self.window is None else max(0, own - self.window + 1), own + 1)
                page = pages[r, at // self.P]
                for k in range(self.K):
                    scores = q[t, k] @ keys[page, k, at % self.P].T * self.H**-0.5
                    probs = np.exp(scores - scores.max(-1, keepdims=True))
                    out[t, k] = probs / probs.sum(-1, keepdims=True) @ values[page, k, at % self.P]
                t += 1
        return out


def assert_close(out: jax.Array, expected: np.ndarray) -> None:
    got = np.asarray(out.astype(jnp.float32), np.float64)
    assert np.linalg.norm(got - expected) <= 1e-2 * np.linalg.norm(expected)


CASES = {
    "ragged": Case([(0, 70), (0, 0), (0, 1), (0, 100)]),
    "chunks": Case([(61, 70), (128, 64), (0, 30)]),
    "window": Case([(100, 70), (0, 90)], window=50, config=pa.Config(tile=64)),
    "window of one": Case([(3, 70)], T=80, window=1),
    "two kv heads of three": Case([(0, 20), (5, 30)], T=56, K=2, G=3),
    "head dimension 128": Case([(0, 90), (3, 40)], H=128, config=pa.Config(tile=64, stages=3)),
    "pages of 16": Case([(9, 100), (0, 20)], P=16, M=8),
    "pages of 192": Case([(100, 110)], P=192, M=2),
    "three warpgroups": Case([(0, 10), (7, 170)], config=pa.Config(warpgroups=3)),
    "one warpgroup": Case([(0, 10), (7, 60)], T=72, config=pa.Config(warpgroups=1)),
    "float16": Case([(0, 70)], T=75, dtype="float16"),
}


@pytest.mark.parametrize("name", CASES)
def test_reference_matches_float64(name: str) -> None:
    case = CASES[name]
    operands = case.operands()
    out = pa.reference(*operands, window=case.window)
    assert out.dtype == operands[0].dtype
    assert_close(out, case.expected(operands))


@needs_new_jax
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")  # NaN times something, as meant
@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernel_matches_float64(name: str) -> None:
    case = CASES[name]
    operands = case.operands()
    out = simulated(pa.prefill_attention, *operands, window=case.window, config=case.config)
    assert_close(out, case.expected(operands))


@needs_new_jax
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
def test_row_that_blew_up_leaves_its_neighbours_alone() -> None:
    """Rows share tiles of tokens (starts round down to 8) and, one after another, the same shared memory."""
    case = Case([(0, 30), (0, 30), (0, 30)], T=90, M=1)
    q, keys, values, pages, *rows = case.operands()
    expected = case.expected((q, keys, values, pages, *rows))
    q = q.at[30:60].set(jnp.nan)
    keys, values = (cache.at[pages[1]].set(jnp.nan) for cache in (keys, values))
    out = simulated(pa.prefill_attention, q, keys, values, pages, *rows)
    for row in (slice(0, 30), slice(60, 90)):
        assert_close(out[row], expected[row])


@pytest.mark.parametrize("queries", [64, 128, 192])
def test_work_list_covers_every_token_once_and_longest_first(queries: int) -> None:
    rng = np.random.default_rng(queries)
    R, T, tile = 7, 1500, 64
    work_list = jax.jit(lambda *rows: pa.work_list(*rows, T, queries, tile, None))
    for _ in range(20):
        length = np.diff(np.sort(np.concatenate([[0], rng.integers(0, T + 1, R)])))
        length[rng.integers(R)] = 0
        start, offset = rng.integers(0, 500, R), np.cumsum(length) - length
        table, count = work_list(*(jnp.asarray(x) for x in (offset, start, length)))
        assert len(table) == pa.num_tiles(T, R, queries) >= count[0]
        covered = np.zeros(T, int)
        tiles = [dict(zip(pa.FIELDS, map(int, row))) for row in np.asarray(table)[: count[0]]]
        for f in tiles:
            assert f["first_token"] % pa.ALIGN == 0
            assert f["first_token"] <= f["low"] < f["high"] <= f["first_token"] + queries
            covered[f["low"] : f["high"]] += 1
            if f["row"] < R:
                assert f["low"] >= offset[f["row"]] and f["high"] <= offset[f["row"]] + length[f["row"]]
                assert f["low"] + f["shift"] == start[f["row"]] + f["low"] - offset[f["row"]]
                assert (f["last"] - 1) * tile <= f["high"] - 1 + f["shift"] < f["last"] * tile
        assert (covered == 1).all()
        steps = [f["last"] - f["first"] for f in tiles]
        assert steps == sorted(steps, reverse=True)


@needs_new_jax
@pytest.mark.parametrize(("H", "window"), [(128, None), (128, 1000), (64, None)])
def test_lowers_for_cuda_without_a_gpu(H: int, window: int | None) -> None:
    """Layout inference and the shared-memory check run at lowering; Llama-3-8B's heads."""
    kernel = pa._kernel(1024, 8, 4, H, 64, window, jnp.dtype("bfloat16"), pa.Config(), pa.BLOCKS)
    shape = jax.ShapeDtypeStruct
    cache = shape((33, 8, 64, H), jnp.bfloat16)
    table = shape((12, len(pa.FIELDS)), jnp.int32)
    lowered = (
        jax.jit(kernel)
        .trace(shape((1024, 8, 4, H), jnp.bfloat16), cache, cache, shape((2, 16), jnp.int32), table, shape((1,), jnp.int32))
        .lower(lowering_platforms=("cuda",))
    )
    assert "mosaic_gpu" in lowered.as_text()


@pytest.mark.skipif(HOPPER, reason="this is a Hopper GPU")
def test_kernel_named_where_unsupported_raises_and_none_falls_back() -> None:
    operands = CASES["ragged"].operands()
    with pytest.raises(ValueError, match=r"jax 0\.11 or newer|no Hopper GPU"):
        pa.prefill_attention(*operands, implementation="mosaic")
    out = pa.prefill_attention(*operands)
    np.testing.assert_array_equal(np.asarray(out.astype(jnp.float32)), np.asarray(pa.reference(*operands).astype(jnp.float32)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"implementation": "triton"}, "implementation='triton'"),
        ({"window": 0}, "window=0"),
        ({"length_R": jnp.zeros((3,), jnp.int32)}, r"length \(3,\)"),
        ({"values_XKPH": jnp.zeros((1, 1, 64, 64))}, r"values \(1, 1, 64, 64\)"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, object], message: str) -> None:
    names = ("q_TKGH", "keys_XKPH", "values_XKPH", "pages_RM", "offset_R", "start_R", "length_R")
    arguments = dict(zip(names, CASES["ragged"].operands())) | change
    with pytest.raises(ValueError, match=message):
        pa.prefill_attention(**arguments)  # type: ignore[arg-type]


def test_config_refuses_what_no_kernel_has() -> None:
    with pytest.raises(ValueError, match="tile=96"):
        pa.Config(tile=96)


def test_tuned_configs_are_valid_and_fit() -> None:
    for path in tuning.FOLDER.glob("*.json"):
        for entry in tuning._load(path.stem).get("prefill_attention", ()):
            assert set(entry["when"]) <= {"tokens", "head"}
            assert pa.shared_memory_bytes(pa.Config(**entry["config"]), entry["when"].get("head", 128)) <= pa.SHARED_MEMORY
    assert pa.default_config(2048, 128, "no_such_device") == pa.Config()


BIG = Case([(0, 300), (0, 0), (1000, 129), (0, 1), (5, 700)], T=1200, K=2, G=4, H=128, M=20)


def check_on_gpu(case: Case, config: pa.Config | None) -> None:
    operands = case.operands()
    run = jax.jit(lambda *x: pa.prefill_attention(*x, window=case.window, config=config, implementation="mosaic"))
    out = run(*operands)
    assert_close(out, case.expected(operands))
    for _ in range(20):  # a result that moves is a race
        np.testing.assert_array_equal(np.asarray(run(*operands)), np.asarray(out))


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("config", pa.search_space(H=128), ids=str)
def test_every_config_on_gpu(config: pa.Config) -> None:
    for window in (None, 200):
        check_on_gpu(dataclasses.replace(BIG, window=window), config)


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("name", CASES)
def test_every_case_on_gpu(name: str) -> None:
    check_on_gpu(CASES[name], None)
    check_on_gpu(CASES[name], CASES[name].config)
