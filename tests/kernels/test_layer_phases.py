"""What warpgroups of a persistent decode layer do between its products, thread by thread in numpy (simulated_threads.py)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from simulated_blocks import places
from simulated_threads import Threads, run_in_numpy
from test_decode_layer import BF16, RNG, close, needs_new_jax, normal, wide

from pallas_kernels import fixed_point, layer_phases, new_token, persistent
from pallas_kernels.persistent import RANKS

LAUNCH = 3


@pytest.fixture
def numpy_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    run_in_numpy(monkeypatch)


def rms(x: np.ndarray, eps: float) -> np.ndarray:
    return 1 / np.sqrt((wide(x) ** 2).mean(-1) + eps)


def sync_array() -> np.ndarray:
    """What nobody has sent anything to in this launch."""
    return np.full(1 << 18, LAUNCH - 1, np.int32)


def sent(sync: np.ndarray, at: int, count: int, tag: int = LAUNCH) -> np.ndarray:
    """The data of `count` sent words from `at` on."""
    words = sync[at : at + 2 * count].reshape(-1, 2)
    assert (words[:, 1] == tag).all(), "not sent"
    return np.ascontiguousarray(words[:, 0])


def send(sync: np.ndarray, at: int, data: np.ndarray, tag: int = LAUNCH) -> None:
    words = np.ascontiguousarray(data).reshape(-1).view(np.int32)
    sync[at : at + 2 * words.size].reshape(-1, 2)[:] = np.stack([words, np.full(words.size, tag, np.int32)], axis=1)


def sent_rows(sync: np.ndarray, at: int, B: int, O: int) -> np.ndarray:  # noqa: E741
    return sent(sync, at, B * O // 2).view(BF16).reshape(B, O)


def swizzled_place(row: int, column: int, columns: int) -> int:
    """Element of a 16-bit matrix kept in 8 × 64 tiles with 128-byte swizzling."""
    tile = row // 8 * (columns // 64) + column // 64
    return tile * 512 + row % 8 * 64 + (column % 64 // 8 ^ row % 8) * 8 + column % 8


def x_of(x: np.ndarray, B: int, columns: int) -> np.ndarray:
    """x[B, columns] from pieces [slots, N, rows] in shared memory."""
    _, _, rows = x.shape
    flat = x.reshape(x.shape[0], -1)
    return np.array([[flat[c // rows, swizzled_place(n, c % rows, rows)] for c in range(columns)] for n in range(B)])


def fixed_point_x(x: np.ndarray, steps: np.ndarray, B: int, columns: int) -> np.ndarray:
    """x[B, columns] from pieces in fixed point."""
    pieces, N, _ = x.shape
    # [piece, row, column as tiles have them]
    in_int8 = x.reshape(pieces, -1).view(np.int8)[:, places(2 * N, 128, 1)].astype(np.int32)
    high, low = in_int8.reshape(pieces, N // 8, 2, 8, 128).swapaxes(0, 2).swapaxes(1, 2).reshape(2, pieces, N, 128)
    numbers = np.repeat(np.arange(128, dtype=np.int8)[:, None], 128, axis=1)
    order = np.asarray(persistent.tile_int8(numbers, 128))[0, 0].reshape(-1)[places(128, 128, 1)][0]
    values = np.empty((pieces, N, 128))
    values[:, :, order] = (256 * high + low) * steps[:, :, None].astype(float)
    return values.swapaxes(0, 1).reshape(N, -1)[:B, :columns]


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("stream_is", ["a sum", "there", "sent"])
@pytest.mark.parametrize(("B", "N"), [(1, 8), (2, 8), (8, 8), (11, 16)])
def test_add_and_norm(numpy_threads: None, B: int, N: int, stream_is: str, fixed: bool) -> None:
    D, rows, stream, squares = 12 * 128, 128, 64, 32768  # four ranks have two pieces, the others one
    residual, delta, weights = normal(B, D), normal(B, D), normal(3, D)
    weight, added = weights[2], stream_is == "a sum"
    expected = residual + delta if added else residual
    total, sync = np.full((B, D), np.nan, BF16), sync_array()
    if stream_is == "sent":
        send(sync, stream, expected)
    for rank in range(RANKS):
        pieces = 2 if rank < 4 else 1
        x = np.full((2, N, rows), np.nan, BF16)
        steps = np.full((2, N), np.nan, np.float32)
        norms = [np.full_like(weights, np.nan), weights]
        refs = (residual, norms, sync, x, (steps,) if fixed else (), (delta, total) if added else ())
        for piece in range(2):
            place = (rank, pieces, piece, piece, LAUNCH, stream, squares, 1, 2 * D)
            layer_phases.normed_x(refs, (B, N, D, rows, 1, 2), (rows, 0), stream_is != "sent", int(rank % 2 == 0), place)
        mine = (wide(expected) * wide(weight)).reshape(B, -1, rows)[:, rank::RANKS].reshape(B, -1)
        if fixed:
            close(fixed_point_x(x, steps, B, pieces * rows), mine, 1e-2)
            assert np.isnan(steps[:, B:]).all() and np.isnan(steps[pieces:]).all()
            continue
        close(x_of(x, B, pieces * rows), mine, 1e-2)
        assert np.isnan(wide(x_of(x, N, pieces * rows))[B:]).all()
        assert np.isnan(wide(x)[pieces:]).all()
    if added:
        even = np.arange(D) // rows % 2 == 0  # those ranks wrote
        np.testing.assert_array_equal(total[:, even], expected[:, even])
        assert np.isnan(wide(total)[:, ~even]).all()
    else:
        assert np.isnan(wide(total)).all()
    scales = np.full(N, np.nan, np.float32)
    layer_phases.norm_scales(sync, scales, B, D, 1e-5, squares, LAUNCH)
    close(scales[:B], rms(expected, 1e-5), 1e-5)


H_CASES = [(1, 8, 128, 14), (3, 8, 256, 5), (16, 16, 128, 3)]


@pytest.mark.parametrize(
    ("B", "N", "rows", "units", "fixed"),
    [*((*case, fixed) for case in H_CASES for fixed in (False, True)), (2, 8, 64, 5, False)],
)  # in fixed point units are whole pieces of 128
def test_h_to_x(numpy_threads: None, B: int, N: int, rows: int, units: int, fixed: bool) -> None:
    rank, h = 2, 96
    F = (RANKS * (units - 1) + rank + 1) * rows
    values, sync = normal(B, F), sync_array()
    width = 128 if fixed else rows
    x, steps = np.full((units * rows // width, N, width), np.nan, BF16), np.full((units * rows // width, N), np.nan, np.float32)
    send(sync, h, values)
    group, refs = layer_phases.h_group(B, rows, units), (sync, x, *([steps] if fixed else []))
    for piece in range(0, units, group):
        layer_phases.h_x(refs, (B, N, F, rows, group), (width, 0), (h, rank, units, piece, LAUNCH))
    mine = values.reshape(B, -1, rows)[:, rank::RANKS].reshape(B, -1)
    if fixed:
        close(fixed_point_x(x, steps, B, units * rows), mine, 1e-4)
    else:
        np.testing.assert_array_equal(x_of(x, B, units * rows), mine)


def fixed_point_h(values: np.ndarray, N: int) -> tuple[np.ndarray, np.ndarray]:
    """Pieces [·, N, 128] in fixed point and their steps, of values [B, columns]."""
    sync, pieces = sync_array(), values.shape[1] // 128
    x, steps = np.full((pieces, N, 128), np.nan, BF16), np.full((pieces, N), np.nan, np.float32)
    send(sync, 64, np.concatenate([values.reshape(len(values), pieces, 1, 128)] * RANKS, axis=2))
    dims = len(values), N, RANKS * pieces * 128, 128, pieces
    layer_phases.h_x((sync, x, steps), dims, (128, 0), (64, 3, pieces, 0, LAUNCH))
    return x, steps


@pytest.mark.parametrize(("B", "N"), [(1, 8), (5, 8), (11, 16)])
def test_fixed_point_products(numpy_threads: None, B: int, N: int) -> None:
    """Three pieces of x in fixed point, with two groups of an int8 weight, give what float64 does."""
    values = normal(B, 3, 128)
    values[0, 1], values[B - 1, 2] = 0, np.float32(1e30) * values[B - 1, 2]
    x, steps = fixed_point_h(values.reshape(B, -1), N)
    assert np.isnan(steps[:, B:]).all()
    in_int8 = x.reshape(3, -1).view(np.int8)[:, places(2 * N, 128, 1)]  # [piece, row, column as tiles have them]

    weights = RNG.integers(-127, 128, (128, 128)).astype(np.int8)
    tile = np.asarray(persistent.tile_int8(weights, 128))[0, 0].reshape(-1)[places(128, 128, 1)]  # [column, row as tiles…]
    scales = np.abs(normal(2, 128))
    for piece in range(3):
        for w in range(2):
            product = tile[64 * w : 64 * w + 64].astype(np.int32) @ in_int8[piece].T.astype(np.int32)
            total = normal(64, N, dtype=np.float32)
            got = fixed_point.add_scaled((scales, steps), N, product, total, w, 1, piece)
            columns = slice(64 * w, 64 * w + 64)
            expected = (wide(weights)[:, columns] * wide(scales)[1, columns]).T @ wide(values[:, piece]).T
            close(got[:, :B] - total[:, :B], expected, 1e-4)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_row(numpy_threads: None, value: float) -> None:
    values = normal(3, 128)
    values[1, 77] = value
    x, steps = fixed_point_h(values, 8)
    product = np.ones((64, 128), np.int32) @ x.reshape(-1).view(np.int8)[places(16, 128, 1)].T.astype(np.int32)
    refs, zeros = (np.ones((1, 128), BF16), steps), np.zeros((64, 8), np.float32)
    with np.errstate(invalid="ignore"):
        got = fixed_point.add_scaled(refs, 8, product, zeros, 0, 0, 0)
    np.testing.assert_array_equal(np.isnan(got[0, :3]), [False, True, False])


def test_numbers_of_24_bits(numpy_threads: None) -> None:
    e = Threads()
    values = (RNG.normal(size=(4, 128)) * 10.0 ** RNG.integers(-30, 30, (4, 128))).astype(np.float32)
    values[:, :4] = [0, -0.0, np.inf, -np.inf]
    values.view(np.int32)[:, 4:6] = 0x7FFFFFFF, 0x7FC00000  # what the multiprocessor makes for a NaN, and numpy
    got = np.stack(e.unpack_24(e.pack_24(list(values))))
    np.testing.assert_allclose(got, values, rtol=2**-15)
    np.testing.assert_array_equal(np.signbit(got[:, :4]), np.signbit(values[:, :4]))


class Team:
    """The sums of two tiles, scattered over the eight ranks of a team."""

    def __init__(self, B: int, N: int):
        self.B, self.N, self.sums, self.place, self.layer = B, N, 64, 1 << 17, 2
        self.sync = sync_array()
        self.shares = normal(2, RANKS, 128, N, dtype=np.float32)
        self.shares[..., B:] = 0  # what rows of padding are multiplied to
        self.totals = self.shares.sum(1)

    def run(self, epilogue: Any, refs: tuple[Any, ...]) -> None:
        size = layer_phases.sums_words(2)
        for tile in range(2):
            place, tag = self.sums + tile * size, 7000 + tile
            for w in range(2):
                for rank in range(RANKS):
                    part = self.shares[tile, rank, 64 * w : 64 * w + 64]
                    layer_phases.send_sums(part, self.sync, self.B, self.N, 2, place, w, rank, tag)
        for tile in range(2):
            for rank in range(RANKS):
                at = (self.sums + tile * size, tile, rank, 7000 + tile, self.layer, 1 - tile)
                layer_phases.take_sums(self.sync, self.B, self.N, 128, at, (LAUNCH, self.place), epilogue, refs)

    @property
    def expected(self) -> np.ndarray:
        return wide(np.concatenate(list(self.totals))).T[: self.B]

    @property
    def scales(self) -> np.ndarray:
        return np.abs(normal(self.N, dtype=np.float32))


SIZES = pytest.mark.parametrize(("B", "N"), [(1, 8), (5, 8), (16, 16)])


@needs_new_jax
@SIZES
def test_sums_are_stored(numpy_threads: None, B: int, N: int) -> None:
    team, out = Team(B, N), np.full((B, 256), np.nan, BF16)
    team.run(layer_phases.store(B, 256), (out,))
    close(out, team.expected)


@needs_new_jax
def test_sums_are_waited_for(numpy_threads: None) -> None:
    team, out = Team(1, 8), np.zeros((1, 256), BF16)
    args = (team.sync, 1, 8, 128, (64, 0, 0, 7000, 0, 0), (LAUNCH, 0), layer_phases.store(1, 256), (out,))
    with pytest.raises(AssertionError, match="would wait for ever"):
        layer_phases.take_sums(*args)


@needs_new_jax
@SIZES
def test_gate_and_up(numpy_threads: None, B: int, N: int) -> None:
    team = Team(B, N)
    scales = team.scales
    team.run(layer_phases.gate_up(128), (scales,))
    products = team.expected * scales[:B, None]
    gate, up = products[:, 0::2], products[:, 1::2]
    close(sent_rows(team.sync, team.place, B, 128), gate / (1 + np.exp(-gate)) * up)


@needs_new_jax
@pytest.mark.parametrize("bias", [False, True])
@SIZES
def test_qkv_rows(numpy_threads: None, B: int, N: int, bias: bool) -> None:
    team, shifts = Team(B, N), normal(3, 256)
    scales = team.scales
    team.run(layer_phases.qkv_rows(256, bias), (scales, *([shifts] if bias else [])))
    shift = wide(shifts[team.layer]) if bias else 0
    close(sent_rows(team.sync, team.place, B, 256), team.expected * scales[:B, None] + shift)


@needs_new_jax
@SIZES
def test_residual_rows(numpy_threads: None, B: int, N: int) -> None:
    team, stream = Team(B, N), normal(B, 256)
    expected = wide(stream) + team.expected
    team.run(layer_phases.residual_rows(B, 256), (stream,))
    close(stream, expected)
    np.testing.assert_array_equal(sent_rows(team.sync, team.place, B, 256), stream)


@pytest.mark.parametrize(("G", "Q"), [(4, 8), (11, 16)])
def test_rotated_queries_and_the_new_position(numpy_threads: None, G: int, Q: int) -> None:
    B, K, H, P, X, row, head, slot, page, offset, place = 3, 2, 128, 128, 4, 1, 1, 2, 3, 77, 128
    qkv, sync = normal(B, K, G + 2, H), sync_array()
    send(sync, place, qkv)
    angle = RNG.normal(size=(B, H // 2))
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    a, b = wide(qkv[row, head]).reshape(G + 2, 2, H // 2).swapaxes(0, 1)
    turned = np.concatenate([a * cos[row] - b * sin[row], b * cos[row] + a * sin[row]], axis=-1)
    queries, fresh = np.full((2, Q * H), np.nan, BF16), np.full((2, 2, H), np.nan, BF16)
    layer_phases.rotate((sync, cos, sin, queries, fresh), (K, G, H, Q), (place, LAUNCH, row, head, 1))
    got = np.array([[queries[1, swizzled_place(g, h, H)] for h in range(H)] for g in range(Q)])
    close(got[:G], turned[:G])
    assert not wide(got[G:]).any()
    close(fresh[1, 0], turned[G])
    np.testing.assert_array_equal(fresh[1, 1], qkv[row, head, G + 1])

    keys, values, stages = normal(X, K, P, H), normal(X, K, P, H), normal(3, 128 * 128)
    old = keys.copy(), values.copy(), stages.copy()
    others = [np.full((X, K, P, H), np.nan, BF16) for _ in range(4)]  # of two other layers
    refs = (fresh, stages, *others[:2], keys, *others[2:], values)
    layer_phases.new_position(refs, (K, H, P, 128, 128), (head, page, offset, slot, 1, 2))
    assert np.isnan(wide(others)).all()
    for cache, line, expected in ((keys, offset % 64, fresh[1, 0]), (values, 64 + offset % 64, fresh[1, 1])):
        np.testing.assert_array_equal(cache[page, head, offset], expected)
        places = [swizzled_place(line, h, 128) for h in range(H)]
        np.testing.assert_array_equal(stages[slot, places], expected)
        stages[slot, places] = old[2][slot, places]
    keys[page, head, offset], values[page, head, offset] = old[0][page, head, offset], old[1][page, head, offset]
    for now, before in zip((keys, values, stages), old, strict=True):  # nothing else was touched
        np.testing.assert_array_equal(now, before)


@pytest.mark.parametrize(("G", "H", "Q"), [(4, 128, 8), (11, 64, 16)])
def test_what_decode_attention_does_with_new_tokens(numpy_threads: None, G: int, H: int, Q: int) -> None:
    B, K, P, X, rows, row, head, slot, page, offset, line = 3, 2, 128, 4, 64, 1, 1, 2, 3, 77, 13
    qkv, angle = normal(B, K, G + 2, H), RNG.normal(size=(B, H // 2))
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    a, b = wide(qkv[row, head]).reshape(G + 2, 2, H // 2).swapaxes(0, 1)
    turned = np.concatenate([a * cos[row] - b * sin[row], b * cos[row] + a * sin[row]], axis=-1)
    queries = np.full((2, Q * H), np.nan, BF16)
    new_token.rotate_new_token((qkv, cos, sin, queries), K, G, H, Q, row, head, 1)
    got = np.array([[queries[1, swizzled_place(g, h, H)] for h in range(H)] for g in range(Q)])
    close(got[: G + 1], turned[: G + 1])
    np.testing.assert_array_equal(got[G + 1], qkv[row, head, G + 1])
    assert not wide(got[G + 2 :]).any()
    for kept in (G, G + 1):
        cache, tiles = normal(X, K, P, H), normal(3, rows * H)
        old = cache.copy(), tiles.copy()
        new_token.append_kept((queries, cache, tiles), (K, G, H, P), rows, Q, kept, 1, head, page, offset, slot, line)
        places = [swizzled_place(line, h, H) for h in range(H)]
        np.testing.assert_array_equal(cache[page, head, offset], got[kept])
        np.testing.assert_array_equal(tiles[slot, places], got[kept])
        cache[page, head, offset], tiles[slot, places] = old[0][page, head, offset], old[1][slot, places]
        np.testing.assert_array_equal(cache, old[0])
        np.testing.assert_array_equal(tiles, old[1])


@needs_new_jax
@pytest.mark.parametrize(
    ("B", "K", "G", "rows", "shares", "window"),
    [
        (1, 8, 4, 128, 16, None),
        (3, 8, 4, 256, 2, 100),
        (3, 8, 4, 128, 1, None),
        (2, 2, 2, 128, 8, None),
        (1, 4, 7, 128, 3, None),
        (2, 8, 1, 128, 4, 70),
        (11, 2, 8, 256, 1, None),
    ],
)
@pytest.mark.parametrize("fixed", [False, True])
def test_states_combine_to_softmax(
    numpy_threads: None, B: int, K: int, G: int, rows: int, shares: int, window: int | None, fixed: bool
) -> None:
    N, H, place = max(8, 1 << (B - 1).bit_length()), 128, 64
    Q, units = -(-G // 8) * 8, K * G * H // rows
    lengths = np.array([600, 0, 130, *range(40, 48)], np.int32)[:B]
    sync, words = sync_array(), layer_phases.states_words(G, H)
    sync = np.concatenate([sync, sync])
    expected = np.zeros((B, K, G, H))
    for row, n in enumerate(lengths):
        tiles = -(-n // 64) - (max(n - (window or n), 0) // 64)
        used = min(tiles, shares)
        for head in range(K if used else 0):
            scores, values = 3 * RNG.normal(size=(Q, used, 5)), RNG.normal(size=(used, 5, H))
            for s in range(used):
                halves, halved = [], np.full(layer_phases.halved_shape(H, Q), np.nan, np.float32)
                for part in (slice(0, 3), slice(3, 5)) if s % 2 else (slice(0, 5),):
                    top = scores[:, s, part].max(-1)
                    p = np.exp2(scores[:, s, part] - top[:, None])
                    out = np.einsum("qt,th->hq", p, values[s, part])
                    halves.append([x.astype(np.float32) for x in (out, top, p.sum(-1))])
                at = place + ((head * B + row) * shares + s) * words
                if len(halves) > 1:
                    layer_phases.hand_state(halved, *halves[1])
                layer_phases.send_state((sync, halved), *halves[0], (G, H, Q), (at, LAUNCH, len(halves) - 1))
            p = np.exp2(scores - scores.max((1, 2), keepdims=True))
            expected[row, head] = (np.einsum("qst,sth->qh", p, values) / p.sum((1, 2))[:, None])[:G]
    slots = -(-units // RANKS)
    for rank in range(RANKS):
        begin, end = (r * units // RANKS * rows for r in (rank, rank + 1))
        width = 128 if fixed else rows
        x = np.full((1 + slots * rows // width, N, width), np.nan, BF16)
        steps = np.full((len(x), N), np.nan, np.float32)
        refs, dims = (lengths, sync, x, *([steps] if fixed else [])), (B, N, G, rows, slots, shares)
        layer_phases.attended_x(refs, dims, (width, 1), window, (place, begin, end - begin, LAUNCH))
        if end > begin:
            got = fixed_point_x(x[1:], steps[1:], B, end - begin) if fixed else x_of(x[1:], B, end - begin)
            close(got, expected.reshape(B, -1)[:, begin:end])
