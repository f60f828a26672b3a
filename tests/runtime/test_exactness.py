"""The invariant above all: the same logits at every budget, slot order and thread count (numpy, bit for bit)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mlx_flash
from mlx_flash.models.text.sampling import Sampling
from mlx_flash.tools.inspection import inspect_model
from mlx_flash.tools.random_model import make_random
from tests.runtime.plans import load_split
from tests.tiny import CONFIGS, make_tiny

PROMPTS = (1, 17, 300)
WIDE = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2, "vocab_size": 600}


@pytest.fixture(scope="module", params=["bfloat16", "float16", "float32"])
def relu_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    return mlx_flash.convert(make_tiny("openelm-relu", folder), folder / "flash", dtype=request.param)


@pytest.fixture(scope="module")
def silu_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("silu")
    return mlx_flash.convert(make_tiny("openelm", folder), folder / "flash", dtype="bfloat16")


def all_logits(path: Path, memory: int, select: str, tokens: int = 12, **fields) -> np.ndarray:
    """Logits after each prompt and along a fixed reply (prompts, 1 + tokens, vocab)."""
    return logits_of(mlx_flash.load(path, backend="numpy", memory=memory, select=select, **fields)[0], tokens)


def logits_of(model: Any, tokens: int = 12) -> np.ndarray:
    """The same of a model, which is closed."""
    rng = np.random.default_rng(5)
    rows = []
    try:
        for length in PROMPTS:
            cache = model.make_cache()
            ids = rng.integers(0, 256, length + tokens)
            for begin in range(0, length, 256):
                logits = model(ids[begin : min(begin + 256, length)], cache)
            rows.append([logits] + [model([token], cache) for token in ids[length:]])
    finally:
        model.flash.close()
    return np.array(rows)


def some_budgets(path: Path, select: str) -> list[int]:
    report = inspect_model(path, mlx_flash.FlashConfig(backend="numpy", select=select))
    low, high = report["smallest_budget_bytes"], report["everything_resident_bytes"]
    return [low + (high - low) * step // 6 for step in range(7)]


@pytest.mark.parametrize("select", ["all", "gate"])
def test_logits_are_bit_identical_at_every_budget(relu_model: Path, select: str) -> None:
    budgets = some_budgets(relu_model, select)
    wanted = all_logits(relu_model, budgets[-1], select)
    assert np.isfinite(wanted).all() and wanted.std() > 0
    for memory in budgets[:-1]:
        assert (all_logits(relu_model, memory, select) == wanted).all(), f"{select} differs at {memory} bytes"


@pytest.mark.parametrize("relu_model", ["bfloat16"], indirect=True)
@pytest.mark.parametrize("staging", [1, 2, 6])
@pytest.mark.parametrize(
    ("select", "capacities"),
    [
        ("all", (0, 256, 256)),
        ("all", (64, 0, 512)),
        ("gate", (20, 100, 200)),
        ("gate", (0, 288, 3)),
        ("gate", (1, 1, 1)),
    ],
)
def test_uneven_slots_and_read_ahead_change_nothing(
    relu_model: Path, select: str, capacities: tuple[int, ...], staging: int
) -> None:
    """Capacities are chosen here, not by a budget: partly resident layers, and streams of several slabs."""
    high = some_budgets(relu_model, select)[-1]
    wanted = all_logits(relu_model, high, select, tokens=6)
    model = load_split(relu_model, capacities, staging, backend="numpy", select=select)
    assert (logits_of(model, tokens=6) == wanted).all()


def test_a_second_reply_voids_the_first(relu_model: Path) -> None:
    """One KV cache is budgeted: a suspended reply must not go on from the other's keys."""
    model, _ = mlx_flash.load(relu_model, backend="numpy")
    first = model.flash.steps(model, [1, 2, 3], 5, Sampling())
    next(first)
    wanted = list(model.flash.steps(model, [1, 2, 3], 5, Sampling()))
    with pytest.raises(mlx_flash.UsageError, match="another reply"):
        list(first)
    assert list(model.flash.steps(model, [1, 2, 3], 5, Sampling())) == wanted
    model.flash.close()


