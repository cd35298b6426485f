"""Text to token ids and back: tokenizer.json, tokenizer.model or GGUF metadata; incremental detokenization.

Encoding is left to the `tokenizers` and `sentencepiece` libraries. Decoding is done here, on bytes: every token of the
supported kinds (byte-level BPE; sentencepiece pieces with byte fallback) stands for a fixed byte string, so that text
is the UTF-8 decoding of a concatenation, one-shot and incremental decoding agree by construction, and a token costs
the same however long the sequence is.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from jaxinfer.chat import ChatTemplates
from jaxinfer.vocab import (
    CONTROL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    AddedToken,
    Backend,
    HFBackend,
    SentencePieceBackend,
    sentencepiece_proto,
)

_HUB_FILES = [
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
]
ACCEPTED = "a directory with tokenizer.json or tokenizer.model, one of these files itself, or a .gguf file"


class Tokenizer:
    """One interface over the sources. Build it with `load_tokenizer` or `from_gguf`.

    bos/eos prefixes: add_bos and add_eos put the ids round an encoding with special tokens; None leaves both to the
    post-processor of tokenizer.json.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        special_tokens: Mapping[str, str],
        add_bos: bool | None,
        add_eos: bool | None,
        chat: ChatTemplates,
    ) -> None:
        self._backend = backend
        self._chat = chat
        self.special_tokens = dict(special_tokens)  # "bos_token" → its text, …
        ids = {name: backend.token_to_id(text) for name, text in special_tokens.items()}
        self.bos_token_id = ids.get("bos_token")
        self.eos_token_id = ids.get("eos_token")
        self.special_ids = frozenset(backend.special_ids | {i for i in ids.values() if i is not None})
        self.strip_first_space = backend.strip_first_space
        self._bytes: dict[int, bytes] = {}
        self._own_specials = add_bos is not None or add_eos is not None
        self._prefix = [self.bos_token_id] if add_bos and self.bos_token_id is not None else []
        self._suffix = [self.eos_token_id] if add_eos and self.eos_token_id is not None else []

    @property
    def vocab_size(self) -> int:
        """Highest id + 1, added tokens included. The model's own vocabulary may be padded beyond it."""
        return self._backend.size

    def __len__(self) -> int:
        return self.vocab_size

    @property
    def chat_template(self) -> str | None:
        """The default chat template's text."""
        return self._chat.default

    def token_to_id(self, token: str) -> int | None:
        return self._backend.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        """The vocabulary's own spelling ("Ġthe", "▁the", "<0x0A>"); None where there is no such id."""
        return self._backend.piece(token_id)

    def id_to_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for; a special token's are its text's; none for an id without a token."""
        if (known := self._bytes.get(token_id)) is None:
            known = self._bytes[token_id] = self._backend.piece_bytes(token_id)
        return known

    def id_to_piece_text(self, token_id: int) -> str:
        """A token's own text, spaces kept; U+FFFD where it holds a part of a character."""
        return self.id_to_bytes(token_id).decode("utf-8", "replace")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids. Special tokens written in the text become their single ids.

        ValueError for text that is no Unicode (a lone surrogate).
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text is not valid Unicode: lone surrogate at position {error.start}") from error
        if not self._own_specials:
            return self._backend.encode(text, add_special_tokens)
        ids = self._backend.encode(text, False)
        return [*self._prefix, *ids, *self._suffix] if add_special_tokens else ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        skip = self.special_ids if skip_special_tokens else frozenset()
        data = b"".join(self.id_to_bytes(i) for i in ids if i not in skip)
        if self.strip_first_space and data.startswith(b" "):
            data = data[1:]
        return data.decode("utf-8", "replace")

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        chat_template: str | None = None,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The conversation as text; see ChatTemplates.render."""
        return self._chat.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            chat_template=chat_template,
            continue_final_message=continue_final_message,
            variables={**self.special_tokens, **variables},
        )

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kw: Any,
    ) -> list[int]:
        """Token ids of render_chat's text. The template writes BOS where the model wants one; none is added here."""
        return self.encode(self.render_chat(messages, add_generation_prompt, tools, **kw), add_special_tokens=False)

    def bad_words_ids(self, words: Iterable[str]) -> list[list[int]]:
        """Token sequences to ban, as vLLM makes them (SamplingParams.update_from_tokenizer).

        Each word as written; and with a space before it, where that is a different first token of as many tokens.
        """
        out: list[list[int]] = []
        for word in words:
            bare = self.encode(word.lstrip(), add_special_tokens=False)
            if not bare:
                raise ValueError(f"bad_words has {word!r}, which has no tokens; give a word that is not empty")
            out.append(bare)
            spaced = self.encode(" " + word.lstrip(), add_special_tokens=False)
            if spaced[0] != bare[0] and len(spaced) == len(bare):
                out.append(spaced)
        return out


