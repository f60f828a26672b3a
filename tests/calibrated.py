"""Checkpoints with a calibration that is made up, not learnt: fast, and as good or bad as a test wants it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import mlx_flash
from mlx_flash.engine.storage.bundle import DATA_START
from mlx_flash.engine.storage.calibration import Calibration, LayerCalibration, attach
from mlx_flash.engine.storage.checkpoint import Checkpoint
from mlx_flash.engine.storage.reader import LayerFile
from tests.tiny import make_tiny

SPARSITIES = (0.05, 0.5, 0.95)


def made_up_layer(dim: int, count: int, seed: int, share: float | None = 0.4, rank: int = 4) -> LayerCalibration:
    """Random statistics, and a predictor that asks for about `share` of the neurons; all of them for 1."""
    rng = np.random.default_rng(seed)
    curve = np.array([[0, 0.4 * count], [0.4 * count, 0.2 * count], [0.6 * count, 0.1 * count]], np.float32)
    arrays: dict[str, Any] = {
        "rate": rng.random(count, np.float32),
        "energy": rng.random(count, np.float32),
        "curve": curve,
        "predicted_curve": curve,
    }
    figures = {
        "cutoffs": {lead: [2 * s for s in SPARSITIES] for lead in ("gate", "up")},
        "look_ahead": {"margin": 0.0, "recall": 0.5, "precision": 0.5},
    }
    if share is None:
        return LayerCalibration(**arrays, figures=figures)
    a, b = rng.integers(-9, 10, (rank, dim)), rng.integers(-9, 10, (count, rank))
    bias = np.full(count, 1e4 if share == 1 else -160 * (0.5 - share), np.float32)
    arrays |= {"a": a.astype(np.int8), "b": b.astype(np.int8), "bias": bias, "step": np.full(1, 2**-4, np.float32)}
    return LayerCalibration(**arrays, figures=figures)


def calibrate_by_hand(path: Path, share: float | None = 0.4, lead: str = "gate", **summary: Any) -> Path:
    """Write a made-up calibration into a flash checkpoint."""
    checkpoint = Checkpoint.open(path)
    dim = checkpoint.layouts[0].dim
    layers = [made_up_layer(dim, layout.count, seed, share) for seed, layout in enumerate(checkpoint.layouts)]
    known = {"sparsities": list(SPARSITIES), "lead": lead, **summary}
    attach(checkpoint, Calibration(tuple(layers), known))
    return path


def make_calibrated(
    name: str, folder: Path, dtype: str = "bfloat16", share: float | None = 0.4, lead: str = "gate"
) -> Path:
    """A tiny flash checkpoint (tests.tiny.CONFIGS) with a made-up calibration."""
    path = mlx_flash.convert(make_tiny(name, folder), folder / f"{name}-flash", dtype=dtype)
    return calibrate_by_hand(path, share, lead)


def selectors(model: Any) -> Iterator[Any]:
    """The selectors of a loaded model's layers."""
    for layer in model.layers:
        ffn = layer.ffn if hasattr(layer, "ffn") else layer.mlp
        yield getattr(ffn, "_ffn", ffn)


def check_slots(model: Any) -> int:
    """Every slot that counts as filled holds its bundle, byte for byte; returns how many there are."""
    held = 0
    for selector, file in zip(selectors(model), model.flash.plan.checkpoint.layer_files, strict=True):
        held += check_slab(selector.residency, selector.slab, stored_bundles(file))
    return held


def stored_bundles(file: LayerFile) -> np.ndarray:
    """A layer's bundles as they are on disk, uint8 (count, stride)."""
    return np.fromfile(file.path, np.uint8)[DATA_START:].reshape(file.layout.count, file.layout.stride)


def check_slab(residency: Any, slab: Any, bundles: np.ndarray) -> int:
    """The same for one layer; bundles (count, stride) as they are on disk."""
    slots = np.flatnonzero(residency.id_of >= 0)
    ids = residency.id_of[slots]
    assert (residency.slot_of[ids] == slots).all() and (residency.slot_of >= 0).sum() == len(slots)
    for target in slab.targets:
        wanted = bundles[ids, target.offset : target.offset + target.rows.shape[1]]
        wrong = ids[(target.rows[slots] != wanted).any(axis=1)]
        assert not len(wrong), f"the slots of {wrong.tolist()} hold other bytes from {target.offset} on"
    return len(slots)
