"""The command line: generate, chat, serve, collect-env, bench.

Flags of the engine and of sampling are made from the fields of EngineConfig and SamplingParams, in vLLM's spelling, so
there is no second list of them to keep.
"""

import argparse
import dataclasses
import json
import logging
import math
import os
import sys
import time
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NoReturn, TextIO

from jaxinfer import __version__, runtime
from jaxinfer.bench import latency, throughput
from jaxinfer.bench import serve as bench_serve
from jaxinfer.config import EngineConfig
from jaxinfer.request import SamplingParams
from jaxinfer.server_config import ServerConfig

DEFAULT_MAX_TOKENS = 128  # of `generate`; a chat turn may fill the model's length
# What a user can put right: shown as one line. Anything else is a bug and keeps its traceback.
USER_ERRORS = (ValueError, OSError)

HELP = {
    "model": "a directory, a hub id, a .gguf file, an alias (smollm2-135m) or random:CONFIG.json",
    "tokenizer": "a directory or hub id, where the tokenizer is not beside the model",
    "revision": "branch, tag or commit on the hub",
    "tensor_parallel_size": "devices to shard the model over",
    "dtype": "auto, bfloat16, float16 or float32",
    "max_model_len": "longest sequence, prompt and output together; default: what the model was trained for",
    "gpu_memory_utilization": "fraction of each GPU's memory to use",
    "num_gpu_blocks_override": "pages in the KV cache, instead of what memory allows",
    "block_size": "tokens a page",
    "max_num_seqs": "most sequences a step",
    "max_num_batched_tokens": "most prompt tokens a step; default: 4096 on GPU, 512 on CPU",
    "num_scheduler_steps": "decode steps a dispatch while nothing waits; default: 1",
    "enable_prefix_caching": "keep and reuse the pages of earlier prompts",
    "long_prefill_token_threshold": "tokens a step for each pending prompt while others decode; 0 is no limit; default: 256",
    "scheduling_policy": "fcfs, or priority: a request's priority goes before its arrival",
    "seed": "one seed for sampling and for random weights",
    "quantization": "int8: weights in groups of 128 (W8A16); default: as they are",
    "presence_penalty": "taken from the logit of every token of the output",
    "frequency_penalty": "the same, times how often it occurred",
    "repetition_penalty": "divides the logits of tokens of prompt and output; 1 is none",
    "temperature": "0 is greedy",
    "top_p": "keep the likeliest tokens that together reach this probability",
    "top_k": "keep this many of the likeliest tokens; 0 is all",
    "min_p": "keep tokens at least this likely, relative to the likeliest",
    "min_tokens": "no end of the text before so many",
    "include_stop_str_in_output": "leave the stop text in the output",
    "ignore_eos": "do not end at the model's own end-of-text tokens",
    "skip_special_tokens": "leave special tokens out of the text",
    "chat_template": "a file with, or the text of, a jinja2 chat template",
    "download_dir": "where files of the hub are kept",
    "use_tqdm": "progress bars",
    "n": "sequences for each prompt",
    "stop": "text that ends the output; repeatable",
    "stop_token_ids": "token ids that end the output",
    "max_tokens": f"most tokens to generate (generate: {DEFAULT_MAX_TOKENS}; chat: up to the model's length)",
    "logprobs": "alternatives to report for each token, 0 to 20; with --json",
    "prompt_logprobs": "the same for the prompt; with --json",
    "logit_bias": "JSON object, token id to bias: '{\"42\": -100}'",
    "bad_words": "text that may not be generated; repeatable",
    "allowed_token_ids": "the only token ids that may be generated",
    "host": "address to listen on; 0.0.0.0 is every one",
    "port": "0 is any free one",
    "api_key": "asked of clients as a bearer token; JAXINFER_API_KEY does the same, unseen in a list of processes",
    "served_model_name": "name to answer to, instead of the model's own; repeatable",
    "allowed_origins": "origin that browsers may call from (CORS); repeatable",
    "max_queued_requests": "sequences that may wait beyond max_num_seqs; then clients get a 429",
    "max_request_bytes": "largest body of a request",
    "shutdown_timeout": "seconds that running requests get to finish after SIGTERM",
    "warmup": "compile every program before the first request is taken",
}


