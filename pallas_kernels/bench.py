"""Every kernel against XLA and against the limit of memory: python -m pallas_kernels.bench [--tune].

A row is one shape of a model, a batch and a context. Times are microseconds a call: the median of a few runs of some tens of
milliseconds, each one program that calls the kernel again and again on operands that take turns (as many sets as hold 160 MB,
so that nothing stays in L2, but at most 8: smaller ones do stay), every call fed by the one before through a small elementwise
link. The link's own time, measured alone in the same run, is taken off kernel and XLA alike. Every output stays alive, or XLA
would compute only what the link reads. What a dispatch begins with, zeros for outputs and a copy of every cache that is written
in place, counts too: some 3 % at most, since a kernel's dispatch has 64 rounds of its sets or more. XLA is the module's
`reference` (prefill: gathered pages, two products and a softmax; int8: the bf16 product, since XLA gains nothing from int8).
The limit is the bytes that must move (or the operations, where they take longer) at the rates that a read of 4 GB and a
product of 8192³ reach in the same run (XLA's own sum over 4 GB is 5 % slower than the copy engine's read).

Most of a row's time is the compiling of its programs, and most of that a kernel's lowering, which is Python. So kernels are
compiled in processes of their own, one a core, XLA's programs meanwhile in threads (they time themselves on the GPU, one after
another), all of a group of rows at once; then the rows are measured while nothing compiles but what fills their operands. A
row's "seconds" are those of its measuring; its group's compiling took "compile_seconds" a row.

Model by model, Llama-3-8B first. --resume goes on where a run before, of the same card, ended; a row says what its run read.
--tune measures a kernel's default and every configuration of its search space, and merges the best into tuned/<device>.json; of
those that fail, or are wrong, a row says why.
--interpret runs kernels once on tiny shapes in the simulator, on any machine with jax 0.11, and compares them with their
references; those that the simulator cannot run are named.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent import futures
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import serialize_executable
from tqdm import tqdm

from pallas_kernels import mosaic, tuning
from pallas_kernels.bench_cases import BATCHES, CONTEXTS, KERNELS, MODELS, TINY, Case, Model, absent, noise
from pallas_kernels.bench_tables import as_json, line, resumed, summary, write_tuned

GROUP = 32  # rows that are compiled together, at most
ROTATE = 160e6  # bytes that the sets of operands hold together, at least: three times the L2
ROUNDS = 64  # of the sets in a dispatch, at least
FAR = 2e-2  # a relative difference from the reference that says that something is wrong
LINKS = 8  # of the links alone an iteration: with fewer, the loop's own launches would count


def program(case: Case, implementation: str | None, config: Any, loops: int) -> jax.stages.Wrapped:
    """One dispatch: `loops` times a call on each set of operands in turn; implementation None: LINKS links, without calls.
    `out`, what a call returns, is an argument: XLA may not know what links read. Returns the last carry, each set's last output
    and, of a kernel, what the first set gives with the first carry, for comparison."""

    def run(sets: Sequence[Any], carry: Any, out: Any) -> Any:
        given = [case.prepare(operands) for operands in sets]

        def links(_: jax.Array, carry: Any) -> Any:
            for _turn in range(LINKS):
                carry = lax.optimization_barrier(case.link(carry, out))
            return carry

        def calls(_: jax.Array, state: Any) -> Any:
            carry, new = state[0], []
            for operands in given:
                out = case.call(carry, operands, implementation or "", config)
                carry, out = lax.optimization_barrier((case.link(carry, out), out))
                new.append(out)
            return carry, new

        if implementation is None:
            return lax.fori_loop(0, loops, links, carry)
        first = case.call(carry, given[0], implementation, config) if implementation == "mosaic" else None
        return *lax.fori_loop(0, loops, calls, (carry, [out] * len(sets))), first

    return jax.jit(run)


@dataclasses.dataclass(frozen=True)
class Chain:
    """A compiled `program`, and how many calls or links it makes."""

    run: Callable[[Sequence[Any], Any, Any], Any]
    calls: int


@dataclasses.dataclass(frozen=True)
class Time:
    us: float
    spread: float


def _shapes(case: Case, operands: Callable[[jax.Array], Any]) -> tuple[Any, Any, Any]:
    """Of a carry, a set of operands and an output."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    carry, given = jax.eval_shape(case.start, key), jax.eval_shape(operands, key)
    return carry, given, jax.eval_shape(lambda c, o: case.call(c, case.prepare(o), "reference", None), carry, given)


