"""The plan of a persistent decode layer (decode_layer.py): its sizes and its config, what a block of the grid takes of every
product, and where in `sync` blocks leave words for one another.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from pallas_kernels import layer_phases as phases
from pallas_kernels.persistent import RANKS, Product, aligned_bytes

WORDS = 1 << 22  # int32 words of `sync`
GROUP = 128  # rows of an int8 weight that share a scale
TILE = 64  # positions of a tile of keys and values
COLUMNS = 128  # of a unit of weight
GROUPS = 2  # of units of normed x, at most: layer_phases.squares_words has room for two
TAGS = 1 << 12  # of each launch: for the sums of a team's tiles, in all phases, and for each layer's other words


@dataclasses.dataclass(frozen=True)
class Config:
    """blocks: of the grid, at most one a multiprocessor; rows: of a unit of weight; stages: units in the ring; flight: how many
    of those are asked for and not yet there, at most; layers: of the model in one launch, at most."""

    blocks: int = 128
    rows: int = 128
    stages: int = 4
    flight: int = 3
    layers: int = 1

    @property
    def teams(self) -> int:
        return self.blocks // RANKS

    def __post_init__(self) -> None:
        if self.rows not in (64, 128, 256):
            raise ValueError(f"rows={self.rows}: allowed are 64, 128 and 256")
        if self.blocks not in (8, 16, 32, 64, 128):
            raise ValueError(f"blocks={self.blocks}: allowed are 8, 16, 32, 64 and 128")
        if not 1 <= self.flight <= self.stages:
            raise ValueError(f"flight={self.flight}: allowed is 1 to stages={self.stages}")
        if self.layers < 1:
            raise ValueError(f"layers={self.layers}: at least 1")


@dataclasses.dataclass(frozen=True)
class Dims:
    """What a kernel is compiled for. kind: "attention", "mlp" or "layer"; sizes of the half that is absent are 0. layers: how
    many of the kind "layer" one after another."""

    kind: str
    int8: bool
    eps: float
    B: int
    D: int
    F: int = 0
    K: int = 0
    G: int = 0
    H: int = 0
    P: int = 0
    bias: bool = False
    window: int | None = None
    layers: int = 1

    @property
    def N(self) -> int:
        """Rows that the products take: wgmma's narrow side is a multiple of 8, and threads share rows evenly."""
        return max(8, phases.rows_across(self.B))

    @property
    def Q(self) -> int:
        """Queries of a group, padded likewise."""
        return -(-self.G // 8) * 8

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """The products' weights, [in, out]."""
        J, D = self.K * self.H, self.D
        attention = {"qkv": (D, J * (self.G + 2)), "o": (J * self.G, D)}
        mlp = {"gate_up": (D, 2 * self.F), "down": (self.F, D)}
        return {"attention": attention, "mlp": mlp, "layer": attention | mlp}[self.kind]

    def products(self, config: Config) -> dict[str, Product]:
        """How each weight is dealt out; `o`'s rows by runs, since what they are multiplied with comes by heads."""
        units = (config.rows, COLUMNS, config.teams)
        return {name: Product(*size, *units, apart=name != "o") for name, size in self.sizes.items()}


@dataclasses.dataclass(frozen=True)
class Run:
    """A block's share of a product, and where in the ring its units begin (traced)."""

    product: Product
    team: Any
    rank: Any
    tiles: Any
    units: Any  # of a tile
    ring: Any

    @classmethod
    def of(cls, product: Product, team: Any, rank: Any, ring: Any) -> Run:
        return cls(product, team, rank, product.tiles_of(team), product.units_of(rank), ring)

    def tile(self, i: Any) -> Any:
        """The block's i-th tile."""
        return self.product.tile(self.team, i)

    def unit(self, i: Any) -> Any:
        """The i-th unit of a tile, along K."""
        return self.product.unit(self.rank, i)

    @property
    def count(self) -> Any:
        return self.tiles * self.units


@dataclasses.dataclass(frozen=True)
class Pieces:
    """How x lies in a block's shared memory: pieces [N, width] of bf16, h from the first on, what the other products multiply
    at the end, from `x` on: so the pieces of h before that one can be there while gate and up are multiplied. What attention
    needs lies below `x` too, in bytes that h has later."""

    width: int
    per_unit: int  # of weight
    x: int
    count: int


def pieces(dims: Dims, config: Config) -> Pieces:
    """The pieces of a kernel."""
    width, W, Q = GROUP if dims.int8 else config.rows, COLUMNS // 64, dims.Q
    per_unit = config.rows // width
    slots = {name: product.slots * per_unit for name, product in dims.products(config).items()}
    h, x = slots.pop("down", 0), max(slots.values())
    sizes = [] if dims.kind == "mlp" else [
        W * Q * dims.H * 2, W * Q * TILE * 2, W * Q * 128, W * 2 * dims.H * 2, 4 * math.prod(phases.halved_shape(dims.H, Q))
    ]
    attending = aligned_bytes(sizes)
    first = max(h - x, -(-attending // (dims.N * config.rows * 2)) * per_unit)
    return Pieces(width, per_unit, first, first + x)


@dataclasses.dataclass(frozen=True)
class Places:
    """Where in `sync`, after the word that counts launches, each kind of word begins; how many words there are, and tags of a
    launch."""

    turns: int  # places for the sums of tiles: see `consume`
    item_splits: int  # an item of attention is (row, kv head, split)
    at: dict[str, int]
    words: int
    tags: int


def places(dims: Dims, config: Config) -> Places:
    """The layout of `sync` for a kernel. Sums come first and take as much in every kernel of so many blocks: elsewhere each odd
    word is a tag, and a kernel of other sizes must not take a number of theirs for one."""
    N, D, F, W, teams, turns = dims.N, dims.D, dims.F, COLUMNS // 64, config.teams, 4
    pairs = dims.B * dims.K
    item_splits = max(min(config.blocks // pairs, 32 // W), 1) if dims.kind != "mlp" else 1
    at, words = {}, 32
    for name, size in [
        ("sums", teams * turns * phases.sums_words(W)),
        ("squares", teams * 2 * phases.squares_words(N)),
        ("qkv", N * dims.sizes.get("qkv", (0, 0))[1]),
        ("stream", N * D),
        ("next", N * D if dims.kind == "layer" else 0),  # the stream after a layer
        ("h", N * F),
        ("states", pairs * item_splits * phases.states_words(dims.G, dims.H)),
    ]:
        at[name], words = words, words + -(-size // 32) * 32
    tiles = sum(p.tiles // teams + 1 for p in dims.products(config).values())
    return Places(turns, item_splits, at, words, dims.layers * tiles + 1)
