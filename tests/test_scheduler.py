"""The scheduler against a device that is only imagined: it samples a token a row and knows nothing else."""

import random
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.pages import PagePool
from jaxinfer.request import Plan, Request, SamplingParams
from jaxinfer.scheduler import Scheduler

EOS = 7


def scheduler(num_pages: int = 40, steps: int = 1, max_num_seqs: int = 4) -> Scheduler:
    return Scheduler(
        PagePool(num_pages),
        page_size=4,
        max_num_seqs=max_num_seqs,
        max_model_len=64,
        prefill_shapes=[(1, 4), (3, 4), (1, 16)],
        prompt_logprobs_tokens=4,
        steps=steps,
    )


def request(name: str, prompt: int, **params: object) -> Request:
    return Request(name, None, list(range(prompt)), SamplingParams(temperature=0.0, **params), eos_token_ids=frozenset({EOS}))


class Device:
    """Keeps what the slots of a real device would, and checks what plans assume of it."""

    def __init__(self, seed: int = 0):
        self.random = random.Random(seed)
        self.prefilled: dict[str, int] = {}
        self.sampled: dict[str, list[int]] = {}

    def run(self, plan: Plan) -> list[tuple[Request, list[int]]]:
        slots = [c.request.slot for c in plan.prefill] + [r.slot for r in plan.decode]
        assert len(set(slots)) == len(slots) and -1 not in slots
        results: list[tuple[Request, list[int]]] = []
        for r in plan.admitted:
            self.prefilled[r.request_id], self.sampled[r.request_id] = 0, []
        for chunk in plan.prefill:
            assert chunk.start == self.prefilled[chunk.request.request_id]
            self.prefilled[chunk.request.request_id] += chunk.length
            results.append((chunk.request, self.sample(chunk.request, 1) if chunk.last else []))
        for r in plan.decode:
            assert self.prefilled[r.request_id] == len(r.prompt_token_ids)
            results.append((r, self.sample(r, plan.steps)))
        return results

    def sample(self, r: Request, steps: int) -> list[int]:
        sampled, tokens = self.sampled[r.request_id], []
        for _ in range(steps):
            done = len(sampled) >= min(r.params.max_tokens or 64, 64 - len(r.prompt_token_ids)) or (
                EOS in sampled and not r.params.ignore_eos
            )
            tokens.append(-1 if done else self.random.choice([1, 2, 3, EOS]))
            sampled += [t for t in tokens[-1:] if t >= 0]
        return tokens


def drive(s: Scheduler, device: Device, late: int = 1, limit: int = 5000) -> None:
    in_flight: deque[list[tuple[Request, list[int]]]] = deque()
    for _ in range(limit):
        plan = s.schedule()
        if plan is not None:
            in_flight.append(device.run(plan))
        if in_flight and (plan is None or len(in_flight) > late):
            for r, tokens in in_flight.popleft():
                s.commit(r, tokens)
        if not s.has_unfinished and not in_flight:
            return
    raise AssertionError("it does not come to an end")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 30), st.booleans(), st.booleans()), min_size=1, max_size=12),
    st.integers(1, 4),
    st.integers(0, 2),
    st.integers(18, 40),
)
def test_everything_finishes_and_the_pool_is_full_again(
    wishes: list[tuple[int, int, bool, bool]], steps: int, late: int, num_pages: int
) -> None:
    s, device = scheduler(num_pages, steps), Device()
    requests = [
        request(str(i), p, max_tokens=m, ignore_eos=ignore, prompt_logprobs=0 if prompt else None)
        for i, (p, m, ignore, prompt) in enumerate(wishes)
    ]
    for r in requests:
        s.check(r)
        s.add(r)
    drive(s, device, late)
    assert s.pool.num_free == num_pages - 1
    assert not s.has_unfinished
    for r in requests:
        assert r.output_token_ids == device.sampled[r.request_id]
        wanted = min(r.params.max_tokens or 0, 64 - len(r.prompt_token_ids))
        if r.finish_reason == "length":
            assert len(r.output_token_ids) == wanted
        else:
            assert (r.finish_reason, r.output_token_ids[-1]) == ("stop", EOS)
            assert not r.params.ignore_eos


def test_no_step_is_planned_past_the_last_token() -> None:
    s, r = scheduler(), request("a", 3, max_tokens=3, ignore_eos=True)
    s.add(r)
    plans = [s.schedule() for _ in range(5)]  # nothing is committed in between
    assert [p is not None for p in plans] == [True, True, True, False, False]


def test_several_steps_only_when_nothing_waits_or_prefills() -> None:
    s = scheduler(steps=4, max_num_seqs=2)
    for name, prompt in (("a", 2), ("b", 20), ("c", 2)):
        s.add(request(name, prompt, max_tokens=30, ignore_eos=True))
    steps = []
    for _ in range(9):
        plan = s.schedule()
        assert plan is not None
        steps.append((len(plan.prefill), len(plan.decode), plan.steps, len(s.waiting)))
    assert [x[2] for x in steps] == [1] * 9  # "c" waits for a slot all along
    s.abort(s.waiting[0])
    plan = s.schedule()
    assert plan is not None and (len(plan.decode), plan.steps) == (2, 4)


def test_first_come_first_served_with_pages_as_the_limit() -> None:
    s = scheduler(num_pages=1 + 10)
    big, bigger, small = (request(n, 16, max_tokens=m) for n, m in (("a", 8), ("b", 16), ("c", 1)))
    for r in (big, bigger, small):
        s.add(r)
    plan = s.schedule()
    assert plan is not None and plan.admitted == [big]  # 6 pages; the next one needs 8, and nobody overtakes it
    s.abort(big)
    plan = s.schedule()
    assert plan is not None and plan.admitted == [bigger]


def test_prompt_pieces_share_a_program() -> None:
    s = scheduler()
    for name, prompt in (("a", 3), ("b", 20), ("c", 4), ("d", 2)):
        s.add(request(name, prompt))
    plan = s.schedule()
    assert plan is not None
    assert [(c.request.request_id, c.start, c.length, c.last) for c in plan.prefill] == [
        ("a", 0, 3, True),
        ("b", 0, 4, False),
        ("c", 0, 4, True),
    ]


def test_a_request_larger_than_the_pool_is_refused_with_the_arithmetic() -> None:
    s = scheduler(num_pages=5)
    with pytest.raises(ValueError, match=r"needs 5 pages of 4 tokens for up to 20 tokens, but the KV cache has 4"):
        s.check(request("a", 10, max_tokens=10))


def test_abort_frees_pages_at_once_and_late_tokens_are_dropped() -> None:
    s, r = scheduler(), request("a", 3, max_tokens=8)
    s.add(r)
    assert s.schedule() is not None
    r.finish("abort")
    s.abort(r)
    assert s.pool.num_free == 39
    assert s.commit(r, [1]) == 0
    assert r.output_token_ids == []
    waiting = request("b", 3)
    s.add(waiting)
    s.abort(waiting)
    assert not s.has_unfinished