def _count(case: Case) -> int:
    """Sets of operands that take turns."""
    return max(1, min(8, math.ceil(ROTATE / case.bytes)))


class Where(NamedTuple):
    """A case by name, for another process."""

    kernel: str
    model: str
    batch: int
    context: int
    number: int  # of the kernel's cases there

    def case(self) -> Case:
        found = KERNELS[self.kernel](MODELS[self.model], self.batch, self.context, None)
        return next(itertools.islice(found, self.number, None))


def lowered(case: Case, implementation: str | None, config: Any, guess: float) -> tuple[jax.stages.Lowered, int]:
    """A `program`, and how many calls or links it makes. guess: seconds a call (implementation None: a link) may take, for
    choosing how many fill about 25 ms."""
    operands = case.xla_operands if implementation == "reference" and case.xla_operands else case.operands
    carry, given, out = _shapes(case, operands)
    count = _count(case)
    each = count if implementation else LINKS
    least = {"mosaic": ROUNDS, "reference": 8, None: 2}[implementation]  # XLA's rounds of what is large take long
    loops = max(least, round(25e-3 / (guess * each)))
    calls = loops * each + (implementation == "mosaic")  # the one for comparison
    return program(case, implementation, config, loops).lower([given] * count, carry, out), calls


def compile_chain(case: Case, implementation: str | None, config: Any, guess: float) -> Chain:
    program_, calls = lowered(case, implementation, config, guess)
    return Chain(program_.compile(), calls)


def serialized(where: Where, config: Any, guess: float) -> tuple[tuple[Any, Any, Any], int] | str:
    """The kernel's chain, compiled, as `serialize_executable` has it, and its calls; or what went wrong, since not every
    exception can leave its process."""
    try:
        program_, calls = lowered(where.case(), "mosaic", config, guess)
        return serialize_executable.serialize(program_.compile()), calls
    except Exception as error:
        return str(error) or repr(error)


def compile_elsewhere(workers: futures.Executor, where: Where, config: Any, guess: float) -> Chain:
    """The kernel's chain, traced, lowered and compiled by one of `workers`."""
    found = workers.submit(serialized, where, config, guess).result()
    if isinstance(found, str):
        raise RuntimeError(found)
    (program_, arguments, results), calls = found
    devices = jax.local_devices()[:1]
    return Chain(serialize_executable.deserialize_and_load(program_, arguments, results, devices[0].client, devices), calls)


def processes() -> futures.Executor:
    """Where kernels are compiled, one a core; spawned, since CUDA does not survive a fork."""
    context = multiprocessing.get_context("spawn")
    return futures.ProcessPoolExecutor(min(GROUP, os.cpu_count() or 1), mp_context=context)


def zeros(case: Case) -> Any:
    """What a call returns, all zeros."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), _shapes(case, case.operands)[2])


def _numbers(out: Any) -> list[jax.Array]:
    """A call's outputs that are numbers."""
    return [x.astype(jnp.float32) for x in jax.tree.leaves(out) if jnp.issubdtype(x.dtype, jnp.floating)]


def compile_difference(case: Case) -> Callable[[Any, Any, Any], list[jax.Array]]:
    """(carry, operands, what the kernel gave) → ‖kernel − reference‖ / ‖reference‖ of each output, compiled."""

    def off(carry: Any, operands: Any, kernel: Any) -> list[jax.Array]:
        reference = case.call(carry, case.prepare(operands), "reference", None)
        pairs = zip(_numbers(kernel), _numbers(reference), strict=True)
        return [jnp.linalg.norm(a - b) / jnp.linalg.norm(b) for a, b in pairs]

    return jax.jit(off).lower(*_shapes(case, case.operands)).compile()


def measure(chain: Chain, sets: Sequence[Any], begin: tuple[Any, Any], runs: int) -> Time:
    """Microseconds a call, or a link. begin: the carry and the output to begin with."""
    jax.block_until_ready(chain.run(sets, *begin))
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        jax.block_until_ready(chain.run(sets, *begin))
        times.append((time.perf_counter() - start) / chain.calls * 1e6)
    return Time(statistics.median(times), max(times) - min(times))


