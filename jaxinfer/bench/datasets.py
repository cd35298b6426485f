"""The prompts of `bench serve` and `bench throughput`, the same for both: random ones, or a file's. No jax."""

import argparse
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import numpy as np

DATASETS = ("random", "sharegpt", "custom")
NUM_PROMPTS, OUTPUT_LEN = 1000, 128  # where nothing else is said
# Each a single token, with its space, in nearly every vocabulary: n of them make about n tokens.
WORDS = (
    "the of and to in is that for it as was with be by on not he his but at are this have from or had an they which one you "
    "were her all she there would their we him been has when who will more no if out so said what up its about into than them "
    "can only other new some could time these two may then do first any my now such like our over man me even most made after"
).split()


@dataclass(frozen=True)
class SampleRequest:
    """A prompt, text or token ids, and how many tokens to generate for it."""

    prompt: str | list[int]
    output_len: int


def random_prompts(
    num: int, min_len: int, max_len: int, output_len: int | tuple[int, int], vocab: int, seed: int, draw: int = 0
) -> list[SampleRequest]:
    """Prompts of random token ids below `vocab`; their lengths are spread evenly over min_len … max_len, in random order.

    So every seed has as many tokens: of 64 lengths drawn one by one from 128 … 1024, the sum may well be 12 % off.
    output_len: of all, or (least, most), spread evenly too. The order of the lengths depends on `seed` alone, ids on `draw`
    as well: another draw shares no prefix with the first.
    """
    rng = np.random.default_rng(seed)

    def spread(low: int, high: int) -> list[int]:
        lens: list[int] = rng.permutation(low + (2 * np.arange(num) + 1) * (high - low + 1) // (2 * num)).tolist()
        return lens

    input_lens = spread(min_len, max_len)
    output_lens = spread(*((output_len, output_len) if isinstance(output_len, int) else output_len))
    ids = np.random.default_rng([seed, draw])
    return [SampleRequest(ids.integers(0, vocab, n).tolist(), out) for n, out in zip(input_lens, output_lens, strict=True)]


def read_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, record) of a JSON list or of JSON lines."""
    text = path.read_text(encoding="utf-8")
    try:
        is_list = text.lstrip().startswith("[")
        items = json.loads(text) if is_list else [json.loads(line) for line in text.split("\n") if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is neither a JSON list nor JSON lines: {error}") from None
    for number, item in enumerate(items, 1):
        if not isinstance(item, dict):
            raise ValueError(f"{path}, record {number} is not a JSON object")
        yield f"{path}, record {number}", item


def read_sharegpt(path: Path, output_len: int | None) -> list[SampleRequest]:
    """The first turn of each conversation that was answered: {"conversations": [{"value": text}, …]}.

    output_len: None is OUTPUT_LEN: counting the answers' tokens would need the model's tokenizer.
    """
    requests = []
    for where, record in read_records(path):
        turns = record.get("conversations")
        if not isinstance(turns, list) or not all(isinstance(t, dict) and isinstance(t.get("value"), str) for t in turns):
            raise ValueError(f'{where} has no "conversations": [{{"value": text}}, …]')
        if len(turns) >= 2 and turns[0]["value"]:
            requests.append(SampleRequest(turns[0]["value"], OUTPUT_LEN if output_len is None else output_len))
    return requests


def read_custom(path: Path, output_len: int | None) -> list[SampleRequest]:
    """{"prompt": text or token ids, "output_tokens": n}. output_len: None leaves each its own, or OUTPUT_LEN."""
    requests = []
    for where, record in read_records(path):
        prompt, own = record.get("prompt"), record.get("output_tokens", OUTPUT_LEN)
        if not (isinstance(prompt, str) or (isinstance(prompt, list) and all(type(i) is int and i >= 0 for i in prompt))):
            raise ValueError(f'{where} has no "prompt" that is a text or a list of token ids')
        if not prompt or type(own) is not int or own < 1:
            raise ValueError(f'{where}: its "prompt" is empty or its "output_tokens" ({own!r}) is no integer from 1')
        requests.append(SampleRequest(prompt, own if output_len is None else output_len))
    return requests


@dataclass(frozen=True)
class DatasetOptions:
    """Which prompts; vLLM's names. None leaves the choice to what `add_arguments` says in its help."""

    dataset_name: str = "random"
    dataset_path: str | None = None
    num_prompts: int | None = None
    random_input_len: int = 1024
    random_output_len: int | None = None
    random_range_ratio: float = 0.0
    random_input_len_min: int | None = None
    random_input_len_max: int | None = None
    random_output_len_min: int | None = None
    random_output_len_max: int | None = None
    random_vocab_size: int | None = None

    def __post_init__(self) -> None:
        if self.dataset_name not in DATASETS:
            raise ValueError(f"--dataset-name {self.dataset_name}: it must be one of {', '.join(DATASETS)}")
        if (self.dataset_path is None) != (self.dataset_name == "random"):
            raise ValueError(
                f"--dataset-name {self.dataset_name} with --dataset-path {self.dataset_path}: "
                f"{' and '.join(DATASETS[1:])} read a file, random reads none"
            )
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{flag(field.name)} is {value}; it must be at least 1")
        if not 0 <= self.random_range_ratio < 1:
            raise ValueError(f"--random-range-ratio is {self.random_range_ratio}; it must be at least 0 and below 1")
        given = [f.name for f in fields(self) if f.name.startswith("random_") and getattr(self, f.name) != f.default]
        if self.dataset_name != "random" and (unused := [flag(name) for name in given if name != "random_output_len"]):
            raise ValueError(f"{', '.join(unused)}: of --dataset-name random only, not of {self.dataset_name}")
        self.bounds("input"), self.bounds("output")

    def bounds(self, side: str) -> tuple[int, int]:
        """(least, most) tokens of a random "input" or "output"."""
        names = f"random_{side}_len_min", f"random_{side}_len_max"
        low, high = (getattr(self, name) for name in names)
        if low is None and high is None:
            middle, ratio = getattr(self, f"random_{side}_len") or OUTPUT_LEN, self.random_range_ratio
            return max(1, math.floor(middle * (1 - ratio))), math.ceil(middle * (1 + ratio))
        if low is None or high is None or low > high:
            raise ValueError(f"{flag(names[0])} {low} and {flag(names[1])} {high}: give both, the smaller first")
        if self.random_range_ratio:
            raise ValueError(f"--random-range-ratio beside {flag(names[0])}: give one of the two ways to vary lengths")
        return low, high

    def load(self, seed: int, vocab: int | None, draw: int = 0, num: int | None = None) -> list[SampleRequest]:
        """`num` requests (None: --num-prompts). vocab: random ids lie below it unless --random-vocab-size says otherwise;
        None makes texts of English words instead.

        Another draw has other prompts: of a file the next ones, in the order that `seed` shuffles them into, from the
        start again at its end.
        Raises ValueError or OSError for a file that has too few of them or cannot be read.
        """
        if self.dataset_name == "random":
            num = num or self.num_prompts or NUM_PROMPTS
            ids_below = len(WORDS) if vocab is None else self.random_vocab_size or vocab
            requests = random_prompts(num, *self.bounds("input"), self.bounds("output"), ids_below, seed, draw)
            if vocab is not None:
                return requests
            return [SampleRequest(" ".join(WORDS[int(i)] for i in r.prompt), r.output_len) for r in requests]
        assert self.dataset_path is not None
        read = {"sharegpt": read_sharegpt, "custom": read_custom}[self.dataset_name]
        requests = read(Path(self.dataset_path), self.random_output_len)
        num_prompts = self.num_prompts or min(len(requests), NUM_PROMPTS)
        if not 0 < num_prompts <= len(requests):
            raise ValueError(f"{self.dataset_path} has {len(requests)} prompts; --num-prompts {num_prompts} must be 1 to that")
        random.Random(seed).shuffle(requests)
        return [requests[(draw * num_prompts + i) % len(requests)] for i in range(num or num_prompts)]

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Self:
        return cls(**{field.name: getattr(args, field.name) for field in fields(cls)})


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_arguments(parser: argparse.ArgumentParser, vocab: str) -> None:
    """Flags of DatasetOptions. vocab: what random ids are drawn below by default, in words."""
    help_texts = {
        "dataset_name": "random token ids; sharegpt: the first turn of each conversation of a file; "
        'custom: a file of {"prompt": text or token ids, "output_tokens": n}; both a JSON list or JSON lines',
        "dataset_path": "the file",
        "num_prompts": f"default: {NUM_PROMPTS}, or all of a smaller file",
        "random_input_len": "tokens a prompt (words, about, where only text can be sent: chat)",
        "random_output_len": f"tokens to generate, also for a file; default: {OUTPUT_LEN}, or what the file says",
        "random_range_ratio": "lengths are spread evenly over len*(1-ratio) … len*(1+ratio)",
        "random_input_len_min": "with its max: prompt lengths spread evenly from here",
        "random_input_len_max": "… to here",
        "random_output_len_min": "the same for the output",
        "random_output_len_max": "the same for the output",
        "random_vocab_size": f"token ids are drawn below this; default: {vocab}",
    }
    kinds = {"dataset_name": str, "dataset_path": str, "random_range_ratio": float}
    also = {"random_input_len": ["--input-len"], "random_output_len": ["--output-len"]}
    group = parser.add_argument_group("prompts")
    for field in fields(DatasetOptions):
        text = help_texts[field.name] + ("" if field.default is None else f"; default: {field.default}")
        kind = kinds.get(field.name, int)
        choices = DATASETS if field.name == "dataset_name" else None
        names = [flag(field.name), *also.get(field.name, [])]
        group.add_argument(*names, type=kind, default=field.default, choices=choices, help=text)
