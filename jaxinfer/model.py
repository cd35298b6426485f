"""The Transformer: one model for all families (Llama, Mistral, Qwen 2, Qwen 3), written in flax NNX.

NNX defines the parameters and is used to load them; the compiled steps take plain lists of arrays and merge them inside
(`nnx.merge` costs nothing there). Modules are built abstract: every parameter is a ShapeDtypeStruct with the letters of its
shape, from which `weights` reads how to shard it. Matrices are input-major, [in, out]: on an H200 XLA's products stream them
2.7 % faster at decode than the checkpoints' output-major order, in which `weights` reads them (`stored`).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jaxinfer import attention, cache, quant
from jaxinfer.cache import KVCache
from jaxinfer.config import ModelConfig
from jaxinfer.quant import QuantArray, product
from jaxinfer.sharding import Dims, named, padded_dims, spec
from pallas_kernels import add_rms_norm, decode_layer


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """Sequences of a step. Row r computes positions start_R[r] … start_R[r] + len_R[r] - 1, as the flat tokens from offset_R[r]
    on; len 0 is padding. pages_RM holds the row's pages in order; rows that write nothing hold zeros. Without offset_R every
    row has one place: flat token r."""

    pages_RM: jax.Array
    start_R: jax.Array
    len_R: jax.Array
    offset_R: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """A step's tokens: those of the chunks of prompts, row after row, then one of each sequence that decodes."""

    chunks: Rows | None = None
    decode: Rows | None = None

    def last_tokens(self, T: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Of every row of a step of T tokens: the flat place of its last token, its pages, and its length then."""
        B = 0 if self.decode is None else len(self.decode.start_R)
        found = []
        if self.chunks is not None and self.chunks.offset_R is not None:
            rows = self.chunks
            last_R = jnp.maximum(self.chunks.offset_R + rows.len_R - 1, 0)
            found.append((last_R, rows.pages_RM, rows.start_R + rows.len_R))
        if self.decode is not None:
            found.append((T - B + jnp.arange(B), self.decode.pages_RM, self.decode.start_R + self.decode.len_R))
        last, pages, length = (jnp.concatenate(parts) for parts in zip(*found, strict=True))
        return last, pages, length


@dataclass(frozen=True)
class Places:
    """Where a step's tokens stand: their places in the cache, and their rotary tables."""

    page_T: jax.Array
    slot_T: jax.Array  # within the page
    cos_Th: jax.Array
    sin_Th: jax.Array


def param(letters: str, shape: tuple[int, ...], dtype: jnp.dtype, stored: str | None = None) -> nnx.Param:
    """An abstract parameter that knows the letters of its shape (`sharding.spec(letters)` is its sharding), and the order of
    those letters in a checkpoint where it is another."""
    if len(letters) != len(shape) or sorted(stored or letters) != sorted(letters):
        raise ValueError(f"parameter of shape {shape} has letters {letters!r}, stored as {stored!r}")
    return nnx.Param(jax.ShapeDtypeStruct(shape, dtype), letters=letters, stored=stored or letters)


def rms_norm(x_TD: jax.Array, weight_D: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last axis, in float32 (Zhang & Sennrich 2019); returns x's dtype."""
    x = x_TD.astype(jnp.float32)
    x = x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return x.astype(x_TD.dtype) * weight_D


def add_norm(
    residual_TD: jax.Array, delta_TD: jax.Array, weight_D: jax.Array, eps: float, mesh: Mesh
) -> tuple[jax.Array, jax.Array]:
    """The residual stream with a half's delta added, and its norm, on every device: this is where XLA reduces the delta."""
    kernel = functools.partial(add_rms_norm.add_rms_norm, eps=eps)
    # Pinned both, also on one device: operands typed otherwise would make another kernel to compile.
    residual_TD, delta_TD = (lax.with_sharding_constraint(x_TD, named(mesh, "TD")) for x_TD in (residual_TD, delta_TD))
    if mesh.size == 1:
        return kernel(residual_TD, delta_TD, weight_D)
    everywhere = PartitionSpec()
    mapped = jax.shard_map(kernel, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False)
    return mapped(residual_TD, delta_TD, weight_D)


def matrix(
    letters: str,
    shape: tuple[int, ...],
    dtype: jnp.dtype,
    stored: str,
    quantization: str | None,
    mesh: Mesh,
    inputs: int = 1,
) -> nnx.Param:
    """An abstract parameter that a product reduces the first `inputs` axes of; quantized, where that is asked for."""
    if quantization is None:
        return param(letters, shape, dtype, stored)
    return nnx.Param(quant.abstract(letters, shape, inputs, dtype, mesh), letters=letters, stored=stored)


def head(V: int, D: int, dtype: jnp.dtype, quantization: str | None, mesh: Mesh) -> nnx.Param:
    """An abstract head of its own: output-major as the embedding that others share, but input-major where it is quantized."""
    if quantization is None:
        return param("VD", (V, D), dtype)
    return nnx.Param(quant.abstract("DV", (D, V), 1, dtype, mesh), letters="VD", stored="VD")


def spec_of(param: nnx.Param) -> PartitionSpec:
    """How a parameter lies over the mesh, plain or quantized."""
    value = param.get_value()
    return value.spec if isinstance(value, QuantArray) else spec(param.letters)


class Attention(nnx.Module):
    """The attention half of a block: from the residual stream to what is to be added to it."""

    def __init__(
        self, config: ModelConfig, dims: Dims, mesh: Mesh, dtype: jnp.dtype, window: int | None, quantization: str | None
    ):
        K, G, H, D = dims.K, dims.G, config.head_dim, config.hidden_size
        # J: the group's G query heads, its key, its value.
        self.qkv_DKJH = matrix("DKJH", (D, K, G + 2, H), dtype, "KJHD", quantization, mesh)
        self.qkv_bias_KJH = param("KJH", (K, G + 2, H), dtype) if config.qkv_bias else None
        self.q_norm_H = param("H", (H,), dtype) if config.qk_norm else None
        self.k_norm_H = param("H", (H,), dtype) if config.qk_norm else None
        self.o_KGHD = matrix("KGHD", (K, G, H, D), dtype, "DKGH", quantization, mesh, inputs=3)
        self.G, self.eps, self.window, self.mesh = G, config.rms_norm_eps, window, mesh

    def __call__(
        self, x_TD: jax.Array, keys_XKPH: jax.Array, values_XKPH: jax.Array, batch: Batch, places: Places, last_only: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """`last_only`: all keys and values are written, but only each row's last token attends."""
        qkv_TKJH = product(x_TD, self.qkv_DKJH.get_value())
        if self.qkv_bias_KJH is not None:
            qkv_TKJH += self.qkv_bias_KJH.get_value()
        P, H = keys_XKPH.shape[2:]
        # Decode alone, where it applies: rotation, the cache's writes and attention in one kernel.
        alone = batch.decode if batch.chunks is None and self.q_norm_H is None else None
        if alone is not None and attention.appends(x_TD.dtype, self.G, H, P):
            length_B = alone.start_R + alone.len_R
            small = (places.cos_Th, places.sin_Th, keys_XKPH, values_XKPH, alone.pages_RM, length_B, self.window, self.mesh)
            out, keys_XKPH, values_XKPH = attention.append_and_attend(qkv_TKJH, *small)
            return product(out.reshape(len(out), -1), self.o_KGHD.get_value()), keys_XKPH, values_XKPH
        q_TKGH, k_TK1H, v_TK1H = jnp.split(qkv_TKJH, [self.G, self.G + 1], axis=2)
        if self.q_norm_H is not None and self.k_norm_H is not None:
            q_TKGH = rms_norm(q_TKGH, self.q_norm_H.get_value(), self.eps)
            k_TK1H = rms_norm(k_TK1H, self.k_norm_H.get_value(), self.eps)
        # Apart, so that the keys' rotation fuses with their write and the kernel's queries need no copy.
        q_TKGH = attention.rope(q_TKGH, places.cos_Th, places.sin_Th)
        k_TKH = attention.rope(k_TK1H, places.cos_Th, places.sin_Th)[:, :, 0]
        keys_XKPH = cache.write(keys_XKPH, k_TKH, places.page_T, places.slot_T)
        values_XKPH = cache.write(values_XKPH, v_TK1H[:, :, 0], places.page_T, places.slot_T)
        kv, outs, T = (keys_XKPH, values_XKPH), [], len(x_TD)
        if last_only:
            last_R, pages_RM, length_R = batch.last_tokens(T)
            outs = [attention.attend_one(q_TKGH[last_R], *kv, pages_RM, length_R, self.window, self.mesh)]
        else:
            B = 0 if batch.decode is None else len(batch.decode.start_R)
            if (rows := batch.chunks) is not None and rows.offset_R is not None:
                places_R = (rows.pages_RM, rows.offset_R, rows.start_R, rows.len_R)
                outs.append(attention.attend_chunks(q_TKGH[: T - B], *kv, *places_R, self.window, self.mesh))
            if (rows := batch.decode) is not None:
                length_B = rows.start_R + rows.len_R
                outs.append(attention.attend_one(q_TKGH[T - B :], *kv, rows.pages_RM, length_B, self.window, self.mesh))
        out = outs[0] if len(outs) == 1 else jnp.concatenate(outs)
        return product(out.reshape(len(out), -1), self.o_KGHD.get_value()), keys_XKPH, values_XKPH


class MLP(nnx.Module):
    """The gated half of a block (SwiGLU, Shazeer 2020)."""

    def __init__(self, config: ModelConfig, dims: Dims, mesh: Mesh, dtype: jnp.dtype, quantization: str | None):
        D, F = config.hidden_size, dims.F
        # C: gate, up; side by side, so that a shard has both.
        self.gate_up_DFC = matrix("DFC", (D, F, 2), dtype, "FCD", quantization, mesh)
        self.down_FD = matrix("FD", (F, D), dtype, "DF", quantization, mesh)
        self.mesh = mesh

    def __call__(self, x_TD: jax.Array) -> jax.Array:
        h_TF = quant.gated(x_TD, self.gate_up_DFC.get_value(), self.mesh)
        return product(h_TF, self.down_FD.get_value())


class Block(nnx.Module):
    """Two halves, each from the residual stream back to it; each ends where tensor parallelism reduces."""

    def __init__(
        self, config: ModelConfig, dims: Dims, mesh: Mesh, dtype: jnp.dtype, window: int | None, quantization: str | None
    ):
        self.attn_norm_D = param("D", (config.hidden_size,), dtype)
        self.attn = Attention(config, dims, mesh, dtype, window, quantization)
        self.mlp_norm_D = param("D", (config.hidden_size,), dtype)
        self.mlp = MLP(config, dims, mesh, dtype, quantization)
        self.eps = config.rms_norm_eps

    def params(self) -> dict[str, nnx.Param]:
        """The block's parameters by their names in decode_layer.Layer."""
        attn, mlp = self.attn, self.mlp
        bias = {} if attn.qkv_bias_KJH is None else {"bias_O": attn.qkv_bias_KJH}
        weights = dict(qkv=attn.qkv_DKJH, o=attn.o_KGHD, gate_up=mlp.gate_up_DFC, down=mlp.down_FD)
        return dict(norm_D=self.attn_norm_D, mlp_norm_D=self.mlp_norm_D, **weights, **bias)

    def runs_as_kernels(self, rows: int, dtype: jnp.dtype, page: tuple[int, ...]) -> bool:
        """Whether decode of so many rows runs the block as one kernel, or as two on each of several devices: where that was
        measured to win, and applies."""
        if self.attn.q_norm_H is not None:  # which the kernels do not have
            return False
        layer = as_layer({name: param.get_value() for name, param in self.params().items()})
        return decode_layer.wins(rows, dtype, layer, page, self.attn.mesh.size)


def as_layer(values: dict[str, Any]) -> decode_layer.Layer:
    """Values of a block's parameters, whole or a device's shards, as pallas_kernels.decode_layer takes them; None for a matrix
    that it cannot take."""
    norms = {name: values[name] for name in ("norm_D", "mlp_norm_D")}
    weights = {name: quant.kernel_weight(values[name], 3 if name == "o" else 1) for name in ("qkv", "o", "gate_up", "down")}
    return decode_layer.Layer(**norms, **weights, bias_O=values["bias_O"].reshape(-1) if "bias_O" in values else None)


class Transformer(nnx.Module):
    """The decoder-only Transformer, its embedding and its head, laid out for a mesh.

    Args:
        config: the checkpoint's shape.
        mesh: the mesh of `sharding.make_mesh`; sizes are padded to it (`sharding.padded_dims`).
        dtype: of parameters and activations; norms, softmax, rotary tables and logits are float32 inside.
        quantization: "int8" for the blocks' matrices and a head of its own; None.
    """

    def __init__(self, config: ModelConfig, mesh: Mesh, dtype: jnp.dtype, quantization: str | None = None):
        dims = padded_dims(config, mesh.size)
        self.embed_VD = param("VD", (dims.V, config.hidden_size), dtype)
        self.blocks = nnx.List([Block(config, dims, mesh, dtype, window, quantization) for window in config.sliding_windows])
        self.final_norm_D = param("D", (config.hidden_size,), dtype)
        own = not config.tie_word_embeddings
        self.lm_head_VD = head(dims.V, config.hidden_size, dtype, quantization, mesh) if own else None
        self.config, self.dims, self.mesh = config, dims, mesh

    def __call__(self, token_T: jax.Array, kv: KVCache, batch: Batch, last_only: bool = False) -> tuple[jax.Array, KVCache]:
        """Run tokens through all blocks, writing their keys and values.

        last_only: only each row's last token is wanted, so the last block computes no more of the others than keys and values:
            a thirty-second of the products of Llama-3-8B's prefill.

        Returns:
            The last hidden states, not yet normed, [T, D], or [R, D] of each row's last token; and the cache.
        """
        last_only &= batch.chunks is not None  # a decode row has but one
        places = self.places(batch, len(token_T), kv.keys[0].shape[2])
        residual_TD = self.replicate(self.embed(token_T))
        page, dtype = kv.keys[0].shape[1:], residual_TD.dtype
        if batch.chunks is None and all(block.runs_as_kernels(len(token_T), dtype, page) for block in self.blocks):
            return self.decode(residual_TD, kv, batch.decode, places)
        keys, values = list(kv.keys), list(kv.values)
        delta_TD: jax.Array | None = None  # what the half before adds to the residual stream
        for i, block in enumerate(self.blocks):
            with jax.named_scope(f"block{i}"):
                cut = last_only and i == len(self.blocks) - 1
                norm_D = block.attn_norm_D.get_value()
                if delta_TD is None:
                    x_TD = rms_norm(residual_TD, norm_D, block.eps)
                else:
                    residual_TD, x_TD = add_norm(residual_TD, delta_TD, norm_D, block.eps, self.mesh)
                delta_TD, keys[i], values[i] = block.attn(x_TD, keys[i], values[i], batch, places, cut)
                if cut:
                    residual_TD = residual_TD[batch.last_tokens(len(token_T))[0]]
                residual_TD, x_TD = add_norm(residual_TD, delta_TD, block.mlp_norm_D.get_value(), block.eps, self.mesh)
                delta_TD = block.mlp(x_TD)
        assert delta_TD is not None  # a model has layers
        return self.replicate(residual_TD + delta_TD), KVCache(tuple(keys), tuple(values))

    def decode(self, residual_BD: jax.Array, kv: KVCache, rows: Rows | None, places: Places) -> tuple[jax.Array, KVCache]:
        """All blocks of a decode step in a few kernels, or two a block on each of several devices, with a sum over these after
        each."""
        assert rows is not None
        params = [block.params() for block in self.blocks]
        blocks = [{name: param.get_value() for name, param in block.items()} for block in params]
        small = (places.cos_Th, places.sin_Th, rows.pages_RM, rows.start_R + rows.len_R)
        run: Callable[..., Any] = self._run_blocks
        if self.mesh.size > 1:
            whole, pages = PartitionSpec(), [spec("XKPH")] * len(params)
            specs = [{name: spec_of(param) for name, param in block.items()} for block in params]
            ins, outs = (whole, specs, pages, pages, *[whole] * len(small)), (whole, pages, pages)
            run = jax.shard_map(run, mesh=self.mesh, in_specs=ins, out_specs=outs, check_vma=False)
        residual_BD, keys, values = run(self.replicate(residual_BD), blocks, list(kv.keys), list(kv.values), *small)
        return residual_BD, KVCache(tuple(keys), tuple(values))

    def _run_blocks(
        self,
        residual_BD: jax.Array,
        blocks: list[dict[str, Any]],
        keys: list[jax.Array],
        values: list[jax.Array],
        cos_Bh: jax.Array,
        sin_Bh: jax.Array,
        pages_BM: jax.Array,
        length_B: jax.Array,
    ) -> tuple[jax.Array, list[jax.Array], list[jax.Array]]:
        """`decode` on one device, of its shards of each block's parameters and cache: blocks next to one another that are alike
        go together."""
        layers, sync, first = [as_layer(block) for block in blocks], None, 0
        reduce = None if self.mesh.size == 1 else (lambda delta_BD: lax.psum(delta_BD, "tp"))
        for window, alike in itertools.groupby(block.attn.window for block in self.blocks):
            here = slice(first, first + len(list(alike)))
            first = here.stop
            cache = (cos_Bh, sin_Bh, keys[here], values[here], pages_BM, length_B)
            if self.mesh.size == 1:
                residual_BD = self.replicate(residual_BD)  # typed as at first: else another kernel to compile
            with jax.named_scope(f"blocks{here.start}to{here.stop - 1}"):
                residual_BD, keys[here], values[here], sync = decode_layer.layers(
                    residual_BD, layers[here], *cache, sync, eps=self.config.rms_norm_eps, window=window, reduce=reduce
                )
        # The last launch's sync is wanted as little as the others', but were it dropped, that launch would be another kernel.
        residual_BD, _ = lax.optimization_barrier((residual_BD, sync))
        return residual_BD, keys, values

    def _at_head(self, hidden_BD: jax.Array) -> tuple[jax.Array, jax.Array | QuantArray]:
        """The hidden states after the final norm, and the head."""
        x_BD = rms_norm(hidden_BD, self.final_norm_D.get_value(), self.config.rms_norm_eps)
        return x_BD, (self.embed_VD if self.lm_head_VD is None else self.lm_head_VD).get_value()

    def logits(self, hidden_BD: jax.Array) -> jax.Array:
        """Final norm and head: float32 [B, V], sharded over the vocabulary, padding at -inf."""
        x_BD, head_VD = self._at_head(hidden_BD)
        if isinstance(head_VD, QuantArray):
            logits_BV = product(x_BD, head_VD, jnp.float32)
        else:
            logits_BV = jnp.einsum("BD,VD->BV", x_BD, head_VD, preferred_element_type=jnp.float32)
        if self.config.vocab_size < self.dims.V:
            logits_BV = jnp.where(jnp.arange(self.dims.V) < self.config.vocab_size, logits_BV, -jnp.inf)
        return lax.with_sharding_constraint(logits_BV, named(self.mesh, "BV"))

    def argmax(self, hidden_BD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of each device's part of the vocabulary the largest logit, float32, and its token, int32: each [B, devices], sharded
        as logits are. Of equal logits the lowest id, and NaN counts as -inf. Where pallas_kernels.lm_head runs, no logits are
        written. hidden_BD: not yet normed, as for `logits`."""
        x_BD, head = self._at_head(hidden_BD)
        if self.mesh.size == 1:
            value_B, id_B = quant.argmax(x_BD, head, self.config.vocab_size)
            return value_B[:, None], id_B[:, None]

        def of_shard(x_BD: jax.Array, head: jax.Array | QuantArray) -> tuple[jax.Array, jax.Array]:
            share = self.dims.V // self.mesh.size
            offset = lax.axis_index("tp") * share
            value_B, id_B = quant.argmax(x_BD, head, jnp.clip(self.config.vocab_size - offset, 0, share))
            return value_B[:, None], id_B[:, None] + offset

        specs = (PartitionSpec(), head.spec if isinstance(head, QuantArray) else spec("VD"))
        out = (spec("BV"), spec("BV"))
        return jax.shard_map(of_shard, mesh=self.mesh, in_specs=specs, out_specs=out, check_vma=False)(x_BD, head)

    def embed(self, token_T: jax.Array) -> jax.Array:
        """Vocabulary-parallel lookup: each device looks up its own rows and zeros, and the sum is the embedding.

        (A plain gather on the sharded table would make the partitioner gather the whole table.)
        """

        def lookup(table_vD: jax.Array, token_T: jax.Array) -> jax.Array:
            local_T = token_T - lax.axis_index("tp") * table_vD.shape[0]
            mine_T = (local_T >= 0) & (local_T < table_vD.shape[0])
            rows_TD = table_vD.at[jnp.where(mine_T, local_T, 0)].get(mode="promise_in_bounds")
            return lax.psum(jnp.where(mine_T[:, None], rows_TD, 0), "tp")

        table_VD = self.embed_VD.get_value()
        if self.mesh.size == 1:
            return table_VD.at[token_T].get(mode="promise_in_bounds")
        return jax.shard_map(lookup, mesh=self.mesh, in_specs=(spec("VD"), spec("T")), out_specs=spec("TD"))(table_VD, token_T)

    def places(self, batch: Batch, T: int, page_size: int) -> Places:
        """Places in the cache and rotary tables of a step's tokens; padding tokens write to page 0."""
        found = []
        B = 0 if batch.decode is None else len(batch.decode.start_R)
        if (rows := batch.chunks) is not None and rows.offset_R is not None:
            t = jnp.arange(T - B)
            row_T = jnp.maximum(jnp.sum(t[:, None] >= rows.offset_R, axis=1) - 1, 0)  # the last row that begins by then
            within_T = t - rows.offset_R[row_T]
            position_T = rows.start_R[row_T] + within_T
            index_T = jnp.minimum(position_T // page_size, rows.pages_RM.shape[1] - 1)
            found.append((position_T, within_T < rows.len_R[row_T], rows.pages_RM[row_T, index_T]))
        if (rows := batch.decode) is not None:
            index_B = jnp.minimum(rows.start_R // page_size, rows.pages_RM.shape[1] - 1)
            page_B = jnp.take_along_axis(rows.pages_RM, index_B[:, None], axis=1, mode="promise_in_bounds")[:, 0]
            found.append((rows.start_R, rows.len_R > 0, page_B))
        position_T, real_T, page_T = found[0] if len(found) == 1 else (jnp.concatenate(x) for x in zip(*found, strict=True))
        rope = self.config.rope
        cos, sin = attention.rope_tables(position_T, rope.inv_freq(self.config.head_dim), rope.attention_scaling)
        return Places(jnp.where(real_T, page_T, 0), position_T % page_size, cos, sin)

    def replicate(self, x_TD: jax.Array) -> jax.Array:
        """Pin the residual stream to every device: this is where XLA puts the all-reduce."""
        return lax.with_sharding_constraint(x_TD, named(self.mesh, "TD"))