class Detokenizer:
    """Text of a growing output, in the context of its prompt: `add` ids, take the new text, `flush` at the end.

    The pieces never end in a part of a character (the UTF-8 decoder holds it back), and together they are exactly what
    one decode would give. Tokens become bytes with nothing between them, so spaces_between_special_tokens changes
    nothing, as with Hugging Face's fast tokenizers; it is taken because vLLM's SamplingParams has it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        tail = b""
        for i in reversed(prompt_ids):
            if i not in self._skip:
                tail = tokenizer.id_to_bytes(i) + tail
            if len(tail) >= 3:  # an unfinished character has at most three bytes
                break
        self._utf8.decode(tail)  # keeps what the prompt leaves unfinished
        self._strip = tokenizer.strip_first_space and not tail

    def add(self, ids: Iterable[int]) -> str:
        data = b"".join(self._tokenizer.id_to_bytes(i) for i in ids if i not in self._skip)
        if self._strip and data:
            data = data.removeprefix(b" ")
            self._strip = False
        return self._utf8.decode(data)

    def flush(self) -> str:
        """What was held back: U+FFFD for a character that never got its last byte."""
        return self._utf8.decode(b"", final=True)


def load_tokenizer(path: str | Path, *, chat_template: str | None = None, revision: str | None = None) -> Tokenizer:
    """The tokenizer of a Hugging Face directory or hub id, a tokenizer.json, a tokenizer.model or a .gguf file.

    chat_template: a template's text, or a file that holds one; replaces the model's own.
    revision: a hub id's branch, tag or commit.
    """
    where = _locate(str(path), revision)
    if where.suffix == ".gguf":
        return from_gguf(read_gguf_metadata(where), chat_template=chat_template)
    folder = where if where.is_dir() else where.parent
    config = _read_json(folder / "tokenizer_config.json")
    named = _special_tokens({**_read_json(folder / "special_tokens_map.json"), **config})
    added = _added_tokens(folder, config, set(named.values()))
    chat = ChatTemplates.from_directory(folder, config, chat_template)
    if where.is_dir():
        names = [name for name in ("tokenizer.json", "tokenizer.model") if (where / name).is_file()]
        if not names:
            found = sorted(p.name for p in where.iterdir() if re.search(r"token|vocab|merges|tekken|gguf", p.name))
            raise FileNotFoundError(
                f"{where} has neither tokenizer.json nor tokenizer.model (alike: {', '.join(found) or 'nothing'}); "
                f"accepted: {ACCEPTED}"
            )
        where = where / names[0]
    if where.suffix == ".json":
        try:
            hf = tokenizers.Tokenizer.from_file(str(where))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{where} is not a tokenizer.json that `tokenizers` can read: {error}") from error
        backend = HFBackend(hf)
        backend.add(added)
        add_bos, add_eos = config.get("add_bos_token"), config.get("add_eos_token")
        return Tokenizer(backend, special_tokens=named, add_bos=add_bos, add_eos=add_eos, chat=chat)
    spm = SentencePieceBackend(
        where.read_bytes(),
        added,
        dummy_prefix=config.get("add_prefix_space") is not False,
        legacy=config.get("legacy") is not False,
    )
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | named
    return Tokenizer(
        spm,
        special_tokens={name: text for name, text in named.items() if spm.token_to_id(text) is not None},
        add_bos=config.get("add_bos_token", True),
        add_eos=config.get("add_eos_token", False),
        chat=chat,
    )


def _locate(path: str, revision: str | None) -> Path:
    where = Path(path).expanduser()
    if where.is_dir() or (where.is_file() and (where.suffix in (".gguf", ".json") or ".model" in where.name)):
        return where
    if where.is_file():
        raise ValueError(f"{path} is no tokenizer; accepted: {ACCEPTED}")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not path.startswith("."):
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(path, revision=revision, allow_patterns=_HUB_FILES))
    raise FileNotFoundError(f"no tokenizer at {path!r}; accepted: {ACCEPTED}, or a hub id such as 'Qwen/Qwen3-0.6B'")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token, … from either spelling: the text, or an object with `content`."""
    out = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"):
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            out[name] = text
    return out


