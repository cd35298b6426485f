"""The command line: flags, output and errors against a stand-in engine; then once for real, in a fresh process."""

import dataclasses
import io
import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from jaxinfer import cli, runtime
from jaxinfer.bench import latency
from jaxinfer.config import EngineConfig
from jaxinfer.request import SamplingParams


@dataclasses.dataclass
class Logprob:
    logprob: float
    rank: int
    decoded_token: str | None = None


class StandIn:
    """Answers every prompt with "w0 w1 …", up to max_tokens words; keeps what it was asked."""

    made: list["StandIn"]
    setup_calls: list[dict]

    def __init__(self, config):
        self.config = config
        self.engine = SimpleNamespace(
            config=config, tokenizer=object(), model_config=SimpleNamespace(vocab_size=50, tie_word_embeddings=False),
            max_model_len=config.max_model_len or 512,
        )  # fmt: skip
        self.calls = []
        self.compiled = 1.0
        self.made.append(self)

    from_config = classmethod(lambda cls, config: cls(config))

    def get_default_sampling_params(self):
        return SamplingParams(temperature=0.6, max_tokens=16)

    def stats(self):
        return {
            "compile_seconds": self.compiled, "num_compilations": 2, "params_bytes_per_device": 1000,
            "embedding_bytes_per_device": 300, "kv_bytes_per_token_per_device": 10, "kv_cache_bytes_per_device": 640,
            "dtype": "float32",
        }  # fmt: skip

    def output(self, prompt, params, count, finished=True):
        ids = list(prompt) if not isinstance(prompt, str) else [ord(c) for c in prompt]
        samples = [
            SimpleNamespace(
                index=i,
                text=" ".join(f"w{j}" for j in range(count)),
                token_ids=list(range(count)),
                cumulative_logprob=None,
                logprobs=[{7: Logprob(-math.inf, 3, "é")}] if params.logprobs is not None else None,
                finish_reason="length" if finished else None,
                stop_reason=None,
            )
            for i in range(params.n)
        ]
        metrics = SimpleNamespace(arrival_time=10.0, first_token_time=10.5, finished_time=12.0 if finished else None)
        return SimpleNamespace(
            request_id="0", prompt=prompt if isinstance(prompt, str) else None, prompt_token_ids=ids,
            prompt_logprobs=None, outputs=samples, finished=finished, metrics=metrics,
        )  # fmt: skip

    def generate(self, prompts, params, use_tqdm=True):
        self.calls.append(("generate", prompts, params))
        return [self.output(prompt, params, params.max_tokens) for prompt in prompts]

    def stream(self, prompt, params):
        self.calls.append(("stream", prompt, params))
        for count in range(1, params.max_tokens + 1):
            self.tick()
            yield self.output(prompt, params, count, count == params.max_tokens)

    def tick(self):
        """A token of a stream."""

    def stream_chat(self, messages, params):
        self.calls.append(("chat", messages, params))
        if messages[-1]["content"] == "too long":
            raise ValueError("the prompt has 99 tokens")
        yield self.output("p", params, len(messages))

    def bare_step_seconds(self, batch_size, length, steps=64):
        self.calls.append(("bare", batch_size, length, steps))
        return 0.01


@pytest.fixture
def engine(monkeypatch):
    """The module of the LLM is replaced as a whole: these tests need none of its imports."""
    StandIn.made, StandIn.setup_calls = [], []
    monkeypatch.setitem(sys.modules, "jaxinfer.llm", SimpleNamespace(LLM=StandIn))
    monkeypatch.setattr(runtime, "setup", lambda **settings: StandIn.setup_calls.append(settings))
    return StandIn


def stdin(monkeypatch, text):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def test_every_engine_and_sampling_field_has_a_flag_and_help():
    parser = cli.build_parser()
    args = parser.parse_args(["generate", "--model", "m"])
    assert cli.given(args, EngineConfig) == {"model": "m"} and cli.given(args, SamplingParams) == {}
    for cls in (EngineConfig, SamplingParams):
        missing = {field.name for field in dataclasses.fields(cls)} - set(cli.HELP) - {"output_kind", "structured_outputs"}
        assert not missing, "a flag that nobody explains"


