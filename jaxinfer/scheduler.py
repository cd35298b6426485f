"""Which requests run in the next step: pure bookkeeping over slots, pages and token counts, no jax.

A plan is made one step ahead of what is known: while the device runs step i, the host plans step i + 1 and then reads the
tokens of step i. So plans count tokens and never look at them. The device finishes a row by itself (stop ids, length);
the host learns of it at `commit` and drops the row from later plans.

Admission reserves the pages of a request's whole length, first come first served, so a running request never lacks one.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

from jaxinfer.pages import PagePool
from jaxinfer.request import Chunk, Plan, Request


class Scheduler:
    """Slots and pages for requests, first come first served.

    Args:
        pool: the pages of the KV cache.
        page_size: tokens a page.
        max_num_seqs: slots.
        max_model_len: the longest sequence, in tokens.
        prefill_shapes: the (rows, tokens a row) that a prefill program exists for.
        prompt_logprobs_tokens: tokens a chunk of a request that asks for prompt_logprobs; such chunks run alone.
        steps: decode steps a plan when nothing waits or prefills; otherwise one.
    """

    def __init__(
        self,
        pool: PagePool,
        *,
        page_size: int,
        max_num_seqs: int,
        max_model_len: int,
        prefill_shapes: Sequence[tuple[int, int]],
        prompt_logprobs_tokens: int,
        steps: int = 1,
    ):
        self.pool = pool
        self.page_size = page_size
        self.max_model_len = max_model_len
        self.prompt_logprobs_tokens = prompt_logprobs_tokens
        self.steps = steps
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        self._rows_for_tokens: dict[int, int] = {}
        for rows, tokens in sorted(prefill_shapes):
            self._rows_for_tokens[tokens] = max(rows, self._rows_for_tokens.get(tokens, 0))

    def check(self, request: Request) -> None:
        """Refuse a request that could never run.

        Raises:
            ValueError: the whole pool has fewer pages than it needs.
        """
        needed = self.pages_needed(request)
        if needed > self.pool.num_pages - 1:
            raise ValueError(
                f"request {request.request_id} needs {needed} pages of {self.page_size} tokens for up to "
                f"{request.max_length(self.max_model_len)} tokens, but the KV cache has {self.pool.num_pages - 1}; "
                f"lower max_tokens or give the cache more memory (gpu_memory_utilization, num_gpu_blocks_override)"
            )

    def add(self, request: Request) -> None:
        """Queue a request that `check` has passed."""
        self.waiting.append(request)

    def abort(self, request: Request) -> None:
        """Forget a request at once; its pages are free for the next plan (steps run in order on the device)."""
        if request in self.waiting:
            self.waiting.remove(request)
        elif request in self.running:
            self._release(request)

    def schedule(self) -> Plan | None:
        """The next step, or None when there is nothing to dispatch."""
        admitted = self._admit()
        prefill = self._chunks()
        prefilled = {chunk.request for chunk in prefill}
        decode = [
            request
            for request in self.running
            if request not in prefilled
            and request.num_prefilled == len(request.prompt_token_ids)
            and request.num_planned_outputs < request.max_outputs(self.max_model_len)
        ]
        if not prefill and not decode:
            return None
        for chunk in prefill:
            chunk.request.num_prefilled += chunk.length
            chunk.request.num_planned_outputs += chunk.last
        # Several steps a dispatch would keep whoever waits or prefills waiting longer.
        steps = 1 if self.waiting or prefill else self.steps
        for request in decode:
            request.num_planned_outputs += steps
        return Plan(admitted=admitted, prefill=prefill, decode=decode, steps=steps)

    def commit(self, request: Request, tokens: Sequence[int]) -> int:
        """Append the tokens that a step sampled for a request, up to where it finishes; returns how many were taken.

        Tokens of a request that finished meanwhile are dropped. -1 stands for rows that the device had finished.
        """
        taken = 0
        for token in tokens:
            if request.finished or token < 0:
                break
            request.append(token, self.max_model_len)
            taken += 1
        if request.finished and request in self.running:
            self._release(request)
        return taken

    @property
    def has_unfinished(self) -> bool:
        return bool(self.waiting or self.running)

    def pages_needed(self, request: Request) -> int:
        """Pages that hold the request at its longest."""
        return -(-request.max_length(self.max_model_len) // self.page_size)

    def _admit(self) -> list[Request]:
        admitted = []
        while self.waiting and self._free_slots and self.pages_needed(self.waiting[0]) <= self.pool.num_free:
            request = self.waiting.popleft()
            request.slot = self._free_slots.pop()
            request.pages = self.pool.allocate(self.pages_needed(request))
            request.scheduled_time = time.time()
            self.running.append(request)
            admitted.append(request)
        return admitted

    def _chunks(self) -> list[Chunk]:
        """The prompts' next pieces: the first one picks the program's tokens a row, others fill its rows."""
        pending = [r for r in self.running if r.num_prefilled < len(r.prompt_token_ids)]
        if not pending:
            return []
        if pending[0].params.prompt_logprobs is not None:
            return [chunk_of(pending[0], self.prompt_logprobs_tokens)]
        remaining = len(pending[0].prompt_token_ids) - pending[0].num_prefilled
        tokens = min((t for t in self._rows_for_tokens if t >= remaining), default=max(self._rows_for_tokens))
        plain = [r for r in pending if r.params.prompt_logprobs is None]
        return [chunk_of(r, tokens) for r in plain[: self._rows_for_tokens[tokens]]]

    def _release(self, request: Request) -> None:
        self.running.remove(request)
        self.pool.free(request.pages)
        self._free_slots.append(request.slot)
        request.pages, request.slot = [], -1


def chunk_of(request: Request, tokens: int) -> Chunk:
    """The next at most `tokens` tokens of a request's prompt."""
    start = request.num_prefilled
    length = min(tokens, len(request.prompt_token_ids) - start)
    return Chunk(request, start, length, last=start + length == len(request.prompt_token_ids))
