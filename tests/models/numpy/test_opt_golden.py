"""OPT against Hugging Face transformers' PyTorch model: greedy tokens recorded from the same random checkpoint.

mlx-lm has no OPT, so test_golden_tokens.py cannot compare it at several budgets and with `gate`; the golden grid runs
it with everything resident.

transformers 5.23 with torch 2.13, fp32, 100 tokens after each prompt; the smallest margin between the best two logits
was 1e-3.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import mlx_flash
from mlx_flash.models.text.sampling import Sampling
from tests.tiny import make_tiny, three_budgets

GOLDEN = {int(k): v for k, v in json.loads((Path(__file__).parent / "opt_golden.json").read_text()).items()}


@pytest.mark.parametrize("select", ["all", "gate"])
def test_greedy_tokens_equal_transformers(select: str, tmp_path: Path) -> None:
    path = mlx_flash.convert(make_tiny("opt", tmp_path), tmp_path / "flash")
    for memory, tokens in zip(three_budgets(path, "numpy", select), (30, 100, 30), strict=True):
        model, _ = mlx_flash.load(path, backend="numpy", select=select, memory=memory)
        rng = np.random.default_rng(3)
        for length, wanted in GOLDEN.items():
            prompt = rng.integers(0, 300, length).tolist()
            assert list(model.flash.steps(model, prompt, tokens, Sampling())) == wanted[:tokens]
        model.flash.close()
