"""Paged decode attention: the reference against a float64 account, the kernel against both.

The kernel runs on the CPU in Mosaic's interpret mode (jax 0.11 and newer; one block of a cluster only, since that mode has
no cluster barrier) and, marked gpu, on a Hopper GPU in every configuration of the search space that fits.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from simulator import simulated

from pallas_kernels import decode_attention as da
from pallas_kernels import tuning

NEW_JAX = tuple(int(x) for x in jax.__version__.split(".")[:2]) >= (0, 11)
needs_new_jax = pytest.mark.skipif(not NEW_JAX, reason="Mosaic GPU's lowering and interpret mode need jax 0.11 or newer")
HOPPER = jax.default_backend() == "gpu" and getattr(jax.devices()[0], "compute_capability", "") == "9.0"
ONE_BLOCK = da.Config(cluster=1, warpgroups=2, stages=2)


@dataclasses.dataclass
class Case:
    """Random operands; every number of the cache that no row may see is NaN, and so is page 0."""

    lengths: list[int]
    K: int = 1
    G: int = 4
    H: int = 64
    P: int = 64
    M: int = 3
    window: int | None = None
    dtype: str = "bfloat16"

    def operands(self, seed: int = 0) -> tuple[jax.Array, ...]:
        rng = np.random.default_rng(seed)
        B, X = len(self.lengths), len(self.lengths) * self.M + 1
        q, keys, values = (
            rng.normal(size=shape) for shape in [(B, self.K, self.G, self.H), *2 * [(X, self.K, self.P, self.H)]]
        )
        pages = rng.permutation(np.arange(1, X)).reshape(B, self.M)
        unseen = np.ones((X, self.P), bool)
        for b, n in enumerate(self.lengths):
            for position in range(max(0, n - (self.window or n)), n):
                unseen[pages[b, position // self.P], position % self.P] = False
            pages[b, -(-n // self.P) :] = 0
        for cache in (keys, values):
            cache[np.broadcast_to(unseen[:, None, :, None], cache.shape)] = np.nan
        cast = lambda x: jnp.asarray(x, self.dtype)  # noqa: E731
        return cast(2 * q), cast(keys), cast(values), jnp.asarray(pages, jnp.int32), jnp.asarray(self.lengths, jnp.int32)

    def expected(self, q: jax.Array, keys: jax.Array, values: jax.Array, pages: jax.Array, _: jax.Array) -> np.ndarray:
        q64, keys64, values64 = (np.asarray(x.astype(jnp.float32), np.float64) for x in (q, keys, values))
        out = np.zeros(q.shape)
        for b, n in enumerate(self.lengths):
            at = np.arange(max(0, n - (self.window or n)), n)
            if not len(at):
                continue
            page = np.asarray(pages)[b, at // self.P]
            for k in range(self.K):
                scores = q64[b, k] @ keys64[page, k, at % self.P].T * self.H**-0.5
                probs = np.exp(scores - scores.max(-1, keepdims=True))
                out[b, k] = probs / probs.sum(-1, keepdims=True) @ values64[page, k, at % self.P]
        return out


def assert_close(out: jax.Array, expected: np.ndarray, lengths: list[int]) -> None:
    got = np.asarray(out.astype(jnp.float32), np.float64)
    assert np.linalg.norm(got - expected) <= 1e-2 * np.linalg.norm(expected)
    assert not got[np.asarray(lengths) == 0].any()


CASES = {
    "ragged": Case([0, 1, 64, 65, 130, 192]),
    "window": Case([0, 5, 64, 130, 192], window=50),
    "window of one": Case([0, 1, 65, 192], window=1),
    "three heads a group": Case([70, 130], K=2, G=3),
    "sixteen heads a group": Case([70, 130], G=16),
    "head dimension 128": Case([70, 130], K=2, H=128),
    "pages of 16": Case([0, 5, 70, 96], P=16, M=6),
    "pages of 8, one head a group": Case([0, 8, 9, 30], G=1, P=8, M=4),
    "pages of 32": Case([5, 64, 96], P=32, M=3),
    "pages of 128": Case([5, 70, 250], P=128, M=2),
    "float16": Case([70, 130], dtype="float16"),
}


@pytest.mark.parametrize("name", CASES)
def test_reference_matches_float64(name: str) -> None:
    case = CASES[name]
    operands = case.operands()
    out = da.reference(*operands, window=case.window)
    assert out.dtype == operands[0].dtype
    assert_close(out, case.expected(*operands), case.lengths)


@needs_new_jax
@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernel_matches_float64(name: str) -> None:
    case = CASES[name]
    operands = case.operands()
    out = simulated(da.decode_attention, *operands, window=case.window, config=ONE_BLOCK)
    assert_close(out, case.expected(*operands), case.lengths)


@needs_new_jax
@pytest.mark.parametrize("config", [da.Config(), da.Config(4, 1, 1), da.Config(8, 2, 2)], ids=str)
def test_lowers_for_cuda_without_a_gpu(config: da.Config) -> None:
    """Layout inference and the shared-memory check run at lowering; Llama-3-8B's shapes."""
    dims = (2, 8, 4, 128, 64, 8, None, jnp.dtype("bfloat16"), config)
    shape = jax.ShapeDtypeStruct
    cache, angles = shape((33, 8, 64, 128), jnp.bfloat16), shape((2, 64), jnp.float32)
    rest = (shape((2, 16), jnp.int32), shape((2,), jnp.int32), cache, cache)
    lower = lambda kernel, *args: jax.jit(kernel).trace(*args, *rest).lower(lowering_platforms=("cuda",)).as_text()  # noqa: E731
    assert "mosaic_gpu" in lower(da._kernel(*dims), shape((64, 128), jnp.bfloat16))
    appending = lower(da._kernel(*dims, appends=True), shape((2, 8, 6, 128), jnp.bfloat16), angles, angles)
    assert "mosaic_gpu" in appending and "output_operand_alias" in appending  # the cache, in place


