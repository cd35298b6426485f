"""The scheduler's rules one by one. Every step of these also passes the checks of `fake_device.Service`."""

import pytest
from fake_device import PAGE, Service, alone, request, scheduler

from jaxinfer.request import Plan, Request, StructuredOutputsParams
from jaxinfer.scheduler import PLAN_TOKENS, cheapest


def service(num_pages: int = 40, **settings: object) -> Service:
    return Service(scheduler(num_pages, **settings))


def step(s: Service, patient: bool = False) -> Plan:
    plan = s.step(patient)
    assert plan is not None
    return plan


def chunks(plan: Plan) -> list[tuple[str, int, int, bool]]:
    return [(c.request.request_id, c.start, c.length, c.last) for c in plan.prefill]


def names(requests: list[Request]) -> str:
    return "".join(r.request_id for r in requests)


# ---- phases, budget, steps


def test_no_step_is_planned_past_the_last_token() -> None:
    s, r = scheduler(), request("a", 3, max_tokens=3)
    s.add(r)
    assert [s.schedule() is not None for _ in range(5)] == [True, True, True, False, False]  # nothing is committed in between


def test_prompts_fill_the_budget_exactly_and_never_hold_decode_rows_back() -> None:
    s = service(max_num_batched_tokens=10)
    s.add(request("a", 3))
    assert chunks(step(s)) == [("a", 0, 3, True)]
    for name, prompt in (("b", 4), ("c", 13), ("d", 2)):
        s.add(request(name, [int(name, 16)] * prompt))
    plan = step(s)
    assert chunks(plan) == [("b", 0, 4, True), ("c", 0, 6, False)] and names(plan.decode) == "a"
    plan = step(s)
    assert chunks(plan) == [("c", 6, 7, True), ("d", 0, 2, True)] and names(plan.decode) == "ab"
    s.drain()


def test_a_plan_has_at_most_max_prefill_rows_chunks() -> None:
    s = service(max_prefill_rows=2)
    for name in "abc":
        s.add(request(name, 2))
    plan = step(s)
    assert names(plan.admitted) == "ab" and len(plan.prefill) == 2  # no slot for who gets no tokens
    assert names(step(s).admitted) == "c"


def test_a_long_prompt_goes_slowly_while_others_decode_and_a_queue_faster() -> None:
    s = service(max_num_batched_tokens=16, long_prefill_token_threshold=4)
    s.add(request("a", [1] * 20, max_tokens=5))
    assert chunks(step(s)) == [("a", 0, 16, False)]  # nobody decodes
    assert chunks(step(s)) == [("a", 16, 4, True)]
    s.add(request("b", [2] * 21, max_tokens=2))
    assert chunks(step(s)) == [("b", 0, 4, False)]  # a does
    s.add(request("c", [3] * 9, max_tokens=1))
    s.add(request("d", [4] * 9, max_tokens=1))
    assert chunks(step(s)) == [("b", 4, 8, False)]  # three pending: twice as fast
    s.add(request("e", [5] * 9, max_tokens=1))
    assert chunks(step(s)) == [("b", 12, 9, True), ("c", 0, 7, False)]
    s.drain()


@pytest.mark.parametrize(("decoding", "alone", "of_two"), [(1, 6, 16), (2, 6, 16), (3, 8, 16)])
def test_few_rows_that_decode_count_among_the_tokens_of_a_slowed_prompt(decoding: int, alone: int, of_two: int) -> None:
    s = service(
        max_num_batched_tokens=32,
        long_prefill_token_threshold=8,
        shared_prefill_sizes=(6,),
        shared_decode_rows=2,
        max_num_seqs=8,
        num_pages=100,
    )
    for i in range(decoding):
        s.add(request(f"r{i}", 2, max_tokens=9))
    step(s)
    s.add(request("long", 40, max_tokens=1))
    assert chunks(step(s)) == [("long", 0, alone, False)]
    s.add(request("next", 9, max_tokens=1))
    assert chunks(step(s)) == [("long", alone, of_two, False)]  # no program shares so many
    s.drain()


