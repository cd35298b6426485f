"""Any sequence of events leaves the scheduler with all its pages and every request with the tokens it has alone.

`fake_device.Service` checks at each step: pages conserved, limits kept, no page with two owners written to, and attention
reading each row's own tokens.
"""

import random

import pytest
from fake_device import MAX_MODEL_LEN, Service, request, scheduler
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from jaxinfer.request import Request

FAMILIES = [[11, 12, 13, 14], [11, 12, 13, 14, 21, 22, 23, 24], [31, 32, 33]]


def prompt(family: int, length: int, last: int) -> list[int]:
    """Prompts of a family share what they can."""
    start = FAMILIES[family]
    return [*(start + list(range(100, 100 + MAX_MODEL_LEN)))[: length - 1], last]


def next_turn(r: Request) -> list[int]:
    return [*r.token_ids, 1][-MAX_MODEL_LEN + 1 :]


class Machine(RuleBasedStateMachine):
    @initialize(
        num_pages=st.integers(17, 40),
        late=st.integers(0, 2),
        steps=st.integers(1, 3),
        max_num_seqs=st.integers(1, 6),
        max_num_batched_tokens=st.integers(1, 40),
        max_prefill_rows=st.integers(1, 4),
        prompt_logprobs_tokens=st.integers(1, 8),
        long_prefill_token_threshold=st.sampled_from([0, 0, 1, 3, 8]),
        shared_prefill_sizes=st.sampled_from([(), (1, 6), (6, 14)]),
        shared_decode_rows=st.sampled_from([0, 2]),
        prefill_sizes=st.sampled_from([{}, {2: 1, 8: 4}, {1: 1, 4: 2, 16: 3}]),
        held_decode_steps=st.sampled_from([0, 1, 4]),
        enable_prefix_caching=st.booleans(),
        policy=st.sampled_from(["fcfs", "priority"]),
    )
    def start(self, num_pages: int, late: int, **chosen: object) -> None:
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr("jaxinfer.scheduler.PLAN_TOKENS", 1)  # or prompts as short as these would never be cut
        self.service = Service(scheduler(num_pages, **chosen), late)
        self.count = 0

    @rule(
        family=st.integers(0, 2),
        length=st.integers(1, 40),
        last=st.integers(0, 2),
        max_tokens=st.one_of(st.integers(1, 30), st.none()),
        ignore_eos=st.booleans(),
        logprobs=st.sampled_from([None, None, None, 0]),
        priority=st.integers(0, 2),
    )
    def add(self, family: int, length: int, last: int, logprobs: int | None, priority: int, **params: object) -> None:
        name, self.count = str(self.count), self.count + 1
        self.service.add(request(name, prompt(family, length, last), priority, prompt_logprobs=logprobs, **params))

    @precondition(lambda self: self.service.finished)
    @rule(which=st.integers(0, 3), priority=st.integers(0, 2), max_tokens=st.integers(1, 9))
    def go_on(self, which: int, priority: int, max_tokens: int) -> None:
        """A conversation's next turn."""
        name, self.count = str(self.count), self.count + 1
        self.service.add(request(name, next_turn(self.service.finished[-1 - which :][0]), priority, max_tokens=max_tokens))

    @rule(times=st.integers(1, 8), patient=st.booleans())
    def step(self, times: int, patient: bool) -> None:
        for _ in range(times):
            self.service.step(patient)

    @precondition(lambda self: self.service.requests)
    @rule(which=st.integers(0, 99), reason=st.sampled_from(["abort", "stop", "error"]))
    def end(self, which: int, reason: str) -> None:
        requests = self.service.requests
        self.service.end(requests[which % len(requests)], reason)
        self.service.check_pages()

    @rule()
    def fail(self) -> None:
        self.service.fail()

    @rule()
    def reset_prefix_cache(self) -> None:
        self.service.scheduler.reset_prefix_cache()

    def teardown(self) -> None:
        if hasattr(self, "service"):
            self.service.drain()
        if hasattr(self, "patch"):
            self.patch.undo()


Machine.TestCase.settings = settings(
    max_examples=200,
    stateful_step_count=50,
    deadline=None,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow],
)
test_machine = Machine.TestCase


def test_100_000_operations_leave_the_pool_full() -> None:
    rng = random.Random(0)
    service = Service(
        scheduler(24, max_num_seqs=6, steps=2, long_prefill_token_threshold=6, policy="priority", max_num_batched_tokens=24)
    )
    s, added = service.scheduler, 0
    for i in range(100_000):
        x = rng.random()
        if x < 0.15 and s.num_waiting < 8:
            r: Request = request(
                str(i),
                next_turn(service.finished.pop())
                if service.finished and rng.random() < 0.3
                else prompt(rng.randrange(3), rng.randint(1, 40), rng.randrange(3)),
                priority=rng.randrange(2),
                max_tokens=rng.randint(1, 30),
                ignore_eos=rng.random() < 0.5,
                prompt_logprobs=0 if rng.random() < 0.05 else None,
            )
            service.add(r)
            added += 1
        elif x < 0.17 and service.requests:
            service.end(rng.choice(service.requests), rng.choice(["abort", "stop", "error"]))
        elif x < 0.1705:
            service.fail()
        else:
            service.step(patient=rng.random() < 0.3)
    service.drain()
    assert added > 5_000 and s.num_preemptions > 1_000 and s.prefix_hits > 10_000  # all of it happened
