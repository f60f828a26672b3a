"""The example of the whole idea on one page, and the engine: each is the other's oracle."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import shutil
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

import mlx_flash
from mlx_flash.models.text.sampling import Sampling
from mlx_flash.models.text.tokenizer import load_tokenizer
from mlx_flash.runtime.model_path import DEFAULT_MODEL, models_folder
from tests.tiny import three_budgets

SOURCE = models_folder() / DEFAULT_MODEL
FILE = Path(__file__).parents[2] / "examples" / "flash_in_200_lines.py"
# The best two logits of these replies lie at least 0.04 apart, several times what rounding the KV cache can move them.
PROMPTS = ("The king said to his daughter", "It was winter, and")
TOKENS = 64
EVERYTHING = 1024  # slots: the widest layer's neurons
CAPACITIES = (0, 1, 48, 300, EVERYTHING)
GATE, UP, DOWN = np.arange(3 * 12 * 4, dtype=np.float32).reshape(3, 12, 4)  # a layer of 12 neurons


def load_example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("flash_in_200_lines", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


example = load_example()


@pytest.fixture(scope="module")
def flash(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mlx_flash.convert(SOURCE, tmp_path_factory.mktemp("example") / "flash")


@pytest.fixture(scope="module")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default model in float32."""
    folder = tmp_path_factory.mktemp("example") / "fp32"
    folder.mkdir()
    tensors = example.read_tensors(SOURCE / "model.safetensors")
    wide = {name: example.widen(raw) for name, raw in tensors.items()}
    save_file(wide, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SOURCE / name, folder)
    return folder


@pytest.fixture(scope="module")
def vocab() -> dict[bytes, int]:
    return example.read_vocabulary(SOURCE / "tokenizer.json")


def test_the_tokens_are_the_engines_at_every_budget_and_capacity(flash: Path, vocab: dict[bytes, int]) -> None:
    wanted: dict[str, list[int]] = {}
    for memory in three_budgets(flash, "numpy", "gate"):
        model, tokenizer = mlx_flash.load(flash, backend="numpy", select="gate", memory=memory)
        for prompt in PROMPTS:
            reply = list(model.flash.steps(model, tokenizer.encode(prompt), TOKENS, Sampling()))
            assert wanted.setdefault(prompt, reply) == reply
            assert tokenizer.decode(reply) == b"".join(list(vocab)[i] for i in reply).decode()
        model.flash.close()
    for prompt, reply in wanted.items():
        for capacity in CAPACITIES:
            assert example.generate(SOURCE, example.encode(prompt, vocab), TOKENS, capacity) == reply, capacity


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_are_the_engines(fp32: Path, vocab: dict[bytes, int], tmp_path: Path, dtype: str) -> None:
    source = fp32 if dtype == "float32" else SOURCE
    ids = example.encode("Once upon a time there was a king who had a king and queen", vocab)
    flash = mlx_flash.convert(source, tmp_path / "flash")
    model, _ = mlx_flash.load(flash, backend="numpy", select="gate", memory=three_budgets(flash, "numpy", "gate")[0])
    wanted = np.array(list(model.flash.forced(model, ids[:1], ids[1:])))
    model.flash.close()
    found = []
    for capacity in CAPACITIES:
        folder = tmp_path / str(capacity)
        folder.mkdir()
        decoder = example.Decoder(source, folder, capacity, len(ids), Counter())
        found.append(np.array([decoder(token) for token in ids]))
        np.testing.assert_array_equal(found[-1], found[0], f"{capacity} slots")
    difference = np.abs(found[0] - wanted)
    if dtype == "float32":
        assert difference.max() <= 1e-4  # sums in another order
    else:
        # Here and there that rounds a key or value to the other side, by one in 256: 0.001 at most was seen. Without
        # rounding them at all it is 0.002 and more.
        assert difference.mean() <= 1.5e-3


