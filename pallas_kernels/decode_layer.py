"""A block's halves, or several whole blocks, at decode as one persistent kernel, for Hopper GPUs; weights in bf16 or int8.

    residual_BD, delta_BD       bf16   the residual stream, and what the half before adds to it (reduced over devices)
    norm_D                      bf16   weight of the half's RMSNorm
    qkv_DO, O = K·(G+2)·H       bf16   input-major, kv head by kv head: G queries, key, value; bias_O bf16 or None
    o_ID, I = K·G·H             bf16
    gate_up_DE, E = 2·F         bf16   gate and up of each f side by side
    down_FD                     bf16
    cos_Bh, sin_Bh, h = H/2     f32    rotary tables of the new tokens' positions
    keys_XKPH, values_XKPH      bf16   the paged cache; returned with the new token's in it (in place, if donated)
    pages_BM, length_B          int32  as in decode_attention.py; length counts the new token, 0 is a padding row (output 0)
    sync                        int32 [WORDS], `new_sync()`, or what a launch of as large a kernel returned (`layers`: or None)
    → residual_BD, delta_BD     bf16   residual + delta, and the half's own output, not yet reduced; then keys, values and sync

`attention_half` and `mlp_half` compute what their names say. `layers` runs blocks one after another with nothing between them,
and has the stream alone: nothing is left to be added; or, on one device of several, which has its share of every weight, in two
launches a block, with the caller's reduction after each. An int8 weight is a pair (tiles, scales) made by `tile_weight`:
symmetric, a bf16 scale for each 128 rows.

What bounds it: reading the weights once. A kernel has one block a multiprocessor, all blocks resident; how they share the
products and wait for one another is told in persistent.py. While a block waits, its ring of shared memory fills with the next
product's weights, and the pages of keys and values stream through the same ring, asked for before the query exists.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import persistent, tuning
from pallas_kernels.layer_kernel import layer_kernel
from pallas_kernels.layer_plan import COLUMNS, GROUP, TAGS, TILE, WORDS, Config, Dims, pieces, places

IMPLEMENTATIONS = ("mosaic", "reference")
SHARED_MEMORY = 227 * 1024  # bytes a block may have
PARAMETERS = 32764  # bytes that a kernel may be given

Weight = Any  # bf16 [K, O], or (int8 tiles [O/128, K/128, 128, 128], bf16 scales [O/128, K/128, 128])


class Layer(NamedTuple):
    """The weights of a block, shapes as above."""

    norm_D: jax.Array
    qkv: Weight
    o: Weight
    mlp_norm_D: jax.Array
    gate_up: Weight
    down: Weight
    bias_O: jax.Array | None = None


# ---------------------------------------------------------------- the same in plain jnp


def tile_weight(weight_KO: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Quantize to int8, symmetric, one bf16 scale for 128 rows of a column, and tile as the kernel reads it."""
    K, O = weight_KO.shape  # noqa: E741
    groups = weight_KO.astype(jnp.float32).reshape(K // GROUP, GROUP, O)
    scales = (jnp.abs(groups).max(axis=1) / 127).astype(jnp.bfloat16)
    steps = jnp.where(scales == 0, 1, scales).astype(jnp.float32)[:, None]
    values = jnp.clip(jnp.round(groups / steps), -127, 127).astype(jnp.int8).reshape(K, O)
    return tile_int8(values, scales)


def tile_int8(values_KO: jax.Array, scales_gO: jax.Array) -> tuple[jax.Array, jax.Array]:
    """int8 [K, O] and bf16 scales [K/128, O] in the kernel's layout: (tiles, scales) of 128 columns, unit by unit."""
    g, O = scales_gO.shape  # noqa: E741
    return persistent.tile_int8(values_KO, COLUMNS), scales_gO.reshape(g, O // COLUMNS, COLUMNS).swapaxes(0, 1)


def plain(weight: Weight) -> jax.Array:
    """A weight as bf16 [K, O], whichever kind it is."""
    if not isinstance(weight, tuple):
        return weight
    tiles, scales = weight
    values_KO = persistent.untile_int8(tiles).astype(jnp.float32)
    scales_gO = scales.swapaxes(0, 1).reshape(scales.shape[1], -1).astype(jnp.float32)
    return (values_KO * jnp.repeat(scales_gO, GROUP, axis=0)).astype(jnp.bfloat16)


def _norm(x_BD: jax.Array, weight_D: jax.Array, eps: float) -> jax.Array:
    x = x_BD.astype(jnp.float32)
    x = x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return (x * weight_D.astype(jnp.float32)).astype(x_BD.dtype)


def _product(x_BK: jax.Array, weight: Weight) -> jax.Array:
    return jnp.einsum("BK,KO->BO", x_BK, plain(weight), preferred_element_type=jnp.float32)


def mlp_reference(
    residual_BD: jax.Array, delta_BD: jax.Array, norm_D: jax.Array, gate_up: Weight, down: Weight, *, eps: float
) -> tuple[jax.Array, jax.Array]:
    """`mlp_half` in plain jnp."""
    residual_BD = residual_BD + delta_BD
    gate_up_BFC = _product(_norm(residual_BD, norm_D, eps), gate_up).reshape(residual_BD.shape[0], -1, 2)
    h_BF = (jax.nn.silu(gate_up_BFC[..., 0]) * gate_up_BFC[..., 1]).astype(residual_BD.dtype)
    return residual_BD, _product(h_BF, down).astype(residual_BD.dtype)


def attention_reference(
    residual_BD: jax.Array,
    delta_BD: jax.Array,
    norm_D: jax.Array,
    qkv: Weight,
    o: Weight,
    cos_Bh: jax.Array,
    sin_Bh: jax.Array,
    keys_XKPH: jax.Array,
    values_XKPH: jax.Array,
    pages_BM: jax.Array,
    length_B: jax.Array,
    *,
    eps: float,
    bias_O: jax.Array | None = None,
    window: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """`attention_half` in plain jnp, on arrays: returns residual, delta, keys, values."""
    from pallas_kernels import decode_attention

    dtype = residual_BD.dtype
    B = residual_BD.shape[0]
    _, K, _, H = keys_XKPH.shape
    residual_BD = residual_BD + delta_BD
    qkv_BO = _product(_norm(residual_BD, norm_D, eps), qkv)
    qkv_BKJH = (qkv_BO if bias_O is None else qkv_BO + bias_O.astype(jnp.float32)).astype(dtype).reshape(B, K, -1, H)
    args = (qkv_BKJH, cos_Bh, sin_Bh, keys_XKPH, values_XKPH, pages_BM, length_B)
    out_BKGH, keys_XKPH, values_XKPH = decode_attention.append_reference(*args, window=window)
    return residual_BD, _product(out_BKGH.reshape(B, -1), o).astype(dtype), keys_XKPH, values_XKPH


# ---------------------------------------------------------------- the public functions


def new_sync(words: int = WORDS) -> jax.Array:
    """The zeros that `sync` begins with. One serves any number of launches, each given what the one before returned, of kernels
    that have as many blocks, up to a million: then tags come again. words: as many as the largest of them needs."""
    return jnp.zeros((words,), jnp.int32)


def _check_sync(sync: jax.Array, dims: Dims, config: Config) -> None:
    if len(sync) < (needed := places(dims, config).words):
        raise ValueError(f"sync has {len(sync)} words: {dims.kind} needs at least {needed} here; pass new_sync()")


def shared_memory_bytes(dims: Dims, config: Config) -> int:
    """What a block of the kernel allocates."""
    x = pieces(dims, config)
    sizes = [config.stages * config.rows * COLUMNS * (1 if dims.int8 else 2), x.count * dims.N * x.width * 2, 4 * dims.N]
    sizes += [config.stages * x.per_unit * COLUMNS * 2, x.count * dims.N * 4] if dims.int8 else []
    return persistent.shared_bytes(sizes)


def why_unsupported(dims: Dims, config: Config) -> str | None:
    """Why the Mosaic kernel cannot do this here, or None where it can."""
    if why := tuning.why_no_mosaic():
        return why
    if config.blocks > (count := jax.devices()[0].core_count):
        return f"{config.blocks} blocks that wait for one another on {count} multiprocessors: some would never start"
    return why_unsupported_shape(dims, config)


def why_unsupported_shape(dims: Dims, config: Config) -> str | None:
    """The part of `why_unsupported` that does not depend on the device."""
    if dims.int8 and config.rows % GROUP:
        return f"rows={config.rows}: an int8 unit is whole groups of {GROUP} rows"
    if dims.B > 16:
        return f"{dims.B} rows: 1 to 16 are supported"
    if dims.kind != "mlp":
        if config.rows != (256 if dims.int8 else 128):
            return (
                f"rows={config.rows}: keys and values pass through the ring in units of 32 KB, 128 rows of bf16 or 256 of int8"
            )
        if dims.H != COLUMNS:
            return f"head dimension {dims.H}: {COLUMNS} is supported"
        if dims.P % TILE:
            return f"{dims.P} tokens a page: multiples of {TILE} are supported"
        if not 1 <= dims.G <= 16:
            return f"{dims.G} query heads to a kv head: 1 to 16 are supported"
    if config.layers > 1:
        # Descriptors of what is copied in tiles, and addresses, are the kernel's parameters.
        bytes_ = config.layers * ((2 if dims.int8 else 6) * 128 + (10 if dims.int8 else 6) * 8) + 256
        if bytes_ > PARAMETERS:
            return f"{config.layers} layers a launch need {bytes_} bytes of parameters, and a kernel has {PARAMETERS}"
    try:
        for name, product in dims.products(config).items():
            if config.layers > 1 and product.tiles < product.teams:
                few = f"{name} has {product.tiles} tiles for {product.teams} teams"
                return f"{few}: each needs one where layers follow one another"
        layout = places(dataclasses.replace(dims, layers=config.layers), config)
        if layout.words > WORDS:
            return f"{dims.B} rows need {layout.words} words of sync, which has {WORDS}"
        if layout.tags > TAGS:
            return f"layers={config.layers}: {layout.tags} tags in a launch, and there are {TAGS}"
        needed = shared_memory_bytes(dims, config)
    except ValueError as error:
        return str(error)
    if needed > SHARED_MEMORY:
        return f"{dims.B} rows need {needed} bytes of shared memory, and a block may have {SHARED_MEMORY}"
    return None


def tuning_sizes(dims: Dims) -> dict[str, int]:
    """What tuned/ is asked with. Its entries name the model's sizes one by one: of others it is not known to win."""
    return dict(rows=dims.B, bf16=int(not dims.int8), D=dims.D, F=dims.F, K=dims.K, G=dims.G)


def tuned_config(dims: Dims, device: str | None = None, halves: bool = False) -> Config | None:
    """The config with which this kernel was measured to beat XLA on this device, or None. halves: of a whole block's dims, for
    its two halves."""
    found = tuning.lookup("decode_halves" if halves else "decode_layer", device, **tuning_sizes(dims))
    return Config(**found) if found else None


def wins(rows: int, dtype: Any, layer: Layer, page: tuple[int, ...], devices: int = 1) -> bool:
    """Whether `layers` would run its kernel here: it was measured to win for such rows and weights, and it applies.

    layer: whole weights, None for one in some other layout. page: (K, P, H), the shape of a page. devices: that weights and
    pages are shared out over.
    """
    four = (layer.qkv, layer.o, layer.gate_up, layer.down)
    if jnp.dtype(dtype) != jnp.bfloat16 or any(weight is None for weight in four):
        return False
    K, P, H = page
    D, heads, F = (_size(weight)[0] for weight in (layer.qkv, layer.o, layer.down))
    sizes = (D, F // devices, K // devices, heads // (K * H), H, P)
    dims = Dims("layer", isinstance(layer.qkv, tuple), 0.0, rows, *sizes)
    return _chosen(dims, None, None, halves=devices > 1) is not None


def _halves(dims: Dims) -> tuple[Dims, Dims]:
    """A block's two kernels: attention, mlp."""
    attention = dataclasses.replace(dims, kind="attention", F=0)
    return attention, dataclasses.replace(dims, kind="mlp", K=0, G=0, H=0, P=0, bias=False, window=None)


def _chosen(dims: Dims, config: Config | None, implementation: str | None, halves: bool = False) -> Config | None:
    """The config to run the kernel with, or None for the reference. halves: of a whole block's dims, for its two halves."""
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation={implementation!r}: allowed are {IMPLEMENTATIONS} and None")
    if implementation == "reference":
        return None
    if config is None and jax.devices()[0].platform == "gpu":
        config = tuned_config(dims, halves=halves)
    if config is None and implementation is None:
        return None
    config = config or Config(rows=256 if dims.int8 else 128)
    config = dataclasses.replace(config, layers=1) if halves else config
    reasons = [why_unsupported(each, config) for each in (_halves(dims) if halves else (dims,))]
    why = next(filter(None, reasons), None)
    if why and implementation == "mosaic":
        raise tuning.Unsupported("decode_layer", why)
    return None if why else config


def _size(weight: Weight) -> tuple[int, int]:
    """[in, out] of either kind of weight."""
    if not isinstance(weight, tuple):
        return weight.shape  # type: ignore[no-any-return]
    tiles, units, columns, _ = weight[0].shape
    return units * GROUP, tiles * columns


def _arrays(*weights: Weight) -> list[jax.Array]:
    return [array for weight in weights for array in (weight if isinstance(weight, tuple) else (weight,))]


def _check(dims: Dims, residual: jax.Array, delta: jax.Array, norms: list[jax.Array], weights: dict[str, Weight]) -> None:
    B, D = residual.shape
    if delta.shape != (B, D) or any(norm.shape != (D,) for norm in norms):
        raise ValueError(f"delta {delta.shape}, norms {[n.shape for n in norms]}: they must be [B={B}, D={D}] and [D={D}]")
    kinds = {isinstance(weight, tuple) for weight in weights.values()}
    if len(kinds) > 1:
        raise ValueError("some weights are int8 and some are not: all must be of one kind")
    for name, size in dims.sizes.items():
        if _size(weights[name]) != size:
            raise ValueError(f"{name} is {_size(weights[name])}: with the other operands it must be {size}")


def mlp_half(
    residual_BD: jax.Array,
    delta_BD: jax.Array,
    norm_D: jax.Array,
    gate_up: Weight,
    down: Weight,
    sync: jax.Array,
    *,
    eps: float,
    config: Config | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """residual + delta → RMSNorm → gate and up → SiLU(gate)·up → down; shapes as in the module's docstring.

    Returns the new residual, the half's output, which the caller reduces and hands to the next half as its delta, and sync.
    implementation: "mosaic", "reference", or None for the kernel where it was measured to win, else the reference.
    Raises ValueError for shapes that do not fit together, for an unknown implementation, and where "mosaic" is named and not
    supported: it never falls back silently.
    """
    B, D = residual_BD.shape
    dims = Dims("mlp", isinstance(gate_up, tuple), eps, B, D, F=_size(down)[0])
    _check(dims, residual_BD, delta_BD, [norm_D], dict(gate_up=gate_up, down=down))
    config = _chosen(dims, config, implementation)
    if config is None:
        return *mlp_reference(residual_BD, delta_BD, norm_D, gate_up, down, eps=eps), sync
    _check_sync(sync, dims, config)
    total, out, sync = layer_kernel(dims, config)(residual_BD, delta_BD, norm_D, *_arrays(gate_up, down), sync)
    return total, out, sync


def attention_half(
    residual_BD: jax.Array,
    delta_BD: jax.Array,
    norm_D: jax.Array,
    qkv: Weight,
    o: Weight,
    cos_Bh: jax.Array,
    sin_Bh: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    pages_BM: jax.Array,
    length_B: jax.Array,
    sync: jax.Array,
    *,
    eps: float,
    bias_O: jax.Array | None = None,
    window: int | None = None,
    config: Config | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, ...]:
    """residual + delta → RMSNorm → qkv (+ bias) → rotate → write the cache in place → attend → o; as `mlp_half` otherwise.

    Returns residual, output, keys, values and sync. length ≤ M·P and page ids below X are the caller's to keep. Norms of single
    heads (Qwen 3) are not supported.
    """
    dims = _attention_dims(
        "attention", residual_BD, qkv, o, 0, keys, values, pages_BM, length_B, cos_Bh, sin_Bh, eps, bias_O, window
    )
    _check(dims, residual_BD, delta_BD, [norm_D], dict(qkv=qkv, o=o))
    config = _chosen(dims, config, implementation)
    small = (cos_Bh, sin_Bh, pages_BM, length_B)
    if config is None:
        args = (residual_BD, delta_BD, norm_D, qkv, o, cos_Bh, sin_Bh, keys, values, pages_BM, length_B)
        return *attention_reference(*args, eps=eps, bias_O=bias_O, window=window), sync
    _check_sync(sync, dims, config)
    bias = [] if bias_O is None else [bias_O]
    total, out, keys, values, sync = layer_kernel(dims, config)(
        residual_BD, delta_BD, norm_D, *small, *bias, *_arrays(qkv, o), keys, values, sync
    )
    return total, out, keys, values, sync


def layers(
    residual_BD: jax.Array,
    weights: Sequence[Layer],
    cos_Bh: jax.Array,
    sin_Bh: jax.Array,
    keys: Sequence[jax.Array],
    values: Sequence[jax.Array],
    pages_BM: jax.Array,
    length_B: jax.Array,
    sync: jax.Array | None,
    *,
    eps: float,
    window: int | None = None,
    reduce: Callable[[jax.Array], jax.Array] | None = None,
    config: Config | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, list[jax.Array], list[jax.Array], jax.Array | None]:
    """Blocks that are alike, one after another, at most config.layers of them in a launch, and as many in each as in any other,
    or one less.

    weights, keys, values: each layer's; shapes as in the module's docstring. sync: None for a new one, of no more words than
    these layers need (6 MB for 16 rows of Llama-3-8B, in place of 17). reduce: for one device of several, which has its share
    of all of these: [B, D] → [B, D], a sum over the devices. A block is two launches then, `attention_half` and `mlp_half`, and
    a sum after each. Returns the residual stream [B, D] with all that the layers add to it, each layer's keys and values, and
    sync.
    Raises ValueError where there are not as many of each, where layers differ in sizes, and as `mlp_half` does.
    """
    if not len(weights) == len(keys) == len(values) > 0:
        counts = f"{len(weights)} layers, keys of {len(keys)} and values of {len(values)}"
        raise ValueError(f"{counts}: as many of each, at least one")
    kinds = set()
    for layer, k, v in zip(weights, keys, values, strict=True):
        cache = (k, v, pages_BM, length_B, cos_Bh, sin_Bh)
        F = _size(layer.down)[0]
        dims = _attention_dims("layer", residual_BD, layer.qkv, layer.o, F, *cache, eps, layer.bias_O, window)
        four = dict(qkv=layer.qkv, o=layer.o, gate_up=layer.gate_up, down=layer.down)
        _check(dims, residual_BD, residual_BD, [layer.norm_D, layer.mlp_norm_D], four)
        kinds.add(dims)
    if len(kinds) > 1:
        listed = " and ".join(sorted(map(str, kinds)))
        raise ValueError(f"layers of {len(kinds)} kinds, {listed}: those of one call must be alike")
    config = _chosen(dims, config, implementation, halves=reduce is not None)
    keys, values = list(keys), list(values)
    if config is None or reduce is not None:
        if sync is None and config is not None:
            sync = new_sync(max(places(half, config).words for half in _halves(dims)))
        how: Any = dict(eps=eps, config=config, implementation="reference" if config is None else "mosaic")
        reduce = reduce or (lambda delta_BD: delta_BD)
        delta_BD = jnp.zeros_like(residual_BD)
        for i, layer in enumerate(weights):
            small: Any = (cos_Bh, sin_Bh, keys[i], values[i], pages_BM, length_B, sync)
            residual_BD, delta_BD, keys[i], values[i], sync = attention_half(
                residual_BD, delta_BD, layer.norm_D, layer.qkv, layer.o, *small, bias_O=layer.bias_O, window=window, **how
            )
            mlp: Any = (layer.mlp_norm_D, layer.gate_up, layer.down, sync)
            residual_BD, delta_BD, sync = mlp_half(residual_BD, reduce(delta_BD), *mlp, **how)
            delta_BD = reduce(delta_BD)
        return residual_BD + delta_BD, keys, values, sync
    if sync is None:
        sync = new_sync(places(dims, config).words)
    _check_sync(sync, dims, config)
    norms, mlp_norms = (jnp.stack([getattr(layer, name) for layer in weights]) for name in ("norm_D", "mlp_norm_D"))
    biases = [layer.bias_O for layer in weights if layer.bias_O is not None]
    small = (norms, cos_Bh, sin_Bh, pages_BM, length_B, *([jnp.stack(biases)] if biases else []), mlp_norms)
    launches = -(-len(weights) // config.layers)
    for i in range(launches):
        here = slice(len(weights) * i // launches, len(weights) * (i + 1) // launches)
        arrays = [_arrays(layer.qkv, layer.o, layer.gate_up, layer.down) for layer in weights[here]]
        by_name = [array for of_layers in zip(*arrays, strict=True) for array in of_layers]
        L, first = len(arrays), jnp.full((1,), here.start, jnp.int32)
        run = layer_kernel(dataclasses.replace(dims, layers=L), config)
        written = run(first, *small, *by_name, *keys[here], *values[here], residual_BD, sync)
        keys[here], values[here], (residual_BD, sync) = written[:L], written[L : 2 * L], written[2 * L :]
    return residual_BD, keys, values, sync


def _attention_dims(
    kind: str,
    residual_BD: jax.Array,
    qkv: Weight,
    o: Weight,
    F: int,
    keys: jax.Array,
    values: jax.Array,
    pages_BM: jax.Array,
    length_B: jax.Array,
    cos_Bh: jax.Array,
    sin_Bh: jax.Array,
    eps: float,
    bias_O: jax.Array | None,
    window: int | None,
) -> Dims:
    """The kernel's dims, or a ValueError that names what does not fit."""
    B, D = residual_BD.shape
    _, K, P, H = keys.shape
    G = _size(o)[0] // (K * H)
    if values.shape != keys.shape:
        raise ValueError(f"keys {keys.shape} and values {values.shape}: they must be alike")
    if pages_BM.ndim != 2 or pages_BM.shape[0] != B or length_B.shape != (B,):
        raise ValueError(f"pages {pages_BM.shape} and length {length_B.shape}: they must be [B={B}, M] and [B={B}]")
    if cos_Bh.shape != (B, H // 2) or sin_Bh.shape != cos_Bh.shape:
        raise ValueError(f"cos {cos_Bh.shape} and sin {sin_Bh.shape}: both must be [B={B}, H/2={H // 2}]")
    if bias_O is not None and bias_O.shape != (_size(qkv)[1],):
        raise ValueError(f"bias {bias_O.shape}: it must be [O={_size(qkv)[1]}]")
    if window is not None and window < 1:
        raise ValueError(f"window={window}: it must be at least 1, or None for no window")
    return Dims(kind, isinstance(qkv, tuple), eps, B, D, F, K, G, H, P, bias_O is not None, window)
