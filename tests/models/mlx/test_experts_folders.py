"""Mixtures of experts in place: folders of links, without an index, cloned without Git LFS, or of another format."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_flash.config import FlashConfig
from mlx_flash.errors import FormatError
from mlx_flash.models.specs.folder import INDEX
from mlx_flash.runtime.loading import load_model
from mlx_flash.runtime.planning.expert_plan import plan_experts
from mlx_flash.runtime.planning.planner import plan_model
from tests.models.specs.test_folder import POINTER, linked
from tests.tiny_experts import config_of, make_model, save_shards

mx = pytest.importorskip("mlx.core", reason="the checkpoints are mlx-lm's")
pytest.importorskip("mlx_lm", reason="the checkpoints are mlx-lm's")

from mlx.utils import tree_flatten  # noqa: E402

CONFIG = config_of("qwen3_moe")
BOTH = pytest.mark.parametrize("backend", ["mlx", "numpy"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_shards(dict(tree_flatten(make_model(CONFIG).parameters())), CONFIG, tmp_path / "model", 3)


def logits(folder: Path, backend: str) -> np.ndarray:
    model = load_model(plan_experts(folder, FlashConfig(backend=backend, slots=0.3, memory="1GB")))
    found = next(model.flash.forced(model, [5, 6, 7, 8], [9])).copy()
    model.flash.close()
    return found


@BOTH
def test_links_and_shards_without_an_index(folder: Path, backend: str, tmp_path: Path) -> None:
    wanted = logits(folder, backend)
    np.testing.assert_array_equal(logits(linked(folder, tmp_path / "linked"), backend), wanted)
    (folder / INDEX).unlink()
    np.testing.assert_array_equal(logits(folder, backend), wanted)
    np.testing.assert_array_equal(logits(linked(folder, tmp_path / "both"), backend), wanted)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "gap": (
        lambda f: [(f / INDEX).unlink(), (f / "model-00002-of-00003.safetensors").unlink()],
        "lacks 1 of 3 shards: model-00002-of-00003.safetensors",
    ),
    "pointer": (lambda f: (f / "model-00001-of-00003.safetensors").write_bytes(POINTER), "is a Git LFS pointer"),
    "tokenizer": (lambda f: (f / "tokenizer.json").write_bytes(POINTER), "tokenizer.json is a Git LFS pointer"),
    "dangling": (
        lambda f: (f / "tokenizer.json").symlink_to("gone"),
        "tokenizer.json is a link to gone, which does not",
    ),
    "circle": (lambda f: (f / "vocab.json").symlink_to("vocab.json"), "vocab.json is a link that leads back to itself"),
    "gguf": (
        lambda f: [*(path.unlink() for path in f.glob("model*")), (f / "q4.gguf").write_bytes(b"GGUF")],
        "GGUF, the format of llama.cpp",
    ),
}


@BOTH
@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_wrong_is_named_before_anything_is_loaded(
    folder: Path, name: str, backend: str, tmp_path: Path
) -> None:
    change, words = DAMAGES[name]
    copy = shutil.copytree(folder, tmp_path / "copy")
    change(copy)
    with pytest.raises(FormatError, match=words):
        plan_model(copy, FlashConfig(backend=backend))
