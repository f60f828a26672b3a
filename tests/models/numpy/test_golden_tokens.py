"""Greedy tokens equal mlx-lm's, fully in memory, at every budget: families, trained models, both backends.

mlx-lm is the independent implementation. ReLU models run with `gate`, the others with `all`. A difference is excused
only where its two best logits lie within 1e-4.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

import mlx_flash
from mlx_flash.models.text.sampling import Sampling
from mlx_flash.models.text.tokenizer import load_tokenizer
from tests.conftest import shared_path
from tests.tiny import CONFIGS, make_tiny, three_budgets

mlx_lm = pytest.importorskip("mlx_lm", reason="golden tokens come from mlx-lm")
mx = pytest.importorskip("mlx.core")

NEW_TOKENS, FEWER = 24, 6  # all where slots change hands; without slots, or with all, a token is like the others
PROMPT_LENGTHS = (1, 17, 300)
TRAINED = ("stories260K", "llama2xs", "babyllama361")
TEXT = "Once upon a time there was a little girl who lived near a dark wood. She had a red ball and a small dog. "


@pytest.fixture
def relu_in_mlx_lm(monkeypatch: pytest.MonkeyPatch) -> None:
    """mlx-lm hard-codes SwiGLU: as reference for a ReLU model its activation is replaced."""

    def gated_relu(gate, x):
        return mx.maximum(gate, 0) * x

    for module in ("openelm", "llama", "qwen3"):
        monkeypatch.setattr(importlib.import_module(f"mlx_lm.models.{module}"), "swiglu", gated_relu)


def reference(folder: Path, prompt: list[int], count: int = NEW_TOKENS) -> Iterator[tuple[int, float]]:
    """(greedy token, margin between the best two logits) from mlx-lm, everything in memory."""
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    for token, logprobs in generate_step(mx.array(prompt), model, max_tokens=count):
        best = np.sort(np.array(logprobs.astype(mx.float32)))[-2:]
        yield int(token), float(best[1] - best[0])


def assert_equal_tokens(got: list[int], wanted: list[tuple[int, float]], what: str) -> None:
    for at, (token, (right, margin)) in enumerate(zip(got, wanted, strict=True)):
        if token != right:
            assert margin <= 1e-4, f"{what}: token {at} is {token}, mlx-lm has {right} (margin {margin:.2g})"
            print(f"{what}: token {at} differs, excused by a margin of {margin:.2g}")
            return


def check(source: Path, prompts: Sequence[list[int]], backend: str, tmp_path: Path) -> None:
    flash = mlx_flash.convert(source, tmp_path / "flash")
    wanted = [list(reference(source, prompt)) for prompt in prompts]
    select = "gate" if "relu" in (source / "config.json").read_text() else "all"
    for memory, tokens in zip(three_budgets(flash, backend, select), (FEWER, NEW_TOKENS, FEWER), strict=True):
        model, _ = mlx_flash.load(flash, backend=backend, memory=memory, select=select)
        for prompt, right in zip(prompts, wanted, strict=True):
            got = list(model.flash.steps(model, prompt, tokens, Sampling()))
            assert_equal_tokens(got, right[:tokens], f"{source.name} {backend} {memory} prompt {len(prompt)}")
        model.flash.close()


# The other families' tokens on mlx are in the golden grid; their FFNs are read like these.
ON_MLX = ("openelm", "openelm-relu", "llama", "qwen3")


@pytest.mark.parametrize(
    ("name", "backend"),
    [(n, b) for n in CONFIGS if n != "opt" for b in ("numpy", "mlx") if b == "numpy" or n in ON_MLX],
)
def test_random_models_of_every_family(name: str, backend: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if "relu" in name:
        request.getfixturevalue("relu_in_mlx_lm")
    source = make_tiny(name, tmp_path)
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, CONFIGS[name]["vocab_size"], length).tolist() for length in PROMPT_LENGTHS]
    check(source, prompts, backend, tmp_path)


@pytest.mark.parametrize("backend", ["numpy", "mlx"])
@pytest.mark.parametrize("name", TRAINED)
def test_trained_models(name: str, backend: str, tmp_path: Path) -> None:
    source = shared_path(f"data/models/{name}")
    ids = load_tokenizer(source).encode(TEXT * 12)
    check(source, [ids[:length] for length in (1, 17, 150)], backend, tmp_path)  # their context is 256