def test_prompts_are_cut_where_padding_costs_more_than_another_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = (256, 512, 1024, 2048, 4096)
    cuts = {1: 256, 384: 512, 600: 512, 1798: 2048, 2225: 2048, 3785: 4096, 5000: 5000}
    assert {tokens: cheapest(tokens, sizes)[1] for tokens in cuts} == cuts
    assert cheapest(3100, sizes) == (2048 + 1024 + 256 + 2 * PLAN_TOKENS, 2048)

    monkeypatch.setattr("jaxinfer.scheduler.cheapest", lambda tokens, sizes: (0, 16 if tokens > 16 else 32))
    settings = {"max_num_batched_tokens": 32, "shared_decode_rows": 1, "max_num_seqs": 40, "num_pages": 100}
    s = service(**settings, max_prefill_rows=8, prefill_sizes={16: 2, 32: 8})
    s.add(request("a", 21, max_tokens=9))
    assert [chunks(step(s)) for _ in range(2)] == [[("a", 0, 16, False)], [("a", 16, 5, True)]]
    s.add(request("b", [2] * 20, max_tokens=9))
    assert chunks(step(s)) == [("b", 0, 20, True)]  # a shares the program of such few tokens
    s.add(request("c", [3] * 20, max_tokens=1))
    assert chunks(step(s)) == [("c", 0, 16, False)]
    step(s)
    for i in range(4):
        s.add(request(str(i), [10 + i] * 6, max_tokens=1))
    assert [c[2] for c in chunks(step(s))] == [6, 6, 6, 6]  # a program of 16 takes two prompts, and 16 are three
    s.drain()


def test_a_burst_of_prompts_goes_before_decode_for_a_few_steps() -> None:
    s = service(max_num_batched_tokens=8, held_decode_steps=2, max_num_seqs=8, num_pages=100)
    s.add(request("a", [1] * 8, max_tokens=20))
    step(s)
    for name in "bcdef":
        s.add(request(name, [ord(name)] * 8, max_tokens=2))
    plans = [step(s) for _ in range(6)]
    assert [names(plan.decode) for plan in plans][:5] == ["", "", "abc", "", ""]
    assert [names([c.request for c in plan.prefill]) for plan in plans] == ["b", "c", "d", "e", "f", ""]
    assert "a" in names(plans[5].decode)
    s.drain()


def test_where_all_are_patient_a_burst_of_prompts_goes_first_however_long() -> None:
    s = service(max_num_batched_tokens=8, held_decode_steps=2, max_num_seqs=8, num_pages=100, long_prefill_token_threshold=2)
    s.add(request("a", [1] * 8, max_tokens=20))
    step(s)
    for name in "bcdef":
        s.add(request(name, [ord(name)] * 8, max_tokens=2))
    s.add(request("g", [9] * 3, max_tokens=2))
    plans = [step(s, patient=True) for _ in range(6)]
    assert [names(plan.decode) for plan in plans] == ["", "", "", "", "", "abcdef"]
    assert chunks(plans[5]) == [("g", 0, 3, True)]  # not a full plan: others decode beside it
    s.drain()


def test_patience_ends_where_prompts_find_no_room() -> None:
    s = service(max_num_batched_tokens=8, max_num_seqs=8, num_pages=1 + 6)  # of 4 tokens
    for name in "abc":
        s.add(request(name, [ord(name)] * 8, max_tokens=6))
    plans = [step(s, patient=True) for _ in range(4)]
    assert [names([c.request for c in plan.prefill]) for plan in plans][:2] == ["a", "b"]
    assert any(plan.decode for plan in plans)
    while s.scheduler.has_unfinished:
        s.step(patient=True)


