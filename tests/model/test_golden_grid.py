"""The golden grid: every family with every feature of its config gives the tokens and logits of transformers.

Recorded in fp32 on PyTorch's CPU by tests/golden/make_grid.py. The same files go to both backends; a cell that is to
be refused, or whose context is to be capped, says so in its file, with the reason.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mlx_flash
from mlx_flash.errors import FlashError
from mlx_flash.models.dense import DENSE
from mlx_flash.models.families import FAMILIES
from mlx_flash.models.mixtures import is_mixture, mixture_backends
from tests.golden.weights import GRID, read_cell, read_family, write_folder

try:
    import mlx_lm  # noqa: F401

    HAS_MLX = True
except ImportError:
    HAS_MLX = False

TOLERANCE = 1e-4


def backends_of(config: dict[str, Any]) -> tuple[str, ...]:
    """The backends whose tables have a config's family."""
    table: Any = FAMILIES.get(config["model_type"]) or DENSE.get(config["model_type"])
    return table.backends if table else mixture_backends(config)


def cells() -> list[Any]:
    found = []
    for family in sorted(path.stem for path in GRID.glob("*.json")):
        for name in read_family(family)["cells"]:
            for backend in backends_of(read_cell(family, name)["config"]):
                label = f"{family}-{name}-{backend}".replace(" ", "_")
                missing = pytest.mark.skipif(backend == "mlx" and not HAS_MLX, reason="needs mlx-lm")
                found.append(pytest.param(family, name, backend, id=label, marks=missing))
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Where the cells' models are, once they were made."""
    return {}


def model_of(cell: dict[str, Any], key: tuple[str, str], folders: dict[tuple[str, str], Path], under: Path) -> Path:
    """What is loaded: the flash checkpoint of a dense model, a mixture of experts as it is."""
    if key not in folders:
        source = write_folder(under / "hf", cell["config"], cell["tensors"], cell["seed"], cell.get("ends"))
        folders[key] = source if is_mixture(cell["config"]) else mlx_flash.convert(source, under / "flash")
    return folders[key]


@pytest.mark.parametrize(("family", "name", "backend"), cells())
def test_transformers_tokens_and_logits(
    family: str, name: str, backend: str, folders: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    cell = read_cell(family, name)
    expect = cell.get("expect", {}).get(backend, {})
    if "refused" in expect:
        with pytest.raises(FlashError, match=expect["refused"]):
            mlx_flash.load(model_of(cell, (family, name), folders, tmp_path), backend=backend, memory="1GB")
        return
    model, tokenizer = mlx_flash.load(
        model_of(cell, (family, name), folders, tmp_path), backend=backend, memory="1GB", select="auto"
    )
    try:
        assert model.flash.plan.exact
        context = model.flash.plan.context
        assert context == expect.get("context", 128)
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
