"""Continuous batching through the engine: what runs beside a request, and what happens to it, never changes its tokens."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import LLM, SamplingParams
from jaxinfer.request import RequestOutput, RequestOutputKind, StructuredOutputsParams
from jaxinfer.structured_outputs import Matcher

VOCAB = 512
SMALL = {"max_num_seqs": 4, "max_model_len": 128, "block_size": 16, "max_num_batched_tokens": 32, "use_tqdm": False}


def tiny_llm(**settings: Any) -> LLM:
    return LLM("random:tiny-llama", **{**SMALL, **settings})


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, length).tolist()


def greedy(n: int, **kwargs: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True, **kwargs)


def mixed() -> tuple[list[list[int]], list[SamplingParams]]:
    prompts = [prompt(n, n) for n in (40, 5, 60, 33, 20, 48, 7, 31)]
    params = [
        greedy(40),
        SamplingParams(max_tokens=50, seed=3, ignore_eos=True, top_p=0.9, repetition_penalty=1.2),
        greedy(30, logprobs=2),
        SamplingParams(max_tokens=45, seed=4, top_k=5, presence_penalty=0.7, ignore_eos=True, bad_words=None),
        greedy(60),
        greedy(20, prompt_logprobs=1),
        SamplingParams(max_tokens=64, seed=5, min_p=0.05, ignore_eos=True, logprobs=1),
        greedy(33, min_tokens=5),
    ]
    return prompts, params


@pytest.fixture(scope="module")
def alone() -> list[Any]:
    llm = tiny_llm(enable_prefix_caching=False, max_num_batched_tokens=128)
    return [llm.generate([p], param, use_tqdm=False)[0] for p, param in zip(*mixed(), strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "preempts"),
    [
        ({"num_gpu_blocks_override": 14}, True),  # a quarter of what four sequences need
        ({"num_gpu_blocks_override": 9, "num_scheduler_steps": 4}, True),
        ({"num_gpu_blocks_override": 14, "tensor_parallel_size": 2}, True),
        ({"long_prefill_token_threshold": 7, "block_size": 8}, False),
        ({"max_num_seqs": 8, "max_num_batched_tokens": 500}, False),
    ],
)
def test_tokens_do_not_depend_on_neighbours_chunks_or_preemption(
    alone: list[Any], settings: dict[str, Any], preempts: bool
) -> None:
    llm = tiny_llm(**settings)
    for _ in range(2):  # the second time, prompts hit the prefix cache
        outputs = llm.generate(*mixed(), use_tqdm=False)
        for output, expected in zip(outputs, alone, strict=True):
            assert output.outputs[0].token_ids == expected.outputs[0].token_ids
            assert output.outputs[0].finish_reason == expected.outputs[0].finish_reason
            assert_logprobs(output.outputs[0].logprobs, expected.outputs[0].logprobs)
            assert_logprobs(output.prompt_logprobs, expected.prompt_logprobs)
    stats = llm.engine.stats()
    assert (stats.num_preemptions > 0) == preempts
    assert preempts or stats.prefix_cache_hits > 0
    assert llm.engine.scheduler.pool.num_free == llm.engine.runner.num_pages - 1


def assert_logprobs(found: Any, expected: Any) -> None:
    assert (found is None) == (expected is None)
    for at, (mine, theirs) in enumerate(zip(found or [], expected or [], strict=True)):
        assert (mine is None) == (theirs is None)
        for token, logprob in (theirs or {}).items():
            assert mine[token].logprob == pytest.approx(logprob.logprob, abs=1e-4), at


def test_a_shared_prefix_is_computed_once() -> None:
    llm = tiny_llm()
    head = prompt(64, 1)
    fresh = [llm.generate([head + prompt(10, n)], greedy(8), use_tqdm=False)[0] for n in (2, 3, 2)]
    assert [output.num_cached_tokens for output in fresh] == [0, 64, 64]
    whole = llm.generate([head], greedy(8), use_tqdm=False)[0]
    assert whole.num_cached_tokens == 48  # the last token is always computed, and with it its page
    llm.reset_prefix_cache()
    again = [llm.generate([head + prompt(10, n)], greedy(8), use_tqdm=False)[0] for n in (2, 3)]
    assert [output.num_cached_tokens for output in again] == [0, 64]
    assert [o.outputs[0].token_ids for o in again] == [o.outputs[0].token_ids for o in fresh[:2]]
    assert fresh[2].outputs[0].token_ids == fresh[0].outputs[0].token_ids


def test_priority_goes_first() -> None:
    llm = tiny_llm(max_num_seqs=1, scheduling_policy="priority")
    engine = llm.engine
    for name, priority in (("last", 5), ("middle", 0), ("first", -1)):
        engine.submit(prompt(4), greedy(3), name, priority)
    finished = []
    while engine.has_unfinished:
        finished += [output.request_id for output in engine.step() if output.finished]
    assert finished == ["first", "middle", "last"]
    with pytest.raises(ValueError, match="priority = 1: this engine runs requests first come first served"):
        tiny_llm().engine.submit(prompt(4), greedy(3), priority=1)


def test_nan_logits_harm_no_neighbour() -> None:
    llm = tiny_llm(enable_prefix_caching=False)
    prompts = [[t for t in prompt(n, n) if t != 13] for n in (20, 40, 9)]
    expected = [o.outputs[0].token_ids for o in llm.generate(prompts, greedy(25, bad_words=None), use_tqdm=False)]
    runner = llm.engine.runner
    at = next(i for i, leaf in enumerate(runner.leaves) if leaf.ndim == 2 and leaf.shape[0] == VOCAB)
    runner.leaves[at] = runner.leaves[at].at[13].set(jnp.nan)
    assert 13 not in {t for tokens in expected for t in tokens}  # or the others would read it too
    poisoned = [*prompts[:2], [13] * 30, prompts[2]]
    for _ in range(2):  # the second time, in pages that the poisoned one had
        outputs = llm.generate(poisoned, greedy(25, allowed_token_ids=None), use_tqdm=False)
        tokens = [o.outputs[0].token_ids for o in outputs]
        assert [*tokens[:2], tokens[3]] == expected


@pytest.mark.slow
def test_guided_outputs_beside_others(smollm2_path: Path) -> None:
    llm = LLM(str(smollm2_path), max_model_len=128, max_num_seqs=8, max_num_batched_tokens=64, use_tqdm=False)
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}, "size": {"type": "integer", "maximum": 99}},
        "required": ["city", "size"],
        "additionalProperties": False,
    }
    forms = [
        None,
        StructuredOutputsParams(json=schema, disable_any_whitespace=True),
        StructuredOutputsParams(regex=r"[0-9]{3}-[0-9]{4}"),
        StructuredOutputsParams(choice=["Rome", "Paris", "Berlin"]),
    ]
    params = [SamplingParams(temperature=0, max_tokens=40, structured_outputs=form) for form in forms]
    params += [SamplingParams(n=2, seed=1, max_tokens=40, structured_outputs=forms[1])]
    outputs = llm.generate(["The capital of Italy is"] * 5, params, use_tqdm=False)
    free, document, number, city, two = [[o.text for o in output.outputs] for output in outputs]
    for text in document + two:
        assert set(json.loads(text)) == {"city", "size"}
    assert [part.isdigit() for part in number[0].split("-")] == [True, True] and len(number[0]) == 8
    assert city == ["Rome"]
    assert {o.finish_reason for output in outputs[1:] for o in output.outputs} == {"stop"}
    assert llm.generate(["The capital of Italy is"], params[0], use_tqdm=False)[0].outputs[0].text == free[0]
    with pytest.raises(ValueError, match="regex cannot be compiled"):
        llm.generate(["x"], SamplingParams(structured_outputs=StructuredOutputsParams(regex="[")), use_tqdm=False)
    (stuck,) = llm.generate(
        ["x"],
        SamplingParams(allowed_token_ids=[5], bad_words=None, min_tokens=2, max_tokens=4, stop_token_ids=[6]),
        use_tqdm=False,
    )
    assert stuck.outputs[0].token_ids == [5] * 4


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 4])
def test_bans_that_run_dry_end_the_text_where_it_stands(smollm2_path: Path, steps: int) -> None:
    llm = LLM(str(smollm2_path), max_model_len=64, max_num_seqs=2, num_scheduler_steps=steps, use_tqdm=False)
    (one,) = llm.get_tokenizer().encode("1", add_special_tokens=False)
    params = SamplingParams(temperature=0, max_tokens=20, allowed_token_ids=[one], bad_words=["1111"], logprobs=1)
    for kind in RequestOutputKind:
        seen: list[RequestOutput] = []
        llm.engine.submit("x", dataclasses.replace(params, output_kind=kind), kind.name)
        while llm.engine.has_unfinished:
            seen += llm.engine.step()
        output = seen[0]
        for later in seen[1:]:
            if kind is RequestOutputKind.DELTA:
                output.add(later)
            else:
                output = later
        sample = output.outputs[0]
        assert (sample.text, sample.token_ids, sample.finish_reason) == ("111", [one] * 3, "stop")
        assert len(sample.logprobs or []) == 3 and sample.cumulative_logprob is not None


@pytest.mark.slow
def test_a_grammar_that_fails_costs_its_own_request_only(smollm2_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(str(smollm2_path), max_model_len=64, max_num_seqs=4, use_tqdm=False)
    alone = llm.generate(["The sea"], greedy(12), use_tqdm=False)[0].outputs[0].token_ids
    accept, calls = Matcher.accept, itertools.count()
    monkeypatch.setattr(Matcher, "accept", lambda self, token: 1 / 0 if next(calls) == 2 else accept(self, token))
    guided = SamplingParams(max_tokens=12, logprobs=1, structured_outputs=StructuredOutputsParams(regex="[a-z ]{40}"))
    llm.engine.submit("The sea", greedy(12), "free")
    llm.engine.submit("The sea", guided, "guided")
    done: dict[str, RequestOutput] = {}
    while llm.engine.has_unfinished:
        done |= {output.request_id: output for output in llm.engine.step() if output.finished}
    assert done["guided"].error == "ZeroDivisionError: division by zero"
    assert done["guided"].outputs[0].finish_reason == "error"
    assert done["free"].outputs[0].token_ids == alone
    assert llm.engine.scheduler.pool.num_free == llm.engine.runner.num_pages - 1 and not llm.engine._matchers
