"""The engine from prompt to text: on tiny random models against transformers, and through every option of a request."""

import asyncio
import dataclasses
import gc
import itertools
import signal
import weakref
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import LLM, SamplingParams
from jaxinfer import outputs as outputs_module
from jaxinfer.config import EngineConfig
from jaxinfer.engine import EngineDeadError, max_model_len, resolve_dtype
from jaxinfer.llm import as_list
from jaxinfer.outputs import Text, Turns
from jaxinfer.request import Plan, RequestOutputKind
from jaxinfer.runner import Step

SMALL = {"max_num_seqs": 4, "max_model_len": 128, "block_size": 16, "max_num_batched_tokens": 32, "use_tqdm": False}
VOCAB = 512


def tiny_llm(model: str = "random:tiny-llama", **settings: Any) -> LLM:
    return LLM(model, **{**SMALL, **settings})


@pytest.fixture(scope="module")
def llm() -> LLM:
    return tiny_llm()


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, length).tolist()


def tokens(llm: LLM, prompts: list[list[int]], params: Any) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]


def greedy(n: int, **kwargs: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True, **kwargs)


# ---- the same tokens, whatever runs beside


def test_batched_is_alone(llm: LLM) -> None:
    prompts = [prompt(n, n) for n in (1, 5, 31, 32, 33, 70, 16)]  # more than slots; shorter and longer than a chunk
    params = [
        greedy(12),
        SamplingParams(max_tokens=9, seed=3, ignore_eos=True),
        greedy(20),
        SamplingParams(max_tokens=15, seed=4, top_k=5, ignore_eos=True),
        greedy(3, logprobs=2),
        SamplingParams(max_tokens=12, seed=5, top_p=0.8, frequency_penalty=0.5, ignore_eos=True),
        greedy(7, prompt_logprobs=1),
    ]
    together = tokens(llm, prompts, params)
    assert [len(t) for t in together] == [12, 9, 20, 15, 3, 12, 7]
    for p, param, expected in zip(prompts, params, together, strict=True):
        assert tokens(llm, [p], param) == [expected]


@pytest.mark.parametrize("settings", [{"block_size": 128}, {"num_scheduler_steps": 5}, {"max_num_batched_tokens": 128}])
def test_page_size_block_of_steps_and_chunking_change_no_token(llm: LLM, settings: dict[str, Any]) -> None:
    prompts = [prompt(n, n) for n in (4, 50)]
    params = [greedy(11), SamplingParams(max_tokens=11, seed=1, ignore_eos=True)]
    assert tokens(tiny_llm(**settings), prompts, params) == tokens(llm, prompts, params)


@pytest.mark.parametrize("tp", [2, 3, 8])
def test_tensor_parallel_tokens(llm: LLM, tp: int) -> None:
    prompts = [prompt(n, n) for n in (4, 50, 9)]
    params = [greedy(11), SamplingParams(max_tokens=11, seed=1, ignore_eos=True), greedy(5, logprobs=3)]
    assert tokens(tiny_llm(tensor_parallel_size=tp), prompts, params) == tokens(llm, prompts, params)


def test_seeds() -> None:
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    seeded = SamplingParams(max_tokens=8, ignore_eos=True, seed=9)
    first, second = tiny_llm(), tiny_llm()
    a, b = tokens(first, [prompt(5)] * 2, params)
    assert a != b  # unseeded requests draw seeds of their own
    assert tokens(second, [prompt(5)] * 2, params) == [a, b]  # from the engine's
    assert tokens(first, [prompt(5)], seeded) == tokens(second, [prompt(5)], seeded)


def test_n_samples_differ_and_are_reproducible(llm: LLM) -> None:
    params = SamplingParams(n=3, max_tokens=6, ignore_eos=True, seed=2)
    (output,) = llm.generate([prompt(5)], params, use_tqdm=False)
    samples = [o.token_ids for o in output.outputs]
    assert [o.index for o in output.outputs] == [0, 1, 2]
    assert len({tuple(s) for s in samples}) == 3
    (again,) = llm.generate([prompt(5)], params, use_tqdm=False)
    assert [o.token_ids for o in again.outputs] == samples
    assert tokens(llm, [prompt(5)], SamplingParams(max_tokens=6, ignore_eos=True, seed=2)) == samples[:1]


