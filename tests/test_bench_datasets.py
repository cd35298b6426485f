"""The prompts of the benchmarks."""

import json
import subprocess
import sys

import pytest

from jaxinfer.bench.datasets import NUM_PROMPTS, OUTPUT_LEN, WORDS, DatasetOptions, SampleRequest, random_prompts


def lengths(requests):
    return [(len(r.prompt), r.output_len) for r in requests]


def test_random_prompts_are_spread_evenly_repeatable_and_share_no_prefix():
    requests = random_prompts(2000, 128, 1024, 64, vocab=500, seed=0)
    input_lens = [len(r.prompt) for r in requests]
    assert (min(input_lens), max(input_lens)) == (128, 1024)  # both included
    assert {input_lens.count(n) for n in range(128, 1025)} == {2, 3}  # 2000 over 897 lengths
    ids = {i for r in requests for i in r.prompt}
    assert ids == set(range(500)) and {r.output_len for r in requests} == {64}
    assert requests == random_prompts(2000, 128, 1024, 64, vocab=500, seed=0)
    # Another draw, another vocabulary: the same work with other ids; another seed: other lengths.
    for other in (random_prompts(2000, 128, 1024, 64, 500, 0, draw=1), random_prompts(2000, 128, 1024, 64, 10**6, 0)):
        assert lengths(other) == lengths(requests) and all(a.prompt != b.prompt for a, b in zip(other, requests))
    another = lengths(random_prompts(2000, 128, 1024, 64, 500, 1))
    assert another != lengths(requests) and sorted(another) == sorted(lengths(requests))  # in another order
    few = [sum(len(r.prompt) for r in random_prompts(64, 128, 1024, 1, 9, seed)) for seed in range(3)]
    assert few == 3 * [few[0]] and few[0] / 64 == pytest.approx((128 + 1024) / 2, rel=0.001)
    assert [len(random_prompts(1, 5, 9, 1, 9, seed)[0].prompt) for seed in range(3)] == [7, 7, 7]
    assert {r.output_len for r in random_prompts(200, 1, 1, (3, 5), 9, 0)} == {3, 4, 5}


def test_bounds_are_vllms_range_ratio_or_what_is_given():
    options = DatasetOptions(random_input_len=10, random_output_len=5, random_range_ratio=0.25)
    assert (options.bounds("input"), options.bounds("output")) == ((7, 13), (3, 7))
    assert DatasetOptions(random_output_len=1, random_range_ratio=0.9).bounds("output") == (1, 2)
    options = DatasetOptions(random_input_len_min=128, random_input_len_max=1024)
    assert (options.bounds("input"), options.bounds("output")) == ((128, 1024), (OUTPUT_LEN, OUTPUT_LEN))
    assert len(options.load(0, 10)) == NUM_PROMPTS


def test_where_only_text_can_be_sent_there_are_as_many_words():
    options = DatasetOptions(num_prompts=3, random_input_len=9, random_range_ratio=0.5)
    texts = options.load(0, None)
    assert [len(t.prompt.split()) for t in texts] == [len(r.prompt) for r in options.load(0, 100)]
    assert {word for t in texts for word in t.prompt.split()} <= set(WORDS)


def test_a_file_is_shuffled_by_the_seed_and_gives_the_next_prompts_to_another_draw(tmp_path):
    path = tmp_path / "custom.jsonl"
    records = [{"prompt": f"p{i}"} for i in range(4)] + [{"prompt": [1, 2], "output_tokens": 3}]
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n\n")
    options = DatasetOptions("custom", str(path))
    everything = options.load(0, 10)
    assert sorted(everything, key=str) == sorted(
        [*(SampleRequest(f"p{i}", OUTPUT_LEN) for i in range(4)), SampleRequest([1, 2], 3)], key=str
    )
    assert options.load(0, 10) == everything != options.load(1, 10)
    two = DatasetOptions("custom", str(path), num_prompts=2, random_output_len=7)
    draws = [[r.prompt for r in two.load(0, 10, draw)] for draw in range(3)]
    order = [r.prompt for r in everything]
    assert draws == [order[:2], order[2:4], [order[4], order[0]]]
    assert {r.output_len for r in two.load(0, 10)} == {7}
    with pytest.raises(ValueError, match="has 5 prompts; --num-prompts 6 must be"):
        DatasetOptions("custom", str(path), num_prompts=6).load(0, 10)


def test_sharegpt_takes_first_turns_that_were_answered(tmp_path):
    path = tmp_path / "sharegpt.json"
    turns = [["a", "b"], ["alone"], ["c", "d", "e"], []]
    path.write_text(json.dumps([{"conversations": [{"from": "x", "value": text} for text in texts]} for texts in turns]))
    loaded = DatasetOptions("sharegpt", str(path), random_output_len=9).load(0, 10)
    assert {(r.prompt, r.output_len) for r in loaded} == {("a", 9), ("c", 9)}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("custom", "hello", "neither a JSON list nor JSON lines"),
        ("custom", "[1]", "record 1 is not a JSON object"),
        ("custom", '{"prompt": "a"}\n{"text": "b"}', 'record 2 has no "prompt"'),
        ("custom", '{"prompt": [1, -2]}', 'record 1 has no "prompt"'),
        ("custom", '{"prompt": ""}', '"prompt" is empty'),
        ("custom", '{"prompt": "a", "output_tokens": 0}', r'"output_tokens" \(0\)'),
        ("sharegpt", '{"prompt": "a"}', 'record 1 has no "conversations"'),
        ("sharegpt", "", "has 0 prompts"),
    ],
)
def test_files_that_hold_no_prompts_are_refused(tmp_path, name, text, message):
    path = tmp_path / "file"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        DatasetOptions(name, str(path)).load(0, 10)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dataset_name": "sonnet"}, "must be one of random, sharegpt, custom"),
        ({"dataset_name": "custom"}, "read a file"),
        ({"dataset_path": "f"}, "random reads none"),
        ({"num_prompts": 0}, "--num-prompts is 0; it must be at least 1"),
        ({"random_range_ratio": 1.0}, "at least 0 and below 1"),
        ({"random_input_len_min": 3}, "give both, the smaller first"),
        ({"random_output_len_min": 3, "random_output_len_max": 2}, "give both, the smaller first"),
        ({"random_input_len_min": 3, "random_input_len_max": 4, "random_range_ratio": 0.5}, "one of the two ways"),
        ({"dataset_name": "custom", "dataset_path": "f", "random_vocab_size": 5}, "of --dataset-name random only"),
    ],
)
def test_options_that_contradict_each_other_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DatasetOptions(**fields)


def test_importing_the_client_imports_no_jax():
    code = "import jaxinfer.bench.serve, jaxinfer.bench.datasets, sys; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
