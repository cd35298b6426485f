"""`jaxinfer bench latency`: one batch from prompt to last token, through `LLM.generate`, in hardware terms.

A token after the first must read every weight and the cached keys and values once, so its time is compared with what a
plain read of memory reaches on the same device in the same run. The same batch is streamed too: the times between tokens.
"""

import argparse
import collections
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
from tqdm import trange

from jaxinfer import runtime
from jaxinfer.request import RequestOutputKind, SamplingParams

# A token that reads less than this may find it in a cache: no share of the memory's rate would mean anything.
CACHE_BYTES = 100e6
SEVERAL = ("batch_size", "input_len", "output_len")  # flags that take a value for each case


@dataclass(frozen=True)
class Options:
    """What `bench latency` is asked; vLLM's names and defaults."""

    batch_size: int = 8
    input_len: int = 32
    output_len: int = 128
    num_iters: int = 10
    num_iters_warmup: int = 3
    temperature: float = 0.0
    output: str | None = None

    def __post_init__(self) -> None:
        least = {"batch_size": 1, "input_len": 1, "output_len": 2, "num_iters": 1, "num_iters_warmup": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                why = ": the first run compiles" if name == "num_iters_warmup" else ""
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {low}{why}")
        if self.output is not None:
            folder = Path(self.output).absolute().parent
            if not folder.is_dir() or Path(self.output).is_dir():
                raise ValueError(f"--output {self.output}: it must be a file in a folder that exists")

    def check_length(self, max_model_len: int) -> None:
        """Raises ValueError where a measured sequence would not fit."""
        if self.input_len + self.output_len > max_model_len:
            raise ValueError(
                f"input_len {self.input_len} + output_len {self.output_len} is more than max_model_len {max_model_len}: "
                "lower --input-len or --output-len, or raise --max-model-len as far as the model allows"
            )

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> list[Self]:
        """One for each case: a flag that was given one value has it in all of them.

        Raises ValueError for flags of several values that are not as many, and for a value out of range.
        """
        values = {name: getattr(args, name) for name in SEVERAL}
        count = max(map(len, values.values()))
        if any(len(value) not in (1, count) for value in values.values()):
            said = ", ".join(f"--{name.replace('_', '-')} {' '.join(map(str, value))}" for name, value in values.items())
            raise ValueError(f"{said}: each takes one value, or one for each case, and these are not as many")
        same = {field.name: getattr(args, field.name) for field in fields(cls) if field.name not in SEVERAL}
        return [cls(**same, **{name: value[i % len(value)] for name, value in values.items()}) for i in range(count)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    help_texts = {
        "batch_size": "prompts a run; several values are several cases, measured one after another",
        "input_len": "random tokens a prompt; one value, or one a case",
        "output_len": "tokens to generate, at least 2; one value, or one a case",
        "num_iters": "measured runs",
        "num_iters_warmup": "runs before those, at least 1",
        "temperature": "0 is greedy",
        "output": "write everything measured to this JSON file, a list with an object for each case",
    }
    for field in fields(Options):
        kind = str if field.name == "output" else type(field.default)
        text = help_texts[field.name] + ("" if field.default is None else f"; default: {field.default}")
        flag = "--" + field.name.replace("_", "-")
        if field.name in SEVERAL:
            parser.add_argument(flag, type=kind, default=[field.default], nargs="+", help=text)
        else:
            parser.add_argument(flag, type=kind, default=field.default, help=text)


@dataclass(frozen=True)
class ReadLimit:
    """What a plain read reaches: bytes a second on each device, and the one to compare with."""

    device_kind: str
    measured: list[float]
    bytes_read: int

    @property
    def known(self) -> float | None:
        """A floor under the reading of the run, so that a slow reading cannot flatter the engine."""
        return runtime.read_limit(self.device_kind)

    @property
    def bytes_per_second(self) -> float:
        return max(statistics.median(self.measured), self.known or 0.0)


def measure_read_limit(num_bytes: int | None = None, repeats: int = 7) -> ReadLimit:
    """Times a reduction that reads an int32 array many times over and writes nothing, on each device by itself.

    num_bytes: size of the array; by default 4 GB on a GPU (less where it would not fit) and 64 MB on a CPU, whose
    forced devices share one memory, so that only the first is read. The median of `repeats` is kept.
    """
    import jax

    devices = jax.local_devices()
    on_gpu = devices[0].platform == "gpu"
    if num_bytes is None:
        limit = min((stats["bytes_limit"] for d in devices if (stats := d.memory_stats())), default=0)
        num_bytes = min(4 << 30, limit // 4) if on_gpu else 64 << 20
    # Tens of milliseconds a measurement: in a shorter one the launch is not lost.
    passes = 24 if on_gpu else 2
    rates = [_read_rate(device, num_bytes, passes, repeats) for device in (devices if on_gpu else devices[:1])]
    return ReadLimit(devices[0].device_kind, rates, num_bytes)


def _read_rate(device: Any, num_bytes: int, passes: int, repeats: int) -> float:
    import jax
    import jax.numpy as jnp

    def read(data_RC: jax.Array, start: jax.Array) -> jax.Array:
        # Each pass needs the one before it, or XLA would read once and reuse the sum.
        return jax.lax.fori_loop(0, passes, lambda _, total: jnp.sum(data_RC ^ total, dtype=jnp.int32), start)

    columns = 8192
    sharding = jax.sharding.SingleDeviceSharding(device)
    make = jax.jit(lambda: jnp.ones((num_bytes // 4 // columns, columns), jnp.int32), out_shardings=sharding)
    data_RC, timed = make(), []
    program = jax.jit(read)
    for repeat in range(repeats + 1):
        start = jax.device_put(np.int32(repeat), device)
        began = time.perf_counter()
        program(data_RC, start).block_until_ready()
        timed.append(time.perf_counter() - began)
    rate = data_RC.nbytes * passes / statistics.median(timed[1:])
    data_RC.delete()
    return rate


def run(llm: Any, options: Options, limit: ReadLimit, seed: int = 0) -> dict[str, Any]:
    """Measures; returns everything as plain JSON values (seconds and bytes unless a name says otherwise).

    A measured run generates `output_len` tokens; beside it, one generates a single token. Time after the first token is
    taken both ways, from the engine's own time of the first token and from the difference to the single-token run, and
    the slower is the headline: tokens are read back late, which lets the first way look too good. A third run streams as
    many prompts: only the times between tokens are taken from it. Compilations and peak are the process's, so a later case's
    include those of the cases before.

    Raises ValueError where a sequence would not fit the model.
    """
    options.check_length(llm.engine.max_model_len)
    rng = np.random.default_rng(seed)
    vocab_size = llm.engine.model_config.vocab_size

    def fresh() -> list[list[int]]:
        prompts: list[list[int]] = rng.integers(0, vocab_size, (options.batch_size, options.input_len)).tolist()
        return prompts

    def asked(output_len: int, kind: RequestOutputKind) -> SamplingParams:
        temperature = options.temperature
        return SamplingParams(temperature=temperature, ignore_eos=True, max_tokens=output_len, output_kind=kind)

    def generate(output_len: int) -> tuple[float, float]:
        """(latency, time to first token) of one fresh random batch."""
        prompts, params = fresh(), asked(output_len, RequestOutputKind.FINAL_ONLY)
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        latency = time.perf_counter() - start
        lengths = {len(output.outputs[0].token_ids) for output in outputs}
        if lengths != {output_len}:
            raise RuntimeError(f"asked for {output_len} tokens a prompt, got {sorted(lengths)}: this measures nothing")
        metrics = [output.metrics for output in outputs]
        return latency, max(m.first_token_time for m in metrics) - min(m.arrival_time for m in metrics)

    def stream() -> list[float]:
        """Seconds between readings of all streams of one fresh random batch, once all have begun: a token of each, but several
        where steps are dispatched several at a time, or where the host stays behind many streams."""
        params = asked(options.output_len, RequestOutputKind.DELTA)
        streams = [llm.stream(prompt, params) for prompt in fresh()]
        times = [time.perf_counter() for _ in zip(*streams, strict=False)]  # those that begin first end first
        for unfinished in streams:  # to the end: no step of theirs is left for the next run to wait for
            collections.deque(unfinished, maxlen=0)
        return np.diff(times).tolist()

    quiet = not sys.stderr.isatty()
    for _ in trange(options.num_iters_warmup, desc="Warm-up", unit="run", disable=quiet):
        generate(options.output_len)
        generate(1)
        stream()
    compiled, peak = llm.stats()["num_compilations"], peak_bytes()
    latencies, ttfts, singles, gaps = [], [], [], []
    with runtime.frozen_heap():
        for _ in trange(options.num_iters, desc="Measuring", unit="run", disable=quiet):
            latency, ttft = generate(options.output_len)
            latencies.append(latency)
            ttfts.append(ttft)
            singles.append(generate(1)[0])
            gaps += stream()
    stats, peak_after = llm.stats(), peak_bytes()

    steps = options.output_len - 1
    by_metrics = [(latency - ttft) / steps for latency, ttft in zip(latencies, ttfts, strict=True)]
    single = statistics.median(singles)
    by_difference = [(latency - single) / steps for latency in latencies]
    per_token = max(by_metrics, by_difference, key=statistics.median)
    seconds = statistics.median(per_token)
    read = bytes_read(llm, stats, options.batch_size, options.input_len + options.output_len / 2)
    rate = read["total"] / seconds
    where = environment()
    no_percentage = why_no_percentage(where["backend"], read["total"])
    report = {
        "options": asdict(options),
        "model": llm.engine.config.model,
        "tensor_parallel_size": llm.engine.config.tensor_parallel_size,
        "environment": where,
        "compile_seconds": stats["compile_seconds"],
        "num_compilations": stats["num_compilations"],
        "num_compilations_while_measuring": stats["num_compilations"] - compiled,
        "stats": {key: value for key, value in stats.items() if isinstance(value, int | float | str)},
        "latency": spread(latencies),
        "time_to_first_token": spread(ttfts),
        "latency_of_one_token": spread(singles),
        "seconds_per_token": spread(per_token),
        "seconds_per_token_by_metrics": spread(by_metrics),
        "seconds_per_token_by_difference": spread(by_difference),
        "inter_token_latency": spread(gaps) | {"p99": float(np.percentile(gaps, 99)), "count": len(gaps)} if gaps else None,
        "tokens_per_second": options.batch_size / seconds,
        "tokens_per_second_with_prompt": options.batch_size * options.output_len / statistics.median(latencies),
        "bytes_read_per_token_per_device": read,
        "bytes_per_second_per_device": rate,
        "read_limit": {
            "bytes_per_second": limit.bytes_per_second,
            "measured": limit.measured,
            "known": limit.known,
            "array_bytes": limit.bytes_read,
        },
        "percent_of_read_limit": None if no_percentage else 100 * rate / limit.bytes_per_second,
        "no_percentage": no_percentage,
        "peak_bytes_per_device": peak_after,
        "peak_bytes_growth_while_measuring": None if peak is None or peak_after is None else peak_after - peak,
        "latencies": latencies,
    }
    bare = bare_step(llm, options)
    if bare is not None:
        report["bare_step_seconds"] = bare
        report["percent_over_bare_step"] = 100 * (seconds / bare - 1)
    return report


def bare_step(llm: Any, options: Options) -> float | None:
    """Seconds of the engine's greedy decode program alone, over the same lengths; None where the run sampled."""
    if options.temperature > 0:
        return None
    per_dispatch = llm.engine.config.num_scheduler_steps or 1
    dispatches = max(1, (options.output_len - 1) // per_dispatch)
    return float(llm.bare_step_seconds(options.batch_size, options.input_len, dispatches))


def bytes_read(llm: Any, stats: dict[str, Any], batch_size: int, mean_len: float) -> dict[str, int]:
    """Bytes that one decode step must read on each device: the weights once, and every sequence's keys and values.

    Of an embedding table that is not also the output projection only batch_size rows are read: it does not count.
    """
    tied = llm.engine.model_config.tie_word_embeddings
    weights = stats["params_bytes_per_device"] - (0 if tied else stats["embedding_bytes_per_device"])
    cache = round(stats["kv_bytes_per_token_per_device"] * mean_len * batch_size)
    return {"weights": weights, "kv_cache": cache, "total": weights + cache}


def why_no_percentage(backend: str, bytes_per_token: float) -> str | None:
    """Why a share of the read limit would mislead; None where it means something."""
    if backend == "cpu":
        return "on a CPU computing takes the time, not reading"
    if bytes_per_token < CACHE_BYTES:
        return f"what a token reads may fit in a cache (less than {CACHE_BYTES / 1e6:.0f} MB)"
    return None


def environment() -> dict[str, Any]:
    import jax

    device, count = jax.devices()[0], jax.device_count()
    return {"jax": jax.__version__, "backend": device.platform, "device": device.device_kind, "devices": count}


def peak_bytes() -> int | None:
    """The most that any device held at once during the run; None where the backend does not say (CPU)."""
    import jax

    peaks = [stats["peak_bytes_in_use"] for d in jax.local_devices() if (stats := d.memory_stats())]
    return max(peaks, default=None)


def spread(seconds: Sequence[float]) -> dict[str, float]:
    p10, median, p90 = np.percentile(seconds, [10, 50, 90]).tolist()
    return {"median": median, "mean": statistics.fmean(seconds), "min": min(seconds), "max": max(seconds)} | {
        "p10": p10,
        "p90": p90,
    }


def summary(report: dict[str, Any]) -> str:
    """The report as the block of lines that is printed."""

    def milliseconds(name: str) -> str:
        s = {key: f"{1e3 * value:.3f}" for key, value in report[name].items()}
        return f"{s['median']} ms (min {s['min']}, p10 {s['p10']}, p90 {s['p90']}, max {s['max']})"

    options, read, limit = report["options"], report["bytes_read_per_token_per_device"], report["read_limit"]
    stats, where = report["stats"], report["environment"]
    share = (
        f"; no percentage: {report['no_percentage']}"
        if report["percent_of_read_limit"] is None
        else f" = {report['percent_of_read_limit']:.1f} % of the read limit {limit['bytes_per_second'] / 1e9:.1f} GB/s "
        f"(measured {statistics.median(limit['measured']) / 1e9:.1f})"
    )
    rows = {
        "Model": f"{report['model']}, {stats['dtype']}, tensor_parallel_size {report['tensor_parallel_size']}",
        "Device": f"{where['device']} ({where['backend']}, {where['devices']} visible), jax {where['jax']}",
        "Run": f"batch {options['batch_size']}, {options['input_len']} + {options['output_len']} tokens, "
        f"{options['num_iters']} times",
        "Latency": milliseconds("latency"),
        "Time to first token": milliseconds("time_to_first_token"),
        "Token after the first": milliseconds("seconds_per_token"),
        "Output": f"{report['tokens_per_second']:.1f} tok/s after the first token, "
        f"{report['tokens_per_second_with_prompt']:.1f} with it",
        "Read a token": f"{read['total'] / 1e9:.3f} GB a device (weights {read['weights'] / 1e9:.3f}, "
        f"KV {read['kv_cache'] / 1e9:.3f})",
        "Bandwidth": f"{report['bytes_per_second_per_device'] / 1e9:.1f} GB/s a device{share}",
        "Compilation": f"{report['compile_seconds']:.1f} s for {report['num_compilations']} programs, "
        f"{report['num_compilations_while_measuring']} of them while measuring",
        "Bytes a device": f"weights {stats['params_bytes_per_device'] / 1e9:.3f} GB, "
        f"KV cache {stats['kv_cache_bytes_per_device'] / 1e9:.3f} GB"
        + ("" if report["peak_bytes_per_device"] is None else f", at most {report['peak_bytes_per_device'] / 1e9:.3f} GB"),
    }
    if (gaps := report["inter_token_latency"]) is not None:
        rows["Between tokens"] = (
            f"{1e3 * gaps['median']:.3f} ms, p99 {1e3 * gaps['p99']:.3f} ({100 * (gaps['p99'] / gaps['median'] - 1):+.1f} %), "
            f"max {1e3 * gaps['max']:.3f}, of {gaps['count']}, streamed"
        )
    if "bare_step_seconds" in report:
        rows["Bare step"] = (
            f"{1e3 * report['bare_step_seconds']:.3f} ms; the engine takes {report['percent_over_bare_step']:+.1f} %"
        )
    return "\n".join(f"{name + ':':<24}{value}" for name, value in rows.items())


def write(reports: list[dict[str, Any]], path: str) -> None:
    Path(path).write_text(json.dumps(reports, indent=2) + "\n")