def append_case(case: Case) -> tuple[tuple[jax.Array, ...], tuple[np.ndarray, jax.Array, jax.Array]]:
    """Operands of append_and_attend, NaN where the new tokens will be, and what comes out: attention in float64, the cache."""
    q, keys, values, pages, length = case.operands()
    rng = np.random.default_rng(1)
    B, K, G, H = q.shape
    qkv = jnp.concatenate([q, jnp.asarray(rng.normal(size=(B, K, 2, H)), q.dtype)], axis=2)
    angle = rng.uniform(0, 6, (B, H // 2))
    cos, sin = jnp.asarray(np.cos(angle), jnp.float32), jnp.asarray(np.sin(angle), jnp.float32)
    x, y = np.split(np.asarray(qkv[:, :, :-1].astype(jnp.float32)), 2, axis=-1)
    c, s = (np.asarray(t)[:, None, None] for t in (cos, sin))
    turned = jnp.asarray(np.concatenate([x * c - y * s, y * c + x * s], axis=-1), q.dtype)
    before, after = [keys, values], [keys, values]
    for b, n in enumerate(case.lengths):
        if n:
            at = (pages[b, (n - 1) // case.P], slice(None), (n - 1) % case.P)
            before = [x.at[at].set(jnp.nan) for x in before]
            after = [x.at[at].set(new) for x, new in zip(after, (turned[b, :, -1], qkv[b, :, -1]))]
    expected = case.expected(turned[:, :, :G], *after, pages, length)
    return (qkv, cos, sin, *before, pages, length), (expected, *after)


def assert_appended(outs: tuple[jax.Array, ...], case: Case, operands: tuple[jax.Array, ...], expected: tuple) -> None:
    assert_close(outs[0], expected[0], case.lengths)
    pages = np.asarray(operands[5])
    for got, want, before in zip(outs[1:], expected[1:], operands[3:5]):
        got, want, before = (np.array(x.astype(jnp.float32)) for x in (got, want, before))
        for b, n in enumerate(case.lengths):
            if n:
                at = (pages[b, (n - 1) // case.P], slice(None), (n - 1) % case.P)
                np.testing.assert_allclose(got[at], want[at], rtol=2**-8, atol=2**-8)
                before[at] = got[at]
        np.testing.assert_array_equal(got, before)  # every other number is as it was, NaN included


APPEND_CASES = [name for name in CASES if name not in ("float16", "sixteen heads a group")]


@pytest.mark.parametrize("name", APPEND_CASES)
def test_append_reference(name: str) -> None:
    operands, expected = append_case(CASES[name])
    assert_appended(da.append_and_attend(*operands, window=CASES[name].window), CASES[name], operands, expected)


@needs_new_jax
@pytest.mark.parametrize("name", APPEND_CASES)
def test_interpreted_append(name: str) -> None:
    operands, expected = append_case(CASES[name])
    outs = simulated(da.append_and_attend, *operands, window=CASES[name].window, config=ONE_BLOCK)
    assert_appended(outs, CASES[name], operands, expected)


@pytest.mark.skipif(HOPPER, reason="this is a Hopper GPU")
def test_kernel_named_where_unsupported_raises_and_none_falls_back() -> None:
    case = CASES["ragged"]
    operands = case.operands()
    with pytest.raises(ValueError, match=r"jax 0\.11 or newer|no Hopper GPU"):
        da.decode_attention(*operands, implementation="mosaic")
    out = da.decode_attention(*operands)
    np.testing.assert_array_equal(np.asarray(out.astype(jnp.float32)), np.asarray(da.reference(*operands).astype(jnp.float32)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"implementation": "triton"}, "implementation='triton'"),
        ({"window": 0}, "window=0"),
        ({"length_B": jnp.zeros((3,), jnp.int32)}, r"length \(3,\)"),
        ({"values_XKPH": jnp.zeros((1, 1, 64, 64))}, r"values \(1, 1, 64, 64\)"),
        ({"cos_Bh": jnp.zeros((6, 64))}, r"cos \(6, 64\)"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, object], message: str) -> None:
    names = ("q_BKGH", "keys_XKPH", "values_XKPH", "pages_BM", "length_B")
    arguments = dict(zip(names, CASES["ragged"].operands())) | change
    if "cos_Bh" not in change:
        with pytest.raises(ValueError, match=message):
            da.decode_attention(**arguments)  # type: ignore[arg-type]
    names = ("qkv_BKJH", "cos_Bh", "sin_Bh", *names[1:])
    arguments = dict(zip(names, append_case(CASES["ragged"])[0])) | change
    with pytest.raises(ValueError, match=message):
        da.append_and_attend(**arguments)  # type: ignore[arg-type]


def test_config_refuses_what_no_kernel_has() -> None:
    with pytest.raises(ValueError, match="cluster=3"):
        da.Config(cluster=3)


def test_tuned_configs_are_valid_and_fit() -> None:
    """Whatever the tables say must construct and fit in shared memory at the largest supported shape."""
    for path in tuning.FOLDER.glob("*.json"):
        for entry in tuning._load(path.stem)["decode_attention"]:
            assert set(entry["when"]) <= {"pairs", "positions"}
            assert da.shared_memory_bytes(da.Config(**entry["config"]), H=128, N=16) <= da.SHARED_MEMORY
    found = [da.default_config(B, 8, 128, 64, "nvidia_h200") for B in (1, 4, 16, 64, 1024)]
    assert found[0].cluster > 1 and found[-1].cluster == 1
    assert da.default_config(1, 8, 4, 64, "no_such_device") == da.Config()


BIG_CASES = (Case([3000, 0, 1, 700], K=8, H=128, M=64), Case([300, 1, 129, 65] * 10, K=8, H=128, M=5))


def check_on_gpu(case: Case, config: da.Config | None) -> None:
    operands = case.operands()
    run = jax.jit(lambda *x: da.decode_attention(*x, window=case.window, config=config, implementation="mosaic"))
    out = run(*operands)
    assert_close(out, case.expected(*operands), case.lengths)
    for _ in range(20):  # a result that moves is a race
        np.testing.assert_array_equal(np.asarray(run(*operands)), np.asarray(out))


def check_append_on_gpu(case: Case, config: da.Config | None) -> None:
    operands, expected = append_case(case)
    run = jax.jit(lambda *x: da.append_and_attend(*x, window=case.window, config=config, implementation="mosaic"))
    outs = run(*operands)
    assert_appended(outs, case, operands, expected)
    for _ in range(20):
        for again, first in zip(run(*operands), outs):  # bit by bit, as there are NaNs
            np.testing.assert_array_equal(np.asarray(again).view(np.uint16), np.asarray(first).view(np.uint16))


def test_append_needs_two_rows_beside_the_queries() -> None:
    case = CASES["sixteen heads a group"]
    operands = append_case(case)[0]
    why = da.why_cannot_append(operands[0], operands[3], operands[4], interpret=object())
    assert why is not None and "16 query heads to a kv head: up to 14" in why
    with pytest.raises(ValueError, match="append_and_attend"):
        da.append_and_attend(*operands, implementation="mosaic")


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("name", APPEND_CASES)
def test_append_on_gpu(name: str) -> None:
    for config in (None, da.Config(4, 2, 1)):
        check_append_on_gpu(CASES[name], config)


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("config", [da.Config(c, w, s) for c, w, s in ((8, 1, 2), (8, 3, 1), (4, 1, 2), (1, 1, 1))], ids=str)
def test_append_of_tuned_configs_on_gpu(config: da.Config) -> None:
    for case in BIG_CASES:
        check_append_on_gpu(case, config)


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("config", da.search_space(H=128, N=8), ids=str)
def test_every_config_on_gpu(config: da.Config) -> None:
    for case in BIG_CASES:
        check_on_gpu(case, config)


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("name", CASES)
def test_every_case_on_gpu(name: str) -> None:
    for config in (None, da.Config(4, 2, 1)):
        check_on_gpu(CASES[name], config)