def furthest(off: Sequence[Any]) -> float:
    """The largest difference; NaN where there is one."""
    numbers = [float(x) for x in off]
    return math.nan if any(map(math.isnan, numbers)) else max(numbers)


def reader(rows: int, blocks: int = 132, lines: int = 32, stages: int = 6, interpret: Any = None) -> Any:
    """A kernel that reads int32 [rows, 256], `lines` at a time a block, and does nothing with it: (x, salt [1]) → salt + 1."""
    from jax.experimental import pallas as pl

    plgpu = mosaic.plgpu()
    share = rows // (lines * blocks)

    def body(x, salt, out, *, buf, full):  # type: ignore[no-untyped-def]
        b = lax.axis_index("b")

        def ask(i):  # type: ignore[no-untyped-def]
            slot = lax.rem(i, stages)
            plgpu.copy_gmem_to_smem(x.at[pl.ds((b * share + i) * lines, lines)], buf.at[slot], full.at[slot])

        for i in range(min(stages, share)):
            ask(i)

        @pl.loop(0, share)
        def _step(i):  # type: ignore[no-untyped-def]
            plgpu.barrier_wait(full.at[lax.rem(i, stages)])

            @pl.when(i + stages < share)
            def _next():  # type: ignore[no-untyped-def]
                ask(i + stages)

        @pl.when(b == 0)
        def _last():  # type: ignore[no-untyped-def]
            out[0] = salt[0] + 1

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((1,), jnp.int32),
        grid=(blocks,),
        grid_names=("b",),
        scratch_types=dict(buf=plgpu.SMEM((stages, lines, 256), jnp.int32), full=plgpu.Barrier(num_barriers=stages)),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True),
        interpret=interpret,
    )
    return jax.jit(kernel)


def limits() -> tuple[float, float]:
    """(bytes a second of `reader` over 4 GB, operations a second of a bf16 product of 8192³), the median of five runs."""
    rows = 4_000_000_000 // (1024 * 32 * 132) * (32 * 132)
    read_all = reader(rows)

    @functools.partial(jax.jit, static_argnums=1)
    def read(x: jax.Array, loops: int) -> jax.Array:
        return lax.fori_loop(0, loops, lambda _, salt: read_all(x, salt), jnp.zeros((1,), jnp.int32))

    @functools.partial(jax.jit, static_argnums=2)
    def multiply(x: jax.Array, y: jax.Array, loops: int) -> jax.Array:
        return lax.fori_loop(0, loops, lambda _, z: z @ y, x)

    def rate(amount: float, run: Callable[[], Any]) -> float:
        jax.block_until_ready(run())
        times = []
        for _ in range(5):
            start = time.perf_counter()
            jax.block_until_ready(run())
            times.append(time.perf_counter() - start)
        return amount / statistics.median(times)

    words = jax.jit(lambda key: lax.bitcast_convert_type(jax.random.bits(key, (rows, 256)), jnp.int32))(jax.random.key(0))
    bytes_rate = rate(40 * words.nbytes, lambda: read(words, 40))
    a, b = (jax.jit(lambda key: noise(key, (8192, 8192), scale=8192**-0.5))(jax.random.key(i)) for i in (1, 2))
    return bytes_rate, rate(30 * 2 * 8192**3, lambda: multiply(a, b, 30))


def _faster(found: dict[Any, Time]) -> Any:
    """The config of the least time, or the first, the default, where it is as good within the spread."""
    best, first = min(found, key=lambda config: found[config].us), next(iter(found))
    return first if found[first].us <= found[best].us + found[best].spread else best


def why_left_out(case: Case) -> str | None:
    """Why the kernel is not for such a shape, if it is not; any other failure is its row's."""
    try:
        jax.eval_shape(lambda c, o: case.call(c, case.prepare(o), "mosaic", None), *_shapes(case, case.operands)[:2])
    except tuning.Unsupported as why:
        return str(why)
    except Exception:
        return None
    return None


