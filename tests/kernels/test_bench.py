"""The benchmark: what it runs, its table of cases, and how tuned files are merged. Times need a GPU; nothing here reads one."""

from __future__ import annotations

import dataclasses
import gc
import json
import time
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import bench, bench_cases, tuning

NEW_JAX = tuple(int(x) for x in jax.__version__.split(".")[:2]) >= (0, 11)
needs_new_jax = pytest.mark.skipif(not NEW_JAX, reason="Mosaic GPU's lowering and interpret mode need jax 0.11 or newer")
HOPPER = jax.default_backend() == "gpu" and getattr(jax.devices()[0], "compute_capability", "") == "9.0"


@needs_new_jax
def test_every_kernel_in_the_simulator(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--interpret"]) == 0
    text = "".join(capsys.readouterr())
    assert all(kernel in text for kernel in bench.KERNELS)


@needs_new_jax
def test_a_kernel_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(bench_cases.MODULES, "linear", "no_such_module")
    assert bench.main(["--interpret", "--kernel", "linear", "softmax"]) == 0
    out, err = capsys.readouterr()
    assert "linear: its module is not in this checkout" in err
    assert "softmax" in out and "linear" not in out


@needs_new_jax
def test_a_wrong_kernel_fails_the_smoke_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from pallas_kernels import lm_head

    right = lm_head.reference
    monkeypatch.setattr(lm_head, "reference", lambda *a, **k: jax.tree.map(lambda x: x + 1, right(*a, **k)))
    assert bench.main(["--interpret", "--kernel", "lm_head"]) == 1


@pytest.mark.skipif(HOPPER, reason="this is a Hopper GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([]) == 2
    assert ("--interpret" if NEW_JAX else "jax 0.11") in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--kernel", "matmul"], ["--model", "gpt-2"], ["--batch", "0"]])
def test_unknown_arguments_are_named(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(arguments)
    assert arguments[1] in capsys.readouterr().err


def test_models_are_those_of_the_configs(repo_root: Path) -> None:
    for name, model in bench.MODELS.items():
        base, _, tp = name.partition("/")
        config = json.loads((repo_root / f"configs/models/{base}.json").read_text())
        heads = config["num_attention_heads"]
        size = bench.Model(
            config["hidden_size"],
            config["intermediate_size"],
            heads,
            config.get("num_key_value_heads", heads),
            config.get("head_dim", config["hidden_size"] // heads),
            config["vocab_size"],
        )
        assert model == size.over(int(tp or 1))


def test_every_case_traces_with_the_shapes_its_operands_have() -> None:
    """Abstractly, and so at full size: the references on all that the table holds at two batches and contexts."""
    found = list(bench.cases(list(bench.KERNELS), bench.MODELS, (1, 16), (512, 32768)))
    assert {case.kernel for _, case in found} == {kernel for kernel in bench.KERNELS if not bench.absent(kernel)}
    assert len({(case.kernel, case.shape) for _, case in found}) == len(found)
    for _, case in found[:: 7 if len(found) > 60 else 1]:
        key = jax.eval_shape(lambda: jax.random.key(0))

        def chain(key: jax.Array, case: bench.Case = case) -> Any:
            carry = case.start(key)
            given = case.prepare((case.xla_operands or case.operands)(key))
            return carry, case.link(carry, case.call(carry, given, "reference", None))

        carry, linked = jax.eval_shape(chain, key)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), carry) == jax.tree.map(lambda x: (x.shape, x.dtype), linked)
        assert case.bytes > 0


def test_a_program_calls_on_every_set_in_turn() -> None:
    case = bench.Case(
        "addition",
        "",
        1,
        1,
        operands=lambda key: key,
        start=lambda key: jnp.zeros(()),
        call=lambda carry, operand, implementation, config: carry + operand,
        link=lambda carry, out: out,
    )
    sets, zero = [jnp.float32(1), jnp.float32(10)], jnp.zeros(())
    assert bench.program(case, "reference", None, 3)(sets, zero, zero) == (33, [23, 33], None)
    assert bench.program(case, "mosaic", None, 3)(sets, jnp.ones(()), zero) == (34, [24, 34], 2)
    case = dataclasses.replace(case, operands=lambda key: jnp.float32(1), bytes=int(bench.ROTATE / 2))
    chain = bench.compile_chain(case, "reference", None, 1e-3)
    assert chain.calls == 2 * round(25e-3 / 2e-3) and bench.measure(chain, sets, (zero, zero), 2).us > 0
    assert bench.compile_chain(case, None, None, 1e-3).calls == bench.LINKS * round(25e-3 / (bench.LINKS * 1e-3))


@pytest.mark.parametrize(
    ("wrong", "expected"), [([[1.0, 1], [2.0, 2.5, 2]], 0.5 / 12**0.5), ([[1.0, 1], [2.0, jnp.nan, 2]], jnp.nan)]
)
def test_the_difference_is_the_furthest_outputs_and_nan_where_there_is_one(wrong: list[list[float]], expected: float) -> None:
    outputs = {"mosaic": wrong, "reference": [[1.0, 1], [2.0, 2, 2]]}

    def call(carry: jax.Array, operands: Any, implementation: str, config: Any) -> Any:
        return [carry * jnp.asarray(x) for x in outputs[implementation]], jnp.arange(3)  # numbers, and ids that do not count

    case = bench.Case("", "", 1, 1, lambda key: None, lambda key: jnp.ones(()), call, lambda *_: None)
    off = bench.compile_difference(case)(jnp.ones(()), None, call(jnp.ones(()), None, "mosaic", None))
    assert bench.furthest(off) == pytest.approx(expected, nan_ok=True)
    assert bench.furthest([0.0, jnp.nan]) != 0 and bench.furthest([jnp.nan, 0.0]) != 0


def test_noise_has_its_deviation_and_no_pattern() -> None:
    a, b = (bench_cases.noise(jax.random.key(i), (512, 256), jnp.float32, 3.0) for i in (1, 2))
    for x in (a, b, a[:, ::2], a[::2] - a[1::2], a - b):
        assert abs(float(x.mean())) < 0.1
    assert float(a.std()) == pytest.approx(3, rel=1e-2) and float((a - b).std()) == pytest.approx(3 * 2**0.5, rel=1e-2)
    assert abs(float((a[:, 1:] * a[:, :-1]).mean())) < 0.1 and abs(float((a[1:] * a[:-1]).mean())) < 0.1
    values, scales = bench_cases._weight(jax.random.key(1), 256, 128, int8=True)
    assert values.shape == (1, 2, 128, 128) and values.dtype == jnp.int8 and float(values.std()) == pytest.approx(74, rel=2e-2)
    assert scales.shape == (1, 2, 128) and len(jnp.unique(values)) == 256


def tiny_cases() -> list[bench.Case]:
    found = [case for _, case in bench.cases(list(bench.KERNELS), {"tiny": bench.TINY}, (1,), (128,), "simulated")]
    return [*found, *bench_cases.layer(bench.TINY, 2, 128, None)]


def test_operands_differ_from_one_another() -> None:
    for case in tiny_cases():
        row = object.__new__(bench.Row)
        row.case = dataclasses.replace(case, bytes=int(bench.ROTATE / 2))
        sets = row._sets(case.operands)
        assert len(sets) == 2
        arrays = [np.asarray(x.astype(jnp.float32)) for x in jax.tree.leaves(sets) if x.dtype != jnp.int32]
        arrays = [x.ravel()[:128] for x in arrays if len(np.unique(x)) > 1]  # norms are ones
        for i, x in enumerate(arrays):
            assert all(not np.array_equal(x, y) for y in arrays[:i]), case.kernel


def test_every_link_waits_for_the_call_and_for_the_link_before() -> None:
    """Or XLA would make one of several, and the time of the others would count as the kernel's."""
    for case in tiny_cases():
        operands, carries = case.operands(jax.random.key(7)), [case.start(jax.random.key(i)) for i in range(2)]
        if case.kernel == "softmax":
            carries[1] = carries[1] + 1  # lengths
        out = case.call(carries[0], case.prepare(operands), "reference", None)
        wrong = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan) if jnp.issubdtype(x.dtype, jnp.floating) else x + 1, out)
        linked = [case.link(carries[0], out), case.link(carries[1], out), case.link(carries[0], wrong)]
        for other in linked[1:]:
            assert not np.array_equal(np.asarray(linked[0]), np.asarray(other)), case.kernel


