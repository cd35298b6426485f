"""A persistent kernel's blocks in numpy, all at once and in any order: what waits for what, and who overwrites whom.

`run(monkeypatch, module, function, dims, config, operands, written, seed)` executes the body of `layer_kernel`, or of
`linear_int8.kernel`, itself: every warpgroup of every block is a thread of Python's, one of which runs at a time, and `seed`
draws which, as far as barriers, words in `sync` and copies allow; some are held back for long. The pieces are those of the
device as far as they matter here: a barrier's phases are known to a waiter by their parity only, so who falls two phases
behind waits for ever; copies arrive late and in any order; a word in `sync` that is overwritten before it was read is an
error, and so is a state in which nobody can go on; wgmma reads as late as it may, and who gives a place back to the copy
engine must have waited for its loads from there (`persistent.finish`). With `warps`, the four warps of a warpgroup are
threads of their own, kept together by nothing but its barriers; but arrays that a warpgroup computes as a whole are each
warp's own, so a barrier that is missing between such an array and wgmma is not noticed.
"""

from __future__ import annotations

import functools
import math
import random
import sys
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import jax
import ml_dtypes
import numpy as np
from simulated_threads import TYPES, Threads

BF16 = ml_dtypes.bfloat16
here = threading.local()  # .agent: the warpgroup that this thread is


class Stuck(AssertionError):
    """Nobody can go on, or somebody's word is gone."""


class Agent:
    """A warpgroup, or a warp of one: what it waits for, and how many phases of each barrier it has seen."""

    def __init__(self, world: World, b: int, w: int, warps: range, body: Callable[[], None]):
        self.world, self.b, self.w, self.warps, self.seen = world, b, w, warps, dict[Any, int]()
        self.ready: Callable[[], bool] = lambda: True
        self.products: list[Any] = []
        self.loads = False  # whether any are under way from what copies write
        self.turn, self.done, self.waits_for = threading.Semaphore(0), False, ""
        self.thread = threading.Thread(target=self._run, args=(body,), daemon=True)

    def _run(self, body: Callable[[], None]) -> None:
        here.agent = self
        self.turn.acquire()
        try:
            if not self.world.ended:
                body()
        except BaseException as error:  # the world raises it
            self.world.error = self.world.error or error
        self.done = True
        self.world.back.release()

    def until(self, ready: Callable[[], bool], what: str) -> None:
        """Let others run, until `ready`."""
        self.ready, self.waits_for = ready, what
        self.world.back.release()
        self.turn.acquire()
        if self.world.ended:
            raise SystemExit

    def meet(self) -> None:
        """The warpgroup's own barrier."""
        barrier = self.world.own[self.b, self.w]
        barrier.arrive()
        barrier.wait()