def test_several_steps_only_when_nothing_waits_or_prefills_or_is_guided_or_lacks_pages() -> None:
    s = service(num_pages=1 + 17, steps=8, max_num_seqs=2)
    a, b, c = (s.add(request(name, [i] * 3, max_tokens=40)) for i, name in enumerate("abc"))
    assert [step(s).steps for _ in range(4)] == [1] * 4  # c waits for a slot
    s.end(c, "abort")
    plan = step(s)
    assert (names(plan.decode), plan.steps) == ("ab", 8)
    a.params.structured_outputs = StructuredOutputsParams(regex="a*")
    assert step(s).steps == 1
    a.params.structured_outputs = None
    assert [step(s).steps for _ in range(3)] == [8, 8, 1]  # 39 tokens each would need 20 pages, 32 need 16
    assert a.num_computed == b.num_computed == 32
    s.drain()


def test_prompt_logprobs_run_alone_and_take_turns_with_other_prompts() -> None:
    s = service(max_num_batched_tokens=6)
    s.add(request("p", 12, prompt_logprobs=0))
    s.add(request("q", 8, prompt_logprobs=0))
    s.add(request("a", 15))
    s.add(request("b", 2))
    # q does not start before p is through; it does not stand in the way of a and b either.
    assert [chunks(step(s)) for _ in range(8)] == [
        [("a", 0, 6, False)],
        [("p", 0, 4, False)],
        [("a", 6, 6, False)],
        [("p", 4, 4, False)],
        [("a", 12, 3, True), ("b", 0, 2, True)],
        [("p", 8, 4, True)],
        [("q", 0, 4, False)],
        [("q", 4, 4, True)],
    ]
    s.drain()


# ---- pages and preemption


def test_pages_grow_with_the_sequence() -> None:
    s = service(max_num_batched_tokens=6)
    r = s.add(request("a", 10, max_tokens=8))
    held = []
    while s.scheduler.has_unfinished:
        s.step()
        held.append(len(r.pages))
    assert held[:2] == [2, 3]  # of tokens 0 … 5, of 0 … 9
    assert max(held) == 5  # the 18th token is sampled and never written


@pytest.mark.parametrize(("num_pages", "last"), [(1 + 5, 3), (1 + 3, 2)])
def test_a_page_comes_a_step_before_it_is_needed_where_there_are_plenty(num_pages: int, last: int) -> None:
    s = service(num_pages)
    r = s.add(request("a", PAGE - 1, max_tokens=2 * PAGE))
    held = {}
    while s.scheduler.has_unfinished:
        s.step()
        held[r.num_computed] = len(r.pages)
    assert (held[PAGE], held[2 * PAGE]) == (2, last)


def test_pages_taken_ahead_cost_no_other_row_of_the_plan_its_own() -> None:
    s = service(1 + 12, steps=2 * PAGE, max_num_batched_tokens=16, max_prefill_rows=4)
    for name in "abcd":
        s.add(request(name, [ord(name)] * 4, max_tokens=17))
    assert names(step(s).admitted) == "abcd"
    plan = step(s)  # eight pages are free, two for each
    assert (names(plan.decode), plan.steps, plan.preempted) == ("abcd", 2 * PAGE, [])
    s.drain()


def test_the_lowest_ranked_gives_its_pages_and_goes_on_with_the_same_tokens() -> None:
    s = service(num_pages=1 + 8)
    a, b = (s.add(request(name, [i] * 8, max_tokens=20)) for i, name in enumerate("ab"))
    while not b.num_preemptions:
        plan = step(s)
    assert names(plan.preempted) == "b" and names(plan.decode) == "a"
    assert (b.slot, b.pages, s.scheduler.waiting) == (-1, [], [b])
    # A token of b was in flight while it was preempted: the commit that followed found it waiting.
    assert len(b.output_token_ids) == b.num_planned_outputs
    before = list(b.output_token_ids)
    late = s.add(request("c", [7] * 4, max_tokens=1))
    while b.slot < 0:
        assert late.slot < 0, "nobody overtakes b"
        plan = s.step() or plan
    assert plan.admitted[0] is b and b.num_to_prefill == 8 + len(before)
    s.drain()
    assert b.output_token_ids[: len(before)] == before and b.output_token_ids == alone(b)
    assert s.scheduler.num_preemptions == a.num_preemptions + b.num_preemptions == b.num_preemptions


