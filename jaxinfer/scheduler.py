"""Which requests run in the next step: pure bookkeeping over slots, pages and token counts, no jax.

A plan is made one step ahead of what is known: while the device runs step i, the host plans step i + 1 and then reads the
tokens of step i. So plans count tokens and never look at them. The device finishes a row by itself (stop ids, length);
the host learns of it at `commit` and drops the row from later plans.

Pages are taken as a sequence grows. When they run out, the lowest-ranked running request is preempted: it gives back slot
and pages, waits at its rank, and later prefills its prompt and outputs again (vLLM's preemption by recomputation). A token
of it may still be in flight then; its commit finds the request waiting. Freed pages may be handed out at once, since steps
run in order on the device.

Full pages are registered under a digest of their tokens and all tokens before them (vLLM's automatic prefix caching), once
a finished step has written them. A request starts from the longest run of such pages; its last token is always computed.
"""

from __future__ import annotations

import functools
import itertools
import time
from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence

from jaxinfer.pages import PagePool, page_digest
from jaxinfer.request import Chunk, Plan, Request

POLICIES = ("fcfs", "priority")
PLAN_TOKENS = 128  # one more plan is about as much work as so many tokens of a prompt


class Scheduler:
    """Slots and pages for requests.

    Requests are ranked by arrival, under policy "priority" first by their priority (smaller runs first). Running ones
    are served in that order, waiting ones admitted in that order.

    Args:
        pool: the pages of the KV cache.
        page_size: tokens a page.
        max_num_seqs: slots.
        max_model_len: the longest sequence, in tokens.
        max_num_batched_tokens: the most tokens that the chunks of a plan have together. Decode rows do not count.
        max_prefill_rows: the most chunks of a plan.
        prefill_sizes: how many tokens a plan's prefill is padded to, in ascending order, and how many chunks such a plan has
            at most. The last of a burst of prompts is cut where several plans are less work.
        prompt_logprobs_tokens: tokens a chunk of a request that asks for prompt_logprobs; such a chunk is alone in its
            plan's prefill, takes no prefix hit, and gives way to other requests' chunks every other plan.
        steps: decode steps a plan when nothing waits or prefills and no output is guided; otherwise one.
        long_prefill_token_threshold: tokens a plan for each pending prompt, while other requests decode; 0: no limit.
        shared_prefill_sizes, shared_decode_rows: the sizes of programs in which so many rows decode beside the prompts; where
            that many are enough, the rows count among these tokens.
        held_decode_steps: how many plans in a row may leave out the rows that decode, while a burst of prompts fills them.
        enable_prefix_caching: start requests from pages that already hold their first tokens.
        policy: "fcfs" or "priority".

    Attributes:
        num_preemptions: so far. prefix_queries, prefix_hits: prompt tokens looked for in the prefix cache, and found.

    Raises:
        ValueError: an unknown policy.
    """

    def __init__(
        self,
        pool: PagePool,
        *,
        page_size: int,
        max_num_seqs: int,
        max_model_len: int,
        max_num_batched_tokens: int,
        max_prefill_rows: int,
        prompt_logprobs_tokens: int,
        prefill_sizes: Mapping[int, int] | None = None,
        steps: int = 1,
        long_prefill_token_threshold: int = 0,
        shared_prefill_sizes: Sequence[int] = (),
        shared_decode_rows: int = 0,
        held_decode_steps: int = 0,
        enable_prefix_caching: bool = True,
        policy: str = "fcfs",
    ):
        if policy not in POLICIES:
            raise ValueError(f"scheduling policy {policy!r}; allowed are {' and '.join(POLICIES)}")
        self.pool = pool
        self.page_size = page_size
        self.max_model_len = max_model_len
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_prefill_rows = max_prefill_rows
        self.prompt_logprobs_tokens = prompt_logprobs_tokens
        self.prefill_sizes = dict(prefill_sizes or {})
        self.steps = steps
        self.long_prefill_token_threshold = long_prefill_token_threshold
        self.shared_prefill_sizes = shared_prefill_sizes
        self.shared_decode_rows = shared_decode_rows
        self.held_decode_steps = held_decode_steps
        self.enable_prefix_caching = enable_prefix_caching
        self.policy = policy
        self.num_preemptions = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self.waiting: list[Request] = []  # by rank
        self.running: dict[Request, None] = {}  # by rank
        self._prompt_logprobs: dict[Request, None] = {}  # those of `running` that ask for them
        self._prompt_logprobs_turn = True
        self._held = 0  # plans in a row that left out the rows that decode
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        self._arrivals = 0

    # ---- in and out

    def check(self, request: Request) -> None:
        """Refuse a request that could never run. Any thread may ask.

        Raises:
            ValueError: the whole pool has fewer pages than it needs.
        """
        needed = self._pages(request.max_length(self.max_model_len))
        if needed > self.pool.num_pages - 1:
            raise ValueError(
                f"request {request.request_id} needs {needed} pages of {self.page_size} tokens for up to "
                f"{request.max_length(self.max_model_len)} tokens, but the KV cache has {self.pool.num_pages - 1}; "
                f"lower max_tokens or give the cache more memory (gpu_memory_utilization, num_gpu_blocks_override)"
            )

    def add(self, request: Request) -> None:
        """Queue a request that `check` has passed."""
        request.rank = (request.priority if self.policy == "priority" else 0, self._arrivals)
        request.output_limit = request.max_outputs(self.max_model_len)
        self._arrivals += 1
        self._wait(request)

    def abort(self, request: Request) -> None:
        """Forget a request at once; its pages are free for the next plan (steps run in order on the device).

        Unknown and finished ones are ignored. What a request that finished with "error" computed is not used again.
        """
        if request.slot >= 0:
            if request.finish_reason == "error":
                self.pool.unregister(request.pages)
            self._release(request)
        else:
            self._stop_waiting(request)

    def commit(self, request: Request, tokens: Sequence[int], prefilled: int = 0) -> int:
        """Take in what a finished step did for a request.

        Args:
            request: the row's request, running, preempted or gone meanwhile.
            tokens: what the step sampled, none if the chunk was not the last one. -1: the device had finished the row.
            prefilled: where the step's chunk ended (start + length), 0 for a decode row.

        Returns:
            How many tokens were appended: fewer than given where the request finishes, 0 if it finished before.
        """
        taken = 0
        for token in tokens:
            if request.finish_reason is not None or token < 0:
                break
            request.append(token)
            taken += 1
        if request.slot >= 0:
            # A chunk from before a preemption may say more than what the pages of now hold.
            request.num_committed = min(prefilled or request.num_tokens - 1, request.num_computed)
            if self.enable_prefix_caching and request.num_committed >= (request.num_registered + 1) * self.page_size:
                self._register(request)
            if request.finish_reason is not None:
                self._release(request)
        elif taken and request.finish_reason is not None:
            self._stop_waiting(request)
        return taken

    def preempt_all(self) -> None:
        """After the device failed: no step in flight will be committed, and no page holds what it should.

        Every running request waits again, in its order; all pages are free and nothing is found in them.
        """
        for request in reversed(list(self.running)):
            self._preempt(request)
        for request in self.waiting:
            request.num_planned_outputs = len(request.output_token_ids)
        self.reset_prefix_cache()

    def reset_prefix_cache(self) -> None:
        """Forget what the pages contain: no later request starts from what was computed so far."""
        self.pool.reset_prefix_cache()

    @property
    def has_unfinished(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def fills_a_plan(self) -> bool:
        """Whether the pending prompts are enough for a plan of the most tokens."""
        return sum(self._pending()) >= self.max_num_batched_tokens

    def _pending(self) -> list[int]:
        """Prompt tokens still to be computed, of the requests whose turn is next; at most as many as a plan takes."""
        running = [left for r in self.running if (left := r.num_to_prefill - r.num_computed) > 0]
        waiting = [r.num_tokens for r in self.waiting[: self.max_prefill_rows]]
        return [*running, *waiting][: self.max_prefill_rows]

    @property
    def num_waiting(self) -> int:
        return len(self.waiting)

    @property
    def num_running(self) -> int:
        return len(self.running)

    # ---- planning

    def schedule(self, patient: bool = False) -> Plan | None:
        """The next step, or None: nothing to dispatch until a step in flight is committed or a request is added.

        patient: nobody waits for a token before every request has ended, so prompts are not slowed down for decode, which is
            held for as long as a burst of them lasts.
        """
        steps = self._steps() if self.steps > 1 else 1
        # Prompt logprobs have a program of their own, so they and other prompts take turns.
        alone = self._prompt_logprobs_turn and self._first_for_prompt_logprobs() is not None
        self._prompt_logprobs_turn = not alone
        pending = self._pending()
        decoding = sum(map(self._decodes, self.running)) if pending else 0  # only what prompts do to them is asked
        slowed = decoding and self.long_prefill_token_threshold and not patient
        budget, rows = self._slowed_budget(decoding) if slowed else self.max_num_batched_tokens, self.max_prefill_rows
        hold = not alone and self._hold_decode(decoding, budget, patient)
        if not 0 < decoding <= self.shared_decode_rows:
            budget = self._cut(budget, pending)
        admitted: list[Request] = []
        prefill: list[Chunk] = []
        decode: list[Request] = []
        preempted: list[Request] = []
        promised = 0  # pages that prompts in the middle of their prefill still need
        page_size = self.page_size

        # By rank, so that who is preempted for another's pages has not been served yet.
        for request in list(self.running):
            if request.slot < 0:
                break  # preempted, as are all that follow
            if request.num_computed >= request.num_to_prefill:
                if hold:
                    continue
                more = min(steps, request.output_limit - request.num_planned_outputs)
                if more <= 0:
                    continue
                end = request.num_computed + more
                if end > len(request.pages) * page_size and not self._grow(request, end, preempted):
                    break
                request.num_computed = end
                request.num_planned_outputs += more
                decode.append(request)
                continue
            if rows and budget and alone == asks_for_prompt_logprobs(request):
                chunk = self._chunk(request, min(budget, self.prompt_logprobs_tokens) if alone else budget)
                if not self._grow(request, chunk.start + chunk.length, preempted):
                    break
                prefill.append(chunk)
                budget, rows = budget - chunk.length, 0 if alone else rows - 1
            promised += self._pages(request.num_to_prefill) - len(request.pages)

        at, kept = 0, self._growing() if self.waiting and self._free_slots else 0  # pages, left for those that may grow
        while at < len(self.waiting) and self._free_slots and rows and budget and not preempted and not alone:
            request = self.waiting[at]
            if request.num_planned_outputs > len(request.output_token_ids):
                break  # preempted a moment ago, its last tokens are still in flight
            if asks_for_prompt_logprobs(request) and self._first_for_prompt_logprobs() is not None:
                at += 1  # one at a time, and nobody waits behind the others
                continue
            hits = self._hits(request)
            needed = self._pages(request.num_tokens) - sum(self.pool.is_held(page) for page in hits)
            grows = self._may_grow(request, request.num_tokens)
            if self.running and needed + promised + kept + grows > self.pool.num_free:
                break
            kept += grows
            del self.waiting[at]
            self._start(request, hits)
            admitted.append(request)
            if not asks_for_prompt_logprobs(request):
                chunk = self._chunk(request, budget)
                self._grow(request, chunk.start + chunk.length, preempted)
                prefill.append(chunk)
                budget, rows = budget - chunk.length, rows - 1
            promised += self._pages(request.num_to_prefill) - len(request.pages)

        # Nobody else took the turn. No row of this plan loses pages for it.
        first = None if prefill else self._first_for_prompt_logprobs()
        if first is not None:
            chunk = self._chunk(first, min(budget, self.prompt_logprobs_tokens))
            end = chunk.start + chunk.length
            if self._pages(end) - len(first.pages) <= self.pool.num_free:
                self._grow(first, end, preempted)
                prefill.append(chunk)

        # The next step's pages already, where there are plenty: the device hears of them while this step runs. After all others
        # have theirs, so that this costs nobody a page of now.
        for request in decode:
            ahead = request.num_computed + min(steps, request.output_limit - request.num_planned_outputs)
            wanted = self._pages(ahead) - len(request.pages)
            if 0 < wanted <= self.pool.num_free - len(self.running):
                self._grow(request, ahead, preempted)

        # Longest first: the attention of many rows takes them in this order, and should end on short ones.
        decode.sort(key=lambda r: r.num_computed, reverse=True)
        for chunk in prefill:
            chunk.request.num_computed += chunk.length
            chunk.request.num_planned_outputs += chunk.last
        if hold and not prefill:
            self._held = self.held_decode_steps  # the prompts found no room: nobody gains by holding
            again = self.schedule() or Plan([], [], [], 1, [])
            admitted, preempted = admitted + again.admitted, preempted + again.preempted
            prefill, decode, steps = again.prefill, again.decode, again.steps
        if not (admitted or prefill or decode):
            return None
        return Plan(admitted, prefill, decode, steps, preempted)

    def _steps(self) -> int:
        """Several steps a dispatch would keep whoever waits or prefills waiting longer, and guides steer each token."""
        if self.waiting:
            return 1
        pages = 0
        for r in self.running:
            if r.num_computed < r.num_to_prefill or r.params.structured_outputs is not None:
                return 1
            more = min(self.steps, r.output_limit - r.num_planned_outputs)
            pages += max(0, self._pages(r.num_computed + more) - len(r.pages))
        return self.steps if pages <= self.pool.num_free else 1

    def _slowed_budget(self, decoding: int) -> int:
        """Prompt tokens of a plan that `decoding` rows wait for: no more than the threshold for each prompt that is pending
        (rounded down to a power of two of them: programs come in such sizes), so that one long prompt hardly slows the
        others down, and a queue of prompts still fills the device."""
        pending = len(self.waiting) + sum(r.num_computed < r.num_to_prefill for r in self.running)
        tokens = self.long_prefill_token_threshold * (1 << max(0, pending.bit_length() - 1))
        if tokens >= self.max_num_batched_tokens:
            return self.max_num_batched_tokens
        shared = tokens - self.shared_decode_rows
        return shared if decoding <= self.shared_decode_rows and shared in self.shared_prefill_sizes else tokens

    def _cut(self, budget: int, lengths: Sequence[int]) -> int:
        """The budget; or less of it, where the pending tokens are less work in several plans than in one that pads them."""
        tokens = sum(lengths)
        if not 0 < tokens < budget:
            return budget
        first = cheapest(tokens, tuple(self.prefill_sizes))[1]
        if first >= tokens:
            return budget
        chunks = bisect_left(list(itertools.accumulate(lengths)), first) + 1
        return first if chunks <= self.prefill_sizes[first] else budget

    @staticmethod
    def _decodes(request: Request) -> bool:
        return request.num_computed >= request.num_to_prefill and request.num_planned_outputs < request.output_limit

    def _hold_decode(self, decoding: int, budget: int, patient: bool) -> bool:
        """Whether the `decoding` rows sit this plan out: while a burst of prompts that have slots and pages fills whole plans,
        as each decode step costs nearly what it costs for all slots. A few plans in a row at most, unless all are patient."""
        prompts = 0
        if decoding and (patient or self._held < self.held_decode_steps) and budget == self.max_num_batched_tokens:
            prompts = sum(r.num_to_prefill - r.num_computed for r in self.running if r.num_computed < r.num_to_prefill)
            pages = self.pool.num_free - self._growing()
            for request in self.waiting[: len(self._free_slots)]:
                pages -= self._pages(request.num_tokens) + self._may_grow(request, request.num_tokens)
                if prompts >= budget or pages < 0:
                    break
                prompts += request.num_tokens
        hold = 0 < budget <= prompts
        self._held = self._held + 1 if hold else 0
        return hold

    def _first_for_prompt_logprobs(self) -> Request | None:
        """The one running request that is in the middle of a prefill for prompt_logprobs."""
        return next((r for r in self._prompt_logprobs if r.num_computed < r.num_to_prefill), None)

    def _chunk(self, request: Request, tokens: int) -> Chunk:
        start, end = request.num_computed, min(request.num_computed + tokens, request.num_to_prefill)
        return Chunk(request, start, end - start, last=end == request.num_to_prefill)

    def _start(self, request: Request, hits: list[int]) -> None:
        """Give a waiting request a slot, and the pages that hold its first tokens."""
        self.pool.share(hits)
        request.slot = self._free_slots.pop()
        request.pages = hits
        request.num_registered = len(hits)
        request.num_computed = request.num_committed = len(hits) * self.page_size
        request.num_to_prefill = request.num_tokens
        request.num_planned_outputs = len(request.output_token_ids)
        if request.scheduled_time is None:
            request.scheduled_time = time.time()
            if self._may_hit(request):
                request.num_cached_tokens = request.num_computed
                self.prefix_queries += request.num_tokens
                self.prefix_hits += request.num_computed
        in_order = not self.running or next(reversed(self.running)).rank < request.rank
        self.running[request] = None
        if not in_order:
            self.running = dict.fromkeys(sorted(self.running, key=rank))
        if asks_for_prompt_logprobs(request):
            self._prompt_logprobs[request] = None

    def _grow(self, request: Request, length: int, preempted: list[Request]) -> bool:
        """Give a running request pages for `length` tokens, at the cost of those ranked below it; False: it was the last."""
        wanted = self._pages(length) - len(request.pages)
        while wanted > self.pool.num_free:
            lowest = next(reversed(self.running))
            self._preempt(lowest)
            preempted.append(lowest)
            if lowest is request:
                return False
        if wanted > 0:
            request.pages += self.pool.allocate(wanted)
        return True

    def _preempt(self, request: Request) -> None:
        self._release(request)
        request.num_preemptions += 1
        self.num_preemptions += 1
        self._wait(request)

    def _release(self, request: Request) -> None:
        del self.running[request]
        self._prompt_logprobs.pop(request, None)
        self.pool.free(request.pages)
        self._free_slots.append(request.slot)
        request.pages, request.slot = [], -1
        request.num_computed = request.num_committed = request.num_registered = 0

    def _wait(self, request: Request) -> None:
        insort(self.waiting, request, key=rank)

    def _stop_waiting(self, request: Request) -> None:
        at = bisect_left(self.waiting, request.rank, key=rank)
        if at < len(self.waiting) and self.waiting[at] is request:
            del self.waiting[at]

    def _pages(self, length: int) -> int:
        return -(-length // self.page_size)

    def _may_grow(self, request: Request, length: int) -> bool:
        """Whether a request may come to need more pages than it has, and than `length` tokens do. Of its last token nothing is
        kept."""
        longest = len(request.prompt_token_ids) + request.output_limit - 1
        return self._pages(longest) > max(len(request.pages), self._pages(length))

    def _growing(self) -> int:
        """How many run and may grow: a page is left for each, or it would soon be preempted."""
        return sum(self._may_grow(request, request.num_to_prefill) for request in self.running)

    # ---- prefix caching

    def _may_hit(self, request: Request) -> bool:
        return self.enable_prefix_caching and not asks_for_prompt_logprobs(request)

    def _hits(self, request: Request) -> list[int]:
        """The pages that hold the request's first tokens, at most all but the last one."""
        hits: list[int] = []
        if self._may_hit(request):
            for i in range((request.num_tokens - 1) // self.page_size):
                page = self.pool.find(self._digest(request, i))
                if page is None:
                    break
                hits.append(page)
        return hits

    def _register(self, request: Request) -> None:
        full = request.num_committed // self.page_size
        for i in range(request.num_registered, full):
            self.pool.register(request.pages[i], self._digest(request, i))
        request.num_registered = full

    def _digest(self, request: Request, i: int) -> bytes:
        """Of its i-th page."""
        digests, size = request.page_digests, self.page_size
        while (n := len(digests)) <= i:
            digests.append(page_digest(digests[-1] if digests else b"", request.token_id_slice(n * size, (n + 1) * size)))
        return digests[i]


@functools.cache
def cheapest(tokens: int, sizes: tuple[int, ...]) -> tuple[int, int]:
    """(work, tokens of the first plan) to prefill so many tokens in plans that are padded to one of `sizes`, ascending."""
    fits = bisect_left(sizes, tokens)
    if fits == len(sizes):
        return tokens, tokens
    whole = sizes[fits], sizes[fits]
    if fits == 0:
        return whole
    first = sizes[fits - 1]
    return min(whole, (first + PLAN_TOKENS + cheapest(tokens - first, sizes)[0], first))


def rank(request: Request) -> tuple[int, int]:
    return request.rank


def asks_for_prompt_logprobs(request: Request) -> bool:
    return request.params.prompt_logprobs is not None
