"""Small models, cards and traces for the tests of `mlx_flash bench`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx_flash
from mlx_flash.tools.bench.trace_replay import Replay, replay_trace, synthetic_trace
from tests.tiny import CONFIGS

LAYERS = 3


def loaded(path: Path, **more: Any) -> Any:
    fields = {"slots": 0.3, "select": "predictor", "backend": "numpy", "look_ahead": "off", "max_context": 64}
    return mlx_flash.load(path, **(fields | more))[0]


def replay_for(plan: Any) -> Replay:
    return Replay(synthetic_trace([layout.count for layout in plan.checkpoint.layouts], 16))


def decoding(model: Any, tokens: int = 12) -> Any:
    """The steps after a prompt and three tokens more; with slots for some, each layer reads."""
    steps = model.flash.forced(model, [1, 2, 3], [5 + k for k in range(tokens + 3)])
    next(steps)
    if model.flash.plan.selector == "predictor":
        replay_trace(model, replay_for(model.flash.plan))
    for _ in range(3):
        next(steps)
    return steps


def make_card_folder(parent: Path) -> Path:
    """A card that is a folder with a config, as `--card` takes it."""
    folder = parent / "tiny-card"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIGS["openelm"]))
    return folder
