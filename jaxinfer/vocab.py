"""Vocabularies: one interface over `tokenizers` and `sentencepiece`, and the bytes that each token stands for."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import sentencepiece
import tokenizers

SPACE = "\u2581"  # sentencepiece's visible space
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # token types of ModelProto and of GGUF
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class AddedToken:
    """A token matched in the text as a whole, before the vocabulary's own segmentation."""

    id: int
    content: str
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


class Backend(Protocol):
    """What differs between the `tokenizers` and the `sentencepiece` library."""

    size: int  # highest id + 1
    special_ids: set[int]
    strip_first_space: bool  # the text's first space is the encoder's dummy prefix

    def encode(self, text: str, with_specials: bool) -> list[int]: ...
    def piece(self, token_id: int) -> str | None: ...
    def piece_bytes(self, token_id: int) -> bytes: ...
    def token_to_id(self, token: str) -> int | None: ...


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable character for each byte (openai/gpt-2, encoder.py, bytes_to_unicode), reversed."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF_CHAR = _byte_level_alphabet()


def _sentencepiece_bytes(piece: str, byte_fallback: bool) -> bytes:
    if byte_fallback and (match := _BYTE_PIECE.fullmatch(piece)):
        return bytes([int(match[1], 16)])
    return piece.replace(SPACE, " ").encode()


class HFBackend:
    """A `tokenizers.Tokenizer` (tokenizer.json, or built from a GGUF file's byte-level BPE)."""

    def __init__(self, hf: tokenizers.Tokenizer) -> None:
        hf.no_truncation()
        hf.no_padding()
        self.hf = hf
        self._byte_level, self._byte_fallback, self.strip_first_space = _read_decoder(hf)
        self.refresh()

    def refresh(self) -> None:
        """Read the vocabulary again, after tokens were added."""
        self._added = self.hf.get_added_tokens_decoder()
        self.special_ids = {i for i, token in self._added.items() if token.special}
        self.size = 1 + max(self.hf.get_vocab(with_added_tokens=True).values(), default=-1)

    def add(self, tokens: Iterable[AddedToken]) -> None:
        """Add tokens at their own ids; ValueError where the vocabulary would give another one."""
        for token in sorted(tokens, key=lambda t: t.id):
            if token.id in self._added and self._added[token.id].content == token.content:
                if token.special:
                    self.special_ids.add(token.id)
                continue
            add = self.hf.add_special_tokens if token.special else self.hf.add_tokens
            add(
                [
                    tokenizers.AddedToken(
                        token.content,
                        single_word=token.single_word,
                        lstrip=token.lstrip,
                        rstrip=token.rstrip,
                        normalized=False,
                        special=token.special,
                    )
                ]
            )
            if (got := self.hf.token_to_id(token.content)) != token.id:
                raise ValueError(
                    f"added token {token.content!r} is given id {token.id}, but the vocabulary puts it at {got}; "
                    "tokenizer_config.json or added_tokens.json does not belong to this tokenizer.json"
                )
            self._added[token.id] = tokenizers.AddedToken(token.content, special=token.special)
            if token.special:
                self.special_ids.add(token.id)
            self.size = max(self.size, token.id + 1)

    def encode(self, text: str, with_specials: bool) -> list[int]:
        # As a batch of one: `encode` would keep Python's lock, and a long text stop every other thread.
        return self.hf.encode_batch([text], add_special_tokens=with_specials)[0].ids

    def piece(self, token_id: int) -> str | None:
        return self.hf.id_to_token(token_id) if token_id >= 0 else None

    def piece_bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].content.encode()
        piece = self.piece(token_id)
        if piece is None:  # the model's padded vocabulary is larger than the tokenizer's
            return b""
        if not self._byte_level:
            return _sentencepiece_bytes(piece, self._byte_fallback)
        if all(char in _BYTE_OF_CHAR for char in piece):
            return bytes(_BYTE_OF_CHAR[char] for char in piece)
        return piece.encode()

    def token_to_id(self, token: str) -> int | None:
        return self.hf.token_to_id(token)


def _read_decoder(hf: tokenizers.Tokenizer) -> tuple[bool, bool, bool]:
    """(byte level, byte fallback, strip the first space) from the decoder of a tokenizer.json.

    ValueError for a decoder that does not map each token to fixed bytes.
    """
    spec = json.loads(hf.to_str()).get("decoder") if hf.decoder is not None else None
    steps = spec["decoders"] if spec and spec["type"] == "Sequence" else [spec] if spec else []
    kinds = {step["type"] for step in steps}
    if "ByteLevel" in kinds and kinds <= {"ByteLevel", "Fuse"}:
        return True, False, False
    of_sentencepiece = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}
    known = bool(kinds & {"Replace", "Metaspace"}) and kinds <= of_sentencepiece
    strip = False
    for step in steps if known else []:
        if step["type"] == "Replace":
            known = known and step["pattern"] == {"String": SPACE} and step["content"] == " "
        elif step["type"] == "Strip":
            known = known and step["content"] == " " and step["start"] <= 1 and step["stop"] == 0
            strip = strip or step["start"] == 1
        elif step["type"] == "Metaspace":
            known = known and step["replacement"] == SPACE
            strip = strip or step.get("prepend_scheme", "always") != "never"
    if not known:
        raise ValueError(
            f"tokenizer.json has the decoder {json.dumps(spec)}; supported are ByteLevel (Llama 3, Qwen, SmolLM2) and "
            "sentencepiece's (Metaspace, or a Sequence of Replace ▁, ByteFallback, Fuse, Strip: Llama 2, Mistral)"
        )
    return False, "ByteFallback" in kinds, strip