def _added_tokens(folder: Path, config: Mapping[str, Any], specials: set[str]) -> list[AddedToken]:
    """Tokens with ids of their own, from tokenizer_config.json (added_tokens_decoder) and added_tokens.json."""
    found = {}
    for text, i in _read_json(folder / "added_tokens.json").items():
        found[int(i)] = AddedToken(int(i), text, special=text in specials)
    for i, spec in config.get("added_tokens_decoder", {}).items():
        flags = {name: bool(spec.get(name)) for name in ("lstrip", "rstrip", "single_word")}
        special = bool(spec.get("special")) or spec["content"] in specials
        found[int(i)] = AddedToken(int(i), spec["content"], special=special, **flags)
    return list(found.values())


# ---------------------------------------------------------------------------------------------------------------- GGUF

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


@dataclass(frozen=True)
class PreTokenizer:
    """How a value of `tokenizer.ggml.pre` splits text before BPE, as in the tokenizer.json of the models that use it.

    split: a regex, or None for GPT-2's. ignore_merges: a whole word of the vocabulary needs no merges.
    """

    split: str | None = None
    individual_digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False  # where the file does not say


PRE_TOKENIZERS = {
    "smollm": PreTokenizer(individual_digits=True),
    "qwen2": PreTokenizer(split=_QWEN2_SPLIT, nfc=True),
    "llama-bpe": PreTokenizer(split=_LLAMA3_SPLIT, ignore_merges=True, add_bos=True),
}


def read_gguf_metadata(path: str | Path) -> dict[str, Any]:
    """Key → Python value of a GGUF file's header."""
    return dict(read_gguf(path)[0])


def read_gguf(path: str | Path) -> tuple[dict[str, Any], list[Any]]:
    """A GGUF file's metadata, key → Python value, and its tensors (gguf.ReaderTensor: mapped, not read).

    The last file's are kept: the library takes seconds for a vocabulary, and tokenizer, config and weights all ask.

    Raises:
        ValueError: not a GGUF file, or a truncated one; names it and its size.
    """
    return _read_gguf(str(path), Path(path).stat().st_mtime_ns)


@lru_cache(maxsize=1)
def _read_gguf(path: str, modified: int) -> tuple[dict[str, Any], list[Any]]:
    import gguf

    try:
        reader = gguf.GGUFReader(path)
    except Exception as error:  # whatever numpy says of a slice that is not there
        size = Path(path).stat().st_size
        raise ValueError(
            f"{path} ({size} bytes) is not a readable GGUF file, or is truncated (an interrupted download?): {error}"
        ) from error
    return {key: field.contents() for key, field in reader.fields.items()}, reader.tensors


