"""`jaxinfer bench throughput`: many prompts at once through `LLM.generate`, prompts and JSON names as `bench serve`'s."""

import argparse
import time
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from jaxinfer import runtime
from jaxinfer.bench import results
from jaxinfer.bench.datasets import DatasetOptions, SampleRequest
from jaxinfer.bench.datasets import add_arguments as add_dataset_arguments
from jaxinfer.bench.latency import environment, peak_bytes, spread
from jaxinfer.request import SamplingParams


@dataclass(frozen=True)
class Options:
    """How `bench throughput` measures."""

    num_iters: int = 1
    num_iters_warmup: int = 1
    temperature: float = 0.0

    def __post_init__(self) -> None:
        for name in ("num_iters", "num_iters_warmup"):
            if getattr(self, name) < 1:
                why = ": the first run compiles" if name == "num_iters_warmup" else ""
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1{why}")

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Self:
        return cls(**{field.name: getattr(args, field.name) for field in fields(cls)})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    help_texts = {
        "num_iters": "measured runs, each with prompts of its own; their median is the figure",
        "num_iters_warmup": "runs before those, at least 1",
        "temperature": "0 is greedy",
    }
    for field in fields(Options):
        name, text = "--" + field.name.replace("_", "-"), f"{help_texts[field.name]}; default: {field.default}"
        parser.add_argument(name, type=type(field.default), default=field.default, help=text)
    add_dataset_arguments(parser, vocab="the model's vocabulary")
    results.add_arguments(parser)


def check_lengths(dataset: DatasetOptions, max_model_len: int) -> None:
    """Raises ValueError where a random prompt could be too long; a file's are checked by the engine."""
    if dataset.dataset_name != "random":
        return
    longest = dataset.bounds("input")[1], dataset.bounds("output")[1]
    if sum(longest) > max_model_len:
        raise ValueError(
            f"prompts of up to {longest[0]} tokens and outputs of up to {longest[1]} are more than max_model_len "
            f"{max_model_len}: lower --input-len or --output-len, or raise --max-model-len as far as the model allows"
        )


def run(llm: Any, options: Options, dataset: DatasetOptions, seed: int = 0) -> dict[str, Any]:
    """Measures; returns everything as plain JSON values (seconds and bytes unless a name says otherwise).

    The figures are those of the run of median duration; `iterations` has them of each. Every run generates to the full
    output length. Runs have prompts of their own (`DatasetOptions.load`), so that none finds its prefixes cached.
    """
    check_lengths(dataset, llm.engine.max_model_len)
    vocab = llm.engine.model_config.vocab_size
    if (dataset.random_vocab_size or 0) > vocab:
        raise ValueError(f"--random-vocab-size {dataset.random_vocab_size} is more than the model's vocabulary of {vocab}")
    draws = [dataset.load(seed, vocab, draw) for draw in range(options.num_iters + options.num_iters_warmup)]
    for requests in draws[options.num_iters :]:
        generate(llm, requests, options.temperature)
    compiled = llm.stats()["num_compilations"]
    with runtime.frozen_heap():
        iterations = [generate(llm, requests, options.temperature) for requests in draws[: options.num_iters]]
    stats = llm.stats()
    median = sorted(iterations, key=lambda iteration: iteration["duration"])[(len(iterations) - 1) // 2]
    return {
        "options": asdict(options),
        "dataset": asdict(dataset),
        "model_id": llm.engine.config.model,
        "engine": asdict(llm.engine.config),
        "environment": environment(),
        "num_prompts": len(draws[0]),
        **median,
        "durations": spread([iteration["duration"] for iteration in iterations]),
        "output_throughputs": spread([iteration["output_throughput"] for iteration in iterations]),
        "iterations": iterations,
        "compile_seconds": stats["compile_seconds"],
        "num_compilations": stats["num_compilations"],
        "num_compilations_while_measuring": stats["num_compilations"] - compiled,
        "peak_bytes_per_device": peak_bytes(),
        "stats": {key: value for key, value in stats.items() if isinstance(value, int | float | str)},
    }


def generate(llm: Any, requests: list[SampleRequest], temperature: float) -> dict[str, Any]:
    """One run: its figures, from the first prompt handed in to the last output handed out.

    Raises RuntimeError where an output is not as long as was asked for.
    """
    params = [SamplingParams(temperature=temperature, ignore_eos=True, max_tokens=r.output_len) for r in requests]
    start = time.perf_counter()
    outputs = llm.generate([request.prompt for request in requests], params)
    duration = time.perf_counter() - start
    input_lens = [len(output.prompt_token_ids) for output in outputs]
    output_lens = [len(output.outputs[0].token_ids) for output in outputs]
    wrong = [i for i, request in enumerate(requests) if output_lens[i] != request.output_len]
    if wrong:
        raise RuntimeError(
            f"{len(wrong)} of {len(requests)} outputs are not as long as asked for, the first {output_lens[wrong[0]]} tokens "
            f"instead of {requests[wrong[0]].output_len}: "
            + (outputs[wrong[0]].error or f"prompt and output must fit into max_model_len {llm.engine.max_model_len}")
        )
    return {
        **results.rates(duration, len(outputs), sum(input_lens), sum(output_lens)),
        "total_cached_tokens": sum(output.num_cached_tokens for output in outputs),
        "input_lens": input_lens,
        "output_lens": output_lens,
    }


def summary(result: dict[str, Any]) -> str:
    """The result as the block of lines that is printed."""
    where, many = result["environment"], len(result["iterations"]) > 1
    rows = {
        "Completed requests": result["completed"],
        "Benchmark duration (s)": result["duration"],
        "Total input tokens": result["total_input_tokens"],
        "Total generated tokens": result["total_output_tokens"],
        "Request throughput (req/s)": result["request_throughput"],
        "Output token throughput (tok/s)": result["output_throughput"],
        "Total token throughput (tok/s)": result["total_token_throughput"],
    }
    lines = [results.header(" Throughput Benchmark Result ", "="), *(results.row(*item) for item in rows.items())]
    if many:
        durations, rate = result["durations"], result["output_throughputs"]
        lines.append(results.header(f"{len(result['iterations'])} runs; above, the one of median duration"))
        lines.append(results.row("Duration, min to max (s)", f"{durations['min']:.2f} to {durations['max']:.2f}"))
        lines.append(results.row("Output throughput, min to max (tok/s)", f"{rate['min']:.2f} to {rate['max']:.2f}"))
    lines.append("=" * results.WIDTH)
    stats, engine = result["stats"], result["engine"]
    lines.append(
        f"{result['model_id']}, {stats['dtype']}, tensor_parallel_size {engine['tensor_parallel_size']}, max_num_seqs "
        f"{engine['max_num_seqs']}; {where['device']} ({where['backend']}, {where['devices']} visible), jax {where['jax']}"
    )
    lines.append(
        f"compilation: {result['compile_seconds']:.1f} s for {result['num_compilations']} programs, "
        f"{result['num_compilations_while_measuring']} of them while measuring"
    )
    if cached := result["total_cached_tokens"]:
        lines.append(f"note: {cached} of the input tokens came from the prefix cache")
    return "\n".join(lines)
