"""A warpgroup's 128 threads in numpy: what `persistent.Emitter` offers, executed instead of emitted.

`run_in_numpy(monkeypatch)` makes the functions of pallas_kernels/layer_phases.py run on numpy arrays: pointers are byte offsets
into them, registers are vectors of 128 numbers, predicates and `when` are masks, shuffles index by thread, and a flag that a
thread would wait for must already be up.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np

from pallas_kernels import persistent

TYPES = {"f32": np.float32, "b16": np.uint16, "b32": np.int32}


class Threads:
    """The Emitter's methods, on vectors of 128."""

    i16, i32, f32 = np.uint16, np.int32, np.float32

    def __init__(self) -> None:
        self.thread = np.arange(128, dtype=np.int32)
        self.warp, self.lane = self.thread // 32, self.thread % 32
        self.mask = np.ones(128, bool)
        arith = SimpleNamespace(
            constant=lambda kind, x: np.full(128, x, kind),
            select=np.where,
            subf=np.subtract,
            xori=np.bitwise_xor,
            maximumf=np.maximum,
            andi=np.bitwise_and,
            cmpf=lambda op, a, b: op(a, b),
            CmpFPredicate=SimpleNamespace(OGT=np.greater),
            extui=lambda kind, x: x.astype(kind),
            shli=lambda x, by: (x.view(np.uint32) << by.view(np.uint32)).view(np.int32),
        )
        self.m = SimpleNamespace(arith=arith)
        self.utils = SimpleNamespace(inline_ptx=self.inline_ptx)

    c = staticmethod(lambda x: np.full(128, x, np.float32 if isinstance(x, float) else np.int32) if np.isscalar(x) else x)
    sub = staticmethod(lambda a, b: a - b)
    mul = staticmethod(lambda a, b: a * b)
    div = staticmethod(lambda a, b: a // b)
    rem = staticmethod(lambda a, b: a % b)
    both = staticmethod(np.logical_and)
    either = staticmethod(np.logical_or)
    fadd = staticmethod(lambda a, b: (a + np.float32(b) if np.isscalar(b) else a + b).astype(np.float32))
    fmul = staticmethod(lambda a, b: (a * np.float32(b) if np.isscalar(b) else a * b).astype(np.float32))
    exp2 = staticmethod(np.exp2)

    def add(self, *xs: Any) -> Any:
        return sum(xs[1:], self.c(xs[0]))

    def cmp(self, op: str, a: Any, b: Any) -> Any:
        a, b = self.c(a).view(np.uint32), self.c(b).view(np.uint32)
        return {"eq": np.equal, "ne": np.not_equal, "ult": np.less}[op](a, b)

    def select(self, p: Any, a: Any, b: Any) -> Any:
        return np.where(p, self.c(a), self.c(b))

    @contextlib.contextmanager
    def when(self, condition: Any) -> Iterator[None]:
        outer, self.mask = self.mask, self.mask & condition
        yield
        self.mask = outer

    def shuffle(self, x: Any, distance: int) -> Any:
        assert (self.mask.reshape(4, 32) == self.mask[::32, None]).all(), "a shuffle that only some lanes of a warp reach"
        return x[self.thread ^ distance]

    def largest(self, xs: Any) -> Any:
        assert (self.mask.reshape(4, 32) == self.mask[::32, None]).all(), "a reduction that only some lanes of a warp reach"
        bits = np.stack([np.ascontiguousarray(x, np.float32).view(np.int32) & 0x7FFFFFFF for x in xs])
        return np.repeat(bits.max(0).reshape(4, 32).max(1), 32).view(np.float32)

    to_f32 = staticmethod(lambda x: x.astype(np.float32))

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """A GPU's NaN is all ones."""
        out = (a.astype(np.float64) * b + c).astype(np.float32)
        return np.where(np.isnan(out), np.full(128, 0x7FFFFFFF, np.int32).view(np.float32), out)

    def gather_bytes(self, words: Any, which: int) -> Any:
        as_bytes = [np.ascontiguousarray(word, np.int32).view(np.uint8).reshape(-1, 4)[:, which] for word in words]
        return np.stack(as_bytes, axis=-1).reshape(-1).view(np.int32)

    # Memory: (bytes of the array, byte offset of each thread)

    def permute(self, a: Any, b: Any, selected: int) -> Any:
        both = np.stack([np.ascontiguousarray(x, np.int32) for x in (a, b)], axis=-1).view(np.uint8)
        return np.ascontiguousarray(both[:, [selected >> 4 * i & 15 for i in range(4)]]).view(np.int32)[:, 0]

    def from_lane(self, x: Any, lane: Any) -> Any:
        assert (self.mask.reshape(4, 32) == self.mask[::32, None]).all(), "a shuffle that only some lanes of a warp reach"
        return x[self.warp * 32 + lane]

    silu_up = persistent.Emitter.silu_up
    pack_24, unpack_24 = persistent.Emitter.pack_24, persistent.Emitter.unpack_24

    def ptr(self, ref: np.ndarray, offset: Any, size: int) -> Any:
        return ref.reshape(-1).view(np.uint8), self.c(offset) * size + np.zeros(128, np.int32)

    def row_ptr(self, ref: np.ndarray, index: Any, stride: int, offset: Any, size: int) -> Any:
        return self.ptr(ref, index * stride + offset, size)

    tiled_ptr = persistent.Emitter.tiled_ptr
    one_of = staticmethod(lambda refs, index: refs[int(index[0])])

    def load(self, ptr: Any, kind: str, count: int, mask: Any) -> list[np.ndarray]:
        memory, at = ptr
        size = np.dtype(TYPES[kind]).itemsize
        out = np.zeros((count, 128), TYPES[kind])
        for t in np.flatnonzero(mask):
            assert at[t] % (size * count) == 0, "misaligned"
            out[:, t] = memory[at[t] : at[t] + size * count].view(TYPES[kind])
        return list(out)

    def store(self, ptr: Any, kind: str, values: Any, mask: Any) -> None:
        memory, at = ptr
        values = np.stack([np.broadcast_to(v, 128) for v in values]).astype(TYPES[kind])
        size = values.itemsize * len(values)
        for t in np.flatnonzero(mask):
            assert at[t] % size == 0 and 0 <= at[t] <= len(memory) - size, "misaligned or out of bounds"
            memory[at[t] : at[t] + size] = np.ascontiguousarray(values[:, t]).view(np.uint8)

    def inline_ptx(self, code: str, *args: Any, predicate: Any = None, has_side_effects: bool = True) -> None:
        self.ptx(code, *args, predicate=predicate)

    def ptx(self, code: str, *args: Any, result: Any = None, predicate: Any = None) -> Any:
        mask = self.mask if predicate is None else self.mask & predicate
        op = re.match(r"(ld|st)\.(?:global|shared)(?:\.v(\d))?\.(\w+) ", code)
        if op and op[1] == "ld":
            values = self.load(args[0], op[3], int(op[2] or 1), mask)
            return values if isinstance(result, list) else values[0]
        if op:
            return self.store(args[0], op[3], args[1:], mask)
        return {"ex2": np.exp2, "rcp": np.reciprocal, "lg2": np.log2, "rsqrt": lambda x: 1 / np.sqrt(x)}[code.split(".")[0]](
            args[0]
        )

    def load_32(self, ptr: Any, count: int = 1) -> list[Any]:
        return self.load(ptr, "b32", count, self.mask)

    def store_32(self, ptr: Any, bits: Any) -> None:
        self.store(ptr, "b32", [bits], self.mask)

    def as_i32(self, x: Any) -> Any:
        return np.ascontiguousarray(x, np.float32).view(np.int32)

    def as_f32(self, bits: Any) -> Any:
        return np.ascontiguousarray(bits, np.int32).view(np.float32)

    def halves(self, bits: Any) -> tuple[Any, Any]:
        pairs = self.widen(np.ascontiguousarray(bits, np.int32).view(np.uint16))
        return pairs[0::2], pairs[1::2]

    def pair(self, a: Any, b: Any) -> Any:
        return np.stack([self.narrow(a), self.narrow(b)], axis=-1).reshape(-1).view(np.int32)

    def load_f32(self, ptr: Any) -> Any:
        return self.ptx("ld.global.f32 $0, [$1];", ptr)

    def load_bf16(self, ptr: Any) -> Any:
        return self.widen(self.ptx("ld.global.b16 $0, [$1];", ptr))

    def widen(self, bits: Any) -> Any:
        return bits.astype(np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)

    def narrow(self, x: Any) -> Any:
        return np.asarray(x, np.float32).astype(ml_dtypes.bfloat16).view(np.uint16)

    def store_16(self, ptr: Any, bits: Any, predicate: Any = None) -> None:
        self.ptx("st.global.b16 [$0], $1;", ptr, bits, predicate=predicate)

    # Flags and fragments

    def barrier(self) -> None:
        assert self.mask.all() or not self.mask.any(), "a barrier that only some threads reach"

    def send(self, ptr: Any, words: Any, tag: Any) -> None:
        as_int = [np.ascontiguousarray(np.broadcast_to(word, 128)).view(np.int32) for word in words]
        self.store(ptr, "b32", [*as_int, tag] if len(words) == 3 else [x for word in as_int for x in (word, tag)], self.mask)

    def watch(self, ptr: Any, tag: Any, needed: Any, words: int = 1) -> None:
        mask = self.mask & needed
        got = self.load((ptr[0], ptr[1] + 4 * words), "b32", 1, mask)[0]
        assert (got[mask] == np.broadcast_to(tag, 128)[mask]).all(), "would wait for ever"

    def receive(self, sync: Any, places: Any, tag: Any, needed: Any, each: int = 2) -> list[tuple[Any, ...]]:
        out = []
        for ptr, need in zip([self.ptr(sync, place, 4) for place in places], needed, strict=True):
            mask = self.mask & need
            words = self.load(ptr, "b32", 4, mask)
            for got in words[1::2] if each == 2 else words[3:]:
                assert (got[mask] == np.broadcast_to(tag, 128)[mask]).all(), "would wait for ever"
            out.append(tuple(words[0::2] if each == 2 else words[:3]))
        return out

    def count(self, ptr: Any, needed: Any) -> Any:
        """Warp by warp, as lanes find it."""
        memory, at = ptr
        before = np.zeros(128, np.int32)
        for warp in range(4):
            lane0 = 32 * warp
            if (self.mask & needed)[lane0]:
                counter = memory[at[lane0] : at[lane0] + 4].view(np.int32)
                before[lane0 : lane0 + 32] = counter[0]
                counter += 1
        return before

    def load_fresh(self, ptr: Any) -> list[Any]:
        return self.load(ptr, "f32", 4, self.mask)

    def fold(self, count: Any, state: list[Any], step: Any) -> list[Any]:
        for i in range(int(count[self.mask].max(initial=0))):
            with self.when(count > i):
                after = step(self.c(i), state)
                state = [np.where(self.mask, new, old) for new, old in zip(after, state, strict=True)]
        return state

    fragment = persistent.Emitter.fragment

    def unpack(self, array: np.ndarray) -> list[tuple[Any, Any]]:
        """[64·i, N] in the WGMMA layout, or [N] as its reduction over rows, to pairs of columns."""
        columns = lambda tile: [8 * tile + 2 * (self.lane % 4) + i for i in range(2)]  # noqa: E731
        tiles = range(array.shape[-1] // 8)
        if array.ndim == 1:
            return [tuple(array[c] for c in columns(tile)) for tile in tiles]
        row = 16 * self.warp + self.lane // 4
        blocks = range(array.shape[0] // 64)
        return [
            tuple(array[64 * block + row + 8 * half, c] for c in columns(tile))
            for block in blocks
            for tile in tiles
            for half in range(2)
        ]

    def pack(self, pairs: Any, shape: tuple[int, ...]) -> np.ndarray:
        """The inverse of `unpack`, of a matrix."""
        out, numbers = np.zeros(shape, np.float32), np.arange(np.prod(shape)).reshape(shape)
        for places, values in zip(self.unpack(numbers), pairs, strict=True):
            for at, value in zip(places, values, strict=True):
                out.reshape(-1)[at] = value
        return out


def run_in_numpy(monkeypatch: Any) -> None:
    def inline(arg_types: Any, return_type: Any = None) -> Any:
        def wrap(run: Any) -> Any:
            def call(*args: Any) -> Any:
                as_vectors = [Threads.c(int(a)) if t == "i32" else a for a, t in zip(args, arg_types, strict=True)]
                with np.errstate(all="ignore"):  # numbers of threads that a mask leaves out
                    return run(Threads(), *as_vectors)

            return call

        return wrap

    monkeypatch.setattr(persistent, "inline", inline)
