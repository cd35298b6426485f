"""What the benchmark runs: models, and each kernel's rows for a model, a batch and a context, as `Case`s.

`call` runs kernel and reference alike; XLA's own way stands here where a module's `reference` is not written for speed.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

BF16 = jnp.bfloat16
PAGE = 64  # tokens
SHORT_CONTEXT = 8192  # prompts beyond it are not benchmarked: XLA's scores would not fit


@dataclasses.dataclass(frozen=True)
class Model:
    """Sizes of one device's share: D model, F mlp, N query heads, K kv heads, H head dimension, V vocabulary; of how many."""

    D: int
    F: int
    N: int
    K: int
    H: int
    V: int
    devices: int = 1

    def over(self, tp: int) -> Model:
        sizes = dict(F=self.F // tp, N=self.N // tp, K=self.K // tp, V=self.V // tp)
        return dataclasses.replace(self, **sizes, devices=tp)


LLAMA3_70B = Model(8192, 28672, 64, 8, 128, 128256)
MODELS = {
    "llama3-8b": Model(4096, 14336, 32, 8, 128, 128256),
    "llama2-7b": Model(4096, 11008, 32, 32, 128, 32000),
    "llama2-13b": Model(5120, 13824, 40, 40, 128, 32000),
    "llama3-70b": LLAMA3_70B,
    "llama3-70b/4": LLAMA3_70B.over(4),
    "llama3-70b/8": LLAMA3_70B.over(8),
    "mistral-7b": Model(4096, 14336, 32, 8, 128, 32000),
    "qwen2.5-7b": Model(3584, 18944, 28, 4, 128, 152064),
}
TINY = Model(256, 256, 2, 1, 64, 512)
BATCHES = (1, 8, 16, 64)
CONTEXTS = (512, 2048, 8192, 32768)


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table.

    operands: key → what takes turns. start: key → the chain's first carry.
    call: (carry, operands, implementation, config) → an output, an array or a tuple of them.
    link: (carry, output) → the next carry, elementwise and small.
    table, sizes: the kernel's name in tuned/*.json, and what an entry of it says "when" with.
    configs: what --tune measures, the default first. xla_operands: what XLA is timed with, where that is something else.
    prepare: operands → what `call` takes, inside the program but ahead of its loop.
    """

    kernel: str
    shape: str
    bytes: int
    operations: int
    operands: Callable[[jax.Array], Any]
    start: Callable[[jax.Array], Any]
    call: Callable[[Any, Any, str, Any], Any]
    link: Callable[[Any, Any], Any]
    table: str = ""
    sizes: dict[str, Any] = dataclasses.field(default_factory=dict)
    configs: Callable[[], Sequence[Any]] = tuple
    xla_operands: Callable[[jax.Array], Any] | None = None
    prepare: Callable[[Any], Any] = lambda operands: operands


def _bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Random uint32, by a hash of each one's place (after lowbias32, C. Wellons 2018): jax.random's take several times as long
    to compile, and every row of the table has its own shapes."""
    place = lax.iota(jnp.uint32, math.prod(shape[1:])).reshape(shape[1:])
    first, (a, b) = lax.broadcasted_iota(jnp.uint32, shape, 0), jax.random.bits(key, (2,))
    x = place + a  # a window of one sequence: what b and the first axis add makes windows that overlap differ
    x = ((x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)) ^ (first * jnp.uint32(0x9E3779B9) + b)
    x = (x ^ (x >> 16)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


@functools.partial(jax.jit, static_argnames=("shape", "dtype", "scale"))
def noise(key: jax.Array, shape: tuple[int, ...], dtype: Any = BF16, scale: float = 1.0) -> jax.Array:
    """Uniform, of mean 0 and deviation `scale`."""
    signed = lax.bitcast_convert_type(_bits(key, shape), jnp.int32).astype(jnp.float32)
    return (signed * (scale * 3**0.5 * 2.0**-31)).astype(dtype)


def _pages(rows: int, length: int) -> jax.Array:
    """A table of pages of its own for each row; page 0 is nobody's."""
    return (1 + jnp.arange(rows * math.ceil(length / PAGE), dtype=jnp.int32)).reshape(rows, -1)


def _cache(key: jax.Array, model: Model, rows: int, length: int) -> tuple[jax.Array, jax.Array]:
    shape = (1 + rows * math.ceil(length / PAGE), model.K, PAGE, model.H)
    a, b = jax.random.split(key)
    return noise(a, shape), noise(b, shape)


def _angles(B: int, S: int, H: int) -> tuple[jax.Array, jax.Array]:
    """Rotary tables of one position for all rows."""
    angles = jnp.broadcast_to(S * 1e-2 / (1 + jnp.arange(H // 2)), (B, H // 2))
    return jnp.cos(angles), jnp.sin(angles)


def _configs(module: Any, *sizes: Any) -> list[Any]:
    return [module.default_config(*sizes), *module.search_space(*sizes)]


def _small(x: jax.Array, out: jax.Array) -> jax.Array:
    """x again, but it had to wait for the whole of `out`'s first column."""
    return x + (out[:, :1] * 1e-3).astype(x.dtype)


# ---------------------------------------------------------------- the kernels: model, batch, context → cases


def decode_attention(model: Model, B: int, S: int, interpret: Any) -> Iterator[Case]:
    from pallas_kernels import decode_attention as module

    K, G, H = model.K, model.N // model.K, model.H
    pages, length = _pages(B, S), jnp.full((B,), S, jnp.int32)

    def call(q: jax.Array, caches: Any, implementation: str, config: Any) -> jax.Array:
        table = pages
        if implementation == "reference":  # or XLA gathers the pages once, before the loop
            table += jnp.isnan(q[0, 0, 0, 0]).astype(jnp.int32)
        how: dict[str, Any] = dict(implementation=implementation, config=config, interpret=interpret)
        return module.decode_attention(q, caches[0], caches[1], table, length, **how)

    yield Case(
        "decode_attention",
        f"{B} × {S}, K={K} G={G} H={H}",
        4 * B * S * K * H,
        4 * B * S * model.N * H,
        lambda key: _cache(key, model, B, S),
        lambda key: noise(key, (B, K, G, H)),
        call,
        lambda q, out: q * BF16(0.5) + out,
        "decode_attention",
        {"pairs": B * K, "positions": pages.shape[1] * PAGE},
        lambda: [module.default_config(B, K, pages.shape[1], PAGE), *module.search_space(H, 8 if G <= 8 else 16)],
    )


def append_and_attend(model: Model, B: int, S: int, interpret: Any) -> Iterator[Case]:
    """Context S counting the new token."""
    from pallas_kernels import decode_attention as module

    K, G, H = model.K, model.N // model.K, model.H
    pages, length = _pages(B, S), jnp.full((B,), S, jnp.int32)
    cos, sin = _angles(B, S, H)

    def call(qkv: jax.Array, refs: Any, implementation: str, config: Any) -> jax.Array:
        if interpret is not None:
            config = module.Config(warpgroups=2)
        how: dict[str, Any] = dict(implementation=implementation, config=config, interpret=interpret)
        keys, values = (ref[...] for ref in refs)
        out, *written = module.append_and_attend(qkv, cos, sin, keys, values, pages, length, **how)
        for ref, array in zip(refs, written, strict=True):
            ref[...] = array
        return out

    yield Case(
        "append_and_attend",
        f"{B} × {S}, K={K} G={G} H={H}",
        4 * B * S * K * H,
        4 * B * S * model.N * H,
        lambda key: _cache(key, model, B, S),
        lambda key: noise(key, (B, K, G + 2, H)),
        call,
        lambda qkv, out: jnp.concatenate([qkv[:, :, :G] * BF16(0.5) + out, qkv[:, :, G:]], axis=2),
        prepare=lambda caches: [jax.new_ref(x) for x in caches],
    )


def prefill_attention(model: Model, B: int, S: int, interpret: Any) -> Iterator[Case]:
    from pallas_kernels import prefill_attention as module

    if B > 1 or S > SHORT_CONTEXT:
        return
    K, G, H = model.K, model.N // model.K, model.H
    pages, none, length = _pages(1, S), jnp.zeros((1,), jnp.int32), jnp.full((1,), S, jnp.int32)

    def dense(q_TKGH: jax.Array, keys_XKPH: jax.Array, values_XKPH: jax.Array) -> jax.Array:
        page_M = pages[0] + jnp.isnan(q_TKGH[0, 0, 0, 0]).astype(jnp.int32)
        keys_SKH, values_SKH = (c[page_M].swapaxes(1, 2).reshape(S, K, H) for c in (keys_XKPH, values_XKPH))
        scores_KGTS = jnp.einsum("TKGH,SKH->KGTS", q_TKGH, keys_SKH, preferred_element_type=jnp.float32)
        seen_TS = jnp.arange(S) <= jnp.arange(S)[:, None]
        probs_KGTS = jax.nn.softmax(jnp.where(seen_TS, scores_KGTS * H**-0.5, -jnp.inf), axis=-1).astype(BF16)
        return jnp.einsum("KGTS,SKH->TKGH", probs_KGTS, values_SKH)

    def call(q: jax.Array, caches: Any, implementation: str, config: Any) -> jax.Array:
        if implementation == "reference":
            return dense(q, *caches)
        how: dict[str, Any] = dict(implementation=implementation, config=config, interpret=interpret)
        return module.prefill_attention(q, caches[0], caches[1], pages, none, none, length, **how)

    yield Case(
        "prefill_attention",
        f"1 × {S}, K={K} G={G} H={H}",
        4 * S * (model.N + K) * H,
        2 * S * (S + 1) * model.N * H,
        lambda key: _cache(key, model, 1, S),
        lambda key: noise(key, (S, K, G, H)),
        call,
        lambda q, out: q * BF16(0.5) + out,
        "prefill_attention",
        {"tokens": S, "head": H},
        lambda: [module.default_config(S, H), *module.search_space(H)],
    )


def softmax(model: Model, B: int, S: int, interpret: Any) -> Iterator[Case]:
    """Scores of one new token a row, and for one row of a chunk of up to 2048 tokens at the context's end."""
    from pallas_kernels import softmax as module

    for T in (1, min(2048, S)) if B == 1 else (1,):
        start = jnp.full((B,), S - T, jnp.int32)
        shape = (B, model.N, T, S)
        seen = B * model.N * (T * (S - T) + T * (T + 1) // 2)

        def call(length: jax.Array, scores: Any, implementation: str, config: Any, start: jax.Array = start) -> jax.Array:
            how: dict[str, Any] = dict(implementation=implementation, config=config, interpret=interpret)
            return module.softmax(scores, start, length, scale=model.H**-0.5, dtype=BF16, **how)

        yield Case(
            "softmax",
            f"{B} × {T} of {S}, N={model.N}, float32 → bf16",
            4 * seen + 2 * math.prod(shape),
            0,
            lambda key, shape=shape: noise(key, shape, jnp.float32),  # type: ignore[misc]
            lambda key: jnp.full((B,), S, jnp.int32),
            call,
            lambda length, out: length + jnp.isnan(out[:, 0, 0, 0]).astype(jnp.int32),
            "softmax",
            {"keys": S},
            functools.partial(_configs, module, math.prod(shape[:3]), S, jnp.float32),
        )


def lm_head(model: Model, B: int, S: int, interpret: Any) -> Iterator[Case]:
    from pallas_kernels import linear
    from pallas_kernels import lm_head as module

    D, V = model.D, model.V

    def plain(key: jax.Array) -> jax.Array:
        return noise(key, (V, D), scale=D**-0.5)

    def configs(candidates: int, int8: bool) -> list[Any]:
        default = linear.default_config(B, D, V, True) if int8 else module.default_config(B, D, V, candidates)
        return [default, *module.search_space(B, D, V, candidates, int8)]

    for candidates, int8 in ((1, False), (20, False), (64, False), (1, True)):
        if int8 and (D % 128 or V % 128):
            continue

        def call(x: jax.Array, head: Any, implementation: str, config: Any, candidates: int = candidates) -> Any:
            how: dict[str, Any] = dict(implementation=implementation, config=config, interpret=interpret)
            return module.lm_head(x, head, candidates=candidates, **how)

        yield Case(
            "lm_head",
            f"{B} × {D} · {V}, {candidates} candidate{'s' * (candidates > 1)}{', int8' * int8}",
            D * V + D * V // 64 if int8 else 2 * D * V,
            2 * B * D * V,
            functools.partial(_weight, rows=D, columns=V, int8=True) if int8 else plain,
            lambda key: noise(key, (B, D)),
            call,
            lambda x, out: _small(x, out[0]),
            "" if int8 else "lm_head",  # what an int8 head's entry says, that it beats `linear` and a maximum, no row shows
            {"batch": B, "vocabulary": V, "candidates": candidates},
            functools.partial(configs, candidates, int8),
            plain if int8 else None,
        )


@functools.partial(jax.jit, static_argnames=("rows", "columns", "int8"))
def _weight(key: jax.Array, rows: int, columns: int, int8: bool) -> Any:
    if not int8:
        return noise(key, (rows, columns), scale=rows**-0.5)
    of_values, of_scales = jax.random.split(key)
    bits = _bits(of_values, (columns // 128, rows // 128, 128, 32))
    scales = noise(of_scales, (columns // 128, rows // 128, 128)) * 0.1 + 1
    values = lax.bitcast_convert_type(bits, jnp.int8).reshape(*bits.shape[:3], 128)
    return values, (scales * (rows**-0.5 / 74)).astype(BF16)


def linear(model: Model, B: int, S: int, interpret: Any) -> Iterator[Case]:
    from pallas_kernels import linear as module
    from pallas_kernels import linear_int8

    heads = model.N * model.H
    products = {
        "qkv": (model.D, heads + 2 * model.K * model.H),
        "o": (heads, model.D),
        "gate_up": (model.D, 2 * model.F),
        "down": (model.F, model.D),
    }
    for (name, (rows, columns)), int8 in itertools.product(products.items(), (False, True)):
        if rows % 128 or columns % 128 or (interpret is not None and int8):  # not for the simulator
            continue

        def call(x: jax.Array, weight: Any, implementation: str, config: Any, silu: bool = name == "gate_up") -> Any:
            if interpret is not None:
                config = module.Config(stages=2)  # one block: the simulator has no clusters
            how: dict[str, Any] = dict(implementation=implementation, config=config, interpret=interpret)
            return module.linear(x, weight, silu=silu, **how)

        yield Case(
            "linear",
            f"{name} {B} × {rows} · {columns}, {'int8' if int8 else 'bf16'}",
            rows * columns + rows * columns // 64 if int8 else 2 * rows * columns,
            2 * B * rows * columns,
            functools.partial(_weight, rows=rows, columns=columns, int8=int8),
            lambda key, rows=rows: noise(key, (B, rows)),  # type: ignore[misc]
            call,
            _small,
            "linear_int8" if int8 else "linear_bf16",
            {"rows": B, "inputs": [rows], "columns": [columns]},  # tiles are dealt out for just these
            functools.partial(_configs, linear_int8, B, rows, columns)
            if int8
            else functools.partial(_configs, module, B, rows, columns, False),
            functools.partial(_weight, rows=rows, columns=columns, int8=False),
        )


def layer(model: Model, B: int, S: int, interpret: Any) -> Iterator[Case]:
    """A whole decoder layer, and several in one launch; context S counts the new token."""
    return _blocks(model, B, S, interpret, "layer") if model.devices == 1 else iter(())


def halves(model: Model, B: int, S: int, interpret: Any) -> Iterator[Case]:
    """One device's share of a decoder layer in two launches, and nothing reduced over devices between them."""
    return _blocks(model, B, S, interpret, "halves") if model.devices > 1 else iter(())


def _blocks(model: Model, B: int, S: int, interpret: Any, kind: str) -> Iterator[Case]:
    from pallas_kernels import decode_layer as module

    if interpret is not None:
        return  # not one kernel for the simulator: its phases are tested alone
    K, G, H, D, F = model.K, model.N // model.K, model.H, model.D, model.F
    pages, length = _pages(B, S), jnp.full((B,), S, jnp.int32)
    shapes = ((D, (G + 2) * K * H), (model.N * H, D), (D, 2 * F), (F, D))
    if any(size % 128 for shape in shapes for size in shape):
        return
    elements = sum(math.prod(shape) for shape in shapes)
    cos, sin = _angles(B, S, H)

    def operands(key: jax.Array, int8: bool, count: int) -> Any:
        return [one(k, int8) for k in jax.random.split(key, count)]

    def one(key: jax.Array, int8: bool) -> Any:
        keys = jax.random.split(key, 5)
        weights = tuple(_weight(k, *shape, int8) for k, shape in zip(keys, shapes))
        return weights, _cache(keys[4], model, B, S)

    def prepare(given: Any) -> Any:
        norm = jnp.ones((D,), BF16)
        weights = [module.Layer(norm, qkv, o, norm, gate_up, down) for (qkv, o, gate_up, down), _ in given]
        caches = [[jax.new_ref(caches[side]) for _, caches in given] for side in range(2)]
        return weights, *caches, jax.new_ref(module.new_sync())

    def call(carry: Any, given: Any, implementation: str, config: Any) -> Any:
        weights, *refs = given
        keys, values, sync = jax.tree.map(lambda ref: ref[...], refs)
        args = (carry, weights, cos, sin, keys, values, pages, length, sync)
        int8 = isinstance(weights[0].qkv, tuple)
        dims = module.Dims("layer", int8, 1e-5, B, D, F, K, G, H, PAGE)
        config = config or module.tuned_config(dims, halves=kind == "halves") or module.Config(rows=256 if int8 else 128)
        config = dataclasses.replace(config, layers=len(weights))  # all in one launch
        how = dict(eps=1e-5, config=config, implementation=implementation)
        reduce = (lambda delta_BD: delta_BD) if kind == "halves" else None
        out, *written = module.layers(*args, reduce=reduce, **how)
        jax.tree.map(lambda ref, array: ref.__setitem__(..., array), refs, written)
        return out - carry  # what they add: this is compared

    for int8, count in itertools.product((False, True), (1, 4) if kind == "layer" else (1,)):
        yield Case(
            kind,
            f"{B} × {S}, D={D} F={F} K={K} G={G}, {'int8' if int8 else 'bf16'}{f', {count} layers' if count > 1 else ''}",
            count * ((elements + elements // 64 if int8 else 2 * elements) + 4 * B * S * K * H),
            count * (2 * B * elements + 4 * B * S * model.N * H),
            functools.partial(operands, int8=int8, count=count),
            lambda key: noise(key, (B, D)),
            call,
            lambda carry, out: (carry + out) * BF16(0.5),
            xla_operands=functools.partial(operands, int8=False, count=count),
            prepare=prepare,
        )


def swiglu(model: Model, B: int, S: int, interpret: Any) -> Iterator[Case]:
    """A prompt of S tokens."""
    from pallas_kernels import swiglu as module

    D, E, T = model.D, 2 * model.F, max(S, module.ROWS)
    if B > 1 or S > SHORT_CONTEXT or D % module.STEP or E % module.COLUMNS:
        return

    def call(x: jax.Array, weight: jax.Array, implementation: str, config: Any) -> jax.Array:
        if interpret is not None:
            config = module.Config(cluster=1, stages=2)  # the simulator has no clusters
        return module.swiglu(x, weight, implementation=implementation, config=config, interpret=interpret)

    yield Case(
        "swiglu",
        f"{T} × {D} · {E}",
        2 * (D * E + T * D + T * E // 2),
        2 * T * D * E,
        lambda key: noise(key, (D, E), scale=D**-0.5),
        lambda key: noise(key, (T, D)),
        call,
        _small,
        "swiglu",
        {"rows": T},
        lambda: [module.Config(), *module.search_space()],
    )


def add_rms_norm(model: Model, B: int, S: int, interpret: Any) -> Iterator[Case]:
    """A token a row, and for one row a prompt of S tokens."""
    from pallas_kernels import add_rms_norm as module

    D = model.D
    for T in (1, min(S, SHORT_CONTEXT)) if B == 1 else (B,):

        def operands(key: jax.Array, T: int = T) -> tuple[jax.Array, jax.Array]:
            return noise(key, (T, D)), jnp.ones((D,), BF16)

        def call(residual: jax.Array, given: Any, implementation: str, config: Any) -> tuple[jax.Array, jax.Array]:
            return module.add_rms_norm(residual, *given, eps=1e-5, implementation=implementation, interpret=interpret)

        yield Case(
            "add_rms_norm",
            f"{T} × {D}",
            8 * T * D,
            0,
            operands,
            lambda key, T=T: noise(key, (T, D)),  # type: ignore[misc]
            call,
            lambda residual, out: (residual + out[0]) * BF16(0.5) + out[1],
        )


# Each reads the module of its name, or the one named here.
MODULES = {"layer": "decode_layer", "halves": "decode_layer", "append_and_attend": "decode_attention"}
KERNELS: dict[str, Callable[[Model, int, int, Any], Iterator[Case]]] = {
    "decode_attention": decode_attention,
    "append_and_attend": append_and_attend,
    "prefill_attention": prefill_attention,
    "softmax": softmax,
    "lm_head": lm_head,
    "linear": linear,
    "swiglu": swiglu,
    "add_rms_norm": add_rms_norm,
    "layer": layer,
    "halves": halves,
}


def absent(kernel: str) -> bool:
    """Whether this checkout lacks the kernel's module."""
    return importlib.util.find_spec(f"pallas_kernels.{MODULES.get(kernel, kernel)}") is None