class Row:
    """A case on its way into the table: its programs are handed to `pool` at once, and measured by `bench`."""

    def __init__(
        self,
        pool: futures.Executor,
        workers: futures.Executor,
        where: Where,
        case: Case,
        bytes_rate: float,
        operations_rate: float,
        tune: bool,
    ):
        self.where, self.case = where, case
        self.limit = max(case.bytes / bytes_rate, case.operations / operations_rate)  # seconds
        self.configs = tuple(dict.fromkeys(case.configs()) if tune else ()) or (None,)
        self.compile_kernel(pool, workers)
        self.xla = pool.submit(compile_chain, case, "reference", None, self.limit * 2 + 6e-6)
        self.difference = pool.submit(compile_difference, case)
        self.link = pool.submit(compile_chain, case, None, None, 2e-6)

    def compile_kernel(self, pool: futures.Executor, workers: futures.Executor) -> None:
        """Begin, or begin again."""
        guess = self.limit * 1.2 + 4e-6
        self.chains: dict[Any, futures.Future[Chain]] = {
            config: pool.submit(compile_elsewhere, workers, self.where, config, guess) for config in self.configs
        }

    def lost_a_worker(self) -> bool:
        """Whether a process ended beside this row's compiling, which then nobody in its pool can do."""
        return any(isinstance(chain.exception(), futures.BrokenExecutor) for chain in self.chains.values())

    def wait(self) -> None:
        """Until everything has compiled, or failed to."""
        programs: list[futures.Future[Any]] = [self.link, self.difference, self.xla, *self.chains.values()]
        futures.wait(programs)

    def bench(self) -> dict[str, Any]:
        """What was measured."""
        row: dict[str, Any] = {"limit_us": self.limit * 1e6}
        sets: list[Any] = []  # emptied at the end: an error that a future keeps holds this frame, and so would hold them
        begin: Any = None  # likewise
        try:
            sets += self._sets(self.case.operands)
            begin = self.case.start(jax.random.key(0)), zeros(self.case)
            row["link_us"] = measure(self.link.result(), sets, begin, 3).us
            found: dict[Any, Time] = {}
            failed: dict[Any, str] = {}
            for config, chain in self.chains.items():
                try:
                    found[config] = measure(chain.result(), sets, begin, 3 if found else 5)
                except Exception as error:
                    failed[config] = " ".join(str(error).split())[:300]
            while found:
                best = _faster(found)
                row["relative_difference"] = off = self._difference(best, sets, begin)
                if off < FAR:
                    row |= {"us": found[best].us - row["link_us"], "spread_us": found[best].spread}
                    row["percent_of_limit"] = 100 * row["limit_us"] / row["us"]
                    row |= {} if best is None else {"config": dataclasses.asdict(best)}
                    break
                failed[best] = f"{off:.1e} from the reference, and {FAR} is wrong"
                del found[best]
            else:
                raise ValueError(next(iter(failed.values())))
            if failed:
                row["failed"] = {str(config): why for config, why in failed.items()}
        except Exception as error:  # a row that cannot be is a row that says why
            row["error"] = " ".join(str(error).split())[:300]
        try:
            if self.case.xla_operands or not sets:
                sets.clear()
                sets += self._sets(self.case.xla_operands or self.case.operands)
            begin = self.case.start(jax.random.key(0)), zeros(self.case)
            xla = measure(self.xla.result(), sets, begin, 3)
            if "link_us" in row:
                row |= {"xla_us": xla.us - row["link_us"], "xla_spread_us": xla.spread}
            if "us" in row:
                row["faster"] = row["xla_us"] / row["us"]
        except Exception as error:
            row["xla_error"] = " ".join(str(error).split())[:300]
        sets.clear()
        begin = None
        return row

    def _difference(self, config: Any, sets: Sequence[Any], begin: tuple[Any, Any]) -> float:
        first = self.chains[config].result().run(sets, *begin)[-1]
        return furthest(self.difference.result()(begin[0], sets[0], first))

    def _sets(self, operands: Callable[[jax.Array], Any]) -> list[Any]:
        return [operands(jax.random.key(7 + i)) for i in range(_count(self.case))]


