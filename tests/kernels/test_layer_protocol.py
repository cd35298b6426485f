"""The whole persistent decode kernel in numpy, its blocks in any order: results, deadlocks, words lost (simulated_blocks.py).

Phases alone are tested in test_layer_phases.py; here is what waits for what, which no CPU test of Mosaic's can run.
"""

from __future__ import annotations

import collections
import functools
from typing import Any

import jax
import numpy as np
import pytest
import simulated_blocks
from test_decode_layer import Case, assert_alike

from pallas_kernels import decode_layer as dl
from pallas_kernels import layer_phases
from pallas_kernels.layer_plan import Config, Dims


def simulated(monkeypatch: pytest.MonkeyPatch, seed: int, warps: bool = False) -> None:
    """Make decode_layer's functions run the kernel in the simulator."""

    from pallas_kernels import layer_kernel as module

    def layer_kernel(dims: Dims, config: Config) -> Any:
        assert dl.why_unsupported_shape(dims, config) is None
        written = {"mlp": 1, "attention": 3, "layer": 2 * dims.layers + 2}[dims.kind]

        def launch(*operands: Any) -> list[Any]:
            arrays = [np.array(x) for x in operands]
            return simulated_blocks.run(monkeypatch, module, "layer_kernel", dims, config, arrays, written, seed, warps)

        return launch

    monkeypatch.setattr(dl, "layer_kernel", layer_kernel)
    monkeypatch.setattr(dl, "_chosen", lambda dims, config, implementation, halves=False: config)


def small(*lengths: int, **changes: Any) -> Case:
    return Case(list(lengths), **{**dict(D=256, F=384, K=1, G=2), **changes})


CASES = {
    "three layers": (small(70, 1, layers=3), Config(blocks=16, stages=3, layers=3)),
    "launches of one layer and of two": (small(65, layers=3, bias=True), Config(blocks=8, stages=2, flight=1, layers=2)),
    "int8": (small(130, F=512, int8=True, layers=2), Config(blocks=8, rows=256, stages=2, flight=2, layers=2)),
    "bias and window": (small(200, 0, 64, bias=True, window=50, layers=2), Config(blocks=8, layers=2)),
    "eight rows": (small(65, 1, 0, 2, 3, 130, 4, 5, layers=2), Config(blocks=8, layers=2)),
    "sixteen rows in int8": (small(*[65] * 16, F=512, int8=True, layers=2), Config(blocks=8, rows=256, stages=3, layers=2)),
    "h before gate and up are done": (small(70, 1, F=2048, layers=2), Config(blocks=8, stages=3, layers=2)),
    "blocks with little to do": (Case([70]), Config(blocks=128)),  # teams without tiles, ranks without units
    "many tiles": (small(70, F=1024, layers=2), Config(blocks=8, stages=3, layers=2)),
    "ranks with one group of pieces or two": (small(70, 1, D=1408, F=1408, layers=2), Config(blocks=16, stages=3, layers=2)),
    "many pieces of x": (small(*[65] * 12, 0, F=2304, K=2, G=5), Config(blocks=8, stages=3)),  # several units of a tile
    "more items than blocks": (small(65, 1, 64, 0, 2, 3, 130, 4, 5, layers=2), Config(blocks=8, stages=3, layers=2)),
}


@functools.cache
def expected(name: str) -> tuple[Any, ...]:
    return CASES[name][0].expected("layer")


@pytest.mark.parametrize("name", CASES)
def test_any_order_gives_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, config = CASES[name]
    reference, sync, results = expected(name), dl.new_sync(), []
    for seed in range(1 if config.blocks == 128 else 2):  # launch after launch with one sync
        simulated(monkeypatch, seed)
        *got, sync = case.run("layer", case.operands(), sync, config=config)
        results.append(jax.tree.leaves(got))
        assert_alike("layer", case, (*got, sync), reference)
    for first, again in zip(results[0], results[-1], strict=True):
        np.testing.assert_array_equal(first.astype(np.float32), again.astype(np.float32))


def test_h_is_taken_while_gate_and_up_are_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[int, list[str]] = collections.defaultdict(list)  # of each block's messenger

    def noted(name: str) -> None:
        run = getattr(layer_phases, name)

        def and_run(*args: Any) -> None:
            calls[simulated_blocks.here.agent.b].append(name)
            run(*args)

        monkeypatch.setattr(layer_phases, name, and_run)

    noted("take_sums")
    noted("h_x")
    simulated(monkeypatch, 0)
    case = small(70, 1, F=2048)
    case.run("layer", case.operands(), dl.new_sync(), config=Config(blocks=8, stages=3))
    tiles_of_down = case.D // 128
    assert all(names[names.index("h_x") :].count("take_sums") > tiles_of_down for names in calls.values())


def test_only_padding_ends_too(monkeypatch: pytest.MonkeyPatch) -> None:
    simulated(monkeypatch, 0)
    case = small(0, 0, layers=2)
    *got, sync = case.run("layer", case.operands(), dl.new_sync(), config=Config(blocks=16, stages=3, layers=2))
    assert_alike("layer", case, (*got, sync), case.expected("layer"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["many tiles", "ranks with one group of pieces or two"])
def test_warps_may_drift_apart(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, config = CASES[name]
    simulated(monkeypatch, 0, warps=True)
    got = case.run("layer", case.operands(), dl.new_sync(), config=config)
    assert_alike("layer", case, got, expected(name))


@pytest.mark.parametrize(
    ("kind", "changes", "blocks"), [("attention", {}, 16), ("mlp", {}, 16), ("mlp", dict(D=1152, F=2304), 8)]
)  # the last: not all ranks have a second group of pieces
def test_halves(kind: str, changes: dict[str, int], blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = small(70, 1, **changes)
    reference = case.expected(kind)
    simulated(monkeypatch, 0)
    assert_alike(kind, case, case.run(kind, case.operands(), dl.new_sync(), config=Config(blocks=blocks)), reference)


@pytest.mark.parametrize(
    ("case", "config"),
    [
        (small(70, 1, 0, D=384, bias=True, layers=3), Config(blocks=8)),
        (small(130, 65, F=512, int8=True, layers=2), Config(blocks=16, rows=256, stages=2, flight=2)),
    ],
    ids=["bf16", "int8"],
)
def test_halves_take_turns_with_one_sync(case: Case, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    reference, sync, results = case.expected("halves"), dl.new_sync(), []
    for seed in range(2):
        simulated(monkeypatch, seed)
        *got, sync = case.run("halves", case.operands(), sync, config=config)
        results.append(jax.tree.leaves(got))
        assert_alike("halves", case, (*got, sync), reference)
    for first, again in zip(*results, strict=True):
        np.testing.assert_array_equal(first.astype(np.float32), again.astype(np.float32))


@pytest.mark.parametrize("name", ["summed", "xfree", "empty"])
def test_the_simulator_notices_who_does_not_wait(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, config = CASES["three layers"]
    wait = simulated_blocks.Barrier.wait

    def hasty(barrier: simulated_blocks.Barrier) -> None:
        if not barrier.name.startswith(name):
            wait(barrier)

    monkeypatch.setattr(simulated_blocks.Barrier, "wait", hasty)
    with pytest.raises(simulated_blocks.Stuck, match=r"nobody can go on|still to be read"):
        for seed in range(12):  # some orders go well
            simulated(monkeypatch, seed)
            case.run("layer", case.operands(), dl.new_sync(), config=config)
