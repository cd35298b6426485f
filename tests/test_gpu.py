"""What only a GPU can show: `pytest -m gpu` on a machine that has one or more."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxinfer import LLM, SamplingParams
from jaxinfer.config import model_config_file, read_json
from pallas_kernels import tuning

pytestmark = pytest.mark.gpu


def llm(model: str = "random:llama3.2-1b", **settings: Any) -> LLM:
    defaults = {"max_model_len": 1024, "max_num_seqs": 4, "num_gpu_blocks_override": 80, "use_tqdm": False}
    return LLM(model, **{**defaults, **settings})


def prompts(lengths: list[int]) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 30_000, n).tolist() for n in lengths]


def tokens(model: LLM, asked: list[list[int]], params: Any) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in model.generate(asked, params, use_tqdm=False)]


def greedy(n: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True)


def test_memory_stands_still_between_decode_steps() -> None:
    model = llm()
    tokens(model, prompts([100, 30]), greedy(20))
    device, in_use, peaks = jax.devices()[0], [], []
    for _ in model.stream(prompts([100])[0], greedy(300)):
        # What was freed while a step ran counts until that has ended, and the next one runs already.
        jax.block_until_ready(model.engine.runner.state)
        stats = device.memory_stats()
        in_use.append(stats["bytes_in_use"])
        peaks.append(stats["peak_bytes_in_use"])
    # The first and last steps have no other beside them.
    assert len(set(in_use[3:-3])) == 1 and max(in_use) - min(in_use) <= 4096
    assert len(set(peaks)) == 1


@pytest.mark.parametrize("steps", [1, 4])
def test_the_cache_is_updated_in_place(steps: int) -> None:
    runner = llm(num_scheduler_steps=steps).engine.runner
    for greedy_program in (True, False):
        bucket = next(b for b in runner.decode_buckets if b.rows == 4 and b.steps == steps and b.greedy == greedy_program)
        compiled = runner.compile(bucket, runner.cache)
        sizes: Any = compiled.memory_analysis()
        assert sizes.alias_size_in_bytes >= runner.num_pages * runner.page_bytes
        shape = ",".join(map(str, runner.cache.keys[0].shape))
        assert not re.findall(rf"= bf16\[{shape}\]\S* copy\(", compiled.as_text() or "")


def test_decode_runs_the_kernel_and_agrees_with_the_reference() -> None:
    """The same bfloat16 model, decoding through the kernel and through plain jnp (a page size the kernel refuses)."""
    asked = prompts([200, 70, 64, 1])
    by_kernel, by_reference = llm(), llm(block_size=40, num_gpu_blocks_override=120)
    runner = by_kernel.engine.runner
    first = tokens(by_kernel, asked, greedy(12))
    assert any("custom_call" in (p.as_text() or "") or "custom-call" in (p.as_text() or "") for p in runner.programs.values())
    second = tokens(by_reference, asked, greedy(12))
    # Different orders of addition may flip a near tie and then differ for good; most rows must not.
    assert sum(a == b for a, b in zip(first, second, strict=True)) >= 2
    assert [a[0] for a in first] == [b[0] for b in second]  # the first token comes from the same prefill


@pytest.mark.parametrize(("name", "dtype"), [("llama3.2-1b", "bfloat16"), ("llama2-7b", "float16")])
def test_a_lone_sequence(name: str, dtype: str) -> None:
    """Separate kernels, whose row's pages are a part of the array that the host sends."""
    model = llm(f"random:{name}", dtype=dtype, num_gpu_blocks_override=40)
    [asked] = prompts([70])
    [alone], together = tokens(model, [asked], greedy(8)), tokens(model, [asked, asked[:9]], greedy(8))
    assert alone[:2] == together[0][:2]  # the second is decoded; later ones may be on the other side of a near tie
    [output] = model.generate([asked], SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1), use_tqdm=False)
    assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == 70