def test_a_step_never_waits_for_pages_that_were_sent_with_it(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, sent, waits = llm.engine.runner, [], []
    put, rows = runner._put, runner._rows_to_decode
    monkeypatch.setattr(runner, "_put", lambda x: [array := put(x), sent.append(array)][0])

    def watched(*args: Any) -> Any:
        sent.clear()
        out = rows(*args)
        waits.append((len(sent), any(out is array for array in sent)))
        return out

    monkeypatch.setattr(runner, "_rows_to_decode", watched)
    tokens(llm, [prompt(10), prompt(20)], greedy(40))
    assert waits[0] == (1, True)  # the first; then pages were sent for both, while a step ran
    assert waits.count((1, True)) <= 3  # where somebody joins or ends
    assert waits.count((1, False)) >= 3


def test_a_recycled_page_does_not_poison_its_next_owner(llm: LLM) -> None:
    expected = tokens(llm, [prompt(40)], greedy(30))
    runner = llm.engine.runner
    runner.cache = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), runner.cache)
    llm.reset_prefix_cache()
    assert tokens(llm, [prompt(40)], greedy(30)) == expected


def test_all_pages_and_slots_come_back(llm: LLM) -> None:
    tokens(llm, [prompt(9)] * 9, greedy(4))
    engine = llm.engine
    assert engine.scheduler.pool.num_free == engine.runner.num_pages - 1
    assert not engine.has_unfinished and not engine._groups and not engine._texts


def test_between_steps_the_same_bytes_are_alive() -> None:
    """Once the device has been waited for: across pages, and whatever is sent a step ahead."""
    engine, alive = tiny_llm().engine, []
    for seed in range(2):
        engine.submit(prompt(3, seed), greedy(120))
    gc.collect()
    gc.disable()  # what other tests left behind would go in the middle
    try:
        while engine.has_unfinished:
            engine.step()
            jax.block_until_ready(engine.runner.state)
            alive.append(sum(array.nbytes for array in jax.live_arrays()))
    finally:
        gc.enable()
    assert len(alive) > 110 and len(set(alive[2:-2])) == 1


# ---- logprobs


def test_logprobs_are_those_of_the_prompt_read_again(llm: LLM) -> None:
    (output,) = llm.generate([prompt(20)], greedy(8, logprobs=4), use_tqdm=False)
    completion = output.outputs[0]
    assert completion.logprobs is not None and len(completion.logprobs) == 8
    (again,) = llm.generate([prompt(20) + completion.token_ids], greedy(1, prompt_logprobs=4), use_tqdm=False)
    assert again.prompt_logprobs is not None and again.prompt_logprobs[0] is None and len(again.prompt_logprobs) == 28
    for position, token, reread in zip(completion.logprobs, completion.token_ids, again.prompt_logprobs[20:], strict=True):
        assert reread is not None
        assert list(position) == list(reread) and len(position) == 4 and position[token].rank == 1
        for id_, entry in position.items():
            assert entry.logprob == pytest.approx(reread[id_].logprob, abs=1e-4)
    assert completion.cumulative_logprob == pytest.approx(
        sum(p[t].logprob for p, t in zip(completion.logprobs, completion.token_ids, strict=True))
    )


def test_logprobs_zero_is_the_token_alone(llm: LLM) -> None:
    (output,) = llm.generate([prompt(5)], greedy(3, logprobs=0), use_tqdm=False)
    assert [list(p) for p in output.outputs[0].logprobs or []] == [[t] for t in output.outputs[0].token_ids]


# ---- when it ends


def test_stop_token_min_tokens_and_length(llm: LLM) -> None:
    free = tokens(llm, [prompt(6)], greedy(10))[0]
    stop = next(t for i, t in enumerate(free) if t not in free[:i] and i >= 2)
    at = free.index(stop)
    params = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True, stop_token_ids=[stop])
    (output,) = llm.generate([prompt(6)], params, use_tqdm=False)
    completion = output.outputs[0]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    assert completion.token_ids == free[: at + 1]
    params.min_tokens = at + 2
    (output,) = llm.generate([prompt(6)], params, use_tqdm=False)
    assert stop not in output.outputs[0].token_ids[: at + 2]
    (output,) = llm.generate([prompt(125)], SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True), use_tqdm=False)
    assert (len(output.outputs[0].token_ids), output.outputs[0].finish_reason) == (3, "length")


