"""RopeConfig against transformers' rotary embeddings, to the rounding of pow, and the errors of its parsing."""

import re

import numpy as np
import pytest

from jaxinfer.config import ModelConfig
from jaxinfer.rope import RopeConfig

BASE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 32,
    "max_position_embeddings": 4096,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}

CASES = {
    "default": (10000.0, None),
    "default, theta an int": (1000000, {"rope_type": "default"}),
    "linear": (10000.0, {"rope_type": "linear", "factor": 4.0}),
    "linear, old type key": (10000.0, {"type": "linear", "factor": 2.5}),
    "llama3": (500000.0, LLAMA3),
    "llama3, factor 32": (500000.0, {**LLAMA3, "factor": 32.0}),
    "llama3, no original length": (10000.0, {k: v for k, v in LLAMA3.items() if not k.startswith("original")}),
    "yarn": (10000.0, YARN),
    "yarn, large theta": (1000000.0, {**YARN, "factor": 40}),
    "yarn, no original length": (10000.0, {"type": "yarn", "factor": 2.0}),
    "yarn, no factor": (10000.0, {**YARN, "factor": None}),
    "yarn, factor under one": (10000.0, {**YARN, "factor": 0.5}),
    "yarn, attention factor": (10000.0, {**YARN, "attention_factor": 0.7}),
    "yarn, mscale": (10000.0, {**YARN, "mscale": 0.707, "mscale_all_dim": 1.0}),
    "yarn, mscale alone": (10000.0, {**YARN, "mscale": 0.707}),
    "yarn, no truncation": (10000.0, {**YARN, "truncate": False}),
    "yarn, betas": (10000.0, {**YARN, "beta_fast": 16, "beta_slow": 2}),
    "yarn, zero betas": (10000.0, {**YARN, "beta_fast": 0, "beta_slow": 0}),
    "yarn, equal betas": (10000.0, {**YARN, "beta_fast": 2.0, "beta_slow": 2.0, "truncate": False}),
}


def config(theta: float, scaling: dict | None, head_dim: int = 64) -> dict:
    return {**BASE, "head_dim": head_dim, "rope_theta": theta, "rope_scaling": scaling}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case, head_dim):
    pytest.importorskip("torch")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    theta, scaling = CASES[case]
    values = config(theta, scaling, head_dim)
    reference = LlamaRotaryEmbedding(LlamaConfig(**{**values, "rope_scaling": scaling and dict(scaling)}))
    rope = ModelConfig.from_hf(values).rope
    ours = rope.inv_freq(head_dim)
    assert ours.dtype == np.float32 and ours.shape == (head_dim // 2,)
    # A float32 pow may differ in the last place from one libm to the next, which a ramp can double; nothing else may.
    np.testing.assert_allclose(ours, reference.inv_freq.numpy(), rtol=2.5e-7, atol=0)
    assert rope.attention_scaling == pytest.approx(reference.attention_scaling, rel=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_nested_spelling_is_the_same(case):
    theta, scaling = CASES[case]
    old = config(theta, scaling)
    new = {key: value for key, value in old.items() if not key.startswith("rope_")}
    new["rope_parameters"] = {**(scaling or {}), "rope_theta": theta}
    by_layer = {**new, "rope_parameters": {"full_attention": new["rope_parameters"]}}
    rope = ModelConfig.from_hf(old).rope
    assert rope == ModelConfig.from_hf(new).rope == ModelConfig.from_hf(by_layer).rope


def test_scaling_kinds_differ():
    default = RopeConfig().inv_freq(64)
    for case in ("linear", "llama3", "yarn"):
        scaling = CASES[case][1]
        rope = ModelConfig.from_hf(config(10000.0, scaling)).rope
        changed = np.mean(rope.inv_freq(64) != default)
        assert (changed == 1) if case == "linear" else (0 < changed < 1), case


def test_freq_factors_are_the_gguf_form_of_llama3():
    llama3 = ModelConfig.from_hf(config(500000.0, LLAMA3)).rope
    plain = RopeConfig(rope_theta=500000.0)
    factors = plain.inv_freq(64) / llama3.inv_freq(64)
    assert factors.min() == 1 and factors.max() == 8
    gguf = RopeConfig(rope_theta=500000.0, freq_factors=tuple(factors.tolist()))
    np.testing.assert_allclose(gguf.inv_freq(64), llama3.inv_freq(64), rtol=2e-7)
    with pytest.raises(ValueError, match=r"freq_factors has 32 values, not head_dim // 2 = 64"):
        gguf.inv_freq(128)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "rope type 'dynamic' is not supported; supported: default, linear"),
        ({"type": "longrope", "factor": 2.0}, "rope type 'longrope' is not supported"),
        ({"type": "mrope", "mrope_section": [8, 12, 12]}, "rope type 'mrope' is not supported"),
        ({"rope_type": "default", "mrope_section": [8, 12, 12]}, "rope type 'mrope' is not supported"),
        ({"rope_type": "linear"}, "rope type 'linear' needs factor"),
        ({"rope_type": "llama3", "factor": 8.0}, "needs low_freq_factor, high_freq_factor"),
        ({"rope_type": "linear", "factor": 0}, "rope factor = 0: it must be greater than 0"),
        ({"rope_type": "linear", "factor": "2"}, "rope factor = '2': it must be a finite number"),
        ({**LLAMA3, "high_freq_factor": 1.0}, "type 'llama3' needs them to differ"),
        ({**YARN, "original_max_position_embeddings": 1.5}, "original_max_position_embeddings = 1.5"),
        ({**YARN, "truncate": "no"}, "rope truncate = 'no': it must be true or false"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported"),
        (["linear", 2.0], "rope parameters must be a mapping"),
        (
            {
                "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            "differ between layer types (full_attention, sliding_attention)",
        ),
    ],
)
def test_refusals_name_the_value(scaling, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ModelConfig.from_hf(config(10000.0, scaling))


def test_partial_rotary_factor_at_the_top_is_refused():
    with pytest.raises(ValueError, match=r"partial_rotary_factor = 0\.25"):
        ModelConfig.from_hf({**BASE, "partial_rotary_factor": 0.25})
    assert ModelConfig.from_hf({**BASE, "partial_rotary_factor": 1.0}).rope == RopeConfig()
