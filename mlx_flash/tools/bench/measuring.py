"""What `mlx_flash bench` measures: loads a checkpoint cold and warm, decodes fixed tokens, and takes the times.

The speed is that of tokens without clocks inside; tokens with clocks give the split into phases. Both kinds alternate.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mlx_flash.runtime.generation import peak_bytes
from mlx_flash.runtime.loading import load
from mlx_flash.runtime.planning.cost_model import Prediction, predict
from mlx_flash.runtime.planning.neuron_plan import NeuronPlan
from mlx_flash.stats import Stats

from .options import BenchOptions
from .timeline import TimedToken, Timeline
from .trace_replay import Replay, replay_trace

SEED = 20


@dataclass(frozen=True)
class Start:
    """From the call to the first token, in seconds: loading, then the prompt."""

    load_s: float
    prompt_s: float


@dataclass
class Memory:
    """Bytes of this process. peak: the most that was resident; anonymous: the most that was not file pages, as sampled
    between steps, None where the system does not tell."""

    peak: int = 0
    anonymous: int | None = None

    def look(self) -> None:
        """Sample the figures; called between steps."""
        self.peak = _status("VmHWM") or peak_bytes()
        found = [_status(name) for name in ("RssAnon", "RssShmem")]  # mmap without a file is one or the other
        if found[0] is not None:
            self.anonymous = max(found[0] + (found[1] or 0), self.anonymous or 0)


@dataclass
class Measured:
    """What `run_bench` measured. dropped: the page cache was emptied before the cold start.

    warming_s, untimed_s: seconds of tokens without clocks, while warming up and after it; cpu_s: processor time of the
    latter, all threads together.
    """

    plan: NeuronPlan
    dropped: bool
    cold: Start
    warm: Start | None = None
    warming_s: list[float] = field(default_factory=list)
    untimed_s: list[float] = field(default_factory=list)
    cpu_s: float = 0.0
    timed: list[TimedToken] = field(default_factory=list)
    phases: tuple[str, ...] = ()
    stats: Stats = field(default_factory=Stats)
    memory: Memory = field(default_factory=Memory)
    prediction: Prediction | None = None

    @property
    def decoded(self) -> int:
        """Tokens that `stats` counts."""
        return len(self.untimed_s) + len(self.timed)


def run_bench(
    plan: NeuronPlan, options: BenchOptions, replay: Replay | None = None, progress: bool = False
) -> Measured:
    """Measure a checkpoint as it is planned to run. replay: names the neurons that are asked for, in place of the
    predictors. Raises what `load` raises, and ReadError."""
    dropped = drop_page_cache()
    _forget_peak()
    found = _decode_cold(plan, options, replay, dropped, progress)
    # The first model is gone by now: two would not fit the memory of those who measure under a limit.
    model, _, start = _start(plan, *next(replies(plan, options)))
    model.flash.close()
    return replace(found, warm=start)


def replies(plan: NeuronPlan, options: BenchOptions) -> Iterator[tuple[list[int], list[int]]]:
    """For every round a prompt and what follows: ids from a seed, the same in every run."""
    rng = np.random.default_rng(SEED)
    for _ in range(options.rounds):
        ids = rng.integers(0, plan.spec.vocab, options.prompt + options.reply).tolist()
        yield ids[: options.prompt], ids[options.prompt :]


def _start(plan: NeuronPlan, prompt: list[int], reply: list[int]) -> tuple[Any, Any, Start]:
    """A loaded model, after a prompt; the steps of the reply."""
    begin = time.perf_counter()
    model, _ = load(plan.checkpoint.path, plan.config)
    loaded = time.perf_counter()
    try:
        steps = model.flash.forced(model, prompt, reply)
        next(steps)
    except BaseException:
        model.flash.close()
        raise
    return model, steps, Start(loaded - begin, time.perf_counter() - loaded)


def _decode_cold(
    plan: NeuronPlan, options: BenchOptions, replay: Replay | None, dropped: bool, progress: bool
) -> Measured:
    rounds = replies(plan, options)
    model, steps, start = _start(plan, *next(rounds))
    timeline = Timeline(model)
    try:
        found = Measured(model.flash.plan, dropped, start)
        found.memory.look()
        if replay is not None:
            replay_trace(model, replay)
        found.phases = tuple(name for name in timeline.phases if name)
        with tqdm(
            total=options.rounds * options.reply, desc="decoding", unit="token", disable=not progress, leave=False
        ) as bar:
            while True:
                _decode(model, steps, options, timeline, found, bar)
                if (following := next(rounds, None)) is None:
                    break
                steps = model.flash.forced(model, *following)
                next(steps)
        found.prediction = observed_prediction(found, replay)
    finally:
        timeline.end()
        model.flash.close()
    return found


def _decode(
    model: Any, steps: Iterator[np.ndarray], options: BenchOptions, timeline: Timeline, found: Measured, bar: Any
) -> None:
    """Decode one reply: warm up, then tokens without (0) and with clocks (1) in the order 0 1 1 0 0 1 1 0 .., so that
    something that alternates by itself, such as a look-ahead that times itself, affects both kinds alike."""
    stats = model.flash.stats
    for _ in range(options.warm):
        found.warming_s.append(_seconds(steps)[0])
        bar.update()
    stats.reset()
    for pair in range(options.tokens):
        for clocks in (pair % 2 == 1, pair % 2 == 0):
            if clocks:
                found.timed.append(timeline.time(lambda: next(steps)))
            else:
                seconds, cpu = _seconds(steps)
                found.untimed_s.append(seconds)
                found.cpu_s += cpu
            bar.update()
        found.memory.look()
    found.stats.add(stats)


def _seconds(steps: Iterator[np.ndarray]) -> tuple[float, float]:
    cpu, begin = time.process_time(), time.perf_counter()
    next(steps)
    return time.perf_counter() - begin, time.process_time() - cpu


def observed_prediction(found: Measured, replay: Replay | None) -> Prediction | None:
    """The cost model's prediction for the measured demand of these tokens; None where the machine was not measured."""
    plan = found.plan
    if plan.machine is None or plan.prediction is None or plan.selection.name == "all":
        return plan.prediction
    asked, missed, fired = np.mean([token.use for token in found.timed], axis=0).T.tolist()
    demand = plan.demand.observed(asked, missed, fired)
    if replay is not None:
        layers = [replace(each, recall=replay.recall, precision=replay.precision) for each in demand.layers]
        demand = replace(demand, layers=tuple(layers))
    tuning = replace(plan.tuning, look_ahead=plan.look_ahead if found.stats.guessed else "off")
    return predict(plan.machine, demand, tuning, plan.memory.staging_blocks)


def drop_page_cache() -> bool:
    """Empty the page cache before a cold start; False where that cannot be done (it takes Linux and root)."""
    if sys.platform != "linux":
        return False
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
    except OSError:
        return False
    return True


def _forget_peak() -> None:
    """Restart the count of the peak, so that earlier work, such as writing a card, is left out; Linux only."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> int | None:
    """Bytes, by a name in /proc/self/status; None where there is no such file."""
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None