def test_allowed_bias_and_bans(llm: LLM) -> None:
    (allowed,) = tokens(llm, [prompt(6)], greedy(6, allowed_token_ids=[7, 9]))
    assert set(allowed) <= {7, 9}
    (biased,) = tokens(llm, [prompt(6)], greedy(4, logit_bias={33: 100.0}))
    assert biased == [33] * 4


# ---- the front


def test_stream_grows_and_leaving_it_frees_everything(llm: LLM) -> None:
    expected = tokens(llm, [prompt(6)], greedy(10))[0]
    seen = [output.outputs[0].token_ids for output in llm.stream(prompt(6), greedy(10))]
    assert seen[-1] == expected
    assert all(a == b[: len(a)] for a, b in itertools.pairwise(seen))
    for output in llm.stream(prompt(6), greedy(100)):
        if len(output.outputs[0].token_ids) >= 3:
            break
    while llm.engine.has_unfinished:
        llm.engine.step()
    assert llm.engine.scheduler.pool.num_free == llm.engine.runner.num_pages - 1


def test_streams_and_generate_share_the_engine(llm: LLM) -> None:
    """Whoever steps the engine, everyone gets his own outputs: in turns, past one's end, and never read at all."""
    long, short = tokens(llm, [prompt(6), prompt(9, 1)], [greedy(20), greedy(4)])
    first, second = llm.stream(prompt(6), greedy(20)), llm.stream(prompt(9, 1), greedy(4))
    assert next(first).outputs[0].token_ids == long[:1]
    assert tokens(llm, [prompt(30, 2)], greedy(40))  # both streams end in here
    assert [o.outputs[0].token_ids for o in first][-1] == long
    assert [o.outputs[0].token_ids for o in second][-1] == short
    pairs = list(zip(llm.stream(prompt(6), greedy(4)), llm.stream(prompt(9, 1), greedy(4)), strict=False))
    assert pairs[-1][0].outputs[0].token_ids == long[:4]
    unread = llm.stream(prompt(6), greedy(20))
    unread_id = unread.request_id
    del unread
    assert not llm.engine.is_running(unread_id)
    assert not llm._latest