def measured(
    todo: Sequence[tuple[Where, Case]], rates: tuple[float, float], tune: bool, until: float, say: Callable[[str], None]
) -> Generator[tuple[Case, dict[str, Any]]]:
    """(case, row) one after another, in groups, until time.monotonic() is `until`; a row with "left_out" says why its
    kernel is not for such a shape. rates: of `limits`."""
    size, first = 1 if tune else min(GROUP, os.cpu_count() or 1), 0  # one row's configurations are enough for the cores
    pool, workers = futures.ThreadPoolExecutor(4 * GROUP), processes()  # threads wait for processes too
    try:
        while first < len(todo) and time.monotonic() < until:
            say("compiling")
            start = time.perf_counter()
            group: list[tuple[Where, Case, Row | str]] = []
            for where, case in todo[first : first + size]:
                group.append((where, case, why_left_out(case) or Row(pool, workers, where, case, *rates, tune)))
            for *_, row in group:
                if isinstance(row, Row):
                    row.wait()
            lost = [row for *_, row in group if isinstance(row, Row) and row.lost_a_worker()]
            broken = bool(lost)
            for row in lost:  # one after another: now a process that ends takes its own row with it only
                workers = processes() if broken else workers
                row.compile_kernel(pool, workers)
                row.wait()
                broken = row.lost_a_worker()
            workers = processes() if broken else workers
            say("measuring")
            compiling = (time.perf_counter() - start) / len(group)
            while group:
                start = time.perf_counter()
                where, case, row = group.pop(0)
                about = {"kernel": case.kernel, "model": where.model, "shape": case.shape}
                found = {"left_out": row} if isinstance(row, str) else row.bench()
                yield case, about | found | {"seconds": time.perf_counter() - start, "compile_seconds": compiling}
                if time.monotonic() >= until:  # after a row at least: it was compiled for long
                    break
            first += size
            size = 1 if tune else min(2 * size, GROUP)
    finally:
        for executor in (workers, pool):
            executor.shutdown(cancel_futures=True)


# ---------------------------------------------------------------- the command


def cases(
    kernels: Sequence[str], models: dict[str, Model], batches: Sequence[int], contexts: Sequence[int], interpret: Any = None
) -> Iterator[tuple[Where, Case]]:
    """(where, case) of all that was asked for, model by model; a shape that several share comes once, under the first's
    name."""
    seen = set()
    for name, model in models.items():
        for kernel, batch, context in itertools.product(itertools.filterfalse(absent, kernels), batches, contexts):
            for number, case in enumerate(KERNELS[kernel](model, batch, context, interpret)):
                if (kernel, case.shape) not in seen:
                    seen.add((kernel, case.shape))
                    yield Where(kernel, name, batch, context, number), case