def add_fields(parser: argparse._ArgumentGroup, cls: type, skip: Sequence[str] = (), defaults: bool = True) -> None:
    """One flag for each field of a dataclass; a flag that is not given leaves no attribute (see `given`).

    defaults: tell the class's own defaults in the help.
    """
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.name in skip or not field.init:
            continue
        kind, many = _kind(hints[field.name])
        options: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS}
        texts = [HELP[field.name]] if field.name in HELP else []
        if defaults and field.default not in (None, dataclasses.MISSING):
            texts.append(f"default: {field.default}")
        options["help"] = "; ".join(texts).replace("%", "%%") or None
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = kind
            options["metavar"] = "JSON" if kind is _json_object else kind.__name__.upper()
            if many:
                options |= {"action": "append"} if kind is str else {"nargs": "+"}
        parser.add_argument("--" + field.name.replace("_", "-"), **options)


def _kind(hint: Any) -> tuple[Any, bool]:
    """(parser of one value, whether several are taken) of an annotation such as `int | None` or `str | list[str]`."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        kinds = [_kind(arg) for arg in typing.get_args(hint) if arg is not type(None)]
        return kinds[0][0], any(many for _, many in kinds)
    if typing.get_origin(hint) in (list, tuple):
        return typing.get_args(hint)[0], True
    if typing.get_origin(hint) is dict:
        return _json_object, False
    if hint in (bool, int, float, str):
        return hint, False
    raise TypeError(f"no command-line flag can be made of the type {hint}")


def _json_object(text: str) -> dict[int, float]:
    try:
        return {int(key): float(value) for key, value in json.loads(text).items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise argparse.ArgumentTypeError(f"{shorten(text)!r} is not a JSON object of token id to number: {error}") from None


def _ids(text: str) -> list[int]:
    try:
        return [int(item) for item in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{shorten(text)!r} is not a list of token ids such as 1,2,3") from None


def shorten(prompt: Any, width: int = 80) -> str:
    """A prompt (text or token ids) as one line to recognize it by."""
    line = " ".join(str(prompt).split())
    return line if len(line) <= width else line[: width - 1] + "…"


def given(args: argparse.Namespace, cls: type) -> dict[str, Any]:
    """The fields of `cls` that the user gave on the command line."""
    return {f.name: getattr(args, f.name) for f in dataclasses.fields(cls) if hasattr(args, f.name)}


class Parser(argparse.ArgumentParser):
    """No abbreviated flags (a later flag could change what they mean), and a mistake is told in one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="jaxinfer", description="Llama-family language models on JAX.")
    parser.add_argument("--version", action="version", version=f"jaxinfer {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", help="continue one or more prompts")
    generate.add_argument("--prompt", action="append", help="repeatable; without it the prompt is read from stdin")
    ids_help = "a prompt as token ids, 1,2,3, for a model without a tokenizer; repeatable"
    generate.add_argument("--prompt-token-ids", type=_ids, action="append", metavar="IDS", help=ids_help)
    json_help = (
        "print one JSON object for each prompt: metrics are its wall times, compilation included; run is the speed line "
        "of all prompts together, with compilation apart"
    )
    generate.add_argument("--json", action="store_true", help=json_help)
    _engine_flags(generate)
    _sampling_flags(generate)
    generate.set_defaults(run=run_generate)

    chat = commands.add_parser("chat", help="talk with a model; /reset forgets, /exit ends")
    chat.add_argument("--system-prompt", help="a message that stands before the conversation")
    _engine_flags(chat)
    _sampling_flags(chat, skip=("n", "logprobs", "prompt_logprobs"))
    chat.set_defaults(run=run_chat)

    serve = commands.add_parser("serve", help="an OpenAI-compatible server")
    serve.add_argument("model_tag", nargs="?", metavar="MODEL", help="as --model")
    add_fields(serve.add_argument_group("server"), ServerConfig)
    _engine_flags(serve)
    serve.set_defaults(run=run_serve)

    env = commands.add_parser("collect-env", help="what a bug report needs to say about this machine")
    env.add_argument("--json", action="store_true")
    _common_flags(env)
    env.set_defaults(run=run_collect_env)

    bench = commands.add_parser("bench", help="measure").add_subparsers(dest="bench", required=True, metavar="WHAT")
    measure = bench.add_parser("latency", help="one batch from prompt to last token, in hardware terms")
    latency.add_arguments(measure)
    _engine_flags(measure)
    measure.set_defaults(run=run_bench_latency)
    measure = bench.add_parser("throughput", help="many prompts at once, offline")
    throughput.add_arguments(measure)
    _engine_flags(measure)
    measure.set_defaults(run=run_bench_throughput)
    measure = bench.add_parser("serve", help="load a running OpenAI server")
    bench_serve.add_arguments(measure)
    measure.add_argument("--debug", action="store_true", help="full tracebacks")
    measure.set_defaults(run=bench_serve.run)
    return parser