def test_flags_take_their_types_from_the_fields():
    words = (
        "generate --model m --tensor-parallel-size 4 --gpu-memory-utilization 0.5 --no-use-tqdm --dtype float32 "
        "--top-p 0.9 --n 2 --seed 7 --stop a --stop b --stop-token-ids 1 2 --ignore-eos --logit-bias {\"3\":-1.5}"
    ).split()
    args = cli.build_parser().parse_args(words)
    assert cli.given(args, EngineConfig) == {
        "model": "m", "tensor_parallel_size": 4, "gpu_memory_utilization": 0.5, "use_tqdm": False, "dtype": "float32",
        "seed": 7,
    }  # fmt: skip
    assert cli.given(args, SamplingParams) == {
        "top_p": 0.9, "n": 2, "seed": 7, "stop": ["a", "b"], "stop_token_ids": [1, 2], "ignore_eos": True,
        "logit_bias": {3: -1.5},
    }  # fmt: skip


def test_generate_streams_one_prompt(engine, capsys):
    assert cli.main(["generate", "--model", "m", "--prompt", "Hi", "--max-tokens", "3", "--num-cpu-devices", "4"]) == 0
    out, err = capsys.readouterr()
    assert out == "w0 w1 w2\n"
    assert "prompt: Hi" in err and "2 prompt tokens, 3 output tokens" in err and "tok/s" in err
    [(kind, prompt, params)] = engine.made[0].calls
    assert (kind, prompt, params.max_tokens, params.temperature) == ("stream", "Hi", 3, 0.6), "the model's temperature"
    assert engine.setup_calls == [{"num_cpu_devices": 4, "gpu_memory_utilization": 0.9}]


def test_generate_default_length_and_stdin(engine, capsys, monkeypatch):
    stdin(monkeypatch, "from a pipe\n")
    assert cli.main(["generate", "--model", "m"]) == 0
    _, prompt, params = engine.made[0].calls[0]
    assert prompt == "from a pipe" and params.max_tokens == cli.DEFAULT_MAX_TOKENS


def test_generate_json(engine, capsys):
    words = ["generate", "--model", "m", "--json", "--prompt", "é", "--prompt", "bc", "--max-tokens", "2"]
    assert cli.main([*words, "--logprobs", "1", "--n", "2"]) == 0
    out, err = capsys.readouterr()
    first, second = [json.loads(line) for line in out.splitlines()]
    assert first["prompt"] == "é" and first["prompt_token_ids"] == [233] and second["prompt"] == "bc"
    assert [o["index"] for o in first["outputs"]] == [0, 1]
    sample = first["outputs"][0]
    assert (sample["text"], sample["token_ids"], sample["finish_reason"]) == ("w0 w1", [0, 1], "length")
    assert sample["logprobs"] == [{"7": {"logprob": None, "rank": 3, "decoded_token": "é"}}], "-inf is no JSON"
    assert first["metrics"] == {"seconds": 2.0, "first_token_seconds": 0.5}
    run = first["run"]
    assert run == second["run"] and (run["prompt_tokens"], run["output_tokens"], run["compile_seconds"]) == (3, 8, 0.0)
    assert run["output_tokens_per_second"] == pytest.approx(8 / run["seconds"])
    assert f"8 output tokens in {run['seconds']:.2f} s: {run['output_tokens_per_second']:.1f} tok/s" in err
    assert "speed:" not in out


def test_token_ids_for_a_model_without_tokenizer(engine, capsys, monkeypatch):
    words = ["generate", "--model", "m", "--prompt-token-ids", "1,2,3", "--max-tokens", "2"]
    assert cli.main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt_token_ids"] == [1, 2, 3]

    def without_tokenizer(config):
        llm = engine(config)
        llm.engine.tokenizer = None
        return llm

    monkeypatch.setattr(engine, "from_config", without_tokenizer)
    assert cli.main(words) == 2
    assert "m has no tokenizer to make text with" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["generate", "--model", "m", "--prompt-token-ids", "1;2"])


def test_several_completions_say_whose_they_are(engine, capsys):
    words = ["generate", "--model", "m", "--max-tokens", "1"]
    assert cli.main([*words, "--prompt", "a", "--n", "2"]) == 0
    assert capsys.readouterr().out == "[1/1 sample 1/2] a\nw0\n\n[1/1 sample 2/2] a\nw0\n\n"
    assert cli.main([*words, "--prompt", "a\nb", "--prompt-token-ids", "1,2"]) == 0
    assert capsys.readouterr().out == "[1/2] a b\nw0\n\n[2/2] [1, 2]\nw0\n\n"


