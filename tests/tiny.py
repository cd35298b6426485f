"""Tiny random checkpoints of every family, made by transformers: the reference of the parity tests.

Importing this module needs torch and transformers; a test does `pytest.importorskip("torch")` before it.
"""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from jaxinfer.config import model_config_file, read_json

_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}

# name → (the shape in configs/models it starts from, what differs)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("tiny-llama", {}),
    "llama3": ("tiny-llama3", {"num_attention_heads": 8, "num_key_value_heads": 2, "tie_word_embeddings": False}),
    "llama3.2": ("tiny-llama3", {}),  # tied head; 9 heads and 3 kv heads, as SmolLM2
    "mistral": ("tiny-mistral", {}),
    "mistral-no-window": ("tiny-mistral", {"sliding_window": None}),
    "qwen2": ("tiny-qwen2", {"tie_word_embeddings": False}),
    "qwen2-window": ("tiny-qwen2", {"use_sliding_window": True, "max_window_layers": 1}),  # tied; layers 1, 2 windowed
    "qwen3": ("tiny-qwen3", {}),
    "llama-yarn": ("tiny-llama", {"num_key_value_heads": 2, "rope_scaling": _YARN}),
    "llama-linear": ("tiny-llama", {"num_key_value_heads": 1, "rope_scaling": {"type": "linear", "factor": 2.5}}),
}


def config_dict(family: str, **overrides: Any) -> dict[str, Any]:
    """The config.json of a variant, in the spelling of transformers 4."""
    shape, differences = VARIANTS[family]
    return {**read_json(model_config_file(shape)), **differences, **overrides}


def make_model(config: dict[str, Any], seed: int = 0) -> PreTrainedModel:
    """A random float32 model of a config.json's content, in eval mode, with eager attention.

    Norm weights and biases are random too: left at one and zero they would hide a mistake. Projections keep the scale
    of their input, so that the logits have a spread of about one.
    """
    hf_config = AutoConfig.for_model(**{"model_type": config["model_type"], **config})
    model = AutoModelForCausalLM.from_config(hf_config, attn_implementation="eager", dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # a tied head appears once
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.3 * noise)
            elif name.endswith(".bias"):
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    return model.eval()


def make_checkpoint(
    tmp_path: Path,
    family: str,
    *,
    seed: int = 0,
    dtype: str = "float32",
    max_shard_size: str | int | None = None,
    old_spelling: bool = False,
    **overrides: Any,
) -> tuple[Path, PreTrainedModel]:
    """Write config.json, generation_config.json and safetensors; return the directory and the model that it holds.

    dtype: of the stored weights; the returned model is float32, with the weights rounded as they are stored.
    max_shard_size: small values give several files and an index. old_spelling: config.json with rope_theta,
    rope_scaling and torch_dtype rather than rope_parameters and dtype. overrides: keys of config.json.
    """
    config = config_dict(family, **overrides)
    model = make_model(config, seed).to(getattr(torch, dtype))
    path = Path(tmp_path) / f"{family}-{dtype}-{seed}"
    model.save_pretrained(path, **({} if max_shard_size is None else {"max_shard_size": max_shard_size}))
    if old_spelling:
        (path / "config.json").write_text(json.dumps({**config, "torch_dtype": dtype}))
    return path, model.float()


def reference_logits(model: PreTrainedModel, ids: list[int]) -> Any:
    """Logits of every position of one sequence, a float32 numpy array [T, V]."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float().numpy()
