"""An engine without a model: a real scheduler, and a device that is only imagined.

What the device keeps at a position of a page stands for keys and values: a number made of the token there and of the number
at the position before, as it was read. So it stands for all tokens up to it, and a wrong page anywhere shows.
A sampled token is made of that number and the request's seed.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

from jaxinfer.pages import PagePool
from jaxinfer.request import Plan, Request, SamplingParams
from jaxinfer.scheduler import Scheduler

PAGE = 4
MAX_MODEL_LEN = 64
VOCAB, EOS = 11, 7
POISON = -1


def scheduler(num_pages: int = 40, **settings: object) -> Scheduler:
    defaults: dict = dict(max_num_seqs=4, max_num_batched_tokens=16, max_prefill_rows=3, prompt_logprobs_tokens=4)
    return Scheduler(PagePool(num_pages), page_size=PAGE, max_model_len=MAX_MODEL_LEN, **{**defaults, **settings})


def request(name: str, prompt: int | list[int], priority: int = 0, **params: object) -> Request:
    ids = list(range(prompt)) if isinstance(prompt, int) else prompt
    settings = SamplingParams(temperature=0.0, **{"ignore_eos": True, "max_tokens": 8, "seed": 0, **params})
    return Request(name, None, ids, settings, eos_token_ids=frozenset({EOS}), priority=priority)


def key(before: int, token: int) -> int:
    return hash((before, token))


def keys(token_ids: list[int]) -> list[int]:
    """What the cache holds at each position of a sequence."""
    made, last = [], 0
    for token in token_ids:
        last = key(last, token)
        made.append(last)
    return made


def sample(r: Request, last: int) -> int:
    return hash((r.params.seed, last)) % VOCAB


def alone(r: Request) -> list[int]:
    """The outputs of a request that nothing disturbs."""
    outputs: list[int] = []
    last = keys(r.prompt_token_ids)[-1]
    while not over(r, outputs):
        outputs.append(sample(r, last))
        last = key(last, outputs[-1])
    return outputs


def over(r: Request, outputs: list[int]) -> bool:
    return len(outputs) >= r.max_outputs(MAX_MODEL_LEN) or (not r.params.ignore_eos and outputs[-1:] == [EOS])


@dataclass
class Slot:
    """A sequence as the device knows it: its tokens, what the cache must hold for them, how many it has written."""

    request: Request
    tokens: list[int]
    expected: list[int]
    computed: int | None = None


@dataclass
class Service:
    """Steps a scheduler the way the engine does: step i + `late` is dispatched before step i is read."""

    scheduler: Scheduler
    late: int = 1
    in_flight: deque[list[tuple[Request, list[int], int]]] = field(default_factory=deque)
    slots: dict[int, Slot] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)  # not yet finished
    finished: list[Request] = field(default_factory=list)  # by themselves

    def __post_init__(self) -> None:
        self.pages = [[0] * PAGE for _ in range(self.scheduler.pool.num_pages)]

    def add(self, r: Request) -> Request:
        self.scheduler.check(r)
        self.scheduler.add(r)
        self.requests.append(r)
        return r

    def end(self, r: Request, reason: str) -> None:
        """Ended by the host: a client that left, a stop string, an error."""
        if reason == "error":  # what it alone holds is not to be trusted
            held = Counter(page for other in self.scheduler.running for page in other.pages)
            for page in r.pages:
                if held[page] == 1:
                    self.pages[page] = [POISON] * PAGE
        r.finish(reason)
        self.scheduler.abort(r)
        assert r.pages == [] and r.slot == -1 and r not in self.scheduler.running and r not in self.scheduler.waiting
        self.requests.remove(r)
        outputs = alone(r)
        assert outputs[: len(r.output_token_ids)] == r.output_token_ids

    def fail(self) -> None:
        """The device forgets everything."""
        self.in_flight.clear()
        self.slots.clear()
        self.pages = [[POISON] * PAGE for _ in self.pages]
        self.scheduler.preempt_all()
        assert self.scheduler.pool.num_free == self.scheduler.pool.num_pages - 1

    def step(self, patient: bool = False) -> Plan | None:
        self.patient = patient
        plan = self.scheduler.schedule(patient)
        if plan is not None:
            self.in_flight.append(self.dispatch(plan))
        elif not self.in_flight:
            assert not self.scheduler.has_unfinished, "nothing to do, and yet not done"
        if self.in_flight and (plan is None or len(self.in_flight) > self.late):
            for r, tokens, prefilled in self.in_flight.popleft():
                before = len(r.output_token_ids)
                taken = self.scheduler.commit(r, tokens, prefilled)
                assert r.output_token_ids[before:] == tokens[:taken]
                if taken and r.finished:
                    self.requests.remove(r)
                    self.finished.append(r)
                    assert r.output_token_ids == alone(r)
                    assert r.slot == -1 and r not in self.scheduler.waiting
        self.check_pages()
        return plan

    def drain(self) -> None:
        """Step until all is done. At worst each second step gives the first-ranked request a token, and no other one."""
        for _ in range(20 + 2 * sum(r.max_length(MAX_MODEL_LEN) for r in self.requests)):
            if not self.scheduler.has_unfinished and not self.in_flight:
                assert self.requests == []
                assert self.scheduler.pool.num_free == self.scheduler.pool.num_pages - 1
                return
            self.step()
        raise AssertionError(f"starved: {[r.request_id for r in self.requests]}")

    def check_pages(self) -> Counter[int]:
        """Pages are conserved; how many hold each is returned."""
        pool, holders = self.scheduler.pool, Counter(page for r in self.scheduler.running for page in r.pages)
        assert pool.num_free + len(holders) == pool.num_pages - 1
        assert holders[0] == 0
        assert self.scheduler.num_waiting + self.scheduler.num_running == len(self.requests)
        return holders

    # ---- the device

    def dispatch(self, plan: Plan) -> list[tuple[Request, list[int], int]]:
        self.check_limits(plan)
        holders = self.check_pages()
        for r in plan.admitted:
            self.slots[r.slot] = Slot(r, r.token_ids, keys(r.token_ids))
        results: list[tuple[Request, list[int], int]] = []
        for chunk in plan.prefill:
            r, slot = chunk.request, self.slots[chunk.request.slot]
            assert slot.request is r
            if slot.computed is None:  # what stands before is a prefix hit: whole pages, and not all of it
                assert chunk.start % PAGE == 0 and chunk.start < len(slot.tokens)
                slot.computed = chunk.start
            assert chunk.start == slot.computed
            assert chunk.last == (chunk.start + chunk.length == len(slot.tokens))
            self.write(slot, r.token_id_slice(chunk.start, chunk.start + chunk.length), r.pages, holders)
            results.append((r, [self.sample(slot)] if chunk.last else [], slot.computed))
        for r in plan.decode:
            slot, tokens = self.slots[r.slot], []
            assert slot.request is r
            for _ in range(plan.steps):
                if over(r, slot.tokens[len(r.prompt_token_ids) :]):
                    tokens.append(-1)
                else:
                    self.write(slot, slot.tokens[-1:], r.pages, holders)
                    tokens.append(self.sample(slot))
            results.append((r, tokens, 0))
        return results

    def write(self, slot: Slot, tokens: list[int], pages: list[int], holders: Counter[int]) -> None:
        assert slot.computed is not None
        assert slot.computed + len(tokens) <= len(slot.tokens)
        for token in tokens:
            at, before = slot.computed, slot.computed - 1
            assert holders[pages[at // PAGE]] == 1, "it writes to a page that another request holds too"
            last = self.pages[pages[before // PAGE]][before % PAGE] if at else 0
            self.pages[pages[at // PAGE]][at % PAGE] = key(last, token)
            slot.computed += 1
        read: list[int] = []
        for page in pages:
            read += self.pages[page]
        assert read[: slot.computed] == slot.expected[: slot.computed], "attention reads what is not its own"

    def sample(self, slot: Slot) -> int:
        assert slot.computed == len(slot.tokens)
        token = sample(slot.request, slot.expected[-1])
        slot.tokens.append(token)
        slot.expected.append(key(slot.expected[-1], token))
        return token

    def check_limits(self, plan: Plan) -> None:
        s, chunks = self.scheduler, plan.prefill
        in_plan = [chunk.request for chunk in chunks] + plan.decode
        assert len(set(in_plan)) == len(in_plan)
        assert not set(plan.preempted) & {*in_plan, *plan.admitted}
        slots = [r.slot for r in s.running]
        assert len(set(slots)) == len(slots) and -1 not in slots and {r.slot for r in in_plan} <= set(slots)
        assert all(chunk.length > 0 for chunk in chunks)
        assert sum(chunk.length for chunk in chunks) <= s.max_num_batched_tokens
        assert len(chunks) <= s.max_prefill_rows
        if any(chunk.request.params.prompt_logprobs is not None for chunk in chunks):
            assert len(chunks) == 1 and chunks[0].length <= s.prompt_logprobs_tokens
        if plan.decode and s.long_prefill_token_threshold and not self.patient:
            pending = len(chunks) + len(s.waiting) + len(s.running)  # at the most
            assert sum(chunk.length for chunk in chunks) <= s.long_prefill_token_threshold * pending
        if plan.steps > 1:
            assert not chunks and not s.waiting
