"""The int8 product's kernel in numpy: what its threads do alone (simulated_threads.py), x in fixed point and sums put together,
and all of its blocks in any order (simulated_blocks.py)."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import simulated_blocks
from simulated_threads import run_in_numpy

from pallas_kernels import fixed_point, linear_int8, persistent

RNG = np.random.default_rng(0)
BF16 = ml_dtypes.bfloat16


@pytest.fixture
def numpy_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    run_in_numpy(monkeypatch)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(BF16)


def numbers(x_NP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of rows of one piece, 128 columns: the 16-bit numbers [N, 128], in the order of tiles, and steps; computed plainly."""
    x = x_NP.astype(np.float64)
    steps = np.abs(x).max(axis=1) / fixed_point.HIGHEST
    q = np.rint(x / np.where(steps == 0, 1, steps)[:, None]).astype(int)
    # Half i, step q, eight h, thread of four l, one of a pair j → l, i, q, j, h (persistent.tile_int8).
    return q.reshape(-1, 2, 4, 2, 4, 2).transpose(0, 4, 1, 2, 5, 3).reshape(-1, 128), steps


def assert_numbers(planes: np.ndarray, expected: np.ndarray) -> None:
    """planes: [N, high and low, 128] int8. Where a number lies between two, either will do."""
    assert np.abs(256 * planes[:, 0].astype(int) + planes[:, 1] - expected).max() <= 1


def swizzled(rows: np.ndarray) -> np.ndarray:
    """Lines of 128 bytes with their 16-byte pieces exchanged by line."""
    pieces = rows.reshape(-1, 8, 8, 16)
    return np.stack([pieces[:, i, np.arange(8) ^ i] for i in range(8)], axis=1).reshape(rows.shape)


def lines(x_NP: np.ndarray) -> np.ndarray:
    """bf16 [N, 128] as the copy engine leaves it: eights of rows, each 64 columns by turns."""
    halves = x_NP.reshape(-1, 8, 2, 64).transpose(0, 2, 1, 3)
    return swizzled(np.ascontiguousarray(halves).reshape(-1, 64).view(np.int8))


@pytest.mark.parametrize(("B", "N", "U"), [(1, 8, 4), (7, 8, 1), (16, 16, 2), (32, 32, 4)])
def test_x_becomes_fixed_point_where_it_lies(numpy_threads: None, B: int, N: int, U: int) -> None:
    x, slot = normal(3, U, N, 128), 1
    x[slot, 0, 0] = 0 if B > 1 else 1
    ring = np.stack([lines(x[i, u]) for i in range(3) for u in range(U)]).reshape(3, U, -1).copy()
    before, steps = ring.copy(), np.full((3, U, N), np.nan, np.float32)
    linear_int8.convert((ring.view(BF16), steps), (B, N, U), slot)
    np.testing.assert_array_equal(ring[[0, 2]], before[[0, 2]])
    for u in range(U):
        expected, expected_steps = numbers(x[slot, u])
        got = swizzled(ring[slot, u].reshape(-1, 128)).reshape(-1, 2, 8, 128).swapaxes(1, 2).reshape(N, 2, 128)
        first = 1 if u == 0 and B > 1 else 0  # of a row of zeros the numbers do not matter
        assert_numbers(got[first:B], expected[first:B])
        np.testing.assert_allclose(steps[slot, u, :B], expected_steps[:B], rtol=1e-6)
    assert (steps[slot, 0, 0] == 0) == (B > 1)


@pytest.mark.parametrize(("B", "N"), [(33, 64), (64, 64)])
def test_x_becomes_fixed_point_in_device_memory(numpy_threads: None, B: int, N: int) -> None:
    x, pieces, steps = normal(B, 384), np.full((3, 2 * N, 128), 77, np.int8), np.full((3, N), np.nan, np.float32)
    for piece in range(3):
        linear_int8.convert_piece((x, pieces, steps), (B, N, 384), piece)
        expected, expected_steps = numbers(x[:, 128 * piece :][:, :128])
        got = pieces[piece].reshape(-1, 2, 8, 128).swapaxes(1, 2).reshape(N, 2, 128)
        assert_numbers(got[:B], expected)
        assert (got[B:] == 77).all()
        np.testing.assert_allclose(steps[piece, :B], expected_steps[:B], rtol=1e-6)


