"""The model's numbers: transformers is the truth, and every way to get the same logits gives the same logits."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxinfer.cache import init_cache
from jaxinfer.checkpoint import open_checkpoint
from jaxinfer.model import Batch, Rows, Transformer
from jaxinfer.sharding import make_mesh, padded_dims
from jaxinfer.weights import load_params

pytest.importorskip("torch")
import tiny

LENGTH = 48
Forward = Callable[[np.ndarray, list[int], int], np.ndarray]


def forward_of(path: Path, tp: int) -> tuple[Forward, int]:
    """(forward, vocabulary): forward(ids_BT, pieces, page size) runs the tokens through the cache in pieces of the given
    lengths and returns all logits [B, T, V], float32."""
    checkpoint = open_checkpoint(str(path))
    config, mesh = checkpoint.model_config, make_mesh(tp)
    dims = padded_dims(config, tp)
    model = Transformer(config, mesh, jnp.dtype("float32"))
    graphdef, abstract = nnx.split(model)
    leaves = load_params(checkpoint, model, config, mesh, jnp.dtype("float32"), use_tqdm=False)
    treedef = jax.tree.structure(abstract)

    @jax.jit
    def step(leaves, cache, token_T, batch):
        model = nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))
        hidden_TD, cache = model(token_T, cache, batch)
        return model.logits(hidden_TD), cache

    def forward(ids_BT: np.ndarray, pieces: list[int], page_size: int) -> np.ndarray:
        B, T = ids_BT.shape
        M = -(-T // page_size)
        cache = init_cache(config, dims, 1 + B * M, page_size, jnp.dtype("float32"), mesh)
        # Pages in no particular order, and everything in them poisoned: what was there before must not matter.
        pages_BM = jnp.asarray(1 + np.random.default_rng(0).permutation(B * M).reshape(B, M), jnp.int32)
        cache = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), cache)
        out, start = [], 0
        for piece in pieces:
            # A step may be padded: its program is as long as the longest one.
            ids = np.zeros(B * max(pieces), np.int32)
            ids[: B * piece] = ids_BT[:, start : start + piece].reshape(-1)
            rows = (pages_BM, jnp.full(B, start, jnp.int32), jnp.full(B, piece, jnp.int32))
            batch = Batch(decode=Rows(*rows)) if max(pieces) == 1 else Batch(Rows(*rows, jnp.arange(B) * piece))
            logits, cache = step(leaves, cache, jnp.asarray(ids), batch)
            out.append(np.asarray(logits)[: B * piece, : config.vocab_size].reshape(B, piece, -1))
            start += piece
        return np.concatenate(out, axis=1)

    return forward, config.vocab_size


def prompts(vocab: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, vocab, (2, LENGTH))


@pytest.mark.parametrize("family", tiny.VARIANTS)
def test_logits_equal_transformers_at_any_tp(family: str, tmp_path: Path) -> None:
    path, reference = tiny.make_checkpoint(tmp_path, family)
    for tp in (1, 2, 8):
        forward, vocab = forward_of(path, tp)
        ids = prompts(vocab)
        expected = np.stack([tiny.reference_logits(reference, row.tolist()) for row in ids])
        logits = forward(ids, [LENGTH], 16)
        assert np.ptp(expected) > 0.1  # logits that are all alike would prove nothing
        np.testing.assert_allclose(logits, expected, atol=1e-4, err_msg=f"tp={tp}")


@pytest.mark.parametrize("family", ["llama3.2", "mistral", "qwen3"])
def test_pieces_decode_and_page_sizes_change_nothing(family: str, tmp_path: Path) -> None:
    path, _ = tiny.make_checkpoint(tmp_path, family)
    forward, vocab = forward_of(path, 1)
    ids = prompts(vocab)
    whole = forward(ids, [LENGTH], 16)
    np.testing.assert_allclose(forward(ids, [LENGTH], LENGTH), whole, atol=2e-6, err_msg="one page a sequence")
    np.testing.assert_allclose(forward(ids, [16, 16, 16], 16), whole, atol=1e-5, err_msg="even chunks")
    np.testing.assert_allclose(forward(ids, [7, 20, 13, 8], 16), whole, atol=1e-5, err_msg="uneven chunks")
    decoded = forward(ids[:, :24], [16] + [1] * 8, 16)
    np.testing.assert_allclose(decoded, whole[:, :24], atol=1e-5, err_msg="decode")
