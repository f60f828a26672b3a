"""Where a decoded token's time goes: clocks around what the objects of one loaded model do.

Only `mlx_flash bench` builds one. The clocks are on while a token is timed and off otherwise, so a model that is not
measured has no extra cost. Every moment belongs to the innermost phase. Knows neither prompts nor replies.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_flash.engine.backends.base import Backend

# Waiting for reads; starting reads; attention, norms, output layer; FFN sums; choosing neurons and slots; all else.
PHASES = ("reads", "read calls", "dense", "sparse", "selection", "python")
READS, CALLS, DENSE, SPARSE, SELECTION, REST = range(len(PHASES))
# A lazy backend computes when its results are waited for, not when it is called.
LAZY_PHASES = ("reads", "read calls", "", "", "", "all else")
LEAVE = -1
Mark = tuple[float, int]  # when, and which phase begins; LEAVE: the innermost ends


@dataclass(frozen=True)
class TimeSpan:
    """A phase from `begin` to `end`, in seconds since the token's begin."""

    phase: str
    begin: float
    end: float


@dataclass(frozen=True, eq=False)
class TimedToken:
    """One token. layers: (layer, when its FFN began); use (layers, 3): bundles asked for, missing, fired."""

    seconds: float
    spans: tuple[TimeSpan, ...]
    layers: tuple[tuple[int, float], ...]
    use: np.ndarray

    @property
    def split(self) -> dict[str, float]:
        """Seconds of every phase that occurs; their sum is `seconds`."""
        found: dict[str, float] = {}
        for span in self.spans:
            found[span.phase] = found.get(span.phase, 0.0) + span.end - span.begin
        return found


def exclusive(marks: Sequence[Mark], begin: float, end: float, phases: Sequence[str] = PHASES) -> tuple[TimeSpan, ...]:
    """From nested phases to spans that follow each other from `begin` to `end`: the innermost phase counts."""
    stack, since = [REST], begin
    spans: list[TimeSpan] = []
    for at, phase in [*marks, (end, LEAVE)]:
        name = phases[stack[-1]]
        if spans and spans[-1].phase == name:
            spans[-1] = TimeSpan(name, spans[-1].begin, at - begin)
        elif at > since:
            spans.append(TimeSpan(name, since - begin, at - begin))
        since = at
        if phase == LEAVE:
            stack.pop()
        else:
            stack.append(phase)
    return tuple(spans)