def _common_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-cpu-devices", type=int, help="force this many CPU devices (and the CPU)")
    parser.add_argument("--debug", action="store_true", help="full tracebacks")


def _engine_flags(parser: argparse.ArgumentParser) -> None:
    _common_flags(parser)
    parser.add_argument("--config", help="a YAML file of engine settings, or a preset's name; flags override it")
    add_fields(parser.add_argument_group("engine"), EngineConfig)


def _sampling_flags(parser: argparse.ArgumentParser, skip: Sequence[str] = ()) -> None:
    # --seed stands among the engine's flags and is both's.
    group = parser.add_argument_group("sampling (default: what the model's authors recommend)")
    add_fields(group, SamplingParams, skip=("seed", "output_kind", "structured_outputs", *skip), defaults=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status (0, or 2 for a user's error, told in one line)."""
    args = build_parser().parse_args(argv)
    setup_logging()
    try:
        status = args.run(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The reader went away (| head): nothing to tell it, and Python must not try again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    except USER_ERRORS as error:
        if args.debug:
            raise
        print(f"error: {error or type(error).__name__}", file=sys.stderr)
        return 2


class LogFormatter(logging.Formatter):
    """What the program is doing as plain lines; what is wrong, with its level."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno <= logging.INFO else f"{record.levelname}: {text}"


def setup_logging() -> None:
    """jaxinfer's own INFO lines (each compilation above all: it takes seconds to minutes) and all warnings, on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LogFormatter())
    logging.basicConfig(handlers=[handler])
    logging.getLogger("jaxinfer").setLevel(logging.INFO)


def engine_config(args: argparse.Namespace, least_seqs: int = 1) -> EngineConfig:
    """The flags, over --config, over EngineConfig's defaults; max_num_seqs is at least `least_seqs` unless a flag."""
    flags = given(args, EngineConfig)
    if not sys.stderr.isatty():
        flags.setdefault("use_tqdm", False)  # a bar in a log file is noise
    if args.config is not None:
        config = EngineConfig.load(args.config, **flags)
    elif "model" in flags:
        config = EngineConfig(**flags)
    else:
        raise ValueError("no model: give --model (a directory, hub id, .gguf file, alias or random:CONFIG.json)")
    if "max_num_seqs" in flags or config.max_num_seqs >= least_seqs:
        return config
    return config.override(max_num_seqs=least_seqs)


def load_engine(args: argparse.Namespace, config: EngineConfig) -> Any:
    """The environment first, then the LLM."""
    setup_runtime(args, config)
    from jaxinfer.llm import LLM

    return LLM.from_config(config)


def setup_runtime(args: argparse.Namespace, config: EngineConfig | None = None) -> None:
    runtime.setup(
        num_cpu_devices=args.num_cpu_devices,
        gpu_memory_utilization=config.gpu_memory_utilization if config else None,
    )


def sampling_params(llm: Any, flags: dict[str, Any]) -> SamplingParams:
    """The model's own defaults under `flags`; raises ValueError for a value out of range."""
    return dataclasses.replace(llm.get_default_sampling_params(), **flags)


def run_generate(args: argparse.Namespace) -> int:
    flags = {"max_tokens": DEFAULT_MAX_TOKENS, **given(args, SamplingParams)}
    SamplingParams(**flags)  # a wrong value is told before a model is loaded
    if not args.json and ("logprobs" in flags or "prompt_logprobs" in flags):
        raise ValueError("--logprobs and --prompt-logprobs are printed with --json only")
    prompts = [*(args.prompt or []), *(args.prompt_token_ids or [])] or [_read_prompt(sys.stdin)]
    config = engine_config(args)
    llm = load_engine(args, config)
    if llm.engine.tokenizer is None and not args.json:
        raise ValueError(f"{config.model} has no tokenizer to make text with: give --tokenizer, or --json for its ids")
    params = sampling_params(llm, flags)
    if len(prompts) == 1 and params.n == 1 and not args.json:
        print(f"prompt: {shorten(prompts[0])}", file=sys.stderr)
        speed = Speed(llm)
        try:
            for output in write_stream(llm.stream(prompts[0], params), sys.stdout):
                speed.saw(output)
        except KeyboardInterrupt:
            print(flush=True)  # the shell's prompt gets a line of its own
            raise
        print(speed, file=sys.stderr)
        return 0
    speed = Speed(llm)
    outputs = llm.generate(prompts, params, use_tqdm=config.use_tqdm)
    speed.saw(*outputs)
    for number, (prompt, output) in enumerate(zip(prompts, outputs, strict=True), 1):
        if args.json:
            line = request_json(output) | {"run": speed.as_json()}
            print(json.dumps(line, ensure_ascii=False, allow_nan=False))
            continue
        for completion in output.outputs:
            sample = f" sample {completion.index + 1}/{params.n}" if params.n > 1 else ""
            print(f"[{number}/{len(prompts)}{sample}] {shorten(prompt)}\n{completion.text}\n")
    sys.stdout.flush()
    print(speed, file=sys.stderr)
    return 0


def _read_prompt(stdin: TextIO) -> str:
    if stdin.isatty():
        raise ValueError("no prompt: give --prompt, or pipe one in")
    text = stdin.read().removesuffix("\n")
    if not text:
        raise ValueError("no prompt: stdin is empty and there is no --prompt")
    return text


def write_stream(outputs: Iterable[Any], out: TextIO) -> Iterator[Any]:
    """Writes what each cumulative output adds to the text, and passes the output on."""
    written = 0
    for output in outputs:
        text = output.outputs[0].text
        out.write(text[written:])
        out.flush()
        written = len(text)
        yield output
    out.write("\n")
    out.flush()


class Speed:
    """Times one `generate` or `stream`; compilation, which only a first run pays, is told apart from the work."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        # (seconds, seconds spent compiling, output tokens) at the start, at the first output and at the last
        self.start = self.first = self.last = (time.perf_counter(), self._compiled(), 0)
        self.prompt_tokens = 0
        self.seen = 0

    def _compiled(self) -> float:
        return float(self.llm.stats()["compile_seconds"])

    def saw(self, *outputs: Any) -> None:
        tokens = sum(len(completion.token_ids) for output in outputs for completion in output.outputs)
        self.last = (time.perf_counter(), self._compiled(), tokens)
        self.prompt_tokens = sum(len(output.prompt_token_ids) for output in outputs)
        if self.seen == 0:
            self.first = self.last
        self.seen += 1

    def as_json(self) -> dict[str, float | int]:
        """The same numbers: `seconds` are without `compile_seconds`."""
        seconds, tokens = self._work(self.start, self.last), self.last[2]
        return {
            "seconds": seconds,
            "compile_seconds": self.last[1] - self.start[1],
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": tokens,
            "output_tokens_per_second": tokens / seconds,
        }

    @staticmethod
    def _work(since: tuple[float, float, int], until: tuple[float, float, int]) -> float:
        """Seconds between two marks, less those spent compiling."""
        return max(until[0] - since[0] - (until[1] - since[1]), 1e-9)

    def __str__(self) -> str:
        work = self._work
        seconds, tokens = work(self.start, self.last), self.last[2]
        counted = f"{self.prompt_tokens} prompt tokens, {tokens} output tokens"
        parts = [f"{counted} in {seconds:.2f} s: {tokens / seconds:.1f} tok/s"]
        if self.seen > 1 and tokens > self.first[2]:
            rate = (tokens - self.first[2]) / work(self.first, self.last)
            parts.append(f"first text after {work(self.start, self.first):.3f} s, then {rate:.1f} tok/s")
        parts.append(f"compilation, not counted: {self.last[1] - self.start[1]:.1f} s")
        return "speed: " + "; ".join(parts)


def request_json(output: Any) -> dict[str, Any]:
    """A RequestOutput as plain JSON values; -inf and NaN become null. Its metrics have compilation in them."""
    keys = ("index", "text", "token_ids", "cumulative_logprob", "logprobs", "finish_reason", "stop_reason")
    metrics = output.metrics
    return {
        "request_id": output.request_id,
        "prompt": output.prompt,
        "prompt_token_ids": plain(output.prompt_token_ids),
        "prompt_logprobs": plain(output.prompt_logprobs),
        "outputs": [{key: plain(getattr(completion, key)) for key in keys} for completion in output.outputs],
        "metrics": {
            "seconds": plain(metrics.finished_time - metrics.arrival_time),
            "first_token_seconds": plain(metrics.first_token_time - metrics.arrival_time),
        },
    }


def plain(value: Any) -> Any:
    """Dataclasses, mappings, sequences and numpy scalars as JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, str | bool) or value is None:
        return value
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, Iterable):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def run_chat(args: argparse.Namespace) -> int:
    flags = {"max_tokens": None, **given(args, SamplingParams)}
    SamplingParams(**flags)
    llm = load_engine(args, engine_config(args))
    params = sampling_params(llm, flags)
    start = [{"role": "system", "content": args.system_prompt}] if args.system_prompt else []
    messages = list(start)
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401  line editing and history in input()

        print("/reset forgets the conversation, /exit or Ctrl-D ends it.", file=sys.stderr)
    for line in _lines(interactive):
        text = line.strip()
        if text == "/exit":
            break
        if text == "/reset":
            messages = list(start)
            continue
        if not text:
            continue
        asked = [*messages, {"role": "user", "content": text}]
        try:
            reply = _turn(llm, asked, params)
        except ValueError as error:
            # Too long a conversation, say. A person can shorten it; a script has to know.
            if not interactive:
                raise
            print(f"error: {error}", file=sys.stderr)
            continue
        messages = [*asked, {"role": "assistant", "content": reply}]
    return 0


def _turn(llm: Any, messages: list[dict[str, str]], params: SamplingParams) -> str:
    """Streams one reply and returns it; Ctrl-C keeps what had come until then."""
    speed = Speed(llm)
    reply = ""
    try:
        for output in write_stream(llm.stream_chat(messages, params), sys.stdout):
            reply = output.outputs[0].text
            speed.saw(output)
    except KeyboardInterrupt:
        print(" [stopped]")
    print(speed, file=sys.stderr)
    return reply


def _lines(interactive: bool) -> Iterator[str]:
    if not interactive:
        yield from sys.stdin
        return
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return


def run_serve(args: argparse.Namespace) -> int:
    if args.model_tag is not None:
        if getattr(args, "model", args.model_tag) != args.model_tag:
            raise ValueError(f"two models: {args.model_tag} and --model {args.model}; a server has one")
        args.model = args.model_tag
    config, server_config = engine_config(args), ServerConfig(**given(args, ServerConfig))
    try:
        from jaxinfer import server
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "uvicorn", "pydantic", "prometheus_client", "starlette"):
            raise
        raise ValueError(f"the server needs {error.name}: pip install 'jaxinfer[server]'") from error
    setup_runtime(args, config)
    return server.serve(config, server_config)