def test_batched_is_alone_and_twice_the_same() -> None:
    model = llm("random:tiny-qwen3", max_model_len=128, dtype="float32")
    asked = [[i % 500 for i in range(n)] for n in (1, 40, 100)]
    params = [greedy(10), SamplingParams(max_tokens=10, seed=1, top_p=0.9, ignore_eos=True), greedy(10)]
    together = tokens(model, asked, params)
    assert together == tokens(model, asked, params)
    assert together == [tokens(model, [a], p)[0] for a, p in zip(asked, params, strict=True)]


def test_the_pool_is_sized_from_measured_memory() -> None:
    model = llm(num_gpu_blocks_override=None, max_num_seqs=256, max_model_len=8192, gpu_memory_utilization=0.5)
    stats = jax.devices()[0].memory_stats()
    assert stats["bytes_in_use"] <= stats["bytes_limit"]
    assert model.stats()["kv_cache_bytes_per_device"] > 0.2 * stats["bytes_limit"]
    tokens(model, prompts([1000, 500]), greedy(4))


@pytest.mark.parametrize("name", ["tiny-qwen3", "llama3.2-1b"])
def test_tensor_parallel_tokens(name: str) -> None:
    tp = jax.device_count()
    if tp == 1:
        pytest.skip("one GPU on this machine")
    asked = [[i % 500 for i in range(n)] for n in (5, 60)]
    settings: dict[str, Any] = {"dtype": "float32", "max_model_len": 128, "num_gpu_blocks_override": 40}
    one = tokens(llm(f"random:{name}", **settings), asked, greedy(16))
    assert tokens(llm(f"random:{name}", tensor_parallel_size=tp, **settings), asked, greedy(16)) == one
    blocks = llm(f"random:{name}", tensor_parallel_size=tp, num_scheduler_steps=4, **settings)
    assert tokens(blocks, asked, greedy(16)) == one


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_halves_on_several_gpus(quantization: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block in two kernels on each device: what decode steps give is near what separate kernels do, and twice the same."""
    tp = jax.device_count()
    if tp not in (2, 4, 8):
        pytest.skip(f"{tp} GPUs on this machine: 2, 4 or 8 are needed")
    shape = {"hidden_size": 1024, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8}
    config = tmp_path / "config.json"
    more = {"head_dim": 128, "num_hidden_layers": 4}
    config.write_text(json.dumps({**read_json(model_config_file("tiny-llama")), **shape, **more}))
    asked = [[i % 500 for i in range(n)] for n in (3, 60, 200)]

    def decoded() -> tuple[LLM, list[dict[int, float]]]:
        """Log-probabilities of what the first decode step gives each row."""
        made = llm(f"random:{config}", tensor_parallel_size=tp, quantization=quantization, dtype="bfloat16", max_model_len=512)
        params = SamplingParams(temperature=0.0, max_tokens=2, logprobs=5, ignore_eos=True)
        outputs = [output.outputs[0].logprobs for output in made.generate(asked, params, use_tqdm=False)]
        return made, [{token: entry.logprob for token, entry in logprobs[1].items()} for logprobs in outputs if logprobs]

    def kernels(made: LLM) -> int:
        program = next(p for bucket, p in made.engine.runner.programs.items() if bucket.name.startswith("decode"))
        return (program.as_text() or "").count('custom_call_target="mosaic_gpu')

    separate, expected = decoded()
    entry = {"when": {"rows": 16}, "config": {"rows": 256 if quantization else 128}}
    monkeypatch.setitem(tuning._load(tuning.device_name()), "decode_halves", [entry])
    halves, found = decoded()
    assert kernels(halves) < kernels(separate) and kernels(halves) <= 2 * 4 + 1
    for a, b in zip(found, expected, strict=True):
        common = a.keys() & b.keys()
        assert len(common) >= 4
        np.testing.assert_allclose([a[token] for token in common], [b[token] for token in common], atol=0.05)
    assert tokens(halves, asked, greedy(40)) == tokens(halves, asked, greedy(40))
