"""`bench throughput`: its arithmetic on a stand-in with a clock of its own, and for real on a tiny model."""

import json
from types import SimpleNamespace

import pytest

from jaxinfer import cli
from jaxinfer.bench import throughput
from jaxinfer.bench.datasets import DatasetOptions, random_prompts

TINY = "--model random:configs/models/tiny-llama.json --max-model-len 64 --max-num-seqs 4 --block-size 16".split()


class StandIn:
    """Each generate takes the next of `seconds`."""

    def __init__(self, seconds, short=0):
        self.seconds, self.short, self.now, self.calls = list(seconds), short, 0.0, []
        self.engine = SimpleNamespace(
            config=SimpleNamespace(model="m"), model_config=SimpleNamespace(vocab_size=50), max_model_len=100
        )

    def generate(self, prompts, params):
        self.calls.append((prompts, params))
        self.now += self.seconds[len(self.calls) - 1]
        return [
            SimpleNamespace(
                prompt_token_ids=prompt, outputs=[SimpleNamespace(token_ids=[0] * (p.max_tokens - self.short))],
                num_cached_tokens=1, error=None,
            )
            for prompt, p in zip(prompts, params, strict=True)
        ]  # fmt: skip

    def stats(self):
        return {"num_compilations": 2 + len(self.calls), "compile_seconds": 3.0, "dtype": "float32", "shapes": [1]}


def measure(llm, monkeypatch, options, dataset):
    monkeypatch.setattr(throughput, "asdict", lambda x: dict(vars(x)))  # the stand-in's config is no dataclass
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: llm.now)
    return throughput.run(llm, options, dataset, seed=4)


def test_the_median_run_counts_and_the_warm_up_does_not(monkeypatch):
    llm = StandIn([100.0, 3.0, 2.0, 8.0])
    dataset = DatasetOptions(num_prompts=3, random_input_len_min=2, random_input_len_max=9, random_output_len=5)
    result = measure(llm, monkeypatch, throughput.Options(num_iters=3), dataset)
    tokens = sum(len(prompt) for prompt in llm.calls[0][0])
    assert [i["duration"] for i in result["iterations"]] == [3.0, 2.0, 8.0] and result["duration"] == 3.0
    assert (result["completed"], result["total_input_tokens"], result["total_output_tokens"]) == (3, tokens, 15)
    assert result["request_throughput"] == 1.0 and result["output_throughput"] == 5.0
    assert result["total_token_throughput"] == pytest.approx((tokens + 15) / 3)
    assert result["output_throughputs"]["max"] == 7.5 and result["output_throughputs"]["median"] == 5.0
    assert result["num_compilations_while_measuring"] == 3 and result["total_cached_tokens"] == 3
    # The first measured prompts are those of `bench serve` at the same seed; no run sees a prompt again.
    runs = [prompts for prompts, _ in llm.calls]
    assert runs[1] == [r.prompt for r in random_prompts(3, 2, 9, 5, 50, 4)]
    assert len({tuple(prompt) for prompts in runs for prompt in prompts}) == 12
    assert len({tuple(map(len, prompts)) for prompts in runs}) == 1
    assert all(p.ignore_eos and p.temperature == 0 and p.max_tokens == 5 for _, params in llm.calls for p in params)


def test_an_output_that_is_too_short_is_no_measurement(monkeypatch):
    dataset = DatasetOptions(num_prompts=2, random_input_len=4, random_output_len=5)
    with pytest.raises(RuntimeError, match="2 of 2 outputs are not as long as asked for, the first 3 tokens instead of 5"):
        measure(StandIn([1.0] * 9, short=2), monkeypatch, throughput.Options(), dataset)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--num-iters 0", "num_iters is 0; it must be at least 1"),
        ("--num-iters-warmup 0", "at least 1: the first run compiles"),
        ("--max-model-len 1151", "up to 1024 tokens and outputs of up to 128 are more than max_model_len 1151"),
        ("--output no-such-folder/x.json", "a folder that exists"),
        ("--dataset-name custom", "read a file"),
    ],
)
def test_wrong_options_are_told_before_a_model_is_loaded(capsys, words, message):
    assert cli.main(["bench", "throughput", "--model", "no-such-model", *words.split()]) == 2
    assert message in capsys.readouterr().err


def test_for_real(capsys, tmp_path, monkeypatch, repo_root):
    monkeypatch.chdir(repo_root)
    path = tmp_path / "result.json"
    words = "--num-prompts 6 --random-input-len-min 3 --random-input-len-max 20 --output-len 8 --num-iters 2 --seed 1"
    assert cli.main(["bench", "throughput", *TINY, *words.split(), "--output", str(path)]) == 0
    result, printed = json.loads(path.read_text()), capsys.readouterr().out
    wanted = random_prompts(6, 3, 20, 8, 512, 1)
    assert result["input_lens"] == [len(r.prompt) for r in wanted] and result["output_lens"] == [8] * 6
    assert result["output_throughput"] == pytest.approx(48 / result["duration"])
    assert result["num_compilations_while_measuring"] == 0 and result["environment"]["backend"] == "cpu"
    assert "Total generated tokens:                  48\n" in printed and "2 runs; above, the one of median duration" in printed


def test_ids_above_the_models_vocabulary_are_refused(capsys, monkeypatch, repo_root):
    monkeypatch.chdir(repo_root)
    assert cli.main(["bench", "throughput", *TINY, *"--input-len 4 --output-len 4 --random-vocab-size 513".split()]) == 2
    assert "--random-vocab-size 513 is more than the model's vocabulary of 512" in capsys.readouterr().err