def run_collect_env(args: argparse.Namespace) -> int:
    setup_runtime(args)
    report = runtime.environment_report()
    if args.json:
        print(json.dumps(report, indent=2))
        return 0
    for key, value in report.items():
        if isinstance(value, dict | list) and value:
            print(f"{key}:")
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for name, item in items:
                print(f"  {name}: {item}")
        else:
            print(f"{key}: {value if value not in ({}, [], None) else '-'}")
    return 0


def run_bench_latency(args: argparse.Namespace) -> int:
    cases = latency.Options.from_args(args)
    most = max(options.batch_size for options in cases)
    config = engine_config(args, least_seqs=most)
    if config.max_num_seqs < most:
        raise ValueError(f"batch_size {most} is more than max_num_seqs {config.max_num_seqs} of one step")

    def check_lengths(max_model_len: int) -> None:
        for options in cases:
            options.check_length(max_model_len)

    if config.max_model_len is not None:  # else known once the model is
        check_lengths(config.max_model_len)
    setup_runtime(args, config)
    # Before the engine takes the memory: the limit needs gigabytes of its own.
    limit = latency.measure_read_limit()
    llm = load_engine(args, config)
    check_lengths(llm.engine.max_model_len)
    reports: list[dict[str, Any]] = []
    for options in cases:
        # With the same one, prompts would begin as those of the case before, and find their prefixes cached.
        seed = config.seed + len(reports)
        reports.append(latency.run(llm, options, limit, seed))
        print(("\n" if len(reports) > 1 else "") + latency.summary(reports[-1]), flush=True)
        if options.output:  # after each, so that what ends early loses no other
            latency.write(reports, options.output)
    return 0


def run_bench_throughput(args: argparse.Namespace) -> int:
    options = throughput.Options.from_args(args)
    dataset = throughput.DatasetOptions.from_args(args)
    path = throughput.results.result_path(args, "throughput")
    config = engine_config(args)
    if config.max_model_len is not None:  # else known once the model is: throughput.run checks it then
        throughput.check_lengths(dataset, config.max_model_len)
    result = throughput.run(load_engine(args, config), options, dataset, seed=config.seed)
    print(throughput.summary(result))
    if path is not None:
        throughput.results.write(result, path)
    return 0
