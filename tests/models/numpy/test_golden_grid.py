"""The golden grid: every family with every feature of its config gives the tokens and logits of transformers.

Recorded in fp32 on PyTorch's CPU by tests/golden/make_grid.py. The same files go to both backends. A cell that is to be
refused ("refused": words of the message), or whose context is to be capped ("context": tokens), stands in
tests/golden/exceptions.json under its test's name, with the reason ("why").
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mlx_flash
from mlx_flash.errors import FlashError
from mlx_flash.models.specs.dense_families import DENSE
from mlx_flash.models.specs.families import FAMILIES
from mlx_flash.models.specs.mixtures import is_mixture, mixture_backends
from tests.golden.weights import EXCEPTIONS, GRID, read_cell, read_family, write_folder

try:
    import mlx_lm  # noqa: F401

    HAS_MLX = True
except ImportError:
    HAS_MLX = False

TOLERANCE, CONTEXT = 1e-4, 128
EXPECTED: dict[str, dict[str, Any]] = json.loads(EXCEPTIONS.read_text())


def backends_of(config: dict[str, Any]) -> tuple[str, ...]:
    """The backends whose tables have a config's family."""
    table: Any = FAMILIES.get(config["model_type"]) or DENSE.get(config["model_type"])
    return table.backends if table else mixture_backends(config)


def cells() -> dict[str, tuple[str, str, str]]:
    """Family, cell and backend by the test's name."""
    found = {}
    for family in sorted(path.stem for path in GRID.glob("*.json")):
        for name in read_family(family)["cells"]:
            backends = backends_of(read_cell(family, name)["config"])
            for backend in backends[-1:] if name.endswith(" old") else backends:  # both read one normal form
                found[f"{family}-{name}-{backend}".replace(" ", "_")] = family, name, backend
    return found


CELLS = cells()


class Folders:
    """The last cell's model, for both backends. A cell's own files are deleted when the next one is made."""

    def __init__(self, under: Path):
        self.under, self.key = under, ("", "")

    def model(self, family: str, name: str) -> Path:
        """What is loaded: the flash checkpoint of a dense model, a mixture of experts as it is."""
        cell, source, flash = read_cell(family, name), self.under / "hf", self.under / "flash"
        mixture = is_mixture(cell["config"])
        if self.key != (family, name):
            self.key = ("", "")  # for when the conversion fails
            shutil.rmtree(source, ignore_errors=True)
            shutil.rmtree(flash, ignore_errors=True)
            write_folder(source, cell["config"], cell["tensors"], cell["seed"], cell.get("ends"))
            if not mixture:
                mlx_flash.convert(source, flash)
            self.key = (family, name)
        return source if mixture else flash


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Folders]:
    under = tmp_path_factory.mktemp("grid")
    yield Folders(under)
    shutil.rmtree(under)


def test_every_exception_has_a_cell_and_a_reason() -> None:
    for name, expect in EXPECTED.items():
        kinds = ({"refused", "why"}, {"context", "why"}, {"max_context", "why"})
        assert name in CELLS and expect.keys() in kinds and expect["why"], name


@pytest.mark.parametrize("name", CELLS)
def test_transformers_tokens_and_logits(name: str, folders: Folders) -> None:
    family, feature, backend = CELLS[name]
    if backend == "mlx" and not HAS_MLX:
        pytest.skip("needs mlx-lm")
    cell, expect = read_cell(family, feature), EXPECTED.get(name, {})
    if "refused" in expect:
        with pytest.raises(FlashError, match=expect["refused"]):
            mlx_flash.load(folders.model(family, feature), backend=backend, memory="1GB")
        return
    asked = {"max_context": expect["max_context"]} if "max_context" in expect else {}
    model, tokenizer = mlx_flash.load(folders.model(family, feature), backend=backend, memory="1GB", **asked)
    try:
        assert model.flash.plan.exact
        context = model.flash.plan.context
        assert context == expect.get("context", CONTEXT), f"context {context}"
        compare(model, cell, context)
        if "ends" in cell:
            check_end(model, tokenizer, cell)
    finally:
        model.flash.close()


def compare(model: Any, cell: dict[str, Any], context: int) -> None:
    """Teacher-forced: with the recorded tokens as input, equal best tokens are an equal greedy reply."""
    everything = cell["prompt"] + cell["tokens"]
    first = min(len(cell["prompt"]), context)
    if str(first) not in cell["logits"]:
        first = min(int(n) for n in cell["logits"])
    last = min(len(everything) - 1, context)
    forced = model.flash.forced(model, everything[:first], everything[first:last])
    differs, worst, right = [], 0.0, 0
    for n, logits in enumerate(forced, first):
        if n >= len(cell["prompt"]):
            right += int(logits.argmax()) == everything[n]
        if (wanted := cell["logits"].get(str(n))) is not None:
            found = [*logits[cell["ids"]], logits.max()]
            worst = float(np.abs(np.array(found) - wanted).max())
            if not worst <= TOLERANCE:
                differs.append(f"{worst:.2g} after {n} tokens")
    wanted_tokens = last + 1 - len(cell["prompt"])
    assert not differs and right >= wanted_tokens, (
        f"logits differ by {', '.join(differs) or 'nothing'}; {right} of {wanted_tokens} tokens are right"
    )


def check_end(model: Any, tokenizer: Any, cell: dict[str, Any]) -> None:
    """A reply stops at whichever id of generation_config.json comes first."""
    tokens = cell["tokens"]
    wanted = tokens[: 1 + next(i for i, token in enumerate(tokens) if token in cell["ends"])]
    replies = list(mlx_flash.stream_generate(model, tokenizer, cell["prompt"], max_tokens=len(tokens)))
    assert [reply.token for reply in replies] == wanted
    assert replies[-1].finish_reason == "stop"
