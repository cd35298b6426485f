"""The Transformer: one model for all families (Llama, Mistral, Qwen 2, Qwen 3), written in flax NNX.

NNX defines the parameters and is used to load them; the compiled steps take plain lists of arrays and merge them inside
(`nnx.merge` costs nothing there). Modules are built abstract: every parameter is a ShapeDtypeStruct with the letters of its
shape, from which `weights` reads how to shard it. Matrices are input-major, [in, out]: on an H200 XLA's products stream them
2.7 % faster at decode than the checkpoints' output-major order, in which `weights` reads them (`stored`).
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh

from jaxinfer import attention, cache
from jaxinfer.cache import KVCache
from jaxinfer.config import ModelConfig
from jaxinfer.sharding import Dims, named, padded_dims, spec


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """What a step needs to know of its rows. Row b computes tokens at positions start_B[b] … start_B[b] + len_B[b] - 1;
    len 0 is padding. pages_BM holds the row's pages in order; rows that write nothing hold zeros."""

    pages_BM: jax.Array
    start_B: jax.Array
    len_B: jax.Array


@dataclass(frozen=True)
class Places:
    """Where a step's tokens stand: their positions, their places in the cache, and their rotary tables."""

    pages_BM: jax.Array
    length_B: jax.Array
    position_BT: jax.Array
    page_BT: jax.Array
    offset_BT: jax.Array
    cos_BTh: jax.Array
    sin_BTh: jax.Array


def param(letters: str, shape: tuple[int, ...], dtype: jnp.dtype, stored: str | None = None) -> nnx.Param:
    """An abstract parameter that knows the letters of its shape (`sharding.spec(letters)` is its sharding), and the order of
    those letters in a checkpoint where it is another."""
    if len(letters) != len(shape) or sorted(stored or letters) != sorted(letters):
        raise ValueError(f"parameter of shape {shape} has letters {letters!r}, stored as {stored!r}")
    return nnx.Param(jax.ShapeDtypeStruct(shape, dtype), letters=letters, stored=stored or letters)


