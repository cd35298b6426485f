"""A real trained model: SmolLM2-135M-Instruct from its GGUF gives transformers' tokens, alone, batched and on any mesh."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import LLM, SamplingParams

pytestmark = pytest.mark.slow

NUM_TOKENS = 20
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    ",
    "for (int i = 0; i < 10; i++) {",
    "1, 2, 3, 4, 5,",
    "In 1969, 12345 + 67890 = ",
    "I love pizza 🍕 and 🎉🎉",
    "日本の首都は",
    "Le chat est assis sur",
    "   leading and   inner   spaces\n\n\ttabs",
    "SELECT name FROM users WHERE",
    "A",
]
CHATS = [
    [{"role": "user", "content": "What is 2+2?"}],
    [
        {"role": "system", "content": "You answer in French."},
        {"role": "user", "content": "Hello! 👋"},
        {"role": "assistant", "content": "Bonjour !"},
        {"role": "user", "content": "Count to 12."},
    ],
]


def smollm2(path: Path, tp: int = 1) -> LLM:
    return LLM(str(path), tensor_parallel_size=tp, max_model_len=128, max_num_seqs=8, block_size=32, use_tqdm=False)


@pytest.fixture(scope="module")
def llm(smollm2_path: Path) -> LLM:
    return smollm2(smollm2_path)


@pytest.fixture(scope="module")
def prompt_ids(llm: LLM) -> list[list[int]]:
    tokenizer = llm.get_tokenizer()
    return [*map(tokenizer.encode, PROMPTS), *(tokenizer.apply_chat_template(chat) for chat in CHATS)]


@pytest.fixture(scope="module")
def batched(llm: LLM, prompt_ids: list[list[int]]) -> list[list[int]]:
    return tokens(llm, prompt_ids)


def tokens(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY, use_tqdm=False)]


def test_greedy_tokens_equal_transformers(smollm2_path: Path, prompt_ids: list[list[int]], batched: list[list[int]]) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = reference_model(smollm2_path, torch, transformers)
    for ids, ours in zip(prompt_ids, batched, strict=True):
        with torch.no_grad():  # one pass: each token is the likeliest after those before it, so all are the greedy ones
            logits = model(torch.tensor([ids + ours[:-1]])).logits[0, len(ids) - 1 :]
        assert len(ours) == NUM_TOKENS and logits.argmax(dim=-1).tolist() == ours, f"prompt ids {ids}"


def reference_model(path: Path, torch: Any, transformers: Any) -> Any:
    """transformers' Llama with the GGUF's dequantized weights, by a way of its own (its own GGUF loader needs accelerate)."""
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_theta=100000.0,
        tie_word_embeddings=True,
    )
    parts = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
    parts |= {"attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj"}
    parts |= {"ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    state = {}
    for tensor in gguf.GGUFReader(path).tensors:
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if tensor.name == "token_embd.weight":
            state["lm_head.weight"] = state["model.embed_tokens.weight"] = torch.from_numpy(weight.copy())
        elif tensor.name == "output_norm.weight":
            state["model.norm.weight"] = torch.from_numpy(weight.copy())
        else:
            _, layer, part, _ = tensor.name.split(".")
            if heads := {"attn_q": 9, "attn_k": 3}.get(part):  # llama.cpp stores the rotary pairs side by side
                weight = weight.reshape(heads, 32, 2, 576).swapaxes(1, 2).reshape(weight.shape)
            state[f"model.layers.{layer}.{parts[part]}.weight"] = torch.from_numpy(weight.copy())
    model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(state, strict=True)
    return model.eval()


def test_one_by_one_is_batched(llm: LLM, prompt_ids: list[list[int]], batched: list[list[int]]) -> None:
    for i in (0, 6, 13):
        assert tokens(llm, [prompt_ids[i]]) == [batched[i]]


@pytest.mark.parametrize("tp", [2, 3, 4, 8])
def test_any_mesh_gives_the_same_tokens(
    smollm2_path: Path, tp: int, prompt_ids: list[list[int]], batched: list[list[int]]
) -> None:
    # 9 heads and 3 kv heads: padded to 4, 3, 4 and 8 kv heads.
    assert tokens(smollm2(smollm2_path, tp), prompt_ids) == batched


def test_a_page_recycled_from_nan_changes_nothing(llm: LLM, prompt_ids: list[list[int]], batched: list[list[int]]) -> None:
    runner = llm.engine.runner
    runner.cache = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), runner.cache)
    assert tokens(llm, prompt_ids[:3]) == batched[:3]


def test_stop_string_eos_and_text(llm: LLM) -> None:
    (plain,) = llm.generate(["The capital of France is"], SamplingParams(temperature=0.0, max_tokens=12), use_tqdm=False)
    text = plain.outputs[0].text
    assert " Paris" in text
    word = text.split()[1]
    stopped = SamplingParams(temperature=0.0, max_tokens=12, stop=[word])
    (output,) = llm.generate(["The capital of France is"], stopped, use_tqdm=False)
    completion = output.outputs[0]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", word)
    assert completion.text == text[: text.index(word)]
    # Another processor rounds otherwise, so that one answer can run long; all of them do not.
    questions = [[{"role": "user", "content": text}] for text in ("Hi", "What is 2+2?", "Say yes.", "Thank you!")]
    answers = llm.chat(questions, SamplingParams(temperature=0.0, max_tokens=80), use_tqdm=False)
    ended = [answer.outputs[0] for answer in answers if answer.outputs[0].finish_reason == "stop"]
    assert ended
    for answer in ended:
        assert answer.token_ids[-1] in llm.engine.eos_token_ids and "<|im_end|>" not in answer.text


def test_streamed_pieces_are_whole_characters_and_add_up(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=24, logit_bias={}, ignore_eos=True)
    prompt = "Repeat: 🎉🎉🎉 日本 🎉🎉🎉"
    (whole,) = llm.generate([prompt], params, use_tqdm=False)
    texts = [output.outputs[0].text for output in llm.stream(prompt, params)]
    assert texts[-1] == whole.outputs[0].text
    assert all(b.startswith(a) for a, b in pairwise(texts))
    assert all("\ufffd" not in text for text in texts)


def test_bad_words_are_not_said(llm: LLM) -> None:
    (plain,) = llm.generate(["The capital of France is"], SamplingParams(temperature=0.0, max_tokens=6), use_tqdm=False)
    assert "Paris" in plain.outputs[0].text
    banned = SamplingParams(temperature=0.0, max_tokens=6, bad_words=["Paris"])
    (output,) = llm.generate(["The capital of France is"], banned, use_tqdm=False)
    assert "Paris" not in output.outputs[0].text
