"""The engine's programs: model and sampler on a bucket's rows, in one jitted function each.

There are two kinds, prefill and decode. Each takes the parameters as a plain list, and donates cache and slots' state, so the
pool is never copied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh

from jaxinfer import runtime, sampling, slots
from jaxinfer.buckets import DecodeBucket, PrefillBucket
from jaxinfer.cache import KVCache
from jaxinfer.model import Batch, Rows, Transformer
from jaxinfer.sampling import SampleOutput
from jaxinfer.sharding import named
from jaxinfer.slots import SlotRow, SlotState


@dataclass(frozen=True)
class Programs:
    """What they are made of.

    graphdef, treedef: the model's static half, and the structure of its parameters (`nnx.split`). dtype: of activations and
    cache. max_num_seqs: slots. nobody: a row for a slot, for its shapes.
    """

    graphdef: nnx.GraphDef[Transformer]
    treedef: Any
    mesh: Mesh
    dtype: jnp.dtype
    max_num_seqs: int
    nobody: SlotRow

    def compile(
        self, bucket: DecodeBucket | PrefillBucket, leaves: list[Any], cache: KVCache, state: SlotState
    ) -> jax.stages.Compiled:
        """A bucket's program for these parameters, cache and slots: arrays, or their shapes and shardings.

        The state comes first among its results: JAX gives a donated buffer to the first result of its shape and dtype.
        """
        replicated = named(self.mesh, "")
        if isinstance(bucket, DecodeBucket):
            function = self._decode_program(bucket)
            shapes: list[tuple[int, ...]] = [(bucket.rows, 1 + bucket.pages)]
            out_shardings: tuple[Any, ...] = (shardings(state), shardings(cache), replicated)
        else:
            function = self._prefill_program(bucket)
            shapes = [(bucket.words,), slots.pack_rows([], [self.nobody], 1, self.max_num_seqs).shape]
            if bucket.decode_rows:
                shapes.append((bucket.decode_rows, 1 + bucket.pages))
            out_shardings = (shardings(state), shardings(cache), replicated, replicated)
        rows = [jax.ShapeDtypeStruct(shape, jnp.int32, sharding=replicated) for shape in shapes]
        options = runtime.compiler_options(self.mesh.devices.flat[0].platform)
        jitted = jax.jit(function, donate_argnums=(1, 2), out_shardings=out_shardings, compiler_options=options)
        # float32 means float32: a GPU's default for it is TF32, with 10 bits of mantissa.
        with jax.default_matmul_precision("highest" if self.dtype == jnp.float32 else "default"):
            return jitted.lower(leaves, cache, state, *rows).compile()

    def _model(self, leaves: list[jax.Array]) -> Transformer:
        return nnx.merge(self.graphdef, jax.tree.unflatten(self.treedef, leaves))

    def _to_decode(self, state: SlotState, rows: jax.Array) -> tuple[jax.Array, jax.Array, Rows]:
        """Of rows (slot, pages): the slots, each one's last token, and where that stands. Finished ones are padding."""
        slot_B, pages_BM = rows[:, 0], rows[:, 1:]
        real_B = slot_B < self.max_num_seqs
        at_B = jnp.where(real_B, slot_B, 0)
        active_B = real_B & ~state.finished_S[at_B]
        start_B = jnp.where(active_B, state.length_S[at_B] - 1, 0)
        return slot_B, state.token_S[at_B], Rows(pages_BM, start_B, active_B.astype(jnp.int32))

    def _decode_program(self, bucket: DecodeBucket) -> Callable[..., Any]:
        def decode(
            leaves: list[jax.Array], cache: KVCache, state: SlotState, rows: jax.Array
        ) -> tuple[SlotState, KVCache, SampleOutput]:
            model = self._model(leaves)

            def one(cache: KVCache, state: SlotState) -> tuple[SlotState, KVCache, SampleOutput]:
                slot_B, token_B, to_decode = self._to_decode(state, rows)
                hidden_BD, cache = model(token_B, cache, Batch(decode=to_decode))
                rows_B = (slot_B, to_decode.len_R > 0)
                if bucket.greedy:
                    output, state = sampling.greedy_sample(*model.argmax(hidden_BD), state, *rows_B, self.mesh)
                else:
                    output, state = sampling.sample(model.logits(hidden_BD), state, *rows_B, self.mesh)
                return state, cache, output

            if bucket.steps == 1:
                state, cache, output = one(cache, state)
                return state, cache, jax.tree.map(lambda x: x[None], output)

            def body(k: jax.Array, carry: Any) -> Any:
                state, cache, outputs = carry
                state, cache, output = one(cache, state)
                outputs = jax.tree.map(lambda all_, x: lax.dynamic_update_index_in_dim(all_, x, k, 0), outputs, output)
                return state, cache, outputs

            _, _, shapes = jax.eval_shape(one, cache, state)
            outputs = jax.tree.map(lambda x: jnp.zeros((bucket.steps, *x.shape), x.dtype), shapes)
            return lax.fori_loop(0, bucket.steps, body, (state, cache, outputs))

        return decode

    def _prefill_program(self, bucket: PrefillBucket) -> Callable[..., Any]:
        def prefill(
            leaves: list[jax.Array],
            cache: KVCache,
            state: SlotState,
            packed: jax.Array,
            admitted_AW: jax.Array,
            *decode_rows: jax.Array,
        ) -> tuple[SlotState, KVCache, SampleOutput, tuple[jax.Array, ...] | None]:
            model = self._model(leaves)
            state = slots.admit(state, *slots.unpack_rows(admitted_AW, self.nobody))
            rows_RN, token_T, next_T = bucket.split(packed)
            slot_R, offset_R, start_R, length_R, last_R = (rows_RN[:, i] for i in range(5))
            active_R = (slot_R < self.max_num_seqs) & (last_R > 0)
            batch = Batch(Rows(rows_RN[:, 5:], start_R, length_R, offset_R))
            if decode_rows:
                slot_B, token_B, to_decode = self._to_decode(state, *decode_rows)
                batch = Batch(batch.chunks, to_decode)
                token_T, slot_R = jnp.concatenate([token_T, token_B]), jnp.concatenate([slot_R, slot_B])
                active_R = jnp.concatenate([active_R, to_decode.len_R > 0])
            hidden_TD, cache = model(token_T, cache, batch, last_only=not bucket.prompt_logprobs)
            hidden_RD = hidden_TD[batch.last_tokens(len(token_T))[0]] if bucket.prompt_logprobs else hidden_TD
            output, state = sampling.sample(model.logits(hidden_RD), state, slot_R, active_R, self.mesh)
            prompt = None
            if bucket.prompt_logprobs:
                prompt = sampling.prompt_logprobs(model.logits(hidden_TD), next_T, self.mesh)
            return state, cache, output, prompt

        return prefill


def shardings(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, tree)