class World:
    """All agents, and the copies under way."""

    def __init__(self, seed: int):
        self.own: dict[tuple[int, int], Barrier] = {}
        self.ended = False
        self.random, self.back, self.error = random.Random(seed), threading.Semaphore(0), None
        self.agents: list[Agent] = []
        self.copies: list[Callable[[], None]] = []
        self.copied: set[int] = set()  # addresses of buffers

    def run(self) -> None:
        for agent in self.agents:
            agent.thread.start()
        try:
            self._run()
        finally:  # nobody waits for ever
            self.ended = True
            for agent in self.agents:
                agent.turn.release()

    def _run(self) -> None:
        held_back: set[Agent] = set()
        for step in range(1 << 30):
            left = [agent for agent in self.agents if not agent.done]
            if not left:
                return
            if step % 200 == 0:  # some run only when nobody else can
                held_back = set(self.random.sample(left, len(left) // self.random.choice((2, 4, 1 << 30))))
            order = self.random.sample(left, len(left))
            order.sort(key=lambda agent: agent in held_back)
            go = next((agent for agent in order if agent.ready()), None)
            if self.copies and (go is None or go in held_back or self.random.random() < 0.3):
                self.copies.pop(self.random.randrange(len(self.copies)))()
            elif go is None:
                waiting = "; ".join(f"block {a.b} warpgroup {a.w}: {a.waits_for}" for a in left[:64])
                raise Stuck(f"nobody can go on: {waiting}")
            else:
                go.turn.release()
                self.back.acquire()
            if self.error is not None:
                raise self.error


class Barrier:
    """An mbarrier, or several: `at[i]`."""

    def __init__(self, num_arrivals: int = 1, num_barriers: int = 1, name: str = "barrier"):
        """num_arrivals: of whole warpgroups, whose threads all arrive."""
        self.arrivals, self.phase, self.arrived, self.name = num_arrivals, 0, 0, name
        self.at = [Barrier(num_arrivals, name=f"{name}[{i}]") for i in range(num_barriers)] if num_barriers > 1 else [self]

    def arrive(self, warps: int | None = None) -> None:
        self.arrived += len(here.agent.warps) if warps is None else warps
        if self.arrived == 4 * self.arrivals:
            self.phase, self.arrived = self.phase + 1, 0

    def wait(self) -> None:
        agent = here.agent
        parity = agent.seen.get(self, 0) % 2
        agent.until(lambda: self.phase % 2 != parity, f"{self.name}, phase {agent.seen.get(self, 0)} of {self.phase}")
        agent.seen[self] = agent.seen.get(self, 0) + 1


@functools.lru_cache
def places(rows: int, columns: int, size: int = 2) -> np.ndarray:
    """Where element (row, column) of a matrix is that wgmma reads, of so many bytes each: tiles of 8 rows of 128 bytes, 16-byte
    pieces exchanged by row."""
    r, c, line, piece = np.arange(rows)[:, None], np.arange(columns)[None], 128 // size, 16 // size
    within = (c % line // piece ^ r % 8) * piece + c % piece
    return (r // 8 * (columns // line) + c // line) * 8 * line + r % 8 * line + within


class Ref:
    """A buffer, or a part of one: `at`, `T`, reading and writing as in a kernel. Swizzled ones are matrices, stage by stage."""

    def __init__(self, memory: np.ndarray, swizzled: bool = False, index: tuple[Any, ...] = (), transposed: bool = False):
        self.memory, self.swizzled, self.index, self.transposed = memory, swizzled, index, transposed

    @property
    def at(self) -> Any:
        return _At(self)

    @property
    def T(self) -> Ref:
        return Ref(self.memory, self.swizzled, self.index, not self.transposed)

    def _matrix(self) -> tuple[np.ndarray, np.ndarray]:
        """A stage, flat, and where in it the part is."""
        stages = self.memory.ndim - 2
        where = places(*self.memory.shape[stages:], self.memory.itemsize)[self.index[stages:]]
        return self.memory[self.index[:stages]].reshape(-1), where

    def get(self) -> np.ndarray:
        if self.swizzled:
            flat, where = self._matrix()
            out = flat[where]
        else:
            out = self.memory[self.index]
        return np.array(out.T if self.transposed else out)

    def set(self, value: Any) -> None:
        value = np.asarray(value).T if self.transposed else np.asarray(value)
        if self.swizzled and len(self.index) < self.memory.ndim - 2:  # several matrices
            for i, matrix in enumerate(value):
                Ref(self.memory, True, (*self.index, i)).set(matrix)
        elif self.swizzled:
            flat, where = self._matrix()
            flat[where] = value
        else:
            self.memory[self.index] = value

    def __getitem__(self, index: Any) -> Any:
        return (self if index is Ellipsis else self.at[index]).get()

    def __setitem__(self, index: Any, value: Any) -> None:
        (self if index is Ellipsis else self.at[index]).set(value)


class _At:
    def __init__(self, ref: Ref):
        self.ref = ref

    def __getitem__(self, index: Any) -> Ref:
        assert not self.ref.index, "one `at` to a reference"
        return Ref(self.ref.memory, self.ref.swizzled, index if isinstance(index, tuple) else (index,))


class Words(Threads):
    """Threads whose words come from others: they wait, and notice what came too late."""

    def __init__(self) -> None:
        super().__init__()
        self.mask = (self.warp >= here.agent.warps.start) & (self.warp < here.agent.warps.stop)

    def barrier(self) -> None:
        here.agent.meet()

    def load(self, ptr: Any, kind: str, count: int, mask: Any) -> list[np.ndarray]:
        memory, at = ptr
        here.agent.loads |= memory.ctypes.data in here.agent.world.copied
        size = np.dtype(TYPES[kind]).itemsize * count
        assert (at[mask] % size == 0).all() and (at[mask] >= 0).all(), "misaligned or out of bounds"
        out = np.zeros((128, count), TYPES[kind])
        out[mask] = memory[at[mask][:, None] + np.arange(size)].view(TYPES[kind])
        return list(out.T)

    def _there(self, ptrs: Any, tag: Any, needed: Any) -> bool:
        for ptr, need in zip(ptrs, needed, strict=True):
            mask = self.mask & need
            if mask.any():
                memory, at = ptr
                tags = memory[at[mask][:, None] + np.arange(4)].view(np.int32)[:, 0]
                expected = np.broadcast_to(tag, 128)[mask]
                if (tags > expected).any():
                    raise Stuck(f"word {at[mask][0] // 8 * 2} bears {tags.max()} where {expected[0]} is still to be read")
                if (tags != expected).any():
                    return False
        return True

    def watch(self, ptr: Any, tag: Any, needed: Any, words: int = 1) -> None:
        self.wait([(ptr[0], ptr[1] + 4 * words)], tag, [needed])

    def wait(self, ptrs: Any, tag: Any, needed: Any) -> None:
        here.agent.until(lambda: self._there(ptrs, tag, needed), f"words that bear {int(np.max(tag))}")

    def receive(self, sync: Any, places: Any, tag: Any, needed: Any, each: int = 2) -> list[tuple[Any, ...]]:
        tags = (1, 3) if each == 2 else (3,)
        all_tags = [self.ptr(sync, place + i, 4) for place in places for i in tags]
        self.wait(all_tags, tag, [need for need in needed for _ in tags])
        return super().receive(sync, places, tag, needed, each)


def _inline(arg_types: Any, return_type: Any = None) -> Any:
    def wrap(run: Any) -> Any:
        def call(*args: Any) -> Any:
            plain = [a.memory if isinstance(a, Ref) else a for a in args]
            as_vectors = [Words.c(int(a)) if t == "i32" else a for a, t in zip(plain, arg_types, strict=True)]
            with np.errstate(all="ignore"):
                return run(Words(), *as_vectors)

        return call

    return wrap


def _when(condition: Any) -> Any:
    return lambda run: run() if condition else None


def _loop(low: Any, high: Any) -> Any:
    return lambda run: [run(np.int32(i)) for i in range(int(low), int(high))] and None


def _fori(low: Any, high: Any, step: Any, carry: Any) -> Any:
    for i in range(int(low), int(high)):
        carry = step(np.int32(i), carry)
    return carry


def _copy(source: Ref, to: Ref, barrier: Barrier, oob_mode: Any = None) -> None:
    warps = len(here.agent.warps)  # each asks for its part, and all parts are there when all have
    here.agent.world.copied.add(to.memory.ctypes.data)

    def arrive() -> None:
        to.set(source.get())
        barrier.arrive(warps)

    here.agent.world.copies.append(arrive)


class _Sum:
    """An accumulator of wgmma."""

    def __init__(self, shape: tuple[int, int], dtype: Any):
        self.value = np.zeros(shape, dtype)

    def __getitem__(self, index: Any) -> np.ndarray:
        _wgmma_wait(0)
        return self.value


def _wgmma(total: _Sum, a: Any, b: Ref) -> None:
    here.agent.products.append((total, a, b))


def _wgmma_wait(n: int) -> None:
    """Operands in shared memory are read as late as they may be."""
    products = here.agent.products
    while len(products) > n:
        total, *ab = products.pop(0)
        a, b = ((x.get() if isinstance(x, Ref) else x).astype(total.value.dtype) for x in ab)
        total.value = total.value + a @ b


def _finish(total: Any, every: bool = False) -> None:
    here.agent.loads = False


def _arrive(barrier: Barrier) -> None:
    assert not here.agent.loads or not barrier.name.startswith("empty"), "given back while it may still be loaded from"
    barrier.arrive()
    here.agent.until(lambda: True, "its turn")


def _spread(x: Any, shape: tuple[int, ...], dims: list[int]) -> np.ndarray:
    return np.broadcast_to(np.asarray(x).reshape([shape[i] if i in dims else 1 for i in range(len(shape))]), shape)


def _install(monkeypatch: Any, module: Any) -> None:
    """Everything that the module takes from jax, in numpy."""
    import jax.experimental.pallas as pallas

    from pallas_kernels import mosaic, persistent

    layout = SimpleNamespace(WGMMA=SimpleNamespace(reduce=lambda axis: None), WGMMA_TRANSPOSED=None)
    fake = SimpleNamespace(
        Layout=layout,
        OOBFillMode=SimpleNamespace(PROMISE_IN_BOUNDS=1),
        LoweringSemantics=SimpleNamespace(Lane=None),
        CompilerParams=lambda **kwargs: None,
        SMEM=lambda shape, dtype, transforms=(): lambda: Ref(np.zeros(shape, dtype), bool(transforms)),
        RefUnion=lambda *types: ("union", types),
        Barrier=lambda **kwargs: functools.partial(Barrier, **kwargs),
        ACC=_Sum,
        set_max_registers=lambda count, action: None,
        barrier_wait=lambda barrier: barrier.wait(),
        barrier_arrive=_arrive,
        copy_gmem_to_smem=_copy,
        commit_smem=lambda: here.agent.meet(),
        load=lambda ref, layout=None: ref.get(),
        ShapeDtypeStruct=lambda *args, **kwargs: None,
        layout_cast=lambda x, layout: x,
        broadcasted_iota=lambda dtype, shape, axis, layout=None: np.broadcast_to(np.arange(shape[0])[:, None], shape),
        wgmma=_wgmma,
        wgmma_wait=_wgmma_wait,
        wgmma_accumulator_load=lambda total, wait_n: (_wgmma_wait(wait_n), total.value)[1],
        kernel=lambda body, **kwargs: SimpleNamespace(body=body, **kwargs),
    )
    lax = SimpleNamespace(
        axis_index=lambda name: np.int32(getattr(here.agent, name)),
        div=lambda a, b: np.int32(math.trunc(int(a) / int(b))),
        rem=lambda a, b: np.int32(math.fmod(int(a), int(b))),
        fori_loop=_fori,
        switch=lambda i, branches: branches[i](),
        cond=lambda condition, yes, no, *args: (yes if condition else no)(*args),
        broadcast_in_dim=_spread,
    )
    numpy = SimpleNamespace(bfloat16=BF16, **{
        name: getattr(np, name)
        for name in ("int8", "int32", "float32", "where", "maximum", "minimum", "exp2", "zeros", "zeros_like", "full", "clip")
    })  # fmt: skip
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.mosaic_gpu", fake)
    monkeypatch.setattr(pallas, "mosaic_gpu", fake, raising=False)
    for name, value in dict(when=_when, loop=_loop, ds=lambda at, size: slice(int(at), int(at) + size)).items():
        monkeypatch.setattr(pallas, name, value, raising=False)
    monkeypatch.setattr(pallas, "run_scoped", lambda run, *kinds: run(*kinds))
    monkeypatch.setattr(module, "lax", lax)
    monkeypatch.setattr(module, "jnp", numpy)
    monkeypatch.setattr(mosaic, "plgpu", lambda: fake)
    monkeypatch.setattr(persistent, "inline", _inline)
    monkeypatch.setattr(persistent, "swizzled", lambda bits=16: (1,))
    monkeypatch.setattr(persistent, "together", lambda: here.agent.meet())
    monkeypatch.setattr(persistent, "wgmma_fence", lambda: None)
    monkeypatch.setattr(persistent, "finish", _finish)
    monkeypatch.setattr(persistent, "launches_seen", lambda sync: int(sync.memory[0]))
    monkeypatch.setattr(persistent, "launch_number", _launch_number)
    monkeypatch.setattr(mosaic, "reduce_rows", _reduce)


def _reduce(op: str, *shape: Any) -> Any:
    def reduce(x: np.ndarray, scratch: Ref) -> np.ndarray:
        here.agent.meet()
        return x.max(axis=0) if op == "max" else x.sum(axis=0)

    return reduce


def _launch_number(sync: Ref, seen: int, arrivals: int, count: int) -> np.int32:
    here.agent.meet()
    sync.memory[0] += count if here.agent.warps.start == 0 else 0
    return np.int32(seen // arrivals + 1)


def run(
    monkeypatch: Any,
    module: Any,
    function: str,
    dims: Any,
    config: Any,
    operands: list[np.ndarray],
    written: int,
    seed: int,
    warps: bool = False,
) -> list[np.ndarray]:
    """One launch of what the module's function makes; operands and results are its own. The last `written` operands are updated
    in place."""
    with monkeypatch.context() as patched:
        _install(patched, module)
        patched.setattr(module, "jax", SimpleNamespace(ShapeDtypeStruct=jax.ShapeDtypeStruct, jit=lambda run: run))
        made = getattr(module, function).__wrapped__(dims, config)
        kernel = next(cell.cell_contents for cell in made.__closure__ if isinstance(cell.cell_contents, SimpleNamespace))
        results = [np.full(x.shape, np.nan, x.dtype) for x in kernel.out_type]
        refs = [Ref(x) for x in [*operands, *results]]
        world = World(seed)
        for b in range(kernel.grid[0]):
            own = {name: _allocate(name, kind) for name, kind in kernel.scratch_types.items()}
            for w in range(kernel.num_threads):
                world.own[b, w] = Barrier(name="warpgroup")
                parts = [range(i, i + 1) for i in range(4)] if warps else [range(4)]
                world.agents += [Agent(world, b, w, part, functools.partial(kernel.body, *refs, **own)) for part in parts]
        world.run()
    return [*results, *operands[len(operands) - written :]]


def _allocate(name: str, kind: Any) -> Any:
    if isinstance(kind, tuple):  # a union: groups that have the same bytes
        groups = [[make() for make in (group if isinstance(group, tuple) else [group])] for group in kind[1]]
        memory = np.full(max(sum(-(-x.memory.nbytes // 1024) * 1024 for x in group) for group in groups), 255, np.uint8)

        def place(group: Any) -> Iterator[Ref]:
            at = 0
            for x in group:
                part = memory[at : at + x.memory.nbytes].view(x.memory.dtype).reshape(x.memory.shape)
                at += -(-x.memory.nbytes // 1024) * 1024
                yield Ref(part, x.swizzled)

        return [tuple(place(g)) if isinstance(k, tuple) else next(place(g)) for g, k in zip(groups, kind[1], strict=True)]
    return kind(name=name) if isinstance(kind, functools.partial) else kind()