def test_flags_are_checked_with_the_commands_own_max_tokens(engine, capsys, monkeypatch):
    assert cli.main(["generate", "--model", "m", "--prompt", "a", "--min-tokens", "20"]) == 0
    stdin(monkeypatch, "hello\n")
    assert cli.main(["chat", "--model", "m", "--min-tokens", "1000"]) == 0
    assert [llm.calls[0][2].max_tokens for llm in engine.made] == [cli.DEFAULT_MAX_TOKENS, None]
    assert cli.main(["generate", "--model", "m", "--prompt", "a", "--min-tokens", "129"]) == 2
    assert "at most max_tokens = 128" in capsys.readouterr().err


def test_ctrl_c_in_mid_text_ends_the_line(engine, capsys, monkeypatch):
    def stream(self, prompt, params):
        yield self.output(prompt, params, 2, False)
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "stream", stream)
    assert cli.main(["generate", "--model", "m", "--prompt", "a"]) == 130
    assert capsys.readouterr().out == "w0 w1\n"


def test_a_long_prompt_is_not_echoed(engine, capsys):
    assert cli.main(["generate", "--model", "m", "--prompt", "long " * 1000, "--max-tokens", "1"]) == 0
    [echo] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("prompt: ")]
    assert len(echo) == len("prompt: ") + 80 and echo.endswith("…")


def test_flags_stand_above_the_config_file_and_a_batch_raises_its_max_num_seqs(tmp_path):
    path = tmp_path / "engine.yaml"
    path.write_text("model: m\nmax_num_seqs: 2\nblock_size: 32\n")

    def config(*words, least):
        args = cli.build_parser().parse_args(["bench", "latency", "--config", str(path), *words])
        return cli.engine_config(args, least_seqs=least)

    assert (config(least=1).max_num_seqs, config(least=70).max_num_seqs, config(least=70).block_size) == (2, 70, 32)
    assert config("--max-num-seqs", "8", "--block-size", "16", least=70) == EngineConfig(
        "m", max_num_seqs=8, block_size=16, use_tqdm=sys.stderr.isatty()
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["generate", "--prompt", "a"], "no model: give --model"),
        (["generate", "--model", "m", "--prompt", "a", "--top-p", "2"], "top_p"),
        (["generate", "--model", "m", "--prompt", "a", "--logprobs", "1"], "with --json only"),
        (["generate", "--model", "m", "--prompt", "a", "--tensor-parallel-size", "0"], "tensor_parallel_size"),
        (["generate", "--config", "no-such-preset", "--prompt", "a"], "no-such-preset"),
        (["generate", "--model", "m"], "stdin is empty"),
        (["bench", "latency", "--model", "m", "--output-len", "1"], "output_len is 1; it must be at least 2"),
        (["bench", "latency", "--model", "m", "--max-num-seqs", "4"], "batch_size 8 is more than max_num_seqs 4"),
        (["bench", "latency", "--model", "m", "--num-iters-warmup", "0"], "at least 1: the first run compiles"),
        (["bench", "latency", "--model", "m", "--output", "no-such-folder/x.json"], "a folder that exists"),
        (["bench", "latency", "--model", "m", "--max-model-len", "159"], "input_len 32 + output_len 128 is more than"),
        (
            ["bench", "latency", "--model", "m", "--batch-size", "1", "2", "3", "--input-len", "8", "16"],
            "--batch-size 1 2 3, --input-len 8 16, --output-len 128: each takes one value, or one for each case",
        ),
    ],
)
def test_user_errors_are_one_line_and_exit_2(engine, capsys, monkeypatch, words, says):
    stdin(monkeypatch, "")
    assert cli.main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and says in err and len(err.splitlines()) == 1
    assert engine.made == [], "told before a model is loaded"


def test_debug_shows_the_traceback(engine):
    with pytest.raises(ValueError, match="no model"):
        cli.main(["generate", "--prompt", "a", "--debug"])


def test_a_bug_keeps_its_traceback(engine, monkeypatch):
    monkeypatch.setattr(engine, "stream", lambda *_: (_ for _ in ()).throw(KeyError("lost")))
    with pytest.raises(KeyError, match="lost"):
        cli.main(["generate", "--model", "m", "--prompt", "a"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["generate", "--logit-bias", "[1]"], "is not a JSON object of token id to number"),
        (["generate", "--prompt-token-ids", ",".join(["x"] * 1000)], "is not a list of token ids"),
        (["generate", "--mod", "m"], "unrecognized arguments: --mod m"),
        (["bench", "latency", "--batch", "2"], "unrecognized arguments: --batch 2"),
    ],
)
def test_a_wrong_flag_is_one_short_line(capsys, words, says):
    with pytest.raises(SystemExit) as stopped:
        cli.build_parser().parse_args(words)
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.startswith("error: ") and says in err
    assert len(err.splitlines()) == 1 and len(err) < 300


