"""From plans to the device: which program runs, on what rows, and the pool that it updates in place.

A row's per-sequence state lives on the device, indexed by its slot; what a step needs from the host is one small integer array.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxinfer import runtime, slots
from jaxinfer.attention import reads_valid_pages_only
from jaxinfer.buckets import DecodeBucket, PrefillBucket, coarse, decode_buckets, pow2_ceil, prefill_buckets
from jaxinfer.cache import KVCache, abstract_cache, init_cache, page_bytes
from jaxinfer.config import EngineConfig, ModelConfig
from jaxinfer.model import Transformer
from jaxinfer.programs import Programs
from jaxinfer.request import Chunk, Plan, Request, SamplingParams
from jaxinfer.sampling import SampleOutput
from jaxinfer.sharding import named, padded_dims
from jaxinfer.slots import SlotRow, SlotState

logger = logging.getLogger(__name__)

ADMIT_ROWS = 16
NOTHING = Request("", None, [0], SamplingParams(temperature=0.0))  # for the shapes of a slot's row
CPU_CACHE_BYTES = 1 << 29


@dataclass(slots=True)
class Sampled:
    """What a step gave for one request: its tokens (-1: none, the row was finished or every token banned), and logprobs
    where it asked for them. prefilled: where its piece of the prompt ended; 0: it decoded."""

    request: Request
    tokens: list[int]
    prefilled: int = 0
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None


@dataclass(frozen=True)
class TokenLogprobs:
    """One position: the token's log-probability and rank, and the 20 likeliest ids with theirs."""

    token: int
    logprob: float
    rank: int
    top_ids: np.ndarray
    top_logprobs: np.ndarray


@dataclass
class Step:
    """A dispatched plan; `read` waits for its tokens. Where one program did both, `prefill` holds the decode rows' too, from
    `decode_from` on."""

    plan: Plan
    decode_from: int = 0
    prefill: SampleOutput | None = None
    prompt_logprobs: tuple[jax.Array, ...] | None = None
    decode: SampleOutput | None = None

    @property
    def is_done(self) -> bool:
        """Whether `read` would not wait: the device has gone on to what was dispatched after it."""
        tokens: list[Any] = [output.token_B for output in (self.prefill, self.decode) if output is not None]
        return all(array.is_ready() for array in tokens)

    def read(self) -> list[Sampled]:
        """The step's tokens, on the host; logprobs are fetched only for requests that asked for them."""
        results = []
        if self.prefill is not None:
            tokens_R = np.asarray(self.prefill.token_B)
            for r, chunk in enumerate(self.plan.prefill):
                prompt = self._prompt_logprobs(chunk) if self.prompt_logprobs is not None else None
                tokens = [int(tokens_R[r])] if chunk.last else []
                logprobs = _logprobs(self.prefill, (r,), tokens[0]) if chunk.last and chunk.request.wants_logprobs else None
                end = chunk.start + chunk.length
                results.append(Sampled(chunk.request, tokens, end, [logprobs] if logprobs else None, prompt))
        output = self.prefill if self.decode is None else self.decode
        if self.plan.decode and output is not None:
            tokens_kB = np.asarray(output.token_B) if self.decode is not None else np.asarray(output.token_B)[None]
            tokens_Bk = tokens_kB.T.tolist()
            for b, request in enumerate(self.plan.decode, start=self.decode_from):
                logprobs_k = None
                if request.wants_logprobs:
                    at = [(k, b) for k in range(len(tokens_kB))] if self.decode is not None else [(b,)]
                    logprobs_k = [_logprobs(output, place, token) for place, token in zip(at, tokens_Bk[b], strict=True)]
                results.append(Sampled(request, tokens_Bk[b], logprobs=logprobs_k))
        return results

    def _prompt_logprobs(self, chunk: Chunk) -> list[TokenLogprobs]:
        assert self.prompt_logprobs is not None
        logprob_T, rank_T, ids_T, top_T = (np.asarray(x) for x in self.prompt_logprobs)
        targets = chunk.request.prompt_token_ids[chunk.start + 1 : chunk.start + chunk.length + 1]
        known = max(0, len(chunk.request.prompt_logprobs) - chunk.start)  # from before a preemption
        return [
            TokenLogprobs(token, float(logprob_T[t]), int(rank_T[t]), ids_T[t], top_T[t])
            for t, token in enumerate(targets)
            if t >= known
        ]