def test_rows_that_decode_come_longest_first() -> None:
    s = service(max_num_seqs=4)
    for name, length in zip("abcd", (2, 9, 4, 9), strict=True):
        s.add(request(name, length, max_tokens=6))
    assert names([step(s) for _ in range(5)][-1].decode) == "bdca"
    s.drain()


def test_a_preempted_request_may_finish_while_it_waits() -> None:
    s = service(num_pages=1 + 6)
    s.add(request("a", [1] * 8, max_tokens=9))
    b = s.add(request("b", [2] * 7, max_tokens=5))
    plans = [step(s) for _ in range(6)]
    assert names(plans[4].decode) == "ab" and names(plans[5].preempted) == "b"
    assert b.finish_reason == "length" and s.scheduler.waiting == []
    s.drain()


def test_one_that_is_ranked_lowest_preempts_itself() -> None:
    s = service(num_pages=1 + 6)
    s.add(request("a", [1] * 5, max_tokens=8))
    s.add(request("b", [2] * 8, max_tokens=12))
    assert names([step(s) for _ in range(5)][-1].decode) == "ba"  # a took the last free page
    plan = step(s)
    assert names(plan.preempted) == "b" and names(plan.decode) == "a"
    s.drain()


@pytest.mark.parametrize("prompt", range(4, 13))
def test_where_a_row_preempts_itself_the_step_still_has_something_to_do(prompt: int) -> None:
    s = Service(scheduler(num_pages=1 + 10, prompt_logprobs_tokens=1), late=0)
    s.add(request("p", 20, prompt_logprobs=0))  # not its turn, for half of the prompts
    d = s.add(request("d", [1] * prompt, max_tokens=36 - prompt))
    s.drain()  # a step without a plan would fail
    assert d.num_preemptions


def test_admission_leaves_a_page_for_each_that_runs() -> None:
    s = service(num_pages=1 + 6)
    s.add(request("a", [1] * 8, max_tokens=8))
    b = s.add(request("b", [2] * 16, max_tokens=1))
    assert names(step(s).admitted) == "a" and s.scheduler.pool.num_free == 4  # b's own, but not one for a as well
    s.drain()
    assert b.num_preemptions == 0


@pytest.mark.parametrize(("max_tokens", "admitted"), [(1, "abc"), (2, "a")])
def test_admission_leaves_no_page_for_those_that_have_all_they_will_need(max_tokens: int, admitted: str) -> None:
    s = service(num_pages=1 + 3)
    for name in "abc":  # a page each, and nothing is kept of the last token
        s.add(request(name, [int(name, 16)] * PAGE, max_tokens=max_tokens))
    assert names(step(s).admitted) == admitted
    s.drain()
    assert s.scheduler.num_preemptions == 0


def test_admission_leaves_no_page_for_one_that_has_grown_as_far_as_it_can() -> None:
    s = service(num_pages=1 + 3)
    a = s.add(request("a", 2, max_tokens=7))  # eight tokens are kept: two pages
    while len(a.pages) < 2:
        step(s)
    s.add(request("b", [1] * PAGE, max_tokens=1))
    plan = step(s)
    assert names(plan.admitted) == "b" and names(plan.decode) == "a"
    s.drain()


def test_a_burst_holds_decode_where_its_prompts_find_the_pages_that_decode_will_not_need() -> None:
    s = service(num_pages=1 + 3, max_num_batched_tokens=8)
    s.add(request("a", 2, max_tokens=3))  # one page, for good
    assert names(step(s).admitted) == "a"
    for name in "bc":
        s.add(request(name, [int(name, 16)] * PAGE, max_tokens=1))
    plan = step(s, patient=True)
    assert names(plan.admitted) == "bc" and not plan.decode
    s.drain()


