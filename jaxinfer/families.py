"""The supported model families: what tells them apart, and what their checkpoints call each tensor.

A table row adds a family. Everything here is plain data; nothing imports jax.

Logical names are ours. `TOP_NAMES` occur once, `LAYER_NAMES` once a layer, where `{i}` in the checkpoint's name stands
for the layer. A family's table holds only the tensors it has (no `q_bias` for Llama); `lm_head` is in every table, and
absent from a checkpoint whose head is tied to the embedding.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

TOP_NAMES = ("embed", "final_norm", "lm_head")
_ATTENTION_BIASES = ("q_bias", "k_bias", "v_bias")
_HEAD_NORMS = ("q_norm", "k_norm")
LAYER_NAMES = (
    *("attn_norm", "q", "k", "v", "o"),
    *_ATTENTION_BIASES,
    *_HEAD_NORMS,
    *("mlp_norm", "gate", "up", "down"),
)

_HF_NAMES = {
    "embed": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "lm_head": "lm_head.weight",
    "attn_norm": "model.layers.{i}.input_layernorm.weight",
    "q": "model.layers.{i}.self_attn.q_proj.weight",
    "k": "model.layers.{i}.self_attn.k_proj.weight",
    "v": "model.layers.{i}.self_attn.v_proj.weight",
    "o": "model.layers.{i}.self_attn.o_proj.weight",
    "q_bias": "model.layers.{i}.self_attn.q_proj.bias",
    "k_bias": "model.layers.{i}.self_attn.k_proj.bias",
    "v_bias": "model.layers.{i}.self_attn.v_proj.bias",
    "q_norm": "model.layers.{i}.self_attn.q_norm.weight",
    "k_norm": "model.layers.{i}.self_attn.k_norm.weight",
    "mlp_norm": "model.layers.{i}.post_attention_layernorm.weight",
    "gate": "model.layers.{i}.mlp.gate_proj.weight",
    "up": "model.layers.{i}.mlp.up_proj.weight",
    "down": "model.layers.{i}.mlp.down_proj.weight",
}

_GGUF_NAMES = {
    "embed": "token_embd.weight",
    "final_norm": "output_norm.weight",
    "lm_head": "output.weight",
    "attn_norm": "blk.{i}.attn_norm.weight",
    "q": "blk.{i}.attn_q.weight",
    "k": "blk.{i}.attn_k.weight",
    "v": "blk.{i}.attn_v.weight",
    "o": "blk.{i}.attn_output.weight",
    "q_bias": "blk.{i}.attn_q.bias",
    "k_bias": "blk.{i}.attn_k.bias",
    "v_bias": "blk.{i}.attn_v.bias",
    "q_norm": "blk.{i}.attn_q_norm.weight",
    "k_norm": "blk.{i}.attn_k_norm.weight",
    "mlp_norm": "blk.{i}.ffn_norm.weight",
    "gate": "blk.{i}.ffn_gate.weight",
    "up": "blk.{i}.ffn_up.weight",
    "down": "blk.{i}.ffn_down.weight",
}


def _names(table: Mapping[str, str], qkv_bias: bool, qk_norm: bool) -> dict[str, str]:
    absent = (() if qkv_bias else _ATTENTION_BIASES) + (() if qk_norm else _HEAD_NORMS)
    return {name: text for name, text in table.items() if name not in absent}


@dataclass(frozen=True)
class Family:
    """One architecture.

    `defaults` are the values that transformers' configuration class gives to keys a config.json leaves out (the tests
    compare them). `window` says which layers a sliding window applies to: "none" (the family has no such key), "all",
    or "layers" (by `use_sliding_window`, `max_window_layers` and `layer_types`).
    """

    architecture: str
    model_type: str
    qkv_bias: bool
    qk_norm: bool
    window: str
    defaults: Mapping[str, Any]

    @property
    def tensors(self) -> dict[str, str]:
        """Logical name → name in a Hugging Face checkpoint, `{i}` standing for the layer."""
        return _names(_HF_NAMES, self.qkv_bias, self.qk_norm)


_COMMON: dict[str, Any] = {
    "num_key_value_heads": None,  # None: as many as query heads
    "head_dim": None,  # None: hidden_size // num_attention_heads
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}
_QWEN: dict[str, Any] = {
    **_COMMON,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}

FAMILIES: dict[str, Family] = {
    family.architecture: family
    for family in (
        Family(
            architecture="LlamaForCausalLM",
            model_type="llama",
            qkv_bias=False,
            qk_norm=False,
            window="none",
            defaults={**_COMMON, "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
        ),
        Family(
            architecture="MistralForCausalLM",
            model_type="mistral",
            qkv_bias=False,
            qk_norm=False,
            window="all",
            defaults={
                **_COMMON,
                "num_key_value_heads": 8,
                "max_position_embeddings": 131072,
                "sliding_window": 4096,
                "bos_token_id": 1,
                "eos_token_id": 2,
            },
        ),
        Family(
            architecture="Qwen2ForCausalLM",
            model_type="qwen2",
            qkv_bias=True,
            qk_norm=False,
            window="layers",
            defaults=_QWEN,
        ),
        Family(
            architecture="Qwen3ForCausalLM",
            model_type="qwen3",
            qkv_bias=False,
            qk_norm=True,
            window="layers",
            defaults={**_QWEN, "head_dim": 128},
        ),
    )
}


@dataclass(frozen=True)
class GGUFArchitecture:
    """What a GGUF file's `general.architecture` stands for.

    `permuted_qk`: the file stores each q and k head with its rotary halves interleaved (x0 y0 x1 y1 … for
    x0 x1 … y0 y1 …), as llama.cpp's converter writes `llama`; the loader has to undo it.
    """

    architecture: str
    permuted_qk: bool
    tensors: dict[str, str] = field(repr=False)


def _gguf(architecture: str, permuted_qk: bool) -> GGUFArchitecture:
    family = FAMILIES[architecture]
    return GGUFArchitecture(architecture, permuted_qk, _names(_GGUF_NAMES, family.qkv_bias, family.qk_norm))


GGUF_ARCHITECTURES: dict[str, GGUFArchitecture] = {
    "llama": _gguf("LlamaForCausalLM", permuted_qk=True),
    "qwen2": _gguf("Qwen2ForCausalLM", permuted_qk=False),
    "qwen3": _gguf("Qwen3ForCausalLM", permuted_qk=False),
}

SUPPORTED_ARCHITECTURES = tuple(FAMILIES)
SUPPORTED_GGUF_ARCHITECTURES = tuple(GGUF_ARCHITECTURES)

# llama.cpp keeps the scaling of Llama 3.1's rotary frequencies in this tensor, not in the metadata: the divisor of each
# frequency, [head_dim // 2] float32. ModelConfig.from_gguf takes it.
GGUF_ROPE_FREQS = "rope_freqs.weight"

# Tensors that old checkpoints carry and no model reads: the rotary frequencies follow from the config.
IGNORABLE_TENSORS = ("*.rotary_emb.inv_freq", GGUF_ROPE_FREQS)


def is_ignorable(name: str, tied: bool) -> bool:
    """Whether a left-over checkpoint tensor is harmless: derived data, or the stored copy of a tied head."""
    return (tied and name == _HF_NAMES["lm_head"]) or any(fnmatchcase(name, pattern) for pattern in IGNORABLE_TENSORS)


def checkpoint_names(tensors: Mapping[str, str], num_layers: int, tied: bool) -> dict[tuple[str, int | None], str]:
    """Every tensor a checkpoint must hold: (logical name, layer or None) → its name there.

    `tensors` is `Family.tensors` or `GGUFArchitecture.tensors`. A tied head has no tensor of its own.
    """
    names: dict[tuple[str, int | None], str] = {}
    for logical, text in tensors.items():
        if logical not in TOP_NAMES:
            names.update({(logical, i): text.format(i=i) for i in range(num_layers)})
        elif not (tied and logical == "lm_head"):
            names[logical, None] = text
    return names
