"""`jaxinfer bench serve`: loads a running OpenAI server and times what streams back; vLLM's flags, words and JSON.

A client and nothing more: no jax here, so that it can run in a process of its own beside the server.
"""

import argparse
import asyncio
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from tqdm import tqdm

from jaxinfer.bench import results
from jaxinfer.bench.datasets import DatasetOptions, SampleRequest
from jaxinfer.bench.datasets import add_arguments as add_dataset_arguments

if TYPE_CHECKING:
    import aiohttp

    from jaxinfer.bench.client import Reply

ENDPOINTS = ("/v1/completions", "/v1/chat/completions")
METRICS = {
    "ttft": ("TTFT", "Time to First Token"),
    "tpot": ("TPOT", "Time per Output Token (excl. 1st token)"),
    "itl": ("ITL", "Inter-token Latency"),
    "e2el": ("E2EL", "End-to-end Latency"),
}
VOCAB = 32000  # the smallest among the usual models: its ids are ids of them all


@dataclass(frozen=True)
class Options:
    """How to load the server; vLLM's names."""

    base_url: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    endpoint: str = ENDPOINTS[0]
    model: str | None = None
    request_rate: float = math.inf
    burstiness: float = 1.0
    max_concurrency: int | None = None
    ignore_eos: bool = False
    temperature: float = 0.0
    num_warmups: int = 0
    api_key: str | None = None
    timeout: float = 6 * 3600.0
    ready_check_timeout_sec: float = 0.0
    percentile_metrics: str = "ttft,tpot,itl"
    metric_percentiles: str = "99"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.base_url is not None and not self.base_url.startswith(("http://", "https://")):
            raise ValueError(f"--base-url {self.base_url}: it must begin with http:// or https://")
        if self.endpoint not in ENDPOINTS:
            raise ValueError(f"--endpoint {self.endpoint}: it must be {' or '.join(ENDPOINTS)}")
        for name in ("request_rate", "burstiness", "timeout"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be above 0")
        if not self.ready_check_timeout_sec >= 0:
            raise ValueError(f"--ready-check-timeout-sec is {self.ready_check_timeout_sec}; it must be at least 0")
        if math.isinf(self.request_rate) and self.burstiness != 1:
            raise ValueError(f"--burstiness {self.burstiness} of what? It spreads requests sent at a --request-rate: give one")
        for name, low in (("max_concurrency", 1), ("num_warmups", 0), ("seed", 0)):
            if (value := getattr(self, name)) is not None and value < low:
                raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least {low}")
        if unknown := set(self.metrics) - set(METRICS):
            raise ValueError(f"--percentile-metrics {', '.join(sorted(unknown))}: it must be among {','.join(METRICS)}")
        if not all(0 <= p <= 100 for p in self.percentiles):
            raise ValueError(f"--metric-percentiles {self.metric_percentiles}: each must be 0 to 100")

    @property
    def url(self) -> str:
        return (self.base_url or f"http://{self.host}:{self.port}").rstrip("/")

    @property
    def metrics(self) -> list[str]:
        return self.percentile_metrics.split(",")

    @property
    def percentiles(self) -> list[float]:
        try:
            return [float(p) for p in self.metric_percentiles.split(",")]
        except ValueError:
            raise ValueError(f"--metric-percentiles {self.metric_percentiles}: numbers with commas, as in 50,99") from None

    @property
    def is_chat(self) -> bool:
        return self.endpoint == ENDPOINTS[1]

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Self:
        return cls(**{field.name: getattr(args, field.name) for field in fields(cls)})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    help_texts = {
        "base_url": "http://host:port of the server, instead of --host and --port",
        "host": "",
        "port": "",
        "endpoint": " or ".join(ENDPOINTS),
        "model": "default: the first of /v1/models",
        "request_rate": "requests a second, as a Poisson process; inf sends all at once",
        "burstiness": "with --request-rate: 1 is Poisson, below it requests come in bursts, above it more evenly (gamma)",
        "max_concurrency": "most requests at a time; the others wait in the client, untimed",
        "ignore_eos": "ask for the full output length (a field of vLLM's, not of OpenAI's)",
        "temperature": "0 is greedy",
        "num_warmups": "requests before the measured ones, besides the one that tests the server",
        "api_key": "default: $OPENAI_API_KEY",
        "timeout": "seconds for one request, from end to end",
        "ready_check_timeout_sec": "seconds to wait for a server that still starts; 0 does not wait",
        "percentile_metrics": f"what to show, of {','.join(METRICS)}",
        "metric_percentiles": "which percentiles, with commas",
        "seed": "of prompts, lengths and arrivals",
    }
    kinds = {"port": int, "max_concurrency": int, "num_warmups": int, "seed": int}
    kinds_float = ("request_rate", "burstiness", "temperature", "timeout", "ready_check_timeout_sec")
    for field in fields(Options):
        name = "--" + field.name.replace("_", "-")
        if field.name == "ignore_eos":
            parser.add_argument(name, action="store_true", help=help_texts[field.name])
            continue
        kind = float if field.name in kinds_float else kinds.get(field.name, str)
        texts = [help_texts[field.name]] if help_texts[field.name] else []
        texts += [f"default: {field.default}"] if field.default is not None else []
        parser.add_argument(name, type=kind, default=field.default, help="; ".join(texts))
    add_dataset_arguments(parser, vocab=str(VOCAB))
    results.add_arguments(parser)


def arrivals(num: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """Seconds from the start at which each request is sent.

    Intervals are gamma distributed with the shape `burstiness` (1: exponential, a Poisson process) and scaled so that the
    last request comes at num / rate, as vLLM does: what is asked for is the rate of the very run, not of many.
    """
    if math.isinf(rate):
        return [0.0] * num
    times = np.cumsum(np.random.default_rng(seed).gamma(burstiness, 1 / (rate * burstiness), num))
    return (times * (num / rate / times[-1])).tolist()


def request_body(request: SampleRequest, options: Options, model: str) -> bytes:
    body: dict[str, Any] = {"model": model, "temperature": options.temperature, "stream": True}
    body["stream_options"] = {"include_usage": True}
    if options.is_chat:
        if not isinstance(request.prompt, str):
            raise ValueError(f"a prompt of the file is token ids: a chat takes texts only; use --endpoint {ENDPOINTS[0]}")
        body |= {"messages": [{"role": "user", "content": request.prompt}], "max_completion_tokens": request.output_len}
    else:
        body |= {"prompt": request.prompt, "max_tokens": request.output_len}
    if options.ignore_eos:
        body["ignore_eos"] = True
    return json.dumps(body).encode()


async def send_all(
    session: "aiohttp.ClientSession", options: Options, bodies: Sequence[bytes], at: Sequence[float], title: str
) -> tuple[list["Reply"], float]:
    """Sends each body at its second, at most max_concurrency at a time; (replies in that order, seconds in all)."""
    from jaxinfer.bench.client import stream

    url = options.url + options.endpoint
    limit = asyncio.Semaphore(options.max_concurrency or len(bodies))
    with tqdm(total=len(bodies), desc=title, unit="req", disable=not sys.stderr.isatty()) as bar:

        async def send(body: bytes) -> "Reply":
            async with limit:
                reply = await stream(session, url, body)
            bar.update()
            return reply

        start, tasks = time.perf_counter(), []
        for body, second in zip(bodies, at, strict=True):
            if (wait := start + second - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            tasks.append(asyncio.create_task(send(body)))
        replies = await asyncio.gather(*tasks)
    return replies, time.perf_counter() - start


async def measure(options: Options, dataset: DatasetOptions) -> dict[str, Any]:
    """Tests the server with one request, warms it up, loads it; returns everything as plain JSON values.

    Raises ValueError where there is no server, or where it refuses the test or a warm-up request.
    """
    from jaxinfer.bench.client import first_model, open_session, wait_until_ready

    vocab = None if options.is_chat else VOCAB
    requests = dataset.load(options.seed, vocab)
    # Prompts of their own, or the server would find the measured ones in its prefix cache.
    first = dataset.load(options.seed, vocab, draw=1, num=1 + options.num_warmups)
    api_key = options.api_key or os.environ.get("JAXINFER_API_KEY") or os.environ.get("OPENAI_API_KEY")
    async with open_session(api_key, options.timeout, options.max_concurrency) as session:
        if options.ready_check_timeout_sec:
            print(f"waiting up to {options.ready_check_timeout_sec:g} s for {options.url}", file=sys.stderr)
            await wait_until_ready(session, options.url, options.ready_check_timeout_sec)
        model = options.model or await first_model(session, options.url)
        for title, batch in ("Test", first[:1]), ("Warm-up", first[1:]):
            bodies = [request_body(request, options, model) for request in batch]
            replies = (await send_all(session, options, bodies, [0.0] * len(bodies), title))[0] if bodies else []
            if errors := [reply.error for reply in replies if reply.error]:
                raise ValueError(f"{title.lower()} request to {options.url}{options.endpoint} failed: {errors[0]}")
        bodies = [request_body(request, options, model) for request in requests]
        at = arrivals(len(requests), options.request_rate, options.burstiness, options.seed)
        replies, duration = await send_all(session, options, bodies, at, "Requests")
    return {
        "date": time.strftime("%Y%m%d-%H%M%S"),
        "options": {**asdict(options), "api_key": None, "request_rate": finite(options.request_rate)},
        "dataset": asdict(dataset),
        "model_id": model,
        "num_prompts": len(requests),
        "request_rate": finite(options.request_rate),
        "burstiness": options.burstiness,
        "max_concurrency": options.max_concurrency,
        **summarize(requests, replies, duration, options.percentiles),
    }


def finite(value: float) -> float | str:
    """JSON has no infinity: vLLM writes it as "inf"."""
    return value if math.isfinite(value) else "inf"


def summarize(
    requests: Sequence[SampleRequest], replies: Sequence["Reply"], duration: float, percentiles: Sequence[float]
) -> dict[str, Any]:
    """vLLM's figures, under its names: totals and times of the requests that succeeded, details of all."""
    good = [reply for reply in replies if not reply.error]
    inputs = [_input_tokens(request, reply) for request, reply in zip(requests, replies, strict=True)]
    # Where the server sends no usage each chunk counts as one token.
    outputs = [0 if r.error else len(r.times) if r.output_tokens is None else r.output_tokens for r in replies]
    cached = [reply.cached_tokens for reply in good if reply.cached_tokens is not None]
    succeeded = [i for i, reply in enumerate(replies) if not reply.error]
    seconds = {
        "ttft": [reply.ttft for reply in good],
        # Of one token there is none after the first.
        "tpot": [(replies[i].latency - replies[i].ttft) / (outputs[i] - 1) for i in succeeded if outputs[i] > 1],
        "itl": [gap for reply in good for gap in reply.itl],
        "e2el": [reply.latency for reply in good],
    }
    result: dict[str, Any] = results.rates(duration, len(good), sum(inputs[i] for i in succeeded), sum(outputs))
    result |= {
        "failed": len(replies) - len(good),
        "total_cached_tokens": sum(cached) if cached else None,
        "requests_without_usage": sum(reply.output_tokens is None for reply in good),
        "max_output_tokens_per_s": _peak_rate(good, [outputs[i] for i in succeeded]),
        "max_concurrent_requests": _peak_concurrency(good),
        "output_chunks": sum(len(reply.times) for reply in good),
    }
    for metric, values in seconds.items():
        result |= {f"{name}_{metric}_ms": value for name, value in _statistics(values, percentiles).items()}
    return result | {
        "input_lens": inputs,
        "output_lens": outputs,
        "ttfts": [reply.ttft if reply.times else None for reply in replies],
        "itls": [reply.itl for reply in replies],
        "latencies": [reply.latency if reply.times else None for reply in replies],
        "start_times": [reply.start - min(r.start for r in replies) for reply in replies],
        "finish_reasons": [reply.finish_reason for reply in replies],
        "generated_texts": ["".join(reply.texts) for reply in replies],
        "errors": [reply.error for reply in replies],
    }


def _input_tokens(request: SampleRequest, reply: "Reply") -> int:
    """As the server counts them; else the ids sent, and of a text that nobody counted, none."""
    if reply.input_tokens is not None:
        return reply.input_tokens
    return len(request.prompt) if isinstance(request.prompt, list) else 0


def _statistics(seconds: Sequence[float], percentiles: Sequence[float]) -> dict[str, float | None]:
    """In milliseconds; null where nothing was timed."""
    names = ["mean", "median", "std", *(f"p{p:g}" for p in percentiles)]
    if not seconds:
        return dict.fromkeys(names)
    milliseconds = 1e3 * np.asarray(seconds)
    values = [milliseconds.mean(), np.median(milliseconds), milliseconds.std(), *np.percentile(milliseconds, percentiles)]
    return dict(zip(names, map(float, values), strict=True))


def _peak_rate(replies: Sequence["Reply"], output_lens: Sequence[int]) -> float:
    """Most output tokens in any of the run's seconds; a chunk holds an equal share of its request's tokens."""
    if not replies:
        return 0.0
    times = np.concatenate([reply.times for reply in replies]) - min(reply.start for reply in replies)
    tokens = np.concatenate([np.full(len(r.times), n / len(r.times)) for r, n in zip(replies, output_lens, strict=True)])
    return float(np.bincount(times.astype(int), tokens).max())


def _peak_concurrency(replies: Sequence["Reply"]) -> int:
    """Most requests between their start and their last token at once."""
    events = sorted([(reply.start, 1) for reply in replies] + [(reply.times[-1], -1) for reply in replies])
    return int(np.cumsum([change for _, change in events]).max(initial=0))


def summary(result: dict[str, Any], options: Options) -> str:
    """vLLM's block, and below it what a reader must know."""
    lines = [results.header(" Serving Benchmark Result ", "=")]
    lines += [results.row("Successful requests", result["completed"]), results.row("Failed requests", result["failed"])]
    if options.max_concurrency is not None:
        lines.append(results.row("Maximum request concurrency", options.max_concurrency))
    if math.isfinite(options.request_rate):
        lines.append(results.row("Request rate configured (RPS)", options.request_rate))
    for name, key in {
        "Benchmark duration (s)": "duration",
        "Total input tokens": "total_input_tokens",
        "Total generated tokens": "total_output_tokens",
        "Request throughput (req/s)": "request_throughput",
        "Output token throughput (tok/s)": "output_throughput",
        "Peak output token throughput (tok/s)": "max_output_tokens_per_s",
        "Peak concurrent requests": "max_concurrent_requests",
        "Total token throughput (tok/s)": "total_token_throughput",
    }.items():
        lines.append(results.row(name, result[key]))
    for metric in options.metrics:
        short, title = METRICS[metric]
        lines.append(results.header(title))
        for name in ["mean", "median", *(f"p{p:g}" for p in options.percentiles)]:
            value = result[f"{name}_{metric}_ms"]
            lines.append(results.row(f"{name.capitalize()} {short} (ms)", "-" if value is None else value))
    lines.append("=" * results.WIDTH)
    return "\n".join(lines + notes(result))


def notes(result: dict[str, Any]) -> list[str]:
    """Failures by what went wrong, the most frequent first, and what makes a figure mean less than it says."""
    errors = Counter(error for error in result["errors"] if error)
    lines = [f"{count} failed: {error}" for error, count in errors.most_common(10)]
    if len(errors) > 10:
        lines.append(f"{sum(count for _, count in errors.most_common()[10:])} failed: {len(errors) - 10} other errors")
    if count := result["requests_without_usage"]:
        lines.append(f"note: {count} answers came without usage; their tokens are counted as chunks, and texts sent as none")
    elif result["total_output_tokens"] > 1.05 * result["output_chunks"]:
        tokens = result["total_output_tokens"] / result["output_chunks"]
        lines.append(f"note: a chunk brings {tokens:.2f} tokens on average; ITL is the time between chunks")
    if cached := result["total_cached_tokens"]:
        lines.append(f"note: {cached} of the input tokens came from the server's prefix cache")
    return lines


def run(args: argparse.Namespace) -> int:
    """The command; returns 1 where any request failed. Raises ValueError for what the user can put right."""
    options, dataset = Options.from_args(args), DatasetOptions.from_args(args)
    if options.is_chat and dataset.random_vocab_size is not None:
        raise ValueError("--random-vocab-size: a chat takes no token ids; random words are sent to /v1/chat/completions")
    rate = "inf" if math.isinf(options.request_rate) else f"{options.request_rate:g}"
    path = results.result_path(args, f"serve-{rate}qps")
    try:
        import aiohttp  # noqa: F401
    except ModuleNotFoundError:
        raise ValueError("bench serve needs aiohttp: pip install 'jaxinfer[server]', or pip install aiohttp") from None
    result = asyncio.run(measure(options, dataset))
    print(summary(result, options))
    if path is not None:
        results.write(result, path)
    return 1 if result["failed"] else 0