def test_prompts_in_the_middle_of_their_prefill_will_find_their_pages() -> None:
    s = service(num_pages=1 + 14, long_prefill_token_threshold=4)
    s.add(request("a", [1] * 4, max_tokens=20))
    step(s)
    s.add(request("b", [2] * 40, max_tokens=1))  # four tokens a step for each that is pending
    c = s.add(request("c", [3] * 16, max_tokens=24))
    assert names(step(s).admitted) == "b" and s.scheduler.pool.num_free == 10
    s.drain()
    assert c.num_preemptions == s.scheduler.num_preemptions == 0


def test_a_stream_of_arrivals_starves_nobody() -> None:
    s = service(num_pages=1 + 12, max_num_seqs=3)
    r = s.add(request("long", [9] * 20, max_tokens=20))
    for i in range(60):
        s.add(request(str(i), [i] * 12, max_tokens=4))
        s.step()
    assert r.finished and r.num_preemptions == 0
    s.drain()


def test_a_request_larger_than_the_pool_is_refused_with_the_arithmetic() -> None:
    with pytest.raises(ValueError, match=r"needs 5 pages of 4 tokens for up to 20 tokens, but the KV cache has 4"):
        scheduler(num_pages=5).check(request("a", 10, max_tokens=10))


# ---- order


@pytest.mark.parametrize(("policy", "order"), [("fcfs", "abcd"), ("priority", "cbda")])
def test_priority_orders_who_waits_and_counts_only_where_asked(policy: str, order: str) -> None:
    s = service(max_num_seqs=1, policy=policy)
    for name, priority in (("a", 2), ("b", 0), ("c", -1), ("d", 0)):
        s.add(request(name, 2, priority=priority, max_tokens=2))
    admitted = ""
    while s.scheduler.has_unfinished:
        plan = s.step()
        admitted += names(plan.admitted) if plan else ""
    assert admitted == order


def test_the_lower_priority_is_preempted_though_it_came_first() -> None:
    s = service(num_pages=1 + 8, policy="priority")
    a = s.add(request("a", [1] * 8, priority=1, max_tokens=20))
    step(s)
    b = s.add(request("b", [2] * 8, priority=0, max_tokens=20))
    s.drain()
    assert a.num_preemptions > 0 and b.num_preemptions == 0
    with pytest.raises(ValueError, match="'lifo'; allowed are fcfs and priority"):
        scheduler(policy="lifo")


# ---- prefix caching


def test_a_prefix_is_found_once_its_step_is_committed_and_the_last_token_is_always_computed() -> None:
    s = service()
    a = s.add(request("a", 12, max_tokens=9))
    first = step(s)
    twin = s.add(request("b", 12, max_tokens=1))
    assert chunks(step(s)) == [("b", 0, 12, True)]  # a's step was not read when this one was planned
    c = s.add(request("c", 12, max_tokens=1))
    d = s.add(request("d", [*range(8), 99], max_tokens=1))
    assert chunks(step(s)) == [("c", 8, 4, True), ("d", 8, 1, True)]
    assert c.pages == [] or c.pages[:2] == a.pages[:2]
    assert [r.num_cached_tokens for r in (a, twin, c, d)] == [0, 0, 8, 8]
    assert (s.scheduler.prefix_queries, s.scheduler.prefix_hits) == (12 + 12 + 12 + 9, 16)
    s.drain()
    assert first.admitted == [a]
    # Outputs are found too: a conversation's next turn.
    e = s.add(request("e", [*a.prompt_token_ids, *a.output_token_ids, 5], max_tokens=1))
    assert chunks(step(s)) == [("e", 20, 2, True)] and e.num_cached_tokens == 20
    s.drain()