class SentencePieceBackend:
    """A sentencepiece model with added tokens, which are cut out of the text first.

    legacy: every stretch of text between special tokens gets the dummy space of the model (the behaviour of Hugging
    Face's LlamaTokenizer unless told otherwise, and llama.cpp's); else only text at the very start.
    """

    def __init__(self, model_proto: bytes, added: Iterable[AddedToken], *, dummy_prefix: bool, legacy: bool) -> None:
        try:
            # A message's serialization may be continued: later fields win. Field 3 (normalizer_spec) is merged,
            # and its field 3 is add_dummy_prefix.
            plain = model_proto + b"\x1a\x02\x18\x00"
            self._plain = sentencepiece.SentencePieceProcessor(model_proto=plain)
            prefixed = sentencepiece.SentencePieceProcessor(model_proto=model_proto) if dummy_prefix else self._plain
        except Exception as error:
            raise ValueError(f"sentencepiece cannot read this tokenizer model: {error}") from error
        self._first = prefixed
        self._later = prefixed if legacy else self._plain
        sp = self._plain
        known = {token.id: token for token in added}
        for i in range(len(sp)):
            if (sp.is_control(i) or sp.is_unknown(i)) and i not in known:
                known[i] = AddedToken(i, sp.id_to_piece(i))
        self._added = known
        self._added_ids = {token.content: token.id for token in known.values()}
        self.special_ids = {token.id for token in known.values() if token.special}
        self.size = max([len(sp), *(i + 1 for i in known)])
        self.strip_first_space = dummy_prefix
        longest_first = sorted(known.values(), key=lambda t: len(t.content), reverse=True)
        # plain alternatives: then `re` looks for their first characters only
        self._splitter = re.compile("|".join(re.escape(t.content) for t in longest_first)) if known else None

    def encode(self, text: str, with_specials: bool) -> list[int]:
        """BOS and EOS are the caller's business: `with_specials` is not used."""
        ids: list[int] = []
        end = 0
        for match in self._splitter.finditer(text) if self._splitter else ():
            start, stop = match.span()
            token = self._added[self._added_ids[match[0]]]
            if token.single_word and re.search(r"\w", text[max(start - 1, 0) : start] + text[stop : stop + 1]):
                continue
            before = text[end:start].rstrip() if token.lstrip else text[end:start]
            ids += self._encode_plain(before, end == 0)
            ids.append(token.id)
            end = _skip_space(text, stop) if token.rstrip else stop
        return ids + self._encode_plain(text[end:], end == 0)

    def _encode_plain(self, text: str, at_start: bool) -> list[int]:
        return (self._first if at_start else self._later).encode(text) if text else []

    def piece(self, token_id: int) -> str | None:
        if token_id in self._added:
            return self._added[token_id].content
        return self._plain.id_to_piece(token_id) if 0 <= token_id < len(self._plain) else None

    def piece_bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].content.encode()
        piece = self.piece(token_id)
        return b"" if piece is None else _sentencepiece_bytes(piece, self._plain.is_byte(token_id))

    def token_to_id(self, token: str) -> int | None:
        if token in self._added_ids:
            return self._added_ids[token]
        i = self._plain.piece_to_id(token)
        return i if self._plain.id_to_piece(i) == token else None


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def sentencepiece_proto(
    tokens: Sequence[str],
    scores: Sequence[float],
    types: Sequence[int],
    *,
    add_dummy_prefix: bool,
    remove_extra_whitespaces: bool,
) -> bytes:
    """A serialized BPE ModelProto (sentencepiece_model.proto), written by hand to need no protobuf package."""
    out = bytearray()
    for token, score, kind in zip(tokens, scores, types, strict=True):
        text = token.encode()
        piece = _tag(1, 2) + _varint(len(text)) + text + _tag(2, 5) + struct.pack("<f", score)
        piece += _tag(3, 0) + _varint(kind)
        out += _tag(1, 2) + _varint(len(piece)) + piece
    unknown = [i for i, kind in enumerate(types) if kind == UNKNOWN]
    if len(unknown) != 1:
        raise ValueError(f"a sentencepiece vocabulary has one token of type 2 (unknown), this one has {len(unknown)}")
    # trainer_spec: model_type = BPE, byte_fallback, unk_id; bos, eos and pad are not sentencepiece's business here
    trainer = {3: 2, 35: int(BYTE in types), 40: unknown[0]}
    normalizer = {3: int(add_dummy_prefix), 4: int(remove_extra_whitespaces), 5: 1}
    for number, fields in ((2, trainer), (3, normalizer)):
        spec = b"".join(_tag(key, 0) + _varint(value) for key, value in fields.items())
        out += _tag(number, 2) + _varint(len(spec)) + spec
    return bytes(out)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _tag(field: int, wire_type: int) -> bytes:
    return _varint(field << 3 | wire_type)
