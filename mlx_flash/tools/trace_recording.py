"""Records traces of a model on a text: which bundles each of its layers asks for, token by token."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mlx_flash.config import FlashConfig
from mlx_flash.engine.residency.slots import Residency, SlotPlan
from mlx_flash.engine.storage.calibration import Calibration
from mlx_flash.errors import UsageError
from mlx_flash.runtime.loading import load

from .perplexity import windows_of_files
from .text_windows import read_text
from .trace import Recorder, Trace

Note = Callable[[int, np.ndarray], None]


class RecordedResidency(Residency):
    """A layer's residency that reports the ids of every decoding step, `note(layer, ids)`, once their bundles are
    there. Takes the place of `inner`, whose state it takes over."""

    def __init__(self, inner: Residency, layer: int, note: Note):
        vars(self).update(vars(inner))
        self._layer, self._note = layer, note

    def commit(self, plan: SlotPlan, used: np.ndarray | None = None) -> None:
        super().commit(plan, used)
        self._note(self._layer, plan.ids)


def record_ids(run: Any, note: Note) -> None:
    """From now on call note(layer, ids) for every decoding step of a loaded model's run, layer by layer. Not for
    `all`, which chooses nothing."""
    for selector in run.selectors:
        loader = selector.loader
        loader.residency = RecordedResidency(loader.residency, selector.layer, note)


def record_traces(
    model: str | Path | None,
    data: Sequence[str | Path],
    config: FlashConfig,
    tokens: int | None,
    progress: bool = False,
) -> tuple[list[Trace], Calibration | None]:
    """A trace per window of 128 prompt + 256 decoded tokens, about `tokens` decoded ones in all, and the model's
    calibration if it has one. The prompt too passes token by token, so that its ids are known. Raises UsageError for a
    selector that names no bundles, and what `load` raises."""
    for path in data:
        read_text(path)  # before anything is loaded
    loaded, tokenizer = load(model, config)
    run = loaded.flash
    try:
        if run.plan.selection.name == "all":
            raise UsageError("selector all asks for every bundle; simulate a ReLU model with gate or predictor")
        windows, _ = windows_of_files(tokenizer, data, run.plan.context, tokens)
        recorder = Recorder([layout.count for layout in run.plan.checkpoint.layouts])
        record_ids(run, recorder)
        traces = []
        for window in tqdm(windows, desc="record", unit="window", disable=not progress, file=sys.stderr):
            recorder.restart()
            first, *rest = window.prompt
            for _ in run.forced(loaded, [first], [*rest, *window.scored[:-1]]):
                pass
            traces.append(recorder.trace(len(rest)))
        return traces, run.plan.calibration
    finally:
        run.close()


def knowledge(calibration: Calibration | None, selector: str) -> dict[str, Any]:
    """What the policies may know from calibration: firing rates, and curves of what the selector asks for."""
    if calibration is None:
        return {}
    curves = [layer.predicted_curve if selector == "predictor" else layer.curve for layer in calibration.layers]
    known: dict[str, Any] = {"rates": [layer.rate for layer in calibration.layers]}
    return known | ({"curves": curves} if all(len(curve) > 1 for curve in curves) else {})