def test_more_slots_read_less(vocab: dict[bytes, int]) -> None:
    ids, read, asked = example.encode(PROMPTS[0], vocab), [], set()
    for capacity in CAPACITIES:
        counts = Counter()
        example.generate(SOURCE, ids, TOKENS, capacity, counts)
        assert counts["bytes"] == counts["misses"] * 2 * 256 * 2  # an up row and a down column of 256 bfloat16 each
        asked.add(counts["hits"] + counts["misses"])
        read.append(counts["bytes"])
    assert read == sorted(read, reverse=True) and len(set(read)) == len(read)
    assert len(asked) == 1
    assert read[-1] < read[0] / 10
    assert counts["ffn_bytes"] == 5120 * 3 * 256 * 2


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return example.Bundles(tmp_path_factory.mktemp("bundles") / "layer", GATE, UP, DOWN.T, Counter())


@given(st.integers(0, 12), st.lists(st.sets(st.integers(0, 11)), max_size=12))
def test_a_window_keeps_what_was_used_last(bundles: Any, capacity: int, calls: list[set[int]]) -> None:
    window, used = example.Window(bundles, len(UP), capacity), {}  # used: in which call, of what is resident
    for number, call in enumerate(calls):
        ids, hits = np.array(sorted(call), int), bundles.counts["hits"]
        slots = window.fetch(ids)
        up, down = window.rows(ids, slots)
        np.testing.assert_array_equal(up, UP[ids])
        np.testing.assert_array_equal(down, DOWN[ids])
        assert bundles.counts["hits"] - hits == len(call & set(used))
        assert np.count_nonzero(slots >= 0) == min(capacity, len(call))
        resident = {int(i) for i in window.id_of if i >= 0}
        evicted, kept = set(used) - resident, (set(used) & resident) - call
        assert not evicted & call
        assert max((used[i] for i in evicted), default=-1) <= min((used[i] for i in kept), default=number)
        used = {i: number if i in call else used[i] for i in resident}


def test_a_reply_ends_before_the_end_token(fp32: Path, vocab: dict[bytes, int], tmp_path: Path) -> None:
    ids = example.encode(PROMPTS[0], vocab)
    reply = example.generate(fp32, ids, 12, EVERYTHING)
    config = json.loads((fp32 / "config.json").read_text()) | {"eos_token_id": reply[8]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copy(fp32 / "model.safetensors", tmp_path)
    assert example.generate(tmp_path, ids, 12, EVERYTHING) == reply[: reply.index(reply[8])]


def test_other_activations_are_refused(tmp_path: Path) -> None:
    config = json.loads((SOURCE / "config.json").read_text()) | {"activation_fn_name": "swish"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(AssertionError, match="zeros"):
        example.Decoder(tmp_path, tmp_path, 1, 1, Counter())


def test_it_reads_where_pread_is_missing(bundles: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "pread", raising=False)
    np.testing.assert_array_equal(bundles.read(np.array([7, 0, 11])), np.stack([UP, DOWN], axis=1)[[7, 0, 11]])


@pytest.mark.parametrize(
    "text",
    [
        "Once upon a time, in 1843, there was a king who'd never said 'no'.",
        "  two spaces\n\n\tand a tab ",
        "“Don’t!” — cried Æsop; déjà vu, _twice_ (日本 🦊)",
        "",
    ],
)
def test_ids_are_the_tokenizers(flash: Path, vocab: dict[bytes, int], text: str) -> None:
    assert example.encode(text, vocab) == load_tokenizer(flash).encode(text)


def test_it_is_one_page_of_numpy_and_the_standard_library() -> None:
    lines = FILE.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 200 and max(map(len, lines)) <= 120
    imported = set()
    for node in ast.walk(ast.parse(FILE.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add("." * node.level + str(node.module).split(".")[0])
    assert "numpy" in imported and imported - {"numpy"} <= sys.stdlib_module_names
