"""The invariant above all: the same logits at every budget, slot order and thread count (numpy, bit for bit)."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

import mlx_flash
from mlx_flash.models.text.sampling import Sampling
from mlx_flash.runtime.planning.selective_persistence import MemoryPlan
from mlx_flash.tools.inspection import inspect_model
from tests.tiny import CONFIGS, make_tiny

PROMPTS = (1, 17, 300)


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
    model, _ = mlx_flash.load(path, backend="numpy", memory=memory, select=select, **fields)
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
    relu_model: Path, select: str, capacities: tuple[int, ...], staging: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Capacities are chosen here, not by a budget: partly resident layers, and streams of several slabs."""
    high = some_budgets(relu_model, select)[-1]
    wanted = all_logits(relu_model, high, select, tokens=6)
    module = sys.modules["mlx_flash.runtime.loading"]
    monkeypatch.setattr(module, "split_budget", lambda costs, size: MemoryPlan(size, {}, capacities, staging))
    assert (all_logits(relu_model, high, select, tokens=6) == wanted).all()


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


def test_every_thread_count_gives_the_same(relu_model: Path) -> None:
    numba = pytest.importorskip("numba")
    if numba.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("one core: there is only one thread count")
    budget = some_budgets(relu_model, "gate")[2]
    before = numba.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            numba.set_num_threads(threads)
            results.append(all_logits(relu_model, budget, "gate"))
    finally:
        numba.set_num_threads(before)
    assert (results[0] == results[1]).all()


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