def test_chat_keeps_history_and_resets(engine, capsys, monkeypatch):
    stdin(monkeypatch, "hello\n\nagain\n/reset\nnew\n/exit\nnever\n")
    assert cli.main(["chat", "--model", "m", "--system-prompt", "Be brief."]) == 0
    asked = [[(m["role"], m["content"]) for m in messages] for _, messages, _ in engine.made[0].calls]
    system = ("system", "Be brief.")
    assert asked == [
        [system, ("user", "hello")],
        [system, ("user", "hello"), ("assistant", "w0 w1"), ("user", "again")],
        [system, ("user", "new")],
    ]
    assert engine.made[0].calls[0][2].max_tokens is None
    assert capsys.readouterr().out == "w0 w1\nw0 w1 w2 w3\nw0 w1\n"


def test_chat_in_a_script_fails_on_a_refused_turn(engine, capsys, monkeypatch):
    stdin(monkeypatch, "too long\nhello\n")
    assert cli.main(["chat", "--model", "m"]) == 2
    assert "error: the prompt has 99 tokens" in capsys.readouterr().err


def test_stream_writes_only_what_is_new():
    out = io.StringIO()
    texts = ["", "ab", "ab", "abc d"]
    outputs = [SimpleNamespace(outputs=[SimpleNamespace(text=text)]) for text in texts]
    assert list(cli.write_stream(outputs, out)) == outputs
    assert out.getvalue() == "abc d\n"