def from_gguf(metadata: Mapping[str, Any], *, chat_template: str | None = None) -> Tokenizer:
    """The tokenizer that a GGUF file's metadata describes (`tokenizer.ggml.*`, key → Python value)."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise ValueError(f"tokenizer.ggml.model is {kind!r}; supported: gpt2 (byte-level BPE), llama (sentencepiece)")
    needed = ["tokens", "token_type", "merges", "pre"] if kind == "gpt2" else ["tokens", "token_type", "scores"]
    if missing := [f"tokenizer.ggml.{key}" for key in needed if f"tokenizer.ggml.{key}" not in metadata]:
        raise ValueError(f"the GGUF metadata lacks {', '.join(missing)}, needed for a {kind!r} tokenizer")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    types: list[int] = metadata["tokenizer.ggml.token_type"]
    if len(types) != len(tokens):
        raise ValueError(f"tokenizer.ggml.token_type has {len(types)} entries for {len(tokens)} tokens")
    added = [
        AddedToken(i, text, special=kind_ != USER_DEFINED)
        for i, (text, kind_) in enumerate(zip(tokens, types, strict=True))
        if kind_ in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    pre = _pre_tokenizer(metadata["tokenizer.ggml.pre"]) if kind == "gpt2" else None
    backend: Backend
    if pre:
        backend = _gguf_bpe(tokens, types, metadata["tokenizer.ggml.merges"], pre, added)
    else:
        backend = _gguf_sentencepiece(tokens, types, added, metadata)
    # where the file does not say, as llama.cpp: sentencepiece prompts get BOS, and its ids are 1 and 2
    add_bos, ids = (pre.add_bos, {}) if pre else (True, {"bos": 1, "eos": 2})
    special_tokens = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        i = metadata.get(f"tokenizer.ggml.{key}_token_id", ids.get(key))
        if i is not None and 0 <= i < len(tokens):
            special_tokens[f"{name}_token"] = tokens[i]
    add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", add_bos))
    add_eos = bool(metadata.get("tokenizer.ggml.add_eos_token", False))
    for flag, name in ((add_bos, "bos"), (add_eos, "eos")):
        if flag and f"{name}_token" not in special_tokens:
            raise ValueError(f"prompts are to get {name.upper()}, but tokenizer.ggml.{name}_token_id names no token")
    return Tokenizer(
        backend,
        special_tokens=special_tokens,
        add_bos=add_bos,
        add_eos=add_eos,
        chat=ChatTemplates.from_gguf(metadata, chat_template),
    )


def _pre_tokenizer(name: str) -> PreTokenizer:
    if name not in PRE_TOKENIZERS:
        raise ValueError(f"tokenizer.ggml.pre is {name!r}; supported: {', '.join(PRE_TOKENIZERS)}")
    return PRE_TOKENIZERS[name]


def _gguf_bpe(tokens: list[str], types: list[int], merges: list[str], pre: PreTokenizer, added: list[AddedToken]) -> HFBackend:
    vocab = {text: i for i, (text, kind) in enumerate(zip(tokens, types, strict=True)) if kind != UNUSED}
    pairs = []
    for merge in merges:
        cut = merge.find(" ", 1)  # as llama.cpp: the first character is never the separator
        pairs.append((merge[:cut], merge[cut + 1 :]))
    try:
        hf = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=pre.ignore_merges))
    except Exception as error:
        raise ValueError(f"tokenizer.ggml.merges does not fit tokenizer.ggml.tokens: {error}") from error
    steps: list[pre_tokenizers.PreTokenizer] = []
    if pre.individual_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if pre.split is not None:
        steps.append(pre_tokenizers.Split(tokenizers.Regex(pre.split), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre.split is None))
    hf.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if pre.nfc:
        hf.normalizer = normalizers.NFC()
    hf.decoder = decoders.ByteLevel()
    backend = HFBackend(hf)
    backend.add(added)
    return backend


def _gguf_sentencepiece(
    tokens: list[str], types: list[int], added: list[AddedToken], metadata: Mapping[str, Any]
) -> SentencePieceBackend:
    """Written back to the ModelProto it came from, so that sentencepiece itself does the segmentation."""
    scores = metadata["tokenizer.ggml.scores"]
    if len(scores) != len(tokens):
        raise ValueError(f"tokenizer.ggml.scores has {len(scores)} entries for {len(tokens)} tokens")
    dummy = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    squeeze = bool(metadata.get("tokenizer.ggml.remove_extra_whitespaces", False))
    proto = sentencepiece_proto(tokens, scores, types, add_dummy_prefix=dummy, remove_extra_whitespaces=squeeze)
    return SentencePieceBackend(proto, added, dummy_prefix=dummy, legacy=True)