@pytest.mark.parametrize("blocks", [1, 3, 5, 8])
@pytest.mark.parametrize(
    ("B", "epilogue"), [(3, "none"), (16, "residual"), (8, "silu"), (40, "float32"), (5, "silu float32"), (64, "none")]
)
def test_parts_of_a_tile_are_put_together_by_whoever_comes_last(
    numpy_threads: None, B: int, epilogue: str, blocks: int
) -> None:
    """Two tiles of four units, dealt out to some blocks, which come in any order, twice: what is counted is as before."""
    I, O, steps = 512, 256, 4  # noqa: E741
    total, dtype = O // 128 * steps, np.float32 if "float32" in epilogue else BF16
    dims = linear_int8.Dims(B, I, O, epilogue == "residual", "silu" in epilogue, dtype)
    N = dims.N
    ranges = [(b * total // blocks, (b + 1) * total // blocks) for b in range(blocks)]
    residual = normal(B, O)
    counts = np.append(np.zeros(O // 64 * 4, np.int32), np.int32(1))
    parts = np.full(blocks * 2 * 128 * N, np.nan, np.float32)
    for seed in range(2):
        order = np.random.default_rng(seed)
        tiles = [range(lo // steps, (hi - 1) // steps + 1) for lo, hi in ranges]
        work = [(b, tile, half) for b in range(blocks) for tile in tiles[b] for half in (0, 1)]
        sums = {key: RNG.normal(size=(64, N)).astype(np.float32) for key in work}
        out = np.full((B, O // 2 if dims.silu else O), np.nan, dtype)
        refs: tuple[Any, ...] = (parts, counts, out, *([residual] if dims.residual else []))
        for i in order.permutation(len(work)):
            linear_int8.store(refs, sums[work[i]], dims, (steps, total, blocks), work[i])
        np.testing.assert_array_equal(counts, np.append(np.zeros(O // 64 * 4, np.int32), np.int32(1)))
        expected = np.zeros((O, N), np.float32)
        for (_, tile, half), value in sums.items():
            expected[128 * tile + 64 * half :][:64] += value
        expected = expected.T[:B]
        if dims.residual:
            expected = expected + residual.astype(np.float32)
        if dims.silu:
            gate, up = expected[:, 0::2], expected[:, 1::2]
            expected = gate / (1 + np.exp(-gate)) * up
        np.testing.assert_allclose(out.astype(np.float32), expected, rtol=1e-2, atol=1e-2)


CASES = {  # B, I, O, epilogue, config
    "a block begins and ends within a tile": (3, 512, 384, "none", linear_int8.Config(blocks=5, units=1, stages=3)),
    "more blocks than stages of all": (1, 256, 128, "float32", linear_int8.Config(blocks=132, units=1, stages=4)),
    "whole tiles": (9, 256, 512, "silu", linear_int8.Config(blocks=2, units=2, stages=2)),
    "a tile of many blocks": (16, 2048, 128, "residual", linear_int8.Config(blocks=7, units=2, stages=2)),
    "four units a stage": (8, 1024, 256, "silu float32", linear_int8.Config(blocks=3, units=4, stages=2)),
    "one stage": (2, 512, 256, "none", linear_int8.Config(blocks=3, units=1, stages=1)),
    "x in fixed point": (33, 512, 256, "residual", linear_int8.Config(blocks=3, units=2, stages=2)),
    "64 rows": (64, 384, 256, "none", linear_int8.Config(blocks=4, units=1, stages=3)),
}


@pytest.mark.parametrize("warps", [False, True], ids=["", "warps apart"])
@pytest.mark.parametrize("name", CASES)
def test_all_blocks_in_any_order(name: str, warps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice with the same counters, which are as before each time; padding rows hold NaN."""
    B, I, O, epilogue, config = CASES[name]  # noqa: E741
    dims = linear_int8.Dims(B, I, O, epilogue == "residual", "silu" in epilogue, np.float32 if "float32" in epilogue else BF16)
    values, scales = RNG.integers(-127, 128, (I, O)), (RNG.uniform(0.5, 1.5, (I // 128, O)) * I**-0.5 / 73).astype(BF16)
    tiles = np.asarray(persistent.tile_int8(jnp.asarray(values, jnp.int8), 128))
    of_tiles = scales.reshape(I // 128, O // 128, 128).swapaxes(0, 1)
    counts = np.append(np.zeros(O // 64 * 4, np.int32), np.int32(1))
    before = counts.copy()
    for seed in range(2):
        x, residual = normal(B, I), normal(B, O)
        of_x = [np.concatenate([x, np.full((dims.N - B, I), np.nan, BF16)])]
        if not dims.converts:
            of_x = [np.full((I // 128, 2 * dims.N, 128), 77, np.int8), np.full((I // 128, dims.N), np.nan, np.float32)]
            with monkeypatch.context() as patched:
                run_in_numpy(patched)
                for piece in range(I // 128):
                    linear_int8.convert_piece((x, *of_x), (B, dims.N, I), piece)
        operands = [tiles, of_tiles, *([residual] if dims.residual else []), *of_x, counts]
        out, *_ = simulated_blocks.run(monkeypatch, linear_int8, "kernel", dims, config, operands, 0, seed, warps)
        np.testing.assert_array_equal(counts, before)
        weight = values * np.repeat(scales.astype(np.float64), 128, axis=0)
        expected = x.astype(np.float64) @ weight + (residual.astype(np.float64) if dims.residual else 0)
        if dims.silu:
            expected = expected[:, 0::2] / (1 + np.exp(-expected[:, 0::2])) * expected[:, 1::2]
        assert np.linalg.norm(out.astype(np.float64) - expected) <= 5e-3 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("B", "I", "O", "units"),
    [
        (16, 4096, 28672, 4),  # Llama-3-8B's four
        (8, 4096, 4096, 4),
        (1, 4096, 6144, 4),
        (16, 14336, 4096, 4),
        (17, 4096, 4096, 2),
        (64, 14336, 4096, 2),
        (8, 3584, 3584, 2),  # Qwen2.5-7B's `o`: 196 stages of four units, two for some blocks and one for most
        (1, 4096, 768, 2),  # an eighth of Llama-3-8B's qkv: 48 stages of four units
        (1, 1408, 4096, 1),  # 11 units along the reduced axis
    ],
)
def test_blocks_have_alike_much_to_do(B: int, I: int, O: int, units: int) -> None:  # noqa: E741
    assert linear_int8.stage_units(B, I, O, 132) == units


@pytest.mark.parametrize("field", [{"units": 3}, {"blocks": 0}, {"stages": 0}, {"stages": 33}])
def test_config_refuses_what_no_kernel_has(field: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(field))}={next(iter(field.values()))}"):
        linear_int8.Config(**field)