def test_speed_counts_compilation_apart(monkeypatch):
    clock = iter([100.0, 105.0, 107.0])
    monkeypatch.setattr(cli, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    llm = SimpleNamespace(seconds=0.0)
    llm.stats = lambda: {"compile_seconds": llm.seconds}
    speed = cli.Speed(llm)
    output = SimpleNamespace(prompt_token_ids=[1, 2, 3], outputs=[SimpleNamespace(token_ids=[5])])
    llm.seconds = 4.0  # of the five seconds before the first token
    speed.saw(output)
    output.outputs[0].token_ids = [5] * 11
    llm.seconds = 5.0
    speed.saw(output)
    text = str(speed)
    assert "3 prompt tokens, 11 output tokens in 2.00 s: 5.5 tok/s" in text
    assert "first text after 1.000 s, then 10.0 tok/s" in text and "compilation, not counted: 5.0 s" in text


def test_percentages_only_where_they_mean_something():
    assert latency.why_no_percentage("gpu", 16e9) is None
    assert "CPU" in latency.why_no_percentage("cpu", 16e9)
    assert "cache" in latency.why_no_percentage("gpu", 99e6)


def test_bench_latency_refuses_what_the_loaded_model_cannot_hold(engine, capsys, monkeypatch):
    monkeypatch.setattr(latency, "measure_read_limit", lambda: latency.ReadLimit("cpu", [1.0], 1))
    assert cli.main(["bench", "latency", "--model", "m", "--input-len", "385"]) == 2
    assert "input_len 385 + output_len 128 is more than max_model_len 512" in capsys.readouterr().err
    assert engine.made[0].calls == []
    assert cli.main(["bench", "latency", "--model", "m", "--input-len", "8", "385"]) == 2
    assert engine.made[1].calls == [], "the second case is refused before the first is measured"


def test_bench_latency_arithmetic(engine, capsys, tmp_path, monkeypatch):
    """Time is a counter here: a run of k tokens takes (2 + k) seconds, of which 0.5 are the engine's first token; streamed, the
    second prompt's tokens take 1, 2, 3, … seconds, the first's none."""
    now, ticks = [0.0], [0]
    monkeypatch.setattr(latency, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    original = StandIn.generate

    def generate(self, prompts, params, use_tqdm=True):
        now[0] += 2 + params.max_tokens
        return original(self, prompts, params)

    def tick(self):
        ticks[0] += 1
        now[0] += 0 if ticks[0] % 2 else ticks[0] % 10 / 2 or 5

    monkeypatch.setattr(StandIn, "generate", generate)
    monkeypatch.setattr(StandIn, "tick", tick)
    peaks = iter([2_000_000_000, 2_000_000_512, None, None])
    monkeypatch.setattr(latency, "peak_bytes", lambda: next(peaks))
    limit = latency.ReadLimit("cpu", [100.0, 300.0, 200.0], 1 << 20)
    monkeypatch.setattr(latency, "measure_read_limit", lambda: limit)
    reasons = iter([None, "too small"])
    monkeypatch.setattr(latency, "why_no_percentage", lambda backend, size: next(reasons))
    words = "--batch-size 2 --input-len 8 --output-len 5 --num-iters 3 --num-iters-warmup 1".split()
    path = tmp_path / "out.json"
    assert cli.main(["bench", "latency", "--model", "m", *words, "--output", str(path)]) == 0
    [report] = json.loads(path.read_text())
    assert report["latency"]["median"] == 7.0 and report["time_to_first_token"]["median"] == 0.5
    assert report["seconds_per_token_by_metrics"]["median"] == pytest.approx(6.5 / 4)
    assert report["seconds_per_token_by_difference"]["median"] == pytest.approx(1.0)
    assert report["seconds_per_token"]["median"] == pytest.approx(6.5 / 4), "the slower of the two"
    # weights less the untied embedding; 10 bytes a token, two sequences of 8 + 2.5 tokens on average
    assert report["bytes_read_per_token_per_device"] == {"weights": 700, "kv_cache": 210, "total": 910}
    assert report["bytes_per_second_per_device"] == pytest.approx(910 / (6.5 / 4))
    assert report["percent_of_read_limit"] == pytest.approx(100 * 910 / (6.5 / 4) / 200)
    assert report["tokens_per_second"] == pytest.approx(2 / (6.5 / 4))
    gaps = report["inter_token_latency"]
    assert (gaps["count"], gaps["min"], gaps["median"], gaps["max"]) == (12, 2.0, 3.5, 5.0) and 4.9 < gaps["p99"] <= 5.0
    assert report["peak_bytes_growth_while_measuring"] == 512
    assert report["num_compilations_while_measuring"] == 0
    assert report["percent_over_bare_step"] == pytest.approx(100 * (1.625 / 0.01 - 1))
    calls = engine.made[0].calls
    assert calls[-1] == ("bare", 2, 8, 4)
    prompts = [json.dumps(call[1]) for call in calls[:-1]]
    assert len(set(prompts)) == len(prompts) == 4 * (1 + 1 + 2), "a prompt is never seen twice"
    assert all(call[2].ignore_eos for call in calls[:-1])
    printed = capsys.readouterr().out
    assert "1625.000 ms" in printed and "% of the read limit" in printed and "at most 2.000 GB" in printed
    assert "Between tokens:         3500.000 ms, p99 5000.000 (+42.9 %), max 5000.000, of 12, streamed" in printed
    assert cli.main(["bench", "latency", "--model", "m", *words, "--output", str(path)]) == 0
    [report] = json.loads(path.read_text())
    assert report["percent_of_read_limit"] is None and report["peak_bytes_growth_while_measuring"] is None
    printed = capsys.readouterr().out
    assert "no percentage: too small" in printed and "% of the read limit" not in printed and "at most" not in printed


def test_bench_latency_of_several_cases(engine, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(latency, "measure_read_limit", lambda: latency.ReadLimit("cpu", [1.0], 1))
    path, written, write = tmp_path / "out.json", [], latency.write
    monkeypatch.setattr(latency, "write", lambda reports, path: (written.append(len(reports)), write(reports, path)))
    words = "--batch-size 1 3 --input-len 8 16 --output-len 2 --num-iters 1 --num-iters-warmup 1 --max-num-seqs 4".split()
    assert cli.main(["bench", "latency", "--model", "m", *words, "--output", str(path)]) == 0
    asked = [{name: report["options"][name] for name in latency.SEVERAL} for report in json.loads(path.read_text())]
    assert written == [1, 2], "after each case, so that what ends early loses no other"
    assert asked == [
        {"batch_size": 1, "input_len": 8, "output_len": 2},
        {"batch_size": 3, "input_len": 16, "output_len": 2},
    ]
    [llm] = engine.made
    prompts = [tuple(prompt) for kind, asked, *_ in llm.calls if kind == "generate" for prompt in asked]
    assert len({prompt[:8] for prompt in prompts}) == len(prompts) == 4 * 1 + 4 * 3, "no case's prompts begin as another's"
    assert capsys.readouterr().out.count("Model:") == 2


def test_known_read_limit_is_a_floor():
    assert latency.ReadLimit("NVIDIA H200", [4.0e12], 1).bytes_per_second == 4.46e12
    assert latency.ReadLimit("NVIDIA H200", [4.6e12], 1).bytes_per_second == 4.6e12
    assert latency.ReadLimit("cpu", [1e10], 1).bytes_per_second == 1e10


def test_read_limit_reads_every_pass():
    """The rate is one that memory or a cache can have: nothing was hoisted out of the loop or merged."""
    limit = latency.measure_read_limit(num_bytes=8 << 20, repeats=3)
    assert len(limit.measured) == 1 and limit.bytes_read == 8 << 20
    assert 1e8 < limit.measured[0] < 5e11, "a laptop's memory to a server's cache; more would be a loop optimized away"


@pytest.mark.gpu
def test_read_limit_on_a_gpu_is_near_its_memory_bandwidth():
    limit = latency.measure_read_limit()
    if limit.known is None:
        pytest.skip(f"no known limit for {limit.device_kind}")
    assert all(0.85 * limit.known < rate < 1.1 * limit.known for rate in limit.measured)


def jaxinfer(repo_root, *words, **options):
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "NPROC")} | {"PYTHONPATH": str(repo_root)}
    command = [sys.executable, "-m", "jaxinfer", *words]
    return subprocess.run(command, env=env, cwd=repo_root, capture_output=True, text=True, timeout=300, **options)


def test_help_and_version_are_fast_and_start_no_backend(repo_root):
    done = jaxinfer(repo_root, "--version")
    assert done.returncode == 0 and done.stdout.startswith("jaxinfer 0.")
    code = "import sys, jaxinfer.cli; sys.exit('jax' in sys.modules)"
    env = os.environ | {"PYTHONPATH": str(repo_root)}
    assert subprocess.run([sys.executable, "-c", code], env=env, timeout=60).returncode == 0


def test_collect_env_json(repo_root):
    done = jaxinfer(repo_root, "collect-env", "--json", "--num-cpu-devices", "3")
    report = json.loads(done.stdout)
    assert len(report["devices"]) == 3 and report["environment"]["NCCL_NVLS_ENABLE"] == "0"


def test_generate_for_real(repo_root):
    """The whole program in a fresh process; on two forced devices it gives the greedy tokens of one."""
    words = "generate --json --model random:configs/models/tiny-llama.json --max-model-len 64 --max-num-seqs 2".split()
    words += "--prompt-token-ids 1,2,3,4,5 --prompt-token-ids 6,7 --max-tokens 6 --temperature 0 --ignore-eos".split()
    one = jaxinfer(repo_root, *words)
    assert one.returncode == 0, one.stderr
    two = jaxinfer(repo_root, *words, "--num-cpu-devices", "2", "--tensor-parallel-size", "2")
    assert two.returncode == 0, two.stderr
    tokens = [[json.loads(line)["outputs"][0]["token_ids"] for line in run.stdout.splitlines()] for run in (one, two)]
    assert [len(ids) for ids in tokens[0]] == [6, 6]
    assert tokens[0] == tokens[1]
    assert "tok/s" in one.stderr and "Traceback" not in one.stderr
    assert [line for line in one.stderr.splitlines() if line.startswith("compiled ")], "a line for each compilation"
    several = jaxinfer(repo_root, *words, "--num-cpu-devices", "2", "--tensor-parallel-size", "3")
    assert several.returncode == 2 and several.stderr.startswith("error: ") and "2" in several.stderr, several.stderr


def test_bench_latency_for_real(repo_root, tmp_path):
    path = tmp_path / "latency.json"
    words = "bench latency --model random:configs/models/tiny-llama.json --max-model-len 64 --max-num-seqs 2".split()
    words += "--batch-size 2 --input-len 8 --output-len 8 --num-iters 2 --num-iters-warmup 1".split()
    done = jaxinfer(repo_root, *words, "--output", str(path))
    assert done.returncode == 0, done.stderr
    [report] = json.loads(path.read_text())
    assert report["num_compilations_while_measuring"] == 0
    assert report["inter_token_latency"]["count"] >= 2 * (8 - 1 - 2) and report["inter_token_latency"]["min"] > 0
    assert 0 < report["seconds_per_token"]["median"] < 1 and report["bare_step_seconds"] > 0
    assert report["read_limit"]["bytes_per_second"] > 0 and report["percent_of_read_limit"] is None
    assert "Token after the first:" in done.stdout
