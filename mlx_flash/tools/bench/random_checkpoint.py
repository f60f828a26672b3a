"""Flash checkpoints of model cards with random weights, predictors included, for measurements.

Random predictors take as long as trained ones, but name random neurons: a trace says which neurons a token asks for
(`trace_replay.py`).
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from mlx_flash.config import FlashConfig, parse_selection
from mlx_flash.engine.residency.window import LRU
from mlx_flash.engine.storage.bundle import ITEM_BYTES
from mlx_flash.engine.storage.calibration import Calibration, LayerCalibration, attach
from mlx_flash.engine.storage.checkpoint import Checkpoint
from mlx_flash.engine.storage.json_file import read_json
from mlx_flash.engine.storage.writer import check_free_space, lock_folder, remove_stale
from mlx_flash.errors import UsageError
from mlx_flash.models.conversion.converter import convert
from mlx_flash.models.specs.config_reader import read_spec
from mlx_flash.models.specs.model_spec import ModelSpec
from mlx_flash.runtime.model_path import models_folder
from mlx_flash.runtime.notices import announce
from mlx_flash.tools.random_model import make_random
from mlx_flash.tools.trace import Trace

from .options import BenchOptions

NAME = "mlx_flash-bench"
SPARSE = ("predictor", "gate")  # selectors that need ReLU
GUESSES = {"recall": 0.95, "precision": 0.95}  # of guesses a layer ahead, as FloE reports them (arXiv 2505.05950)
RANK = 256  # of a predictor; what the paper's models and ours need lies between 64 and 1024


def make_card(
    card: str,
    folder: Path,
    dtype: str = "bfloat16",
    relu: bool = False,
    progress: bool = False,
    bits: int | None = None,
) -> Path:
    """Write `folder`/flash, a random-weight checkpoint of a card under models/. relu: use ReLU instead of the card's
    activation; bits: quantise to 4 or 8 bits, in groups of 64. Takes twice the model's size on disk while it runs.
    Raises the errors of make_random and convert."""
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
    # In such a trace only the time since a neuron was last named matters: least recently used is the best policy.
    calibration = Calibration(tuple(layers), {"random": True, "policy": LRU.plain()})
    attach(checkpoint, calibration)
    return calibration


def window_curve(tokens: Sequence[np.ndarray], count: int) -> np.ndarray:
    """(k, 2) fp32: the mean number of slots that the ids of the last 1, 2, 4, ... tokens take, and how many of a
    token's ids are not among them; the last row holds every id and misses none."""
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


def read_card(card: str) -> tuple[Path, ModelSpec]:
    """A card's folder, by its name under models/ or by its path, and the model that its config describes. Raises
    UsageError."""
    folder = Path(card).absolute() if Path(card).is_dir() else models_folder() / card
    if not (folder / "config.json").is_file():
        known = sorted(path.parent.name for path in models_folder().glob("*/config.json"))
        raise UsageError(f"no model card {card!r}; known: {', '.join(known)}, or give a folder with a config.json")
    return folder, read_spec(read_json(folder / "config.json"))


def make_folder(folder: Path) -> Path:
    """Make a folder unless it is there; returns it. Raises UsageError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write in {folder}: {error.strerror or error}") from error
    return folder


@contextmanager
def card_checkpoint(
    card: str,
    dtype: str,
    config: FlashConfig,
    options: BenchOptions,
    work: Path,
    *,
    keep: bool = False,
    progress: bool = False,
) -> Iterator[Path]:
    """A random-weight checkpoint of a card in the folder `work`, with predictors where the options have a trace. It is
    removed at the end, also after an error, unless `keep`. Raises UsageError, SpaceError."""
    folder, spec = read_card(card)
    options.check_context(spec, config)
    trace = options.make_trace(tuple(layer.intermediate for layer in spec.layers))
    make_folder(work)
    relu = parse_selection(config.select).name in SPARSE
    kept = work / f"{folder.name}-{dtype}{'-relu' if relu else ''}-random"
    if keep and os.path.lexists(kept):
        raise UsageError(f"{kept} exists, made before: give it with --model, or remove it")
    shapes = (spec.resident_shapes() | spec.ffn_shapes()).values()
    check_free_space(work, 2 * sum(math.prod(map(int, shape)) for shape in shapes) * ITEM_BYTES[dtype])
    made, lock = _temporary(work)
    try:
        announce(f"writing {card} with random weights into {work}")
        path = make_card(str(folder), made, dtype, relu, progress=progress)
        if trace is not None:
            attach_random_predictors(Checkpoint.open(path), trace)
        if keep:
            os.rename(path, kept)
            path = kept
        yield path
    finally:
        shutil.rmtree(made, ignore_errors=True)
        if lock >= 0:
            os.close(lock)


def _temporary(work: Path) -> tuple[Path, int]:
    """A new hidden folder and its lock; folders of runs that were killed are removed."""
    made = work / f".{NAME}.partial-{os.getpid()}"
    try:
        remove_stale(work, NAME)
        made.mkdir()
        return made, lock_folder(made)
    except OSError as error:
        raise UsageError(f"cannot write in {work} ({error.strerror or error}); name a folder with --work") from error
