"""Tiny checkpoints with a made-up calibration, and their logits after prompts and along fixed replies."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import mlx_flash
from tests.calibrated import make_calibrated

PROMPTS = (1, 17, 257)  # the last one is a chunk of 256 and one token, which is prompt all the same
TOKENS = 4
BACKENDS = ("numpy", "mlx")
MODELS = {"relu": "openelm-relu", "silu": "openelm", "silu-up": "llama", "opt": "opt"}


@dataclass
class Models:
    """Tiny checkpoints with a made-up calibration, one of each kind and dtype."""

    folder: Path
    made: dict[tuple[str, str, float], Path]

    def __call__(self, kind: str, dtype: str = "bfloat16", share: float = 0.4) -> Path:
        key = kind, dtype, share
        if key not in self.made:
            lead = "up" if kind == "silu-up" else "gate"
            folder = self.folder / f"{kind}-{dtype}-{share}"
            folder.mkdir()
            predicts = share if kind == "relu" else None
            self.made[key] = make_calibrated(MODELS[kind], folder, dtype, predicts, lead)
        return self.made[key]


def load(path: Path, backend: str, memory: int | str = "auto", select: str = "all", **fields: Any) -> Any:
    return mlx_flash.load(path, backend=backend, memory=memory, select=select, **fields)[0]


def ids_of(length: int, tokens: int = TOKENS) -> tuple[list[int], list[int]]:
    ids = np.random.default_rng(length).integers(0, 256, length + tokens).tolist()
    return ids[:length], ids[length:]


def reply(model: Any, length: int, tokens: int = TOKENS) -> np.ndarray:
    """Logits (1 + tokens, vocab) after a prompt and along a fixed reply."""
    return np.array(list(model.flash.forced(model, *ids_of(length, tokens))))


def all_logits(path: Path, backend: str, memory: int | str, select: str, **fields: Any) -> np.ndarray:
    return logits_of(load(path, backend, memory, select, **fields))


def logits_of(model: Any) -> np.ndarray:
    """(prompts, 1 + TOKENS, vocab) of a model, which is closed."""
    try:
        return np.array([reply(model, length) for length in PROMPTS])
    finally:
        model.flash.close()


@cache
def exact_logits(path: Path, backend: str) -> np.ndarray:
    return all_logits(path, backend, "auto", "all")


def assert_same(got: np.ndarray, wanted: np.ndarray, backend: str, what: str = "") -> None:
    """Bit for bit where both did the same sums: numpy with Numba. Else within what fp32 sums of another order give."""
    if backend == "numpy" and importlib.util.find_spec("numba"):
        assert (got == wanted).all(), what
    else:
        assert np.abs(got - wanted).max() <= 1e-4 * np.abs(wanted).max(), what