def test_xla_does_not_know_what_links_read() -> None:
    case = next(case for case in tiny_cases() if case.kernel == "lm_head")
    carry, given, out = bench._shapes(case, case.operands)
    text = bench.program(case, None, None, 10).lower([given], carry, out).compile().as_text()
    assert text is not None and text.count(" add(") >= bench.LINKS  # one a link; of known zeros none would be left


def test_integers_have_every_byte_as_often() -> None:
    values, _ = bench_cases._weight(jax.random.key(3), 1024, 1024, int8=True)
    counts = np.bincount(np.asarray(values).view(np.uint8).reshape(-1), minlength=256)
    expected = values.size / 256
    assert ((counts - expected) ** 2 / expected).sum() < 400  # of 255 degrees of freedom: six deviations


def test_merge_keeps_what_was_not_measured_and_looks_up_what_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = [{"when": {"batch": 8, "keys": 512}, "config": {"a": 1}}, {"when": {"batch": 8}, "config": {"a": 2}}]
    path = tmp_path / "card.json"
    path.write_text(json.dumps({"kernel": old, "other": [{"when": {}, "config": {}}]}))
    found = [
        ({"batch": 8, "keys": 512}, {"a": 3}),
        ({"batch": 64, "keys": 4096}, {"a": 4}),
        ({"batch": 1, "keys": 512}, {"a": 5}),
    ]
    bench.write_tuned(path, {"kernel": found})
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    tuning._load.cache_clear()
    look = lambda batch, keys: tuning.lookup("kernel", "card", batch=batch, keys=keys)  # noqa: E731
    assert [look(*at) for at in ((1, 512), (8, 512), (8, 4096), (64, 4096))] == [{"a": 5}, {"a": 3}, {"a": 2}, {"a": 4}]
    assert look(65, 1) == {"a": 4}
    assert tuning.lookup("other", "card") == {}
    # Sizes by name: ahead of limits, for nothing else, and measured again without a second entry.
    for a in (6, 7):
        bench.write_tuned(path, {name: [({"batch": 8, "keys": [512, 768]}, {"a": a})] for name in ("kernel", "third")})
        tuning._load.cache_clear()
    assert look(8, 512) == look(8, 768) == {"a": 7} and look(8, 600) == {"a": 2} and look(1, 512) == {"a": 5}
    third = json.loads(path.read_text())["third"]
    assert third == [{"when": {"batch": 8, "keys": [512, 768]}, "config": {"a": 7}}]
    tuning._load.cache_clear()