def test_only_what_a_finished_step_wrote_can_be_found() -> None:
    s = scheduler(max_num_batched_tokens=4)
    a = request("a", 8, max_tokens=4)
    s.add(a)
    assert s.schedule() and s.schedule()
    s.commit(a, (), 4)
    assert s.pool.num_registered == 1
    s.commit(a, [1], 8)
    for token in (2, 3, 4):
        assert s.schedule()
        s.commit(a, [token])
    assert a.finished and s.pool.num_registered == 2  # the twelfth token was sampled and never written


def test_shared_pages_are_not_counted_twice() -> None:
    s = service(num_pages=1 + 8, max_num_batched_tokens=64)
    s.add(request("a", 20, max_tokens=4))
    step(s), step(s)
    b = s.add(request("b", 20, max_tokens=1))  # a copy would need 5 pages and one more, 2 are free
    assert names(step(s).admitted) == "b" and b.num_cached_tokens == 16
    s.drain()


def test_hits_are_not_sought_for_prompt_logprobs_or_where_caching_is_off() -> None:
    for settings, params in (({}, {"prompt_logprobs": 0}), ({"enable_prefix_caching": False}, {})):
        s = service(prompt_logprobs_tokens=12, **settings)
        for name in "ab":
            r = s.add(request(name, 12, max_tokens=2, **params))
            s.drain()
            assert r.num_cached_tokens == s.scheduler.prefix_queries == s.scheduler.prefix_hits == 0


def test_what_was_used_last_is_forgotten_last_and_tails_before_heads() -> None:
    s = service(num_pages=1 + 8, max_num_batched_tokens=64)
    for name, token in (("a", 1), ("b", 2), ("c", 1)):  # c uses a's pages again
        s.add(request(name, [token] * 13, max_tokens=1))
        s.drain()
    s.add(request("x", [3] * 20, max_tokens=1))  # takes the two pages that were never full, then three of b's
    s.drain()
    a, b = (s.add(request(name, [token] * 13, max_tokens=1)) for name, token in (("a2", 1), ("b2", 2)))
    s.drain()
    assert (a.num_cached_tokens, b.num_cached_tokens) == (12, 0)


def test_a_preempted_request_finds_its_own_pages() -> None:
    s = service(num_pages=1 + 9)
    s.add(request("a", [1] * 8, max_tokens=20))
    b = s.add(request("b", [2] * 12, max_tokens=12))
    starts = []
    while s.scheduler.has_unfinished:
        plan = s.step()
        starts += [c.start for c in plan.prefill if c.request is b and c.last] if plan else []
    assert b.num_preemptions and starts[-1] >= PAGE and b.num_cached_tokens == 0


# ---- the host's doing


def test_abort_frees_pages_at_once_and_late_tokens_are_dropped() -> None:
    s, r, waiting = scheduler(max_num_seqs=1), request("a", 3), request("b", 3)
    s.add(r)
    s.add(waiting)
    assert s.schedule() is not None
    r.finish("abort")
    s.abort(r)
    assert s.pool.num_free == 39 and s.num_running == 0
    assert s.commit(r, [1], 3) == 0 and r.output_token_ids == []
    s.abort(waiting)
    assert not s.has_unfinished
    for unknown in (r, waiting, request("c", 3)):
        s.abort(unknown)


def test_what_a_failed_request_computed_is_not_used_again() -> None:
    s = service()
    a = s.add(request("a", 12))
    for _ in range(3):
        step(s)
    s.end(a, "error")
    b = s.add(request("b", 12))
    assert chunks(step(s)) == [("b", 0, 12, True)] and b.num_cached_tokens == 0
    s.drain()


def test_after_the_device_failed_all_start_again_in_their_order() -> None:
    s = service(max_num_seqs=3)
    a, b, c, d = (s.add(request(name, [i] * 12, max_tokens=9)) for i, name in enumerate("abcd"))
    for _ in range(4):
        step(s)
    s.fail()
    assert s.scheduler.waiting == [a, b, c, d] and s.scheduler.running == {}
    assert chunks(step(s))[0] == ("a", 0, 12 + len(a.output_token_ids), True)
    s.drain()
