"""`mlx_flash calibrate`: end to end on tiny models, interrupted at every step, and everything that it must refuse."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mlx_flash
from mlx_flash import cli
from mlx_flash.engine.storage import calibration as store
from mlx_flash.engine.storage.calibration import Calibration, LayerCalibration, encode, load_calibration, model_identity
from mlx_flash.engine.storage.checkpoint import Checkpoint, verify
from mlx_flash.engine.storage.writer import lock_folder
from mlx_flash.tools.calibration import calibrator as tuning
from mlx_flash.tools.calibration import predictor_fit, statistics
from mlx_flash.tools.calibration import predictor_training as training
from mlx_flash.tools.calibration.statistics import SPARSITIES, Weights
from tests.calibrated import calibrate_by_hand, made_up_layer
from tests.tiny import make_tiny

TOKENS = 600


def make_text(path: Path, characters: int, seed: int = 0) -> Path:
    """Words over a few letters: every one a byte, so a token of the tiny models."""
    rng = np.random.default_rng(seed)
    words = ["".join(rng.choice(list("abcdefghij"), rng.integers(1, 8))) for _ in range(60)]
    text = " ".join(words[int(i)] for i in rng.zipf(1.3, characters) % 60)
    path.write_text(text[:characters])
    return path


def make_quick(patch: pytest.MonkeyPatch) -> None:
    """What a real model needs takes too long here."""
    patch.setattr(tuning, "MIN_TOKENS", 400)
    patch.setattr(tuning, "SCORED_TOKENS", 6)
    patch.setattr(predictor_fit, "LEAST_TOKENS", 200)
    patch.setattr(predictor_fit, "LEAST_STEPS", 8)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    make_quick(monkeypatch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("calibrate")


@pytest.fixture(scope="module")
def text(folder: Path) -> Path:
    return make_text(folder / "text.txt", 1500)


@pytest.fixture(scope="module")
def relu(folder: Path) -> Path:
    return mlx_flash.convert(make_tiny("llama-relu", folder), folder / "relu", dtype="bfloat16")


@pytest.fixture(scope="module")
def silu(folder: Path) -> Path:
    return mlx_flash.convert(make_tiny("openelm", folder), folder / "silu", dtype="bfloat16")


def run(path: Path, text: Path, **options: Any) -> dict[str, Any]:
    options = {"tokens": TOKENS, "loss_windows": 1, "backend": "numpy"} | options
    return tuning.calibrate(path, [text], **options)


def stored(path: Path) -> Calibration:
    found = load_calibration(Checkpoint.open(path))
    assert found is not None
    return found


def calibration_files(path: Path) -> list[Path]:
    return sorted(p for p in (path / "flash").iterdir() if "calibra" in p.name)


def logits(path: Path, select: str, **fields: Any) -> np.ndarray:
    model, _ = mlx_flash.load(path, backend="numpy", select=select, **fields)
    try:
        return np.array(list(model.flash.forced(model, list(b"some words"), list(b"more"))))
    finally:
        model.flash.close()


# End to end


@pytest.fixture(scope="module")
def uninterrupted(relu: Path, text: Path, folder: Path) -> Path:
    """The ReLU model, calibrated in one go."""
    path = shutil.copytree(relu, folder / "uninterrupted")
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch)
        run(path, text)
    return path


def test_a_relu_model_gets_statistics_predictors_and_losses(uninterrupted: Path) -> None:
    path, found = uninterrupted, stored(uninterrupted)
    assert verify(path) > 0
    assert [p.name for p in calibration_files(path)] == [
        Path(Checkpoint.open(path).config["flash"]["calibration"]).name
    ]
    summary = found.summary
    assert summary["lead"] in ("gate", "up") and summary["sparsities"] == list(SPARSITIES)
    assert summary["tokens"] == TOKENS // 512 * 512 + 512  # whole windows
    assert set(summary["losses"]) == set(tuning.LOSSY)
    assert all(loss["tokens"] == 6 for loss in summary["losses"].values())
    for layer in found.layers:
        assert 0.2 < layer.rate.mean() < 0.8 and layer.figures["zeros"] == pytest.approx(
            1 - layer.rate.mean(), abs=1e-6
        )
        assert len(layer.curve) > 3 and (np.diff(layer.curve[:, 0]) >= 0).all() and (layer.energy >= 0).all()
    weights = Checkpoint.open(path)
    dense = sum(info.nbytes for _, info in weights.resident_tensors().values())
    everything = dense + sum(layout.count * layout.bundle_bytes for layout in weights.layouts)
    size = sum(layer.predictor_bytes for layer in found.layers)
    assert size == summary["predictor_bytes"] and size <= 0.05 * everything
    assert summary["predictor_share"] == pytest.approx(size / everything)
    assert summary["recall"] >= 0.97
    exact = logits(path, "all")
    for select in ("predictor", "threshold:0.5", "static:0.5", "prompt:0.5"):
        assert np.isfinite(logits(path, select)).all()
    assert (logits(path, "gate", memory="auto") == exact).mean() > 0.99


def test_predictors_stay_within_five_percent_where_they_would_like_more(
    relu: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shutil.copytree(relu, tmp_path / "copy")
    limit: list[int] = []
    choose = training.choose_ranks

    def watched(*args: Any, budget_bytes: int, **options: Any) -> Any:
        limit.append(budget_bytes)
        return choose(*args, budget_bytes=budget_bytes, **options)

    monkeypatch.setattr(training, "choose_ranks", watched)
    found = run(path, text, loss_windows=0)
    steps = 4 * len(found["layers"])  # beside a, b and the bias there is a step per layer
    assert limit[0] + steps <= 0.05 * found["predictor_bytes"] / found["predictor_share"]
    assert "losses" not in found


def test_a_silu_model_gets_no_predictors(silu: Path, text: Path, tmp_path: Path) -> None:
    path = shutil.copytree(silu, tmp_path / "copy")
    run(path, text)
    found = stored(path)
    verify(path)
    assert not found.has_predictors and "recall" not in found.summary
    assert set(found.summary["losses"]) == {"threshold:0.5", "prompt:0.5", "static:0.5"}
    assert all((layer.rate == 1).all() and layer.curve.shape == (0, 2) for layer in found.layers)
    dropped = [np.abs(logits(path, f"threshold:{s}") - logits(path, "all")).max() for s in (0.1, 0.9)]
    assert 0 < dropped[0] < dropped[1]
    with pytest.raises(mlx_flash.UsageError, match=r"cut-offs are calibrated from 0\.05 to 0\.95"):
        logits(path, "threshold:0.99")
    with pytest.raises(mlx_flash.UsageError, match="needs a ReLU model.*relufy"):
        logits(path, "predictor")


@pytest.mark.parametrize("lead", ["gate", "up"])
def test_threshold_drops_the_share_it_is_told(silu: Path, text: Path, tmp_path: Path, lead: str) -> None:
    from mlx_flash.tools.perplexity import measure_perplexity

    path = shutil.copytree(silu, tmp_path / "copy")
    run(path, text, loss_windows=0)
    found = stored(path)
    store.attach(Checkpoint.open(path), replace(found, summary={**found.summary, "lead": lead}))
    neurons = sum(len(layer.rate) for layer in found.layers)
    for share in (0.3, 0.72):
        config = mlx_flash.FlashConfig(backend="numpy", select=f"threshold:{share}")
        asked = measure_perplexity(path, [text], config, tokens=256)["bundles_per_token"]
        assert asked / neurons == pytest.approx(1 - share, abs=0.05)


def test_a_model_without_gates_is_calibrated_too(text: Path, tmp_path: Path) -> None:
    path = mlx_flash.convert(make_tiny("opt", tmp_path), tmp_path / "flash")
    run(path, text)
    found = stored(path)
    assert found.has_predictors and "lead" not in found.summary
    assert set(found.summary["losses"]) == {"predictor", "prompt:0.5", "static:0.5"}
    with pytest.raises(mlx_flash.UsageError, match="gated"):
        logits(path, "threshold:0.5")


def test_both_backends_learn_much_the_same(relu: Path, text: Path, tmp_path: Path, uninterrupted: Path) -> None:
    pytest.importorskip("mlx_lm")
    path = shutil.copytree(relu, tmp_path / "copy")
    run(path, text, backend="mlx", loss_windows=0)
    for got, wanted in zip(stored(path).layers, stored(uninterrupted).layers, strict=True):
        np.testing.assert_allclose(got.rate, wanted.rate, atol=0.02)
        np.testing.assert_allclose(got.energy, wanted.energy, rtol=0.1, atol=0.02 * wanted.energy.max())


def test_a_budget_that_only_all_fits_still_ends_well(relu: Path, text: Path, tmp_path: Path) -> None:
    """Losses are measured within the budget given; a selector that needs more is left out, nothing is lost."""
    from mlx_flash.tools.inspection import inspect_model

    path = shutil.copytree(relu, tmp_path / "copy")
    config = mlx_flash.FlashConfig(backend="numpy", select="all", max_context=512)
    smallest = inspect_model(path, config)["smallest_budget_bytes"]
    run(path, text, memory=smallest)
    assert "predictor" not in stored(path).summary["losses"]
    verify(path)


# Interrupted


class Interrupt(Exception):
    """Stands for Ctrl-C."""


STEPS: dict[str, tuple[Any, str, int]] = {  # where to raise, and at which call
    "capture": (tuning.Inputs, "save", 1),
    "statistics": (tuning, "sample", 2),
    "firing": (tuning, "firing", 3),
    "sketch": (training, "sketch_layer", 2),
    "train": (training, "train_layer", 2),
    "settle": (training, "settle", 1),
    "look-ahead": (tuning, "look_ahead", 3),
    "attach": (tuning, "attach", 1),
    "losses": (tuning, "measure", 2),
    "second attach": (tuning, "attach", 2),
}


class Calls:
    """Counts calls, and raises in the `stop`-th."""

    def __init__(self, inner: Callable[..., Any], stop: int | None):
        self.inner, self.stop, self.count = inner, stop, 0

    def __get__(self, instance: Any, owner: Any) -> Callable[..., Any]:
        return lambda *args, **options: self(instance, *args, **options)

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.count += 1
        if self.count == self.stop:
            raise Interrupt
        return self.inner(*args, **options)


@pytest.mark.parametrize("step", STEPS)
def test_an_interrupted_calibration_goes_on_and_ends_the_same(
    relu: Path, text: Path, tmp_path: Path, uninterrupted: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = calibrate_by_hand(shutil.copytree(relu, tmp_path / "copy"))
    old, before = calibration_files(path)[0], logits(path, "static:0.3")
    target, name, stop = STEPS[step]
    with monkeypatch.context() as patch:
        patch.setattr(target, name, Calls(getattr(target, name), stop))
        with pytest.raises(Interrupt):
            run(path, text)
    verify(path)
    if step in ("losses", "second attach"):
        assert "losses" not in stored(path).summary, "the new calibration is there, its losses are not"
    else:
        assert old.exists() and (logits(path, "static:0.3") == before).all(), (
            "the old calibration is not valid any more"
        )

    counts = {}
    with monkeypatch.context() as patch:
        for known in ("statistics", "sketch", "train"):
            target, name, _ = STEPS[known]
            counts[known] = Calls(getattr(target, name), None)
            patch.setattr(target, name, counts[known])
        run(path, text)
    done = {"statistics": 0, "sketch": 0, "train": 0}
    if step in done:
        done[step] = 1
    for earlier, later in (("statistics", list(STEPS)[2:]), ("sketch", list(STEPS)[4:]), ("train", list(STEPS)[5:])):
        if step in later:
            done[earlier] = 2 if (earlier, step) == ("statistics", "firing") else 3
    assert {known: calls.count for known, calls in counts.items()} == {known: 3 - n for known, n in done.items()}
    same(path, uninterrupted)


def same(path: Path, wanted: Path) -> None:
    got, right = calibration_files(path), calibration_files(wanted)
    assert [p.name for p in got] == [p.name for p in right], "something is left behind, or other bytes were written"
    assert got[0].read_bytes() == right[0].read_bytes()
    verify(path)


def test_a_capture_goes_on_where_it_stopped(
    relu: Path, text: Path, tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_flash.tools.calibration import ffn_inputs as capture

    monkeypatch.setattr(capture, "SAVE_EVERY", 1)
    path = shutil.copytree(relu, tmp_path / "copy")
    forced = capture.Run.forced
    with monkeypatch.context() as patch:
        patch.setattr(capture.Run, "forced", Calls(forced, 2))
        with pytest.raises(Interrupt):
            run(path, text)
    calls = Calls(forced, None)
    with monkeypatch.context() as patch:
        patch.setattr(capture, "Run", type("Counted", (capture.Run,), {"forced": calls}))
        run(path, text)
    assert calls.count == 1, "the first of two windows ran again"
    same(path, uninterrupted)


@pytest.mark.parametrize("change", ["text", "recall", "seed", "backend"])
def test_what_is_made_from_something_else_is_not_taken(
    relu: Path, text: Path, tmp_path: Path, uninterrupted: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shutil.copytree(relu, tmp_path / "copy")
    other = make_text(tmp_path / "other.txt", 1500, seed=1)
    options: dict[str, Any] = {"recall": {"recall": 0.8}, "seed": {"seed": 1}, "backend": {"backend": "mlx"}}.get(
        change, {}
    )
    if change == "backend":
        pytest.importorskip("mlx_lm")
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "attach", Calls(tuning.attach, 1))
        with pytest.raises(Interrupt):
            run(path, other if change == "text" else text, **options)
    run(path, text)
    same(path, uninterrupted)


def failing(function: Callable[..., Any], at: int, calls: list[int]) -> Callable[..., Any]:
    def fails(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return function(*args, **options)

    return fails


@pytest.mark.parametrize("name", ["replace", "fsync"])
def test_a_disk_that_is_full_leaves_the_old_one(relu: Path, tmp_path: Path, name: str) -> None:
    """Every write of `attach` fails once: a checkpoint holds its old calibration or the whole new one."""
    path = calibrate_by_hand(shutil.copytree(relu, tmp_path / "copy"))
    old, new = stored(path), replace(stored(path), summary={"lead": "up", "sparsities": list(SPARSITIES[:3]), "n": 0})
    for at in range(1, 20):
        calls: list[int] = []
        before = stored(path).summary
        new = replace(new, summary={**new.summary, "n": at})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(store.os, name, failing(getattr(os, name), at, calls))
            try:
                store.attach(Checkpoint.open(path), new)
                passed = True
            except mlx_flash.SpaceError as error:
                assert str(path) in str(error)
                passed = False
        verify(path)
        assert stored(path).summary in (before, new.summary)
        assert not list(path.rglob("*.partial*")), "a partial file is left behind"
        if passed and len(calls) < at:
            assert stored(path).summary == new.summary
            break
    else:
        pytest.fail("no run passed")
    assert at > 2 and len(calibration_files(path)) == 1
    assert old.summary != stored(path).summary


def test_two_at_once(relu: Path, text: Path, tmp_path: Path) -> None:
    path = shutil.copytree(relu, tmp_path / "copy")
    (path / "flash" / "calibrate.partial").mkdir()
    lock = lock_folder(path / "flash" / "calibrate.partial")
    try:
        with pytest.raises(mlx_flash.UsageError, match="being calibrated by another process"):
            run(path, text)
    finally:
        os.close(lock)
    assert load_calibration(Checkpoint.open(path)) is None


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_checkpoint_that_cannot_be_written(relu: Path, text: Path, tmp_path: Path) -> None:
    path = shutil.copytree(relu, tmp_path / "copy")
    (path / "flash").chmod(0o500)
    with pytest.raises(mlx_flash.UsageError, match="calibrate a copy"):
        run(path, text)


# Statistics against the plainest loops


def test_statistics_are_those_of_plain_loops() -> None:
    rng = np.random.default_rng(0)
    tokens, dim, count = 40, 6, 21
    x = rng.normal(size=(tokens, dim)).astype(np.float16)
    gate, up, down = rng.normal(size=(3, count, dim)).astype(np.float32)
    wide = x.astype(np.float64)
    for activation in ("relu", "silu"):
        weights = Weights(gate, up, down, None, activation)
        g, u = wide @ gate.T.astype(np.float64), wide @ up.T.astype(np.float64)
        a = np.maximum(g, 0) if activation == "relu" else g / (1 + np.exp(-g))
        h = a * u
        outputs = h**2 * (down.astype(np.float64) ** 2).sum(axis=1)
        found = statistics.sample(x, weights)
        np.testing.assert_allclose(statistics.energy(x, weights), outputs.mean(axis=0), rtol=1e-4)
        later = [t for t in range(tokens) if t not in (0, 17)]
        np.testing.assert_allclose(statistics.energy(x, weights, [0, 17]), outputs[later].mean(axis=0), rtol=1e-4)
        for name, lead in (("gate", np.abs(a)), ("up", np.abs(u))):
            np.testing.assert_allclose(found.cutoffs[name], np.quantile(lead, SPARSITIES), rtol=1e-3, atol=1e-6)
            cut = np.quantile(lead, 0.5)
            assert found.lost[name] == pytest.approx(outputs[lead <= cut].sum() / outputs.sum(), rel=1e-3, abs=1e-9)
        needed = []
        for token in h**2:
            ordered, total, n = np.sort(token)[::-1], 0.0, 0
            while total < 0.99 * token.sum():
                total, n = total + ordered[n], n + 1
            needed.append(n / count)
        assert found.neurons_for_99_percent == pytest.approx(np.mean(needed), abs=1e-6)

    fires = wide @ gate.T > 0
    packed = statistics.firing(x, Weights(gate, up, down, None, "relu"))
    assert (np.unpackbits(packed, axis=1)[:, :count] == fires).all()
    np.testing.assert_allclose(statistics.rates(packed, count), fires.mean(axis=0), rtol=1e-6)


@settings(max_examples=40)
@given(st.integers(1, 40), st.integers(1, 30), st.floats(0, 1), st.integers(0, 99))
def test_gaps_and_curves_are_those_of_plain_loops(tokens: int, count: int, density: float, seed: int) -> None:
    fires = np.random.default_rng(seed).random((tokens, count)) < density
    histogram = np.zeros(tokens + 1, int)
    for neuron in range(count):
        used = np.flatnonzero(fires[:, neuron])
        for before, after in zip(used, used[1:], strict=False):
            histogram[after - before] += 1
    packed = np.packbits(fires, axis=1)
    assert (statistics.gaps(packed, count) == histogram).all()
    curve = statistics.curve(histogram)
    windows = [0] + [1 << k for k in range(20) if 1 << k < tokens and (2 << k) <= tokens]
    for row, k in enumerate(windows):
        # A use's bundle is held for k tokens, or until its next use takes over; of the last uses nothing is known.
        held = missed = 0
        for neuron in range(count):
            used = np.flatnonzero(fires[:, neuron])
            for before, after in zip(used, used[1:], strict=False):
                held += min(k, after - before)
                missed += after - before > k
        np.testing.assert_allclose(curve[row], [held / tokens, missed / tokens], rtol=1e-6)
    assert len(curve) == len(windows)


def test_a_layer_in_which_nothing_fires_has_figures_too() -> None:
    dead = Weights(np.ones((5, 4), np.float32), np.ones((5, 4), np.float32), np.ones((5, 4), np.float32), None, "relu")
    with np.errstate(all="raise"):
        found = statistics.sample(-np.ones((300, 4), np.float16), dead)
        energy = statistics.energy(-np.ones((300, 4), np.float16), dead)
    assert not energy.any() and found.neurons_for_99_percent <= 1
    assert all(np.isfinite(value) for value in found.lost.values())


def test_bias_and_cutoff_decide_what_fires() -> None:
    x = np.array([[1.0], [2.0], [3.0]], np.float16)
    ones = np.ones((1, 1), np.float32)
    fatrelu = Weights(ones, ones, ones, None, "relu", cutoff=2.0)
    assert np.unpackbits(statistics.firing(x, fatrelu), axis=1)[:, 0].tolist() == [0, 0, 1]
    biased = Weights(ones, None, ones, np.array([-1.5], np.float32), "relu")
    assert np.unpackbits(statistics.firing(x, biased), axis=1)[:, 0].tolist() == [0, 1, 1]
    assert (x @ ones.T + fatrelu.offset > 0).ravel().tolist() == [False, False, True]
    assert (x @ ones.T + biased.offset > 0).ravel().tolist() == [False, True, True]


# What is refused


def plant(path: Path, data: bytes) -> Path:
    """Make `data` the calibration that a checkpoint names."""
    name = store.file_name(data)
    (path / name).write_bytes(data)
    config = json.loads((path / "config.json").read_text())
    config["flash"]["files"][name] = {"bytes": len(data), "sha256": "0" * 64}
    config["flash"]["calibration"] = name
    (path / "config.json").write_text(json.dumps(config))
    return path / name


def made_up(path: Path, change: Callable[[LayerCalibration], LayerCalibration] | None = None, **summary: Any) -> bytes:
    checkpoint = Checkpoint.open(path)
    dim = checkpoint.layouts[0].parts[0].length
    layers = [made_up_layer(dim, layout.count, 1) for layout in checkpoint.layouts]
    if change is not None:
        layers[1] = change(layers[1])
    known = {"sparsities": [0.05, 0.5, 0.95], "lead": "gate", **summary}
    return encode(Calibration(tuple(layers), known), model_identity(checkpoint.files))


def with_nan(values: np.ndarray) -> np.ndarray:
    values = values.copy()
    values.flat[0] = np.nan
    return values


DAMAGES: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "other model": (
        lambda p: made_up(p).replace(model_identity(Checkpoint.open(p).files).encode(), b"f" * 64),
        "belongs to another model",
    ),
    "other version": (lambda p: made_up(p).replace(b'version\\": 1', b'version\\": 2', 1), "version 2"),
    "truncated": (lambda p: made_up(p)[:-64], "truncated"),
    "header only": (lambda p: made_up(p)[:100], "calibration-"),
    "empty": (lambda p: b"", "calibration-"),
    "no calibration": (lambda p: made_up(p).replace(b'"calibration"', b'"calibrated!"', 1), "is no calibration"),
    "fewer neurons": (lambda p: made_up(p, lambda x: replace(x, rate=x.rate[1:])), "layer 1's rate"),
    "other width": (lambda p: made_up(p, lambda x: replace(x, a=x.a[:, 1:])), "layer 1's a"),
    "other rank": (lambda p: made_up(p, lambda x: replace(x, b=x.b[:, 1:])), "layer 1's b"),
    "half a predictor": (lambda p: made_up(p, lambda x: replace(x, bias=None)), "layer 1"),
    "NaN in rates": (lambda p: made_up(p, lambda x: replace(x, rate=with_nan(x.rate))), "not numbers"),
    "NaN in a step": (lambda p: made_up(p, lambda x: replace(x, step=with_nan(x.step))), "not numbers"),
    "a curve of one point": (lambda p: made_up(p, lambda x: replace(x, curve=x.curve[:1])), "layer 1"),
    "a curve below zero": (lambda p: made_up(p, lambda x: replace(x, predicted_curve=-x.curve)), "layer 1"),
    "another lead": (lambda p: made_up(p, lead="sideways"), "figures"),
    "cut-offs that are words": (lambda p: made_up(p, sparsities=["a", "b", "c"]), "figures"),
    "too few cut-offs": (lambda p: made_up(p, sparsities=[0.1, 0.2]), "figures"),
    "no figures": (lambda p: made_up(p, lambda x: replace(x, figures={})), "figures"),
    "losses that are none": (lambda p: made_up(p, losses={"predictor": 3}), "figures"),
}


@pytest.fixture(scope="module")
def spoiled(relu: Path, folder: Path) -> Path:
    return shutil.copytree(relu, folder / "spoiled")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_spoiled_calibration_is_refused(spoiled: Path, damage: str) -> None:
    make, words = DAMAGES[damage]
    planted = plant(spoiled, make(spoiled))
    for select in ("predictor", "static:0.5", "auto"):
        with pytest.raises(mlx_flash.FormatError, match=words) as caught:
            mlx_flash.load(spoiled, backend="numpy", select=select)
        assert planted.name in str(caught.value)
        assert "mlx_flash calibrate" in str(caught.value)


def test_what_the_damages_start_from_is_sound(spoiled: Path) -> None:
    plant(spoiled, made_up(spoiled))
    for select in ("predictor", "static:0.5", "threshold:0.5"):
        assert np.isfinite(logits(spoiled, select)).all()


@settings(max_examples=150)
@given(at=st.floats(0, 1), value=st.integers(0, 255), in_header=st.booleans())
def test_one_wrong_byte_never_ends_in_a_traceback(relu: Path, at: float, value: int, in_header: bool) -> None:
    data = bytearray(made_up(relu))
    end = 8 + int.from_bytes(data[:8], "little") if in_header else len(data)
    data[min(int(at * end), end - 1)] = value
    checkpoint = Checkpoint.open(relu)
    file = relu.parent / "wrong-byte.safetensors"
    file.write_bytes(data)
    dim = checkpoint.layouts[0].parts[0].length
    counts = tuple(layout.count for layout in checkpoint.layouts)
    try:
        found = store.read_calibration(file, dim, counts, model_identity(checkpoint.files))
    except mlx_flash.FormatError as error:
        assert file.name in str(error)
    else:
        assert len(found.layers) == len(counts)


def test_a_name_that_is_not_one_of_the_files(relu: Path, tmp_path: Path) -> None:
    path = shutil.copytree(relu, tmp_path / "copy")
    config = json.loads((path / "config.json").read_text())
    for name in ("../other.safetensors", 7, ["x"], "flash/calibration-none.safetensors"):
        config["flash"]["calibration"] = name
        (path / "config.json").write_text(json.dumps(config))
        with pytest.raises(mlx_flash.FormatError, match="mlx_flash calibrate"):
            mlx_flash.load(path, backend="numpy")


@pytest.mark.parametrize("select", ["predictor", "threshold:0.5", "static:0.5"])
def test_without_a_calibration_the_command_is_named(relu: Path, select: str) -> None:
    with pytest.raises(mlx_flash.UsageError, match=r"mlx_flash calibrate --model M --data TEXT"):
        mlx_flash.load(relu, backend="numpy", select=select)


@pytest.mark.parametrize(
    "select",
    ["prompt:0", "prompt:1.5", "prompt:-0.5", "prompt:x", "prompt:nan", "prompt", "prompt:", "static:0", "static:2"]
    + ["static", "threshold:1", "threshold:0", "threshold", "threshold:auto", "static:auto", "gate:0.5", "all:1"]
    + ["predictor:0.9", "auto:0.5", "Gate", ""],
)
def test_fractions_that_make_no_sense(select: str, relu: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(mlx_flash.UsageError):
        mlx_flash.FlashConfig(select=select)
    assert cli.main(["inspect", "--model", str(relu), "--select", select, "--json"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["type"] == "UsageError" and (select in error["message"] or not select)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a" * 300, "the text has 300 tokens; calibration needs at least 534 (400 to learn from, 134 to measure"),
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"good so far \xff\xfe", "not UTF-8 text (byte 12)"),
        (None, "is not a file"),
    ],
)
def test_texts_that_do_not_do(
    relu: Path, tmp_path: Path, content: bytes | None, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    status = cli.main(["calibrate", "--model", str(relu), "--data", str(path), "--windows", "1", "--json"])
    out = capsys.readouterr()
    assert status == 2 and "Traceback" not in out.err
    assert words in json.loads(out.out)["error"]["message"]
    assert not (relu / "flash" / "calibrate.partial").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--recall", "1"], "recall"),
        (["--recall", "0"], "recall"),
        (["--recall", "nan"], "recall"),
        (["--tokens", "0"], "tokens"),
        (["--tokens", "50"], "tokens"),
        (["--windows", "-1"], "windows"),
        (["--memory", "1kB"], "needs at least"),
        (["--seed", "-1"], "seed"),
    ],
)
def test_settings_that_do_not_do(
    relu: Path, text: Path, options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status = cli.main(["calibrate", "--model", str(relu), "--data", str(text), "--windows", "1", "--json", *options])
    out = capsys.readouterr()
    assert status == 2 and words in json.loads(out.out)["error"]["message"]
    assert load_calibration(Checkpoint.open(relu)) is None


def test_the_command_prints_and_inspect_shows_the_loss(
    relu: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = shutil.copytree(relu, tmp_path / "copy")
    command = ["calibrate", "--model", str(path), "--data", str(text), "--tokens", str(TOKENS), "--windows", "1"]
    assert cli.main([*command, "--backend", "numpy"]) == 0
    printed = capsys.readouterr().out
    for word in ("zeros", "rank", "recall", "precision", "predictors:", "of the weights", "static:0.5"):
        assert word in printed
    assert cli.main([*command, "--backend", "numpy", "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and len(json.loads(out)["layers"]) == 3
    assert cli.main(["inspect", "--model", str(path), "--select", "predictor"]) == 0
    assert "not exact: perplexity " in capsys.readouterr().out


def test_a_tokenizer_of_another_model_is_refused(
    relu: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shutil.copytree(relu, tmp_path / "copy")
    monkeypatch.setattr(tuning, "encode_text", lambda tokenizer, text: ([256], [300] * 600))
    with pytest.raises(mlx_flash.UsageError, match="id 300, the model has 300"):
        run(path, text)


# Shipped with the original


def test_convert_takes_a_shipped_calibration_along(
    uninterrupted: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = shutil.copytree(folder / "llama-relu", tmp_path / "hf")
    shutil.copyfile(calibration_files(uninterrupted)[0], source / store.SHIPPED)
    out = mlx_flash.convert(source, tmp_path / "same", dtype="bfloat16")
    same(out, uninterrupted)
    assert "left out" not in capsys.readouterr().err
    assert (logits(out, "predictor") == logits(uninterrupted, "predictor")).all()
    other = mlx_flash.convert(source, tmp_path / "other", dtype="float16")  # other bits, so not its weights
    assert "left out" in capsys.readouterr().err
    assert load_calibration(Checkpoint.open(other)) is None and not calibration_files(other)
    verify(other)
    (source / store.SHIPPED).write_bytes(b"no such thing")
    broken = mlx_flash.convert(source, tmp_path / "broken", dtype="bfloat16")
    assert "left out" in capsys.readouterr().err and not calibration_files(broken)