@dataclasses.dataclass(frozen=True)
class Power:
    by: int


def powers(model: bench.Model, B: int, S: int, interpret: Any) -> Iterator[bench.Case]:
    """A kernel of plain jnp with two configurations, of which one fails; it is not for 5 or 6 rows, and fails with 7."""

    def call(carry: jax.Array, operand: jax.Array, implementation: str, config: Power | None) -> jax.Array:
        if config == Power(3):
            raise ValueError("no cubes")
        if implementation == "mosaic" and B in (5, 6):
            raise tuning.Unsupported("powers", f"{B} rows")
        if implementation == "mosaic" and B == 7:
            raise ValueError("seven")
        if implementation == "mosaic" and B == 9:
            return carry + 1.1 * operand.sum(0) ** 2
        return carry + operand.sum(0) ** (config.by if config else 2)

    yield bench.Case(
        "powers",
        f"{B} × {S}",
        10**9,
        1,
        operands=lambda key: jnp.full((1, B, S), 2.0),
        xla_operands=lambda key: jnp.ones((2, B, S)),
        start=lambda key: jnp.zeros((B, S)),
        call=call,
        link=lambda carry, out: out * 0.5,
        table="powers",
        sizes={"batch": B},
        configs=lambda: [Power(2), Power(1), Power(3), Power(2)] if S > 100 else [Power(2)],
    )


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of the command, on a card that is not there, with `powers` for all kernels."""
    card = SimpleNamespace(platform="gpu", compute_capability="9.0", device_kind="Some Card")
    monkeypatch.setattr(jax, "__version__", "0.11.2")
    monkeypatch.setattr(jax, "devices", lambda: [card])
    monkeypatch.setattr(bench, "KERNELS", {"powers": powers})
    monkeypatch.setattr(bench, "processes", lambda: futures.ThreadPoolExecutor(2))  # others would not know of `powers`
    monkeypatch.setattr(bench, "absent", lambda kernel: False)
    monkeypatch.setattr(bench.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(bench, "limits", lambda: (1e12, 1e15))
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    return ["--kernel", "powers", "--model", "llama3-8b", "--output", str(tmp_path / "rows.json")]


def test_the_command_measures_tunes_and_writes(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bench.main([*arguments, "--context", "8", "--batch", "2", "--tune"]) == 0
    assert json.loads((tmp_path / "some_card.json").read_text())["powers"][0]["config"] == {"by": 2}
    found = json.loads((tmp_path / "rows.json").read_text())
    assert found["device"] == "Some Card" and len(found["rows"]) == 1
    lines = (tmp_path / "rows.json").read_text().splitlines()
    assert sum(line.startswith('{"kernel"') for line in lines) == 1
    row = found["rows"][0]
    assert row["seconds"] > 0 and row["compile_seconds"] > 0
    assert row["relative_difference"] == 0 and row["limit_us"] == 1000 and {"us", "xla_us", "faster", "link_us"} <= set(row)


def test_the_command_names_what_it_leaves_out_and_what_fails(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compiling: list[Any] = []
    submit, measure = bench.futures.ThreadPoolExecutor.submit, bench.measure

    def submitted(pool: Any, *what: Any) -> Any:
        compiling.append(submit(pool, *what))
        return compiling[-1]

    def alone(*what: Any) -> bench.Time:
        assert len(compiling) >= 4 and all(each.done() for each in compiling)  # nothing compiles beside what is measured
        return measure(*what)

    monkeypatch.setattr(bench.futures.ThreadPoolExecutor, "submit", submitted)
    monkeypatch.setattr(bench, "measure", alone)
    assert bench.main([*arguments, "--context", "8", "--batch", "2", "3", "7", "5", "4", "6"]) == 1
    found, out = json.loads((tmp_path / "rows.json").read_text()), capsys.readouterr().out
    assert [(row["shape"], row.get("error")) for row in found["rows"]] == [
        ("2 × 8", None), ("3 × 8", None), ("7 × 8", "seven"), ("4 × 8", None)
    ]  # fmt: skip
    assert all("xla_us" in row and "xla_error" not in row for row in found["rows"])
    assert [row["shape"] for row in found["left_out"]] == ["5 × 8", "6 × 8"]
    assert "5 rows; pass None" in found["left_out"][0]["left_out"]
    assert "2 rows left out" in out and "not measured" not in out and "| powers | 4 |" in out and "seven" in out


def test_configs_that_fail_or_are_wrong_are_named_and_passed_over(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "_faster", lambda found: list(found)[-1])
    assert bench.main([*arguments, "--context", "800", "--batch", "2", "--tune"]) == 0
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert row["config"] == {"by": 2} and row["us"] and row["relative_difference"] == 0
    assert row["failed"]["Power(by=3)"] == "no cubes" and "from the reference" in row["failed"]["Power(by=1)"]
    assert "no cubes" in capsys.readouterr().out


def test_rows_are_chosen_by_their_shape(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([*arguments, "--context", "8", "16", "--batch", "2", "--shape", "× 16"]) == 0
    assert [row["shape"] for row in json.loads((tmp_path / "rows.json").read_text())["rows"]] == ["2 × 16"]
    with pytest.raises(SystemExit):
        bench.main([*arguments, "--context", "8", "--shape", "int4"])
    assert "--shape 'int4': no row has it" in capsys.readouterr().err


def test_a_kernel_that_is_far_off_is_an_error(arguments: list[str], tmp_path: Path) -> None:
    assert bench.main([*arguments, "--context", "8", "--batch", "9"]) == 1
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert "1.0e-01 from the reference" in row["error"] and row["xla_us"]
    assert bench.main([*arguments, "--context", "8", "--batch", "9", "--resume"]) == 1  # measured again


def test_the_command_says_what_it_had_no_time_for(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main([*arguments, "--context", "8", "--time-limit", "0"]) == 0
    assert "4 rows not measured within 0 s" in capsys.readouterr().out
    clock = iter(range(100))
    monkeypatch.setattr(bench, "time", SimpleNamespace(monotonic=lambda: next(clock), perf_counter=time.perf_counter))
    assert bench.main([*arguments, "--context", "8", "--time-limit", "3"]) == 0  # begun, group, a row's end, another's: late
    assert "2 rows not measured within 3 s" in capsys.readouterr().out


def test_resume_keeps_what_there_is_and_measures_the_rest(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.json"
    assert bench.main([*arguments, "--context", "8", "--batch", "2", "5", "7"]) == 1
    first = json.loads(path.read_text())
    monkeypatch.setattr(bench, "limits", lambda: (2e12, 1e15))
    assert bench.main([*arguments, "--context", "8", "--batch", "2", "3", "5", "--resume"]) == 0
    found, out = json.loads(path.read_text()), capsys.readouterr().out
    assert found["rows"][0] == first["rows"][0] and found["left_out"] == first["left_out"]
    assert [(row["shape"], row["read_TB_per_s"]) for row in found["rows"]] == [("2 × 8", 1), ("3 × 8", 2)]  # 7 × 8 had failed
    assert "not measured" not in out and out.count("\n| powers |") == 2
    assert bench.main([*arguments, "--context", "8", "--batch", "4", "--resume", "--time-limit", "0"]) == 0
    assert "1 rows not measured" in capsys.readouterr().out and json.loads(path.read_text()) == found


def test_resume_wants_a_file_of_the_same_card(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.json"

    def refused(*more: str) -> str:
        with pytest.raises(SystemExit):
            bench.main([*more, "--resume"])
        return capsys.readouterr().err

    assert "--output" in refused(*arguments[:4])
    assert "not tuned" in refused(*arguments, "--tune")
    assert f"there is no {path}" in refused(*arguments)
    path.write_text(json.dumps({"device": "Other Card", "jax": "0.11.2", "rows": [], "left_out": []}))
    assert "'Other Card', this is 'Some Card'" in refused(*arguments)


def test_what_goes_wrong_in_another_process_is_told() -> None:
    where, case = next(iter(bench.cases(["softmax"], {"llama3-8b": bench.MODELS["llama3-8b"]}, (1,), (512,))))
    assert where == ("softmax", "llama3-8b", 1, 512, 0) and where.case().shape == case.shape
    with bench.processes() as workers, pytest.raises(RuntimeError, match=r"Hopper|jax 0.11"):  # as it is here
        bench.compile_elsewhere(workers, where, None, 1e-3)


class Mortal(futures.ThreadPoolExecutor):
    """Processes of which one ends with every row of 13, after which none of them works."""

    made = 0

    def __init__(self) -> None:
        super().__init__(1)
        Mortal.made += 1
        self.dead = False

    def submit(self, run: Any, where: bench.Where, *more: Any) -> Any:  # type: ignore[override]
        self.dead |= where.batch == 13
        if not self.dead:
            return super().submit(run, where, *more)
        lost = futures.Future[Any]()
        lost.set_exception(futures.BrokenExecutor("a process ended"))
        return lost


def test_a_process_that_ends_takes_its_own_row_with_it_only(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "processes", Mortal)
    monkeypatch.setattr(Mortal, "made", 0)
    monkeypatch.setattr(bench, "GROUP", 3)
    monkeypatch.setattr(bench.os, "cpu_count", lambda: 3)
    assert bench.main([*arguments, "--context", "8", "--batch", "2", "13", "3", "4", "8"]) == 1
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["shape"] for row in rows] == ["2 × 8", "13 × 8", "3 × 8", "4 × 8", "8 × 8"]
    assert [row.get("error") for row in rows] == [None, "a process ended", None, None, None]
    assert 2 <= Mortal.made <= 3  # as the first group may see it at once or not


def test_operands_do_not_outlive_a_row_that_fails(arguments: list[str]) -> None:
    before = len(jax.live_arrays())
    gc.disable()
    try:
        assert bench.main([*arguments, "--context", "800", "--batch", "7", "2", "--tune"]) == 1
        assert len(jax.live_arrays()) <= before
    finally:
        gc.enable()
    rows = json.loads(Path(arguments[-1]).read_text())["rows"]
    assert rows[0]["error"] == "seven" and "no cubes" in rows[1]["failed"].values()


def test_the_summary_has_least_median_and_most_of_each_kernel() -> None:
    rows: list[dict[str, Any]] = [
        {"kernel": "a", "faster": f, "percent_of_limit": 50 + f, "relative_difference": 1e-3 * f} for f in (1.0, 3.0, 2.0, 9.0)
    ]
    rows += [{"kernel": "b", "relative_difference": off} for off in (1e-3, float("nan"))] + [{"kernel": "b", "error": "x"}]
    assert bench.summary(rows).splitlines()[2:] == [
        "| a | 4 | 1.00 / 2.50 / 9.00 | 51 / 52 / 59 | 1e-03 / 3e-03 / 9e-03 | 0 |", "| b | 3 | - | - | NaN | 1 |"
    ]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
def test_a_row_on_gpu(tmp_path: Path) -> None:
    output = tmp_path / "rows.json"
    arguments = "--kernel lm_head --model llama2-7b --batch 1 --context 512 --output"
    assert bench.main([*arguments.split(), str(output)]) == 0
    found = json.loads(output.read_text())
    assert found["read_TB_per_s"] > 1 and len(found["rows"]) == 4
    for row in found["rows"]:
        assert row["us"] > 0.9 * row["limit_us"] and row["relative_difference"] < 1e-2
