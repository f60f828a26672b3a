"""A flash checkpoint of a model card with random weights, predictors included, for measurements.

The predictors take their time and name nothing of use; what a token asks for comes from a trace (`trace_replay.py`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mlx_flash.engine.residency.window import LRU
from mlx_flash.engine.storage.calibration import Calibration, LayerCalibration, attach
from mlx_flash.engine.storage.checkpoint import Checkpoint
from mlx_flash.models.conversion.converter import convert
from mlx_flash.runtime.model_path import models_folder
from mlx_flash.tools.random_model import make_random
from mlx_flash.tools.trace import Trace

GUESSES = {"recall": 0.95, "precision": 0.95}  # what is guessed a layer ahead, as FloE reports it (arXiv 2505.05950)
RANK = 256  # of a predictor; what the paper's models and ours need lies between 64 and 1024


def make_card(
    card: str,
    folder: Path,
    dtype: str = "bfloat16",
    relu: bool = False,
    progress: bool = False,
    bits: int | None = None,
) -> Path:
    """Write `folder`/flash, a random-weight checkpoint of a card under models/; relu: with that activation, whatever
    the card's is; bits: quantised to so many, 4 or 8, in groups of 64. Takes twice the model's size on disk while it
    runs. Raises the errors of make_random and convert."""
    source, out, described = folder / "weights", folder / "flash", folder / "card"
    config_file = models_folder() / card / "config.json"
    if relu and config_file.is_file():
        config = json.loads(config_file.read_text())
        key = "activation_fn_name" if "activation_fn_name" in config else "hidden_act"
        shutil.copytree(config_file.parent, described)
        (described / "config.json").write_text(json.dumps(config | {key: "relu"}))
        card = str(described)
    try:
        make_random(card, source, dtype=dtype, progress=progress)
        convert(source, out, progress=progress, quantize=bits is not None, q_bits=bits or 4)
    finally:
        shutil.rmtree(source, ignore_errors=True)
        shutil.rmtree(described, ignore_errors=True)
    return out


def attach_random_predictors(checkpoint: Checkpoint, trace: Trace, rank: int = RANK, seed: int = 0) -> Calibration:
    """Give a checkpoint predictors of random weights, and the statistics of the trace that will be replayed on it."""
    rng = np.random.default_rng(seed)
    layers = []
    for index, (layout, tokens) in enumerate(zip(checkpoint.layouts, trace.ids, strict=True)):
        dim, count = layout.dim, layout.count
        rate = np.bincount(np.concatenate(tokens), minlength=count) / np.float32(len(tokens))
        curve = window_curve(tokens, count)
        layers.append(
            LayerCalibration(
                rate=rate.astype(np.float32),
                energy=rate.astype(np.float32),
                curve=curve,
                predicted_curve=curve,
                a=rng.integers(-127, 128, (rank, dim), np.int8),
                b=rng.integers(-127, 128, (count, rank), np.int8),
                bias=np.zeros(count, np.float32),
                step=np.full(1, 1e-4, np.float32),
                figures={"rank": rank, "layer": index, "look_ahead": {"margin": 0.0, **GUESSES}},
            )
        )
    # Such a trace holds nothing but how long ago a neuron was named: least recently used is the best there is.
    calibration = Calibration(tuple(layers), {"random": True, "policy": LRU.plain()})
    attach(checkpoint, calibration)
    return calibration


def window_curve(tokens: Sequence[np.ndarray], count: int) -> np.ndarray:
    """(k, 2) fp32: slots that the ids of the last 1, 2, 4, ... tokens take in the mean, and how many of a token's ids
    are not among them; the last row holds every id and misses none."""
    last = np.full(count, -(1 << 30), np.int64)
    windows = [1 << k for k in range(8) if 1 << k <= len(tokens) // 2]
    held, missed = np.zeros(len(windows)), np.zeros(len(windows))
    begin = windows[-1] if windows else 0
    for t, ids in enumerate(tokens):
        if t >= begin:
            for k, window in enumerate(windows):
                held[k] += int((last >= t - window).sum())
                missed[k] += int((last[ids] < t - window).sum())
        last[ids] = t
    rows = np.stack([held, missed], 1) / max(1, len(tokens) - begin)
    return np.vstack([rows, [count, 0]]).astype(np.float32)