def _logprobs(output: SampleOutput, at: tuple[int, ...], token: int) -> TokenLogprobs:
    fields = (output.logprob_B, output.rank_B, output.top_ids_B20, output.top_logprobs_B20)
    logprob, rank, ids, top = (np.asarray(x)[at] for x in fields)
    return TokenLogprobs(token, float(logprob), int(rank), ids, top)


class Runner:
    """Owns the parameters, the cache and the slots' state on the mesh, and the programs over them.

    Args:
        model_config: the model's shape.
        config: the engine's settings.
        mesh: from `sharding.make_mesh`.
        graphdef: the model's static half (`nnx.split`).
        leaves: its parameters, in `jax.tree.leaves` order of the state.
        treedef: the state's structure.
        dtype: of activations and cache.
        max_model_len: the longest sequence, in tokens.

    Raises:
        ValueError: the cache cannot hold one sequence of max_model_len; the message holds the arithmetic.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        config: EngineConfig,
        mesh: Mesh,
        graphdef: nnx.GraphDef[Transformer],
        leaves: list[jax.Array],
        treedef: Any,
        dtype: jnp.dtype,
        max_model_len: int,
    ):
        self.model_config, self.config, self.mesh = model_config, config, mesh
        self.leaves, self.dtype, self.max_model_len = leaves, dtype, max_model_len
        self.dims = padded_dims(model_config, mesh.size)  # the model's own
        on_gpu = mesh.devices.flat[0].platform == "gpu"
        most = pow2_ceil(config.max_num_seqs * max_model_len)  # more can never be there to prefill
        self.max_tokens = min(config.max_num_batched_tokens or (4096 if on_gpu else 512), most)
        any_length = reads_valid_pages_only(dtype, self.dims.G, model_config.head_dim, config.block_size)
        self.prefill_buckets = prefill_buckets(config, max_model_len, self.max_tokens, any_length)
        self.decode_buckets = decode_buckets(config, max_model_len, any_length)
        self._make = Programs(graphdef, treedef, mesh, dtype, config.max_num_seqs, self._row(NOTHING))
        self.programs: dict[DecodeBucket | PrefillBucket, jax.stages.Compiled] = {}
        self.compile_seconds = 0.0
        self.state: SlotState = slots.init_state(config.max_num_seqs, self.dims.V, mesh)
        self._admit = self._admit_program()
        self._set_masks = self._mask_program()
        self._nobody = self._put(self._pack([], 1))  # fills no slot
        # What the slots' pages are, as far as decode steps were told; and the rows that were sent last: what they are of, how
        # many pages each has.
        self._pages_SM = np.zeros((config.max_num_seqs, self._pages(max_model_len)), np.int32)
        self._num_pages_S = [0] * config.max_num_seqs
        self._decode_rows: tuple[Any, list[int], jax.Array] | None = None
        self.embedding_bytes = self.dims.V // mesh.size * model_config.hidden_size * jnp.dtype(dtype).itemsize
        weights = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
        # What a decode step reads of them: of an embedding that is not the head too, a row a sequence.
        self.step_weight_bytes = weights - (0 if model_config.tie_word_embeddings else self.embedding_bytes)
        self.page_bytes = page_bytes(model_config, self.dims, config.block_size, dtype, mesh.size)
        self.num_pages = self._num_pages()
        self.cache: KVCache = init_cache(model_config, self.dims, self.num_pages, config.block_size, dtype, mesh)

    def reset(self) -> None:
        """Empty slots and an empty cache, where a failed step took the old ones with it."""
        self.state, self.cache = None, None  # type: ignore[assignment]  # free them first
        self._decode_rows = None
        self.state = slots.init_state(self.config.max_num_seqs, self.dims.V, self.mesh)
        self.cache = init_cache(self.model_config, self.dims, self.num_pages, self.config.block_size, self.dtype, self.mesh)

    @property
    def params(self) -> nnx.State:
        """The parameters as the model's state."""
        return jax.tree.unflatten(self._make.treedef, self.leaves)  # type: ignore[no-any-return]

    @property
    def prefill_sizes(self) -> dict[int, int]:
        """How many tokens the programs take that only prefill, in ascending order, and of how many sequences."""
        return dict(sorted((b.tokens, b.rows) for b in self.prefill_buckets if not b.prompt_logprobs and not b.decode_rows))

    @property
    def shared_prefill_sizes(self) -> list[int]:
        """How many tokens of prompts the programs take that decode too."""
        return [b.tokens for b in self.prefill_buckets if b.decode_rows]

    @property
    def lost_state(self) -> bool:
        """Whether a program that failed had already taken the buffers it was given."""
        return any(x.is_deleted() for x in jax.tree.leaves((self.state, self.cache)))

    # ---- running

    def admit(self, requests: Sequence[Request]) -> None:
        """Fill the requests' slots: sampling parameters, prompt length, counts."""
        limit = self.config.max_num_seqs
        while requests:
            count = 1 if len(requests) == 1 else min(ADMIT_ROWS, limit)
            self.state = self._admit(self.state, self._put(self._pack(requests[:count], count)))
            requests = requests[count:]

    def _pack(self, requests: Sequence[Request], count: int) -> np.ndarray:
        for request in requests:
            self._num_pages_S[request.slot] = 0
            if self._decode_rows and request.slot in self._decode_rows[0][2]:
                self._decode_rows = None  # it says what pages another request had
        rows = [self._row(request) for request in requests] or [self._row(NOTHING)]
        return slots.pack_rows([r.slot for r in requests], rows, count, self.config.max_num_seqs)

    def set_masks(self, slot_ids: Sequence[int], mask_AW: np.ndarray) -> None:
        """Allow these slots the tokens of their masks (structured_outputs.Matcher.mask) and no others, for one step."""
        limit = self.config.max_num_seqs
        for at in range(0, len(slot_ids), ADMIT_ROWS):
            count = min(ADMIT_ROWS, len(slot_ids) - at)
            rows = 1 if count == 1 else min(ADMIT_ROWS, limit)
            packed = np.full((rows, 1 + mask_AW.shape[1]), limit, np.uint32)
            packed[:count, 0], packed[:count, 1:] = slot_ids[at : at + count], mask_AW[at : at + count]
            self.state = self._set_masks(self.state, self._put(packed))

    def _row(self, request: Request) -> SlotRow:
        return slots.make_row(
            request.params,
            request.prompt_token_ids,
            request.output_token_ids,
            eos_token_ids=sorted(request.eos_token_ids),
            bad_words_ids=request.bad_words_ids,
            vocab_size=self.model_config.vocab_size,
            padded_vocab=self.dims.V,
            max_model_len=self.max_model_len,
            sample_index=request.sample_index,
        )

    def _admit_program(self) -> Callable[[SlotState, jax.Array], SlotState]:
        like = self._row(NOTHING)

        def admit(state: SlotState, packed_AW: jax.Array) -> SlotState:
            return slots.admit(state, *slots.unpack_rows(packed_AW, like))

        return jax.jit(admit, donate_argnums=0, out_shardings=slots.state_shardings(self.mesh))

    def _mask_program(self) -> Callable[[SlotState, jax.Array], SlotState]:
        mesh = self.mesh  # not self: a cycle would keep weights and cache from being freed with their last user

        def set_masks(state: SlotState, packed_AW: jax.Array) -> SlotState:
            return slots.set_masks(state, packed_AW[:, 0].astype(jnp.int32), packed_AW[:, 1:], mesh)

        return jax.jit(set_masks, donate_argnums=0, out_shardings=slots.state_shardings(mesh))

    def run(self, plan: Plan, slot_ids: Sequence[int] = (), mask_AW: np.ndarray | None = None) -> Step:
        """Dispatch a plan; returns at once, with the step's tokens still to come. Masks: see `set_masks`."""
        # The prefill's program can fill one slot itself: half a millisecond less until a lone request's first token.
        inside = len(plan.admitted) == 1 and bool(plan.prefill) and mask_AW is None
        if not inside:
            self.admit(plan.admitted)
        if mask_AW is not None:
            self.set_masks(slot_ids, mask_AW)
        step = Step(plan)
        if plan.prefill:
            admitted = self._put(self._pack(plan.admitted, 1)) if inside else self._nobody
            bucket = self._prefill_bucket(plan)
            together = plan.decode if bucket.decode_rows else []
            step.prefill, step.prompt_logprobs = self._run_prefill(bucket, plan.prefill, together, admitted)
            step.decode_from = bucket.rows if together else 0
        if plan.decode and not step.decode_from:
            step.decode = self._run_decode(plan.decode, plan.steps)
        every = any(chunk.request.wants_logprobs for chunk in plan.prefill) or any(r.wants_logprobs for r in plan.decode)
        for output in (step.prefill, step.decode):
            if output is not None:
                for array in jax.tree.leaves(output) if every else [output.token_B]:
                    array.copy_to_host_async()
        return step

    def _prefill_bucket(self, plan: Plan) -> PrefillBucket:
        """The program of a plan's prefill: one that decodes too, where that hardly pads; else the smallest that fits."""
        chunks = plan.prefill
        wants_prompt = chunks[0].request.params.prompt_logprobs is not None
        pages = max(len(request.pages) for request in [*(chunk.request for chunk in chunks), *plan.decode])
        tokens = sum(chunk.length for chunk in chunks)
        fit = [
            b
            for b in self.prefill_buckets
            if b.prompt_logprobs == wants_prompt and b.rows >= len(chunks) and b.tokens >= tokens and b.pages >= pages
        ]
        both = [b for b in fit if b.decode_rows >= len(plan.decode) > 0 and b.tokens < 2 * tokens and plan.steps == 1]
        return both[0] if both else next(b for b in fit if not b.decode_rows)

    def _run_prefill(
        self, bucket: PrefillBucket, chunks: Sequence[Chunk], decode: Sequence[Request], admitted: jax.Array
    ) -> tuple[SampleOutput, tuple[jax.Array, ...] | None]:
        packed = np.zeros(bucket.words, np.int32)
        rows_RN, token_T, next_T = bucket.split(packed)
        rows_RN[:, 0] = self.config.max_num_seqs
        rows_RN[:, 1] = sum(chunk.length for chunk in chunks)  # where padding rows stand: after all others
        at = 0
        for row, chunk in zip(rows_RN, chunks, strict=False):
            request, end = chunk.request, chunk.start + chunk.length
            row[:5] = request.slot, at, chunk.start, chunk.length, chunk.last
            row[5 : 5 + len(request.pages)] = request.pages
            token_T[at : at + chunk.length] = request.token_id_slice(chunk.start, end)
            at += chunk.length
        if bucket.prompt_logprobs:
            ids = request.prompt_token_ids[chunk.start + 1 : end + 1]
            next_T[: len(ids)] = ids
        rows = [self._rows_to_decode(decode, bucket.decode_rows, bucket.pages)] if bucket.decode_rows else []
        self.state, self.cache, output, prompt = self._program(bucket)(
            self.leaves, self.cache, self.state, self._put(packed), admitted, *rows
        )
        return output, prompt

    def _run_decode(self, requests: Sequence[Request], steps: int) -> SampleOutput:
        pages = max(len(request.pages) for request in requests)
        greedy = all(request.is_plain_greedy for request in requests)
        bucket = next(
            b
            for b in self.decode_buckets
            if b.steps == steps and b.greedy == greedy and b.rows >= len(requests) and b.pages >= pages
        )
        rows = self._rows_to_decode(requests, bucket.rows, bucket.pages)
        self.state, self.cache, output = self._program(bucket)(self.leaves, self.cache, self.state, rows)
        return output

    def _rows_to_decode(self, requests: Sequence[Request], count: int, pages: int) -> jax.Array:
        """int32 [count, 1 + pages]: slots and pages. The same rows with the same pages need the same array again, and nothing
        is sent. A program waits for an array that is sent just before it, and where that is copied only when the program before
        is done, the device waits too. So pages come a step before they are needed (Scheduler), their array is sent now, and the
        step goes with the one before as long as that says enough."""
        slot_ids, known, changed = [request.slot for request in requests], self._num_pages_S, False
        for request, slot in zip(requests, slot_ids, strict=True):
            if len(request.pages) != known[slot]:
                self._pages_SM[slot, : len(request.pages)] = request.pages
                known[slot], changed = len(request.pages), True
        key, sent = (count, pages, slot_ids), self._decode_rows
        if sent is not None and sent[0] != key:
            sent = None
        if sent is not None and not changed:
            return sent[2]
        rows = np.zeros((count, 1 + pages), np.int32)
        rows[:, 0] = self.config.max_num_seqs
        rows[: len(slot_ids), 0] = slot_ids
        rows[: len(slot_ids), 1:] = self._pages_SM[slot_ids, :pages]
        self._decode_rows = key, [known[slot] for slot in slot_ids], self._put(rows)
        if sent is not None and all(self._pages(r.num_computed) <= n for r, n in zip(requests, sent[1], strict=True)):
            return sent[2]
        return self._decode_rows[2]

    def _pages(self, length: int) -> int:
        return -(-length // self.config.block_size)

    def _put(self, rows: np.ndarray) -> jax.Array:
        return jax.device_put(rows, named(self.mesh, ""))

    # ---- programs

    def warm_up(self) -> None:
        """Compile every bucket's program now rather than when a request first needs it."""
        buckets: list[DecodeBucket | PrefillBucket] = [*self.prefill_buckets, *self.decode_buckets]
        for number, bucket in enumerate(buckets, 1):
            logger.info("warm-up: program %d of %d", number, len(buckets))
            self._program(bucket)
        limit, words = self.config.max_num_seqs, -(-self.model_config.vocab_size // 32)
        for count in sorted({1, min(ADMIT_ROWS, limit)}):
            self.state = self._admit(self.state, self._put(self._pack([], count)))
            self.state = self._set_masks(self.state, self._put(np.full((count, 1 + words), limit, np.uint32)))

    def _program(self, bucket: DecodeBucket | PrefillBucket) -> jax.stages.Compiled:
        if bucket not in self.programs:
            self.programs[bucket] = self.compile(bucket, self.cache)
        return self.programs[bucket]

    def compile(self, bucket: DecodeBucket | PrefillBucket, cache: KVCache) -> jax.stages.Compiled:
        """Compile a bucket's program for a cache (real or abstract); logs its name and seconds."""
        logger.info("compiling %s", bucket.name)
        start = time.perf_counter()
        compiled = self._make.compile(bucket, self.leaves, cache, self.state)
        seconds = time.perf_counter() - start
        self.compile_seconds += seconds
        logger.info("compiled %s in %.1f s", bucket.name, seconds)
        return compiled

    # ---- memory

    def _num_pages(self) -> int:
        """Pages in the pool: as told, or what the devices have left after weights, state and temporaries."""
        size, least = self.config.block_size, self._pages(self.max_model_len) + 1
        if self.config.num_gpu_blocks_override is not None:
            pages, origin = self.config.num_gpu_blocks_override, "num_gpu_blocks_override"
        else:
            free = free_memory(self.mesh, self.config.gpu_memory_utilization)
            most = self.config.max_num_seqs * (least - 1) + 1
            if free is None:
                pages, origin = min(most, max(least, CPU_CACHE_BYTES // self.page_bytes)), "CPU default"
            else:
                guess = max(least, min(most, coarse(int(free * 0.94) // self.page_bytes)))
                temporaries = self._temporaries(guess)
                pages = min(guess, coarse((free - temporaries) // self.page_bytes, least))
                origin = f"{free / 1e9:.2f} GB free less {temporaries / 1e9:.2f} GB of temporaries"
                if pages < guess:
                    self.programs.clear()  # they were compiled for a larger pool
        if pages < least:
            fits = (pages - 1) * size
            shorter = f"lower max_model_len to at most {fits}, or " if fits > 0 else ""
            more = f"raise gpu_memory_utilization (now {self.config.gpu_memory_utilization}) or use more GPUs"
            if self.config.num_gpu_blocks_override is not None:
                more = f"raise num_gpu_blocks_override to at least {least}"
            raise ValueError(
                f"the KV cache would have {max(pages, 0)} pages ({origin}), but one sequence of max_model_len="
                f"{self.max_model_len} needs {least - 1} pages of {size} tokens x {self.page_bytes // size} bytes a token "
                f"on each device = {(least - 1) * self.page_bytes / 1e6:.3f} MB, and page 0 is reserved; {shorter}{more}"
            )
        logger.info(
            "KV cache: %d pages of %d tokens, %.2f GB a device (%s)", pages, size, pages * self.page_bytes / 1e9, origin
        )
        return pages

    def _temporaries(self, num_pages: int) -> int:
        """Bytes that the hungriest bucket's program needs beside its arguments, from compiling it for that many pages.

        The pool's size hardly changes a program's temporaries, so they are measured before the pool is allocated.
        """
        cache = abstract_cache(self.model_config, self.dims, num_pages, self.config.block_size, self.dtype, self.mesh)
        widest = max(
            (b for b in self.prefill_buckets if not b.prompt_logprobs), key=lambda b: (b.tokens + b.decode_rows, b.pages)
        )
        largest = max(self.decode_buckets, key=lambda b: (b.rows, b.pages, not b.greedy, b.steps))
        temporaries = 0
        buckets: tuple[PrefillBucket, DecodeBucket] = (widest, largest)
        for bucket in buckets:
            self.programs[bucket] = self.compile(bucket, cache)
            sizes: Any = self.programs[bucket].memory_analysis()
            outputs = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
            temporaries = max(temporaries, sizes.temp_size_in_bytes + outputs)
        return int(temporaries * 1.05) + (256 << 20)

    # ---- measuring

    def bare_step_seconds(self, rows: int, length: int, steps: int = 64) -> float:
        """Median seconds a decode step takes with nothing around it: the program alone, dispatched back to back.

        Runs on scratch slots and pages; nothing may be running.

        Args:
            rows: sequences.
            length: tokens that each has in the cache.
            steps: dispatches to time, fewer where max_model_len leaves no room: finished rows would make a step cheaper.

        Raises:
            ValueError: no room for one dispatch, or fewer pages than the sequences need.
        """
        per_dispatch = self.config.num_scheduler_steps or 1
        steps = min(steps, (self.max_model_len - length) // per_dispatch)
        if steps < 1:
            raise ValueError(f"{length} tokens leave no room for {per_dispatch} more under max_model_len={self.max_model_len}")
        held = self._pages(length + steps * per_dispatch)
        if rows * held > self.num_pages - 1:
            raise ValueError(f"{rows} sequences of {length} tokens need {rows * held} pages; there are {self.num_pages - 1}")
        requests = []
        for slot in range(rows):
            params = SamplingParams(temperature=0.0, max_tokens=self.max_model_len, ignore_eos=True)
            request = Request(f"bare-{slot}", None, [0] * length, params, slot=slot)
            request.pages = list(range(1 + slot * held, 1 + (slot + 1) * held))
            requests.append(request)
        times = []
        for _ in range(6):
            self.admit(requests)
            jax.block_until_ready(self.state)
            start = time.perf_counter()
            for _ in range(steps):
                output = self._run_decode(requests, per_dispatch)
            jax.block_until_ready(output)
            times.append((time.perf_counter() - start) / steps / per_dispatch)
        return float(np.median(times[1:]))


def free_memory(mesh: Mesh, utilization: float) -> int | None:
    """Bytes left for the pool on the fullest device, None where the backend does not say (CPU).

    The allocator's own limit holds; it was set from gpu_memory_utilization if `runtime.setup` came before JAX started.
    """
    stats = [device.memory_stats() for device in mesh.devices.flat]
    if any(s is None for s in stats):
        return None
    share = min(1.0, utilization / runtime.memory_fraction())
    return int(min(s["bytes_limit"] * share - s["bytes_in_use"] for s in stats if s))