def test_only_who_streams_waits_for_tokens(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, schedule = set(), llm.engine.scheduler.schedule
    monkeypatch.setattr(llm.engine.scheduler, "schedule", lambda patient: seen.add(patient) or schedule(patient))
    tokens(llm, [prompt(40), prompt(50, 1)], greedy(3))
    assert seen == {True}
    seen.clear()
    stream = llm.stream(prompt(6), greedy(40))
    next(stream)
    tokens(llm, [prompt(7, 1)], greedy(3))  # beside it
    list(stream)
    assert seen == {False}


def test_an_id_used_again_gets_its_own_pages(llm: LLM) -> None:
    engine = llm.engine
    expected = tokens(llm, [prompt(20, 5)], greedy(12))[0]
    engine.submit(prompt(60, 6), greedy(30), "again")
    engine.submit(prompt(5), greedy(2), "other")
    for _ in range(6):
        engine.step()
    engine.abort("again")
    engine.submit(prompt(20, 5), greedy(12), "again")
    outputs = []
    while engine.has_unfinished:
        outputs += [o for o in engine.step() if o.request_id == "again"]
    assert outputs[-1].outputs[0].token_ids == expected


def test_ids_of_samples_and_requests_do_not_meet(llm: LLM) -> None:
    engine = llm.engine
    engine.submit(prompt(4), SamplingParams(n=2, seed=1, max_tokens=3, ignore_eos=True), "x")
    engine.submit(prompt(5), greedy(6), "x-0")
    with pytest.raises(ValueError, match="'x' is already running"):
        engine.submit(prompt(5), greedy(6), "x")
    ended = set()
    while engine.has_unfinished:
        ended |= {o.request_id for o in engine.step() if o.finished}
    assert ended == {"x", "x-0"}


def test_a_step_that_fails_ends_its_requests_and_no_others(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = llm.engine
    engine.submit(prompt(4), greedy(8), "victim")
    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "_run_prefill", lambda *_: 1 / 0)
        (output,) = engine.step()
    assert output.finished and output.error == "ZeroDivisionError: division by zero"
    assert output.outputs[0].finish_reason == "error"
    assert not engine.is_running("victim")
    assert engine.scheduler.pool.num_free == engine.runner.num_pages - 1
    assert len(tokens(llm, [prompt(4)], greedy(8))[0]) == 8


@pytest.mark.parametrize("where", ["dispatch", "read"])
def test_a_failure_that_takes_the_cache_costs_the_others_no_token(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    expected = tokens(llm, [prompt(40), prompt(9)], greedy(12))
    engine, outputs = llm.engine, {}
    engine.submit(prompt(40), greedy(12), "survivor")
    for _ in range(4):
        engine.step()
    engine.submit(prompt(9), greedy(12), "late")
    engine.submit([7, 8], greedy(12), "victim")
    while engine.scheduler.num_running < 3:
        engine.step()
    victims = [r for r in engine.scheduler.running if r.request_id == "victim"]

    def take_all(*_: Any) -> Any:
        jax.tree.map(lambda x: x.delete(), engine.runner.cache)
        raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")

    plan = Plan([], [], victims, 1, [])
    if where == "read":
        step = Step(plan)
        monkeypatch.setattr(step, "read", take_all)
        engine._in_flight.append(step)
        failed = engine._read() if len(engine._in_flight) == 1 else [o for _ in range(2) for o in engine._read()]
    else:
        monkeypatch.setattr(engine.scheduler, "schedule", lambda patient: plan)
        with monkeypatch.context() as patch:
            patch.setattr(engine.runner, "_run_decode", take_all)
            failed = engine.step()
        monkeypatch.undo()
    assert [(o.request_id, o.error) for o in failed if o.error] == [("victim", "RuntimeError: CUDA_ERROR_ILLEGAL_ADDRESS")]
    while engine.has_unfinished:
        outputs |= {output.request_id: output.outputs[0].token_ids for output in engine.step()}
    assert [outputs["survivor"], outputs["late"]] == expected
    assert engine.scheduler.pool.num_free == engine.runner.num_pages - 1


def test_an_engine_that_cannot_start_over_says_so(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = llm.engine
    engine.submit(prompt(4), greedy(8), "victim")
    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "run", lambda *_: 1 / 0)
        patch.setattr(type(engine.runner), "lost_state", True)
        patch.setattr(engine.runner, "reset", lambda: 1 / 0)
        with pytest.raises(EngineDeadError, match="division by zero"):
            engine.step()
    assert not engine.has_unfinished


def test_output_kinds(llm: LLM) -> None:
    params = SamplingParams(n=2, seed=3, max_tokens=9, logprobs=1, ignore_eos=True)
    whole, parts, last = llm.generate([prompt(5)], params, use_tqdm=False)[0], [], []
    for kind, seen in ((RequestOutputKind.DELTA, parts), (RequestOutputKind.FINAL_ONLY, last)):
        llm.engine.submit(prompt(5), dataclasses.replace(params, output_kind=kind), kind.name)
        while llm.engine.has_unfinished:
            seen += llm.engine.step()
    assert len(last) == 1 and last[0].outputs == whole.outputs
    assert len(parts) > 5
    for part in parts[1:]:
        parts[0].add(part)
    assert parts[0].outputs == whole.outputs and parts[0].finished


def shown_lengths(llm: LLM, count: int, prompts: tuple[int, ...] = (5, 7)) -> list[list[int]]:
    """How many tokens each output brings, of streams of `count` tokens that must be the right ones."""
    expected = tokens(llm, [prompt(n) for n in prompts], greedy(count))
    params = greedy(count, output_kind=RequestOutputKind.DELTA)
    parts: dict[str, list[list[int]]] = {llm.engine.submit(prompt(n), params): [] for n in prompts}
    while llm.engine.has_unfinished:
        for output in llm.engine.step():
            parts[output.request_id].append(output.outputs[0].token_ids)
    assert [list(itertools.chain(*shown)) for shown in parts.values()] == expected
    return [[len(part) for part in shown] for shown in parts.values()]


@pytest.mark.parametrize("late", [True, False])
def test_where_the_host_is_late_many_streams_get_a_few_tokens_at_a_time(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    monkeypatch.setattr(outputs_module, "MANY_OUTPUTS", 1)
    monkeypatch.setattr(Step, "is_done", late)
    llm.engine._turns.late_steps = 100.0 if late else 0.0
    first, second = shown_lengths(llm, 20)
    if late:  # by turns, so that each step has about as many outputs
        assert first[0] == second[0] == 1 and set(first[3:-1]) == set(second[3:-1]) == {4}
        assert list(itertools.accumulate(first))[3:-1] != list(itertools.accumulate(second))[3:-1]
    else:
        assert first == second == 20 * [1]


def test_tokens_wait_for_as_many_as_late_steps_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs_module, "LATE_STEPS", 3)
    monkeypatch.setattr(outputs_module, "ON_TIME_STEPS", 2)
    turns, many = Turns(), outputs_module.MANY_OUTPUTS + 1
    late = [turns.tokens_at_a_time(many, True) for _ in range(15)]
    assert late == [1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4, 4, 4, 4, 4]  # a hiccup of two steps holds nothing
    assert [turns.tokens_at_a_time(many - 1, late) for late in (True, False)] == [1, 1]
    on_time = [turns.tokens_at_a_time(many, False) for _ in range(30)]
    assert on_time == 6 * [4] + 6 * [3] + 6 * [2] + 12 * [1]


def test_no_token_waits_while_prompts_hold_up_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs_module, "MANY_OUTPUTS", 0)
    monkeypatch.setattr(Step, "is_done", True)
    engine = tiny_llm(max_num_seqs=16, long_prefill_token_threshold=0).engine
    engine._turns.late_steps = 100.0
    streams = [engine.submit([1, 2, 3 + i], greedy(100, output_kind=RequestOutputKind.DELTA)) for i in range(3)]
    for _ in range(14):
        engine.step()
    assert any(engine._groups[i].num_held for i in streams)
    for i in range(8):  # each fills a step
        engine.submit([5 + i] * 32, greedy(2))
    held_up = 0
    while engine.scheduler.num_waiting:
        engine.step()
        if not engine._in_flight[0].plan.decode:
            held_up += 1
            assert not any(engine._groups[i].num_held for i in streams)
    assert held_up >= 4


def test_samples_of_a_prompt_wait_for_the_one_with_most_tokens(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs_module, "MANY_OUTPUTS", 0)
    monkeypatch.setattr(Step, "is_done", True)
    llm.engine._turns.late_steps = 100.0
    params = SamplingParams(n=2, seed=1, max_tokens=9, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
    llm.engine.submit(prompt(40), params)
    shown = []
    while llm.engine.has_unfinished:
        shown += [[len(sample.token_ids) for sample in output.outputs] for output in llm.engine.step()]
    assert np.sum(shown, axis=0).tolist() == [9, 9] and np.max(shown) == outputs_module.MOST_HELD_TOKENS
    assert shown[0] == [1, 0]  # one of them begins, and is shown at once


def test_what_was_held_of_a_preempted_stream_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = tiny_llm(num_gpu_blocks_override=1 + 8)
    expected = tokens(llm, [prompt(20, n) for n in range(3)], greedy(60))
    monkeypatch.setattr(outputs_module, "MANY_OUTPUTS", 0)
    monkeypatch.setattr(Step, "is_done", True)
    llm.engine._turns.late_steps = 100.0
    params = greedy(60, output_kind=RequestOutputKind.DELTA)
    parts: dict[str, list[int]] = {llm.engine.submit(prompt(20, n), params): [] for n in range(3)}
    held, longest = dict.fromkeys(parts, 0), 0
    while llm.engine.has_unfinished:
        outputs = llm.engine.step()
        for output in outputs:
            parts[output.request_id] += output.outputs[0].token_ids
        for request_id, group in llm.engine._groups.items():
            held[request_id] = held[request_id] + 1 if group.shown and group.num_held else 0
        longest = max(longest, *held.values())
    assert llm.engine.scheduler.num_preemptions > 0
    assert list(parts.values()) == expected and longest <= outputs_module.MOST_HELD_TOKENS


def test_who_does_not_stream_makes_no_crowd(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs_module, "MANY_OUTPUTS", 1)
    monkeypatch.setattr(Step, "is_done", True)
    for n in range(3):
        llm.engine.submit(prompt(5, n), greedy(6, output_kind=RequestOutputKind.FINAL_ONLY))
    stream = llm.engine.submit(prompt(5), greedy(6, output_kind=RequestOutputKind.DELTA))
    outputs = []
    while llm.engine.has_unfinished:
        outputs += llm.engine.step()
    assert [len(o.outputs[0].token_ids) for o in outputs if o.request_id == stream] == 6 * [1]


def test_a_step_is_done_once_its_tokens_are_there(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, read = [], Step.read

    def watched(step: Step) -> list:
        jax.block_until_ready([output.token_B for output in (step.prefill, step.decode) if output is not None])
        seen.append(step.is_done)
        return read(step)

    monkeypatch.setattr(Step, "read", watched)
    tokens(llm, [prompt(40)], greedy(3))
    assert seen and all(seen)
    outputs = [SimpleNamespace(token_B=SimpleNamespace(is_ready=lambda ready=ready: ready)) for ready in (True, False)]
    done, coming = outputs
    plan = Plan([], [], [], 1, [])
    assert Step(plan, prefill=done).is_done and Step(plan, prefill=done, decode=done).is_done
    assert not Step(plan, decode=coming).is_done and not Step(plan, prefill=done, decode=coming).is_done


def test_a_lone_stream_gets_each_token_at_once(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs_module, "MANY_OUTPUTS", 1)
    monkeypatch.setattr(Step, "is_done", True)
    seen = [len(output.outputs[0].token_ids) for output in llm.stream(prompt(5), greedy(6))]
    assert seen == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("done", [False, True])
def test_the_device_works_while_prompts_are_taken_in(llm: LLM, monkeypatch: pytest.MonkeyPatch, done: bool) -> None:
    """Where it is done with a step, and the prompts that wait fill another."""
    steps, begun, submit, step = 0, [], llm.engine.submit, llm.engine.step

    def watched_submit(*args: Any) -> str:
        begun.append(steps)
        return submit(*args)

    def watched_step(patient: bool) -> list:
        nonlocal steps
        steps += 1
        assert patient
        return step(patient)

    prompts = [prompt(n, n) for n in (20, 40, 70, 33, 34)]  # a step takes 32 tokens of one prompt
    expected = [tokens(llm, [p], greedy(3))[0] for p in prompts]
    monkeypatch.setattr(llm.engine, "submit", watched_submit)
    monkeypatch.setattr(llm.engine, "step", watched_step)
    monkeypatch.setattr(Step, "is_done", done)
    assert tokens(llm, prompts[1:], greedy(3)) == expected[1:]
    assert begun == ([0, 1, 2, 3] if done else [0, 1, 1, 1])
    begun.clear()
    with pytest.raises(ValueError, match="is empty"):
        llm.generate([*prompts[1:3], []], greedy(3), use_tqdm=False)
    assert llm.engine.num_unfinished == 0 and len(begun) == 3
    assert tokens(llm, prompts, greedy(3)) == expected


def test_weights_and_cache_go_with_their_last_user() -> None:
    """At once, not when the collector comes by: nothing that holds them is part of a cycle."""
    gc.collect()
    gc.disable()
    try:
        before = sum(array.nbytes for array in jax.live_arrays())
        other = tiny_llm()
        tokens(other, [prompt(5)], greedy(3))
        runner = weakref.ref(other.engine.runner)
        assert sum(array.nbytes for array in jax.live_arrays()) > before + 500_000
        del other
        assert runner() is None and sum(array.nbytes for array in jax.live_arrays()) <= before
    finally:
        gc.enable()


def test_an_interrupt_waits_for_the_end_of_the_step(llm: LLM) -> None:
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    expected = tokens(llm, [prompt(6)], greedy(10))
    run = llm.engine.runner.run

    def interrupted(*plan: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return run(*plan)

    llm.engine.runner.run = interrupted  # type: ignore[method-assign]
    try:
        with pytest.raises(KeyboardInterrupt):
            tokens(llm, [prompt(6)], greedy(10))
    finally:
        llm.engine.runner.run = run  # type: ignore[method-assign]
        signal.signal(signal.SIGINT, handler)
    assert llm.engine.scheduler.pool.num_free == llm.engine.runner.num_pages - 1
    assert tokens(llm, [prompt(6)], greedy(10)) == expected


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([[]], "is empty"),
        ([[1] * 128], "has 128 tokens; with max_model_len=128 it can have at most 127"),
        ([[1, VOCAB]], r"\[512\] are outside the vocabulary: allowed are 0 to 511"),
        (["text"], "has no tokenizer"),
        ([{"prompt_tokens": [1]}], "'prompt' or 'prompt_token_ids'"),
        ([None], "a prompt is text, token ids or a dict of either, got None"),
        ([[1, 2.5]], "prompt token ids must be integers, got 2.5"),
        ([{"prompt_token_ids": 5}], "got 5"),
    ],
)
def test_bad_prompts_are_named_and_nothing_is_left_behind(llm: LLM, bad: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llm.generate([prompt(3), *bad], greedy(2), use_tqdm=False)
    while llm.engine.has_unfinished:
        llm.engine.step()
    assert llm.engine.scheduler.pool.num_free == llm.engine.runner.num_pages - 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tensor_parallel_size": 9}, "tensor_parallel_size=9, but there are 8 cpu devices"),
        ({"num_gpu_blocks_override": 5}, r"would have 5 pages .* needs 8 pages of 16 tokens x \d+ bytes"),
        ({"max_model_len": 100000}, "max_model_len=100000 is more than"),
        ({"quantization": "awq"}, "quantization"),
        ({"block_sizes": 3}, "block_sizes"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_llm(**settings)


def test_prompts_as_one_or_many() -> None:
    assert as_list("a") == ["a"]
    assert as_list([1, 2]) == [[1, 2]]
    assert as_list([[1], "a", {"prompt": "b"}]) == [[1], "a", {"prompt": "b"}]
    assert as_list(np.array([1, 2])) == [[1, 2]]
    assert as_list([np.array([1, 2])])[0].tolist() == [1, 2]


def test_sampling_params_must_match_the_prompts(llm: LLM) -> None:
    with pytest.raises(ValueError, match="sampling_params is a SamplingParams"):
        llm.generate([prompt(2)], {"temperature": 0}, use_tqdm=False)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="prompts are text"):
        llm.generate(3, use_tqdm=False)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="1 sampling_params for 2 prompts"):
        llm.generate([prompt(2), prompt(3)], [greedy(1)], use_tqdm=False)


def test_dtype_and_length_rules() -> None:
    assert resolve_dtype("auto", "bfloat16") == jnp.float32  # on CPU
    assert resolve_dtype("bfloat16", "float32") == jnp.bfloat16
    assert max_model_len(EngineConfig(model="x"), 77) == 77


def test_a_jax_program_and_an_event_loop_beside_it(llm: LLM) -> None:
    """As in a notebook: another loop runs, another jitted function was there first."""
    assert float(jax.jit(lambda x: x + 1)(1.0)) == 2.0

    async def cell() -> list[list[int]]:
        return tokens(llm, [prompt(4)], greedy(3))

    assert asyncio.run(cell()) == tokens(llm, [prompt(4)], greedy(3))


# ---- stop strings


class Letters:
    """A detokenizer of one letter a token."""

    def add(self, ids: list[int]) -> str:
        return "".join(chr(i) for i in ids)

    def flush(self) -> str:
        return ""


def test_what_a_stop_string_may_still_cut_is_not_shown() -> None:
    text = Text(Letters(), ["abcdef"], False)  # type: ignore[arg-type]
    shown = []
    for letter in "xabcdx":
        text.add([ord(letter)], False, check_stop=True)
        shown.append(text.shown(False))
    assert shown == ["", "", "", "", "", "x"]
    assert text.shown(True) == "xabcdx"


@pytest.mark.parametrize(("include", "expected"), [(False, "abc"), (True, "abcxyz")])
def test_stop_string_across_tokens(include: bool, expected: str) -> None:
    text, stopped, shown = Text(Letters(), ["xyz", "q"], include), None, []  # type: ignore[arg-type]
    for letter in "abcxyzw":
        stopped = text.add([ord(letter)], False, check_stop=True)
        shown.append(text.shown(stopped is not None))
        if stopped:
            break
    assert stopped == "xyz"
    assert text.text == expected
    assert shown == ["", "", "a", "ab", "abc", expected]


def test_the_earliest_stop_string_wins() -> None:
    text = Text(Letters(), ["d", "bc"], False)  # type: ignore[arg-type]
    assert text.add([ord(c) for c in "abcd"], False, check_stop=True) == "bc"
    assert text.text == "a"