def smoke(kernels: Sequence[str]) -> int:
    """Each kernel that the simulator knows once on tiny shapes; returns how many were wrong."""
    wrong, simulator = 0, mosaic.plgpu().InterpretGPUParams()
    for _, case in cases(kernels, {"tiny": TINY}, (1,), (128,), simulator):
        carry, operands = (make(jax.random.key(0)) for make in (case.start, case.operands))
        call = jax.jit(lambda carry, operands, case=case: case.call(carry, case.prepare(operands), "mosaic", None))
        # Nothing runs beside the simulator, whose threads wait for one another and share XLA's few with all else.
        found = jax.block_until_ready(call(*jax.block_until_ready((carry, operands))))
        off = furthest(compile_difference(case)(carry, operands, found))
        print(f"{case.kernel:18} {case.shape:40} relative difference {off:.1e}")
        wrong += not off < 1e-2
    for kernel in kernels:
        if kernel in ("layer", "halves"):
            print(f"{kernel}: not in the simulator; the tests run it in numpy")
        if kernel == "linear" and not absent(kernel):
            print("linear in int8: not in the simulator; the tests run it in numpy")
    return wrong


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.bench", description="Kernels against XLA and the limit.")
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS), help="/4, /8: a device's share of tp 4, 8")
    parser.add_argument("--batch", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--context", nargs="+", type=int, default=CONTEXTS)
    parser.add_argument("--shape", default="", help="only rows whose shape has this in it: int8, say")
    parser.add_argument("--memory", type=float, default=40.0, help="GB of operands a row may need; larger ones are left out")
    parser.add_argument("--time-limit", type=float, default=math.inf, help="seconds after which no new row is measured")
    parser.add_argument("--tune", action="store_true", help="measure every configuration, and write tuned/<device>.json")
    parser.add_argument("--output", type=Path, help="JSON, written anew after each row")
    parser.add_argument("--resume", action="store_true", help="keep what --output already has, and measure the rest")
    parser.add_argument("--interpret", action="store_true", help="tiny shapes in the simulator, without a GPU")
    options = parser.parse_args(arguments)
    for name in ("batch", "context"):
        if any(value < 1 for value in getattr(options, name)):
            parser.error(f"--{name} {getattr(options, name)}: must be at least 1")
    if options.resume and not options.output:
        parser.error("--resume: it goes on with the file that --output names; give one")
    if options.resume and options.tune:
        parser.error("--resume with --tune: rows that are known are not tuned; leave --resume out and give another --output")
    device = jax.devices()[0]
    chosen = {name: MODELS[name] for name in options.model}
    todo = list(cases(options.kernel, chosen, options.batch, options.context))
    todo = [(where, case) for where, case in todo if options.shape in case.shape]
    if options.shape and not todo:
        parser.error(f"--shape {options.shape!r}: no row has it; what --output wrote has the shapes")
    if tuple(int(x) for x in jax.__version__.split(".")[:2]) < (0, 11):
        print(f"jax {jax.__version__}: the kernels need jax 0.11 or newer", file=sys.stderr)
        return 2
    for kernel in filter(absent, options.kernel):
        print(f"{kernel}: its module is not in this checkout", file=sys.stderr)
    if options.interpret:
        return min(1, smoke(options.kernel))
    if device.platform != "gpu" or getattr(device, "compute_capability", "") != "9.0":
        print(f"{device.device_kind!r} is no Hopper GPU; --interpret runs tiny shapes in the simulator", file=sys.stderr)
        return 2

    begun = time.monotonic()
    about: dict[str, Any] = {"device": device.device_kind, "jax": jax.__version__}
    rows: list[dict[str, Any]] = []
    left_out: list[dict[str, Any]] = []
    if options.resume:
        try:
            rows, left_out = resumed(options.output, about)
        except ValueError as error:
            parser.error(str(error))
    bytes_rate, operations_rate = limits()
    of_run = {"read_TB_per_s": bytes_rate / 1e12, "bf16_TFLOP_per_s": operations_rate / 1e12}
    facts = (about | of_run).items()
    print(", ".join(f"{name} {value if isinstance(value, str) else round(value, 2)}" for name, value in facts))
    small = [(where, case) for where, case in todo if case.bytes <= options.memory * 1e9]
    known = {(row["kernel"], row["shape"]) for row in (*rows, *left_out)}
    new = [(where, case) for where, case in small if (case.kernel, case.shape) not in known]
    found: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    try:
        rates, until, bar = (bytes_rate, operations_rate), begun + options.time_limit, tqdm(total=len(new), unit="row")
        with bar, closing(measured(new, rates, options.tune, until, bar.set_postfix_str)) as results:
            for case, row in results:
                (left_out if "left_out" in row else rows).append(row | of_run)
                bar.write(line(row))
                bar.update()
                if "config" in row and case.table:
                    found.setdefault(case.table, []).append((case.sizes, row["config"]))
                if options.output:
                    options.output.write_text(as_json({**about, **of_run, "rows": rows, "left_out": left_out}))
    finally:  # also where somebody stops it
        if found:
            path = tuning.FOLDER / f"{tuning.device_name()}.json"
            write_tuned(path, found)
            print(f"wrote {path}")
    print(summary(rows))
    if len(small) < len(todo):
        print(f"{len(todo) - len(small)} rows of more than {options.memory:g} GB left out (--memory)")
    if left_out:
        print(f"{len(left_out)} rows left out, which their kernels are not for")
    if missing := len(known | {(case.kernel, case.shape) for _, case in small}) - len(rows) - len(left_out):
        print(f"{missing} rows not measured within {options.time_limit:g} s (--time-limit)")
    return 1 if any("error" in row or "xla_error" in row for row in rows) else 0


if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # for `processes`, which inherit it, to have some too
    sys.exit(main())