class Timeline:
    """The clocks of one model, whose selectors must not be used by another thread meanwhile."""

    def __init__(self, model: Any):
        run = model.flash
        self._marks: list[Mark] = []
        self._layers: list[tuple[float, int, int, int]] = []  # when, layer, hits and misses until then
        self._stats, self._selectors = run.stats, list(run.selectors)
        self._fired = np.zeros(len(self._selectors))
        self._put: list[tuple[Any, str, Any]] = []  # object, name, what takes its place
        self.lazy = run.plan.backend_name != "numpy"
        self.phases = LAZY_PHASES if self.lazy else PHASES
        self._around(run.shared.reader, ["submit"], CALLS)
        self._put.append((run.stats, "waiting", self._waiting(run.stats.waiting)))
        self._put.append((run.shared, "begin", self._begin(run.shared.begin)))
        if not self.lazy:
            self._around_arithmetic(run.shared.backend)
            self._around_choices()

    def time(self, step: Callable[[], Any]) -> TimedToken:
        """Time `step`, which decodes one token."""
        self._marks.clear()
        self._layers.clear()
        self._fired[:] = 0
        try:
            for thing, name, replacement in self._put:
                setattr(thing, name, replacement)
            begin = time.perf_counter()
            step()
            end = time.perf_counter()
        finally:
            for thing, name, _ in self._put:
                vars(thing).pop(name, None)  # the class's own shows again
        spans = exclusive(self._marks, begin, end, self.phases)
        return TimedToken(end - begin, spans, tuple((layer, at - begin) for at, layer, *_ in self._layers), self._use())

    def end(self) -> None:
        """Drop the references to the model: a cycle would keep its memory."""
        self._put.clear()
        self._selectors.clear()

    def _use(self) -> np.ndarray:
        use, last = np.zeros((len(self._selectors), 3)), (0.0, 0, self._stats.hits, self._stats.misses)
        for this, following in zip(self._layers, [*self._layers[1:], last], strict=True):
            layer, hits, misses = this[1], following[2] - this[2], following[3] - this[3]
            use[layer] += hits + misses, misses, 0
        use[:, 2] = self._fired
        return use

    def _timed(self, call: Callable[..., Any], phase: int) -> Callable[..., Any]:
        mark, now = self._marks.append, time.perf_counter

        def timed(*args: Any, **options: Any) -> Any:
            mark((now(), phase))
            result = call(*args, **options)
            mark((now(), LEAVE))
            return result

        return timed

    def _around(self, thing: Any, names: Sequence[str], phase: int) -> None:
        for name in names:
            if name in vars(thing):
                raise ValueError(f"{name} of {thing} is replaced already")
            self._put.append((thing, name, self._timed(getattr(thing, name), phase)))

    def _around_arithmetic(self, backend: Any) -> None:
        """Clocks for what a backend computes for its decoder, beyond the protocol; conversions happen within that."""
        others = {*vars(Backend), "to_float32", "from_bytes"}
        self._around(backend, [name for name in methods(backend) if name not in others], DENSE)
        self._around(backend, ["shift"], SPARSE)
        make = self._timed(backend.ffn, SPARSE)
        self._put.append((backend, "ffn", lambda spec, x: TimedPass(make(spec, x), self._marks)))

    def _around_choices(self) -> None:
        ahead = {id(each.look_ahead): each.look_ahead for each in self._selectors if getattr(each, "look_ahead", None)}
        for look_ahead in ahead.values():
            self._around(look_ahead, methods(look_ahead), SELECTION)
        for selector in self._selectors:
            if (residency := getattr(selector, "residency", None)) is None:
                continue  # `all` has nothing to choose
            self._around(selector, ["choose"], SELECTION)
            self._around(residency, ["plan", "evict"], SELECTION)
            self._put.append((residency, "commit", self._commit(selector.layer, residency.commit)))

    def _commit(self, layer: int, call: Callable[..., Any]) -> Callable[..., Any]:
        timed = self._timed(call, SELECTION)

        def commit(plan: Any, used: np.ndarray | None = None) -> None:
            timed(plan, used)
            self._fired[layer] += len(plan.ids if used is None else plan.ids[used])

        return commit

    def _waiting(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @contextmanager
        def waiting() -> Iterator[None]:
            self._marks.append((time.perf_counter(), READS))
            with call():
                yield
            self._marks.append((time.perf_counter(), LEAVE))

        return waiting

    def _begin(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def begin(selector: Any) -> None:
            call(selector)
            self._layers.append((time.perf_counter(), selector.layer, self._stats.hits, self._stats.misses))

        return begin


class TimedPass:
    """An `FFNPass` with clocks."""

    def __init__(self, work: Any, marks: list[Mark]):
        self._work, self._mark = work, marks.append

    def _in(self, phase: int, call: Callable[..., Any], *args: Any) -> Any:
        self._mark((time.perf_counter(), phase))
        result = call(*args)
        self._mark((time.perf_counter(), LEAVE))
        return result

    def gate(self, *args: Any) -> Any:
        """Counts as selection: the gates choose the neurons."""
        return self._in(SELECTION, self._work.gate, *args)

    def scalars(self, *args: Any) -> Any:
        return self._in(SPARSE, self._work.scalars, *args)

    def down(self) -> None:
        self._in(SPARSE, self._work.down)

    def dense(self, *args: Any) -> None:
        self._in(SPARSE, self._work.dense, *args)

    def settle(self) -> None:
        self._work.settle()

    def result(self) -> Any:
        return self._in(SPARSE, self._work.result)


def methods(thing: Any) -> list[str]:
    """The public methods of an object's class."""
    found = inspect.getmembers(type(thing), inspect.isfunction)
    return [name for name, _ in found if not name.startswith("_")]


def middle(tokens: Sequence[TimedToken], phases: Sequence[str]) -> dict[str, float]:
    """Mean seconds of every phase over the middle half of the tokens by their time: as steady as a median, and unlike
    medians the phases' figures add up."""
    ranked = sorted(tokens, key=lambda token: token.seconds)
    kept = ranked[len(ranked) // 4 : len(ranked) - len(ranked) // 4]
    splits = [token.split for token in kept]
    return {name: sum(split.get(name, 0.0) for split in splits) / len(kept) for name in phases if name}