def test_a_dropped_model_is_gone_at_once(relu_model: Path) -> None:
    import gc
    import weakref

    gc.disable()  # no cycle may keep gigabytes until the collector comes by
    try:
        model, _ = mlx_flash.load(relu_model, backend="numpy")
        model.flash.close()
        alive = weakref.ref(model.layers[0])
        del model
        assert alive() is None
    finally:
        gc.enable()


def test_silu_too(silu_model: Path) -> None:
    budgets = some_budgets(silu_model, "all")
    wanted = all_logits(silu_model, budgets[-1], "all")
    for memory in budgets[:-1]:
        assert (all_logits(silu_model, memory, "all") == wanted).all()


def test_gate_gives_what_all_gives(relu_model: Path) -> None:
    both = [all_logits(relu_model, some_budgets(relu_model, select)[3], select) for select in ("all", "gate")]
    pytest.importorskip("numba", reason="plain NumPy sums gathered rows in another order")
    assert (both[0] == both[1]).all()


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough that every matrix is worth several tasks for the kernels' threads."""
    folder = tmp_path_factory.mktemp("wide")
    (folder / "config.json").write_text(json.dumps(CONFIGS["llama-relu"] | WIDE))
    make_random(folder, folder / "hf", dtype="bfloat16", seed=7)
    return mlx_flash.convert(folder / "hf", folder / "flash")


@pytest.mark.parametrize("select", ["all", "gate"])
def test_every_thread_count_gives_the_same(wide_model: Path, select: str) -> None:
    pytest.importorskip("numba", reason="plain NumPy has BLAS's threads, whose sums are BLAS's business")
    from mlx_flash.engine.backends.numpy.kernels.thread_pool import TASK_BYTES

    def logits(threads: int) -> np.ndarray:
        model, _ = mlx_flash.load(wide_model, backend="numpy", select=select, slots=0.5)
        backend, layout = model.flash.plan.backend, model.flash.plan.checkpoint.layouts[0]
        assert layout.count * layout.parts[0].nbytes >= 4 * TASK_BYTES
        backend.threads = threads
        assert backend.threads == backend.kernels.threads == backend.tiles.threads == threads
        return logits_of(model, tokens=4)

    wanted = logits(1)
    assert np.isfinite(wanted).all() and wanted.std() > 0
    for threads in (2, 3, 8):
        assert (logits(threads) == wanted).all(), f"{threads} threads give other logits than one"


def test_what_fits_reads_nothing_after_the_first_token(relu_model: Path) -> None:
    for select in ("all", "gate"):
        model, tokenizer = mlx_flash.load(
            relu_model, backend="numpy", memory=some_budgets(relu_model, select)[-1], select=select
        )
        responses = list(mlx_flash.stream_generate(model, tokenizer, [1, 2, 3], max_tokens=20))
        assert responses[-1].bytes_read_per_token == 0 and responses[-1].hit_rate == 1.0
        list(mlx_flash.stream_generate(model, tokenizer, [4, 5, 6], max_tokens=5))
        assert model.flash.stats.bytes_read == 0
        model.flash.close()


def test_a_small_budget_does_read(relu_model: Path) -> None:
    model, tokenizer = mlx_flash.load(
        relu_model, backend="numpy", memory=some_budgets(relu_model, "all")[0], select="all"
    )
    last = list(mlx_flash.stream_generate(model, tokenizer, [1, 2, 3], max_tokens=5))[-1]
    ffn = sum(layout.count * layout.stride for layout in model.flash.plan.checkpoint.layouts)
    assert last.hit_rate == 0.0 and last.bytes_read_per_token >= ffn
    model.flash.close()


def test_opt_runs_at_every_budget(tmp_path: Path) -> None:
    path = mlx_flash.convert(make_tiny("opt", tmp_path), tmp_path / "flash")
    assert CONFIGS["opt"]["activation_function"] == "relu"
    for select in ("all", "gate"):
        budgets = some_budgets(path, select)
        wanted = all_logits(path, budgets[-1], select)
        assert all((all_logits(path, memory, select) == wanted).all() for memory in budgets[:-1:2])