def rms_norm(x_BTD: jax.Array, weight_D: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last axis, in float32 (Zhang & Sennrich 2019); returns x's dtype."""
    x = x_BTD.astype(jnp.float32)
    x = x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return x.astype(x_BTD.dtype) * weight_D


def product(x_BTI: jax.Array, weight_IO: jax.Array) -> jax.Array:
    """x times an input-major weight [I, O…], as one plain matrix product: [B, T, O…].

    Flattened, because XLA transposes or mistiles weights of more axes (measured on H200: 19 us a layer for `o`); the
    sharded axis comes first of what is flattened, so that a shard of the flat axis is a shard of the weight.
    """
    out_BTO = jnp.einsum("BTI,IO->BTO", x_BTI, weight_IO.reshape(weight_IO.shape[0], -1))
    return out_BTO.reshape(*x_BTI.shape[:2], *weight_IO.shape[1:])


class Attention(nnx.Module):
    """The attention half of a block: from the residual stream to what is to be added to it."""

    def __init__(self, config: ModelConfig, dims: Dims, mesh: Mesh, dtype: jnp.dtype, window: int | None):
        K, G, H, D = dims.K, dims.G, config.head_dim, config.hidden_size
        # J: the group's G query heads, its key, its value.
        self.qkv_DKJH = param("DKJH", (D, K, G + 2, H), dtype, stored="KJHD")
        self.qkv_bias_KJH = param("KJH", (K, G + 2, H), dtype) if config.qkv_bias else None
        self.q_norm_H = param("H", (H,), dtype) if config.qk_norm else None
        self.k_norm_H = param("H", (H,), dtype) if config.qk_norm else None
        self.o_KGHD = param("KGHD", (K, G, H, D), dtype, stored="DKGH")
        self.G, self.eps, self.window, self.mesh = G, config.rms_norm_eps, window, mesh

    def __call__(
        self, x_BTD: jax.Array, keys_XKPH: jax.Array, values_XKPH: jax.Array, places: Places
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        qkv_BTKJH = product(x_BTD, self.qkv_DKJH.get_value())
        if self.qkv_bias_KJH is not None:
            qkv_BTKJH += self.qkv_bias_KJH.get_value()
        G = self.G
        qk_BTKjH, v_BTKH = qkv_BTKJH[..., : G + 1, :], qkv_BTKJH[..., G + 1, :]
        if self.q_norm_H is not None and self.k_norm_H is not None:
            q_BTKGH = rms_norm(qk_BTKjH[..., :G, :], self.q_norm_H.get_value(), self.eps)
            k_BTK1H = rms_norm(qk_BTKjH[..., G:, :], self.k_norm_H.get_value(), self.eps)
            qk_BTKjH = jnp.concatenate([q_BTKGH, k_BTK1H], axis=-2)
        qk_BTKjH = attention.rope(qk_BTKjH, places.cos_BTh, places.sin_BTh)  # together: one kernel instead of two
        q_BTKGH, k_BTKH = qk_BTKjH[..., :G, :], qk_BTKjH[..., G, :]
        keys_XKPH = cache.write(keys_XKPH, k_BTKH, places.page_BT, places.offset_BT)
        values_XKPH = cache.write(values_XKPH, v_BTKH, places.page_BT, places.offset_BT)
        B, T, _, _, H = q_BTKGH.shape
        args = (keys_XKPH, values_XKPH, places.pages_BM)
        if T == 1 and attention.has_decode_kernel(q_BTKGH.dtype, G, H, keys_XKPH.shape[2]):
            out = attention.attend_one(q_BTKGH[:, 0], *args, places.length_B, self.window, self.mesh)
        else:
            out = attention.attend(q_BTKGH, *args, places.position_BT, places.length_B, self.window)
        o_ID = self.o_KGHD.get_value().reshape(-1, x_BTD.shape[-1])
        return product(out.reshape(B, T, -1), o_ID), keys_XKPH, values_XKPH


class MLP(nnx.Module):
    """The gated half of a block (SwiGLU, Shazeer 2020)."""

    def __init__(self, config: ModelConfig, dims: Dims, dtype: jnp.dtype):
        D, F = config.hidden_size, dims.F
        # C: gate, up; side by side, so that a shard has both.
        self.gate_up_DFC = param("DFC", (D, F, 2), dtype, stored="FCD")
        self.down_FD = param("FD", (F, D), dtype, stored="DF")

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        gate_up_BTFC = product(x_BTD, self.gate_up_DFC.get_value())
        h_BTF = jax.nn.silu(gate_up_BTFC[..., 0]) * gate_up_BTFC[..., 1]
        return product(h_BTF, self.down_FD.get_value())


class Block(nnx.Module):
    """Two halves, each from the residual stream back to it; each ends where tensor parallelism reduces."""

    def __init__(self, config: ModelConfig, dims: Dims, mesh: Mesh, dtype: jnp.dtype, window: int | None):
        self.attn_norm_D = param("D", (config.hidden_size,), dtype)
        self.attn = Attention(config, dims, mesh, dtype, window)
        self.mlp_norm_D = param("D", (config.hidden_size,), dtype)
        self.mlp = MLP(config, dims, dtype)
        self.eps = config.rms_norm_eps


class Transformer(nnx.Module):
    """The decoder-only Transformer, its embedding and its head, laid out for a mesh.

    Args:
        config: the checkpoint's shape.
        mesh: the mesh of `sharding.make_mesh`; sizes are padded to it (`sharding.padded_dims`).
        dtype: of parameters and activations; norms, softmax, rotary tables and logits are float32 inside.
    """

    def __init__(self, config: ModelConfig, mesh: Mesh, dtype: jnp.dtype):
        dims = padded_dims(config, mesh.size)
        self.embed_VD = param("VD", (dims.V, config.hidden_size), dtype)
        self.blocks = nnx.List([Block(config, dims, mesh, dtype, window) for window in config.sliding_windows])
        self.final_norm_D = param("D", (config.hidden_size,), dtype)
        self.lm_head_VD = None if config.tie_word_embeddings else param("VD", (dims.V, config.hidden_size), dtype)
        self.config, self.dims, self.mesh = config, dims, mesh

    def __call__(self, token_BT: jax.Array, kv: KVCache, batch: Batch) -> tuple[jax.Array, KVCache]:
        """Run tokens through all blocks, writing their keys and values.

        Returns:
            The last hidden states [B, T, D], not yet normed, and the cache.
        """
        places = self.places(batch, token_BT.shape[1], kv.keys[0].shape[2])
        residual_BTD = self.replicate(self.embed(token_BT))
        keys, values = list(kv.keys), list(kv.values)
        for i, block in enumerate(self.blocks):
            with jax.named_scope(f"block{i}"):
                x_BTD = rms_norm(residual_BTD, block.attn_norm_D.get_value(), block.eps)
                delta_BTD, keys[i], values[i] = block.attn(x_BTD, keys[i], values[i], places)
                residual_BTD = self.replicate(residual_BTD + delta_BTD)
                x_BTD = rms_norm(residual_BTD, block.mlp_norm_D.get_value(), block.eps)
                residual_BTD = self.replicate(residual_BTD + block.mlp(x_BTD))
        return residual_BTD, KVCache(tuple(keys), tuple(values))

    def logits(self, hidden_BD: jax.Array) -> jax.Array:
        """Final norm and head: float32 [B, V], sharded over the vocabulary, padding at -inf."""
        x_BD = rms_norm(hidden_BD, self.final_norm_D.get_value(), self.config.rms_norm_eps)
        head_VD = (self.embed_VD if self.lm_head_VD is None else self.lm_head_VD).get_value()
        logits_BV = jnp.einsum("BD,VD->BV", x_BD, head_VD, preferred_element_type=jnp.float32)
        if self.config.vocab_size < self.dims.V:
            logits_BV = jnp.where(jnp.arange(self.dims.V) < self.config.vocab_size, logits_BV, -jnp.inf)
        return lax.with_sharding_constraint(logits_BV, named(self.mesh, "BV"))

    def embed(self, token_BT: jax.Array) -> jax.Array:
        """Vocabulary-parallel lookup: each device looks up its own rows and zeros, and the sum is the embedding.

        (A plain gather on the sharded table would make the partitioner gather the whole table.)
        """

        def lookup(table_vD: jax.Array, token_BT: jax.Array) -> jax.Array:
            local_BT = token_BT - lax.axis_index("tp") * table_vD.shape[0]
            mine_BT = (local_BT >= 0) & (local_BT < table_vD.shape[0])
            rows_BTD = table_vD.at[jnp.where(mine_BT, local_BT, 0)].get(mode="promise_in_bounds")
            return lax.psum(jnp.where(mine_BT[..., None], rows_BTD, 0), "tp")

        table_VD = self.embed_VD.get_value()
        if self.mesh.size == 1:
            return table_VD.at[token_BT].get(mode="promise_in_bounds")
        return jax.shard_map(lookup, mesh=self.mesh, in_specs=(spec("VD"), spec("BT")), out_specs=spec("BTD"))(
            table_VD, token_BT
        )

    def places(self, batch: Batch, T: int, page_size: int) -> Places:
        """Positions, cache places and rotary tables of a step's tokens; padding tokens write to page 0."""
        t = jnp.arange(T)
        position_BT = batch.start_B[:, None] + t
        index_BT = jnp.minimum(position_BT // page_size, batch.pages_BM.shape[1] - 1)
        page_BT = jnp.take_along_axis(batch.pages_BM, index_BT, axis=1, mode="promise_in_bounds")
        rope = self.config.rope
        cos, sin = attention.rope_tables(position_BT, rope.inv_freq(self.config.head_dim), rope.attention_scaling)
        return Places(
            pages_BM=batch.pages_BM,
            length_B=batch.start_B + batch.len_B,
            position_BT=position_BT,
            page_BT=jnp.where(t < batch.len_B[:, None], page_BT, 0),
            offset_BT=position_BT % page_size,
            cos_BTh=cos,
            sin_BTh=sin,
        )

    def replicate(self, x_BTD: jax.Array) -> jax.Array:
        """Pin the residual stream to every device: this is where XLA puts the all-reduce."""
        return lax.with_sharding_constraint(x_BTD, named(self.mesh, "BTD"))
