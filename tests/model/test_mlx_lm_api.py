"""On the mlx backend `model` is an mlx-lm model: mlx-lm's own functions take it unchanged."""

from __future__ import annotations

from pathlib import Path

import pytest

import mlx_flash
from tests.conftest import shared_path

mlx_lm = pytest.importorskip("mlx_lm", reason="this is about mlx-lm")
PROMPT = "Once upon a time"


@pytest.fixture
def flash(tmp_path: Path) -> Path:
    return mlx_flash.convert(shared_path("data/models/stories260K"), tmp_path / "flash")


def test_generate_and_stream_generate_take_the_model(flash: Path) -> None:
    import mlx.nn as nn

    plain = mlx_lm.generate(*mlx_lm.load(str(shared_path("data/models/stories260K"))), PROMPT, max_tokens=60)
    assert plain.startswith(", there was a little girl named Lily.")
    for memory in ("auto", "25MB"):
        model, tokenizer = mlx_flash.load(flash, backend="mlx", memory=memory)
        assert isinstance(model, nn.Module)
        assert mlx_lm.generate(model, tokenizer, PROMPT, max_tokens=60) == plain
        streamed = "".join(r.text for r in mlx_lm.stream_generate(model, tokenizer, PROMPT, max_tokens=60))
        assert streamed == plain
        assert mlx_flash.generate(model, tokenizer, PROMPT, max_tokens=60) == plain
        model.flash.close()


def test_both_backends_give_the_same_text(flash: Path) -> None:
    texts = set()
    for backend in ("mlx", "numpy"):
        model, tokenizer = mlx_flash.load(flash, backend=backend)
        texts.add(mlx_flash.generate(model, tokenizer, PROMPT, max_tokens=60))
        model.flash.close()
    assert len(texts) == 1
