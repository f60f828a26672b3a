"""A calibration that is interrupted at any step goes on and ends the same; a full disk leaves the old one."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import mlx_flash
from mlx_flash.engine.storage import calibration as calibration_file
from mlx_flash.engine.storage.calibration import load_calibration
from mlx_flash.engine.storage.checkpoint import Checkpoint, verify
from mlx_flash.engine.storage.writer import lock_folder
from mlx_flash.tools.calibration import calibrator, predictor_training
from mlx_flash.tools.calibration.neuron_statistics import SPARSITIES
from tests.calibrated import calibrate_by_hand
from tests.tools.calibration.small_calibration import (
    calibration_files,
    logits,
    make_text,
    run,
    same,
    stored,
)

pytestmark = pytest.mark.usefixtures("quick")


class Interrupt(Exception):
    """Stands for Ctrl-C."""


STEPS: dict[str, tuple[Any, str, int]] = {  # where to raise, and at which call
    "capture": (calibrator.FfnInputs, "save", 1),
    "statistics": (calibrator, "sample_statistics", 2),
    "firing": (calibrator, "firing", 3),
    "sketch": (predictor_training, "sketch_layer", 2),
    "train": (predictor_training, "train_layer", 2),
    "choose price": (predictor_training, "choose_price", 1),
    "look-ahead": (calibrator, "look_ahead", 3),
    "attach": (calibrator, "attach", 1),
    "losses": (calibrator, "measure", 2),
    "second attach": (calibrator, "attach", 2),
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


def test_a_capture_goes_on_where_it_stopped(
    relu: Path, text: Path, tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_flash.tools.calibration import ffn_inputs

    monkeypatch.setattr(ffn_inputs, "SAVE_EVERY", 1)
    path = shutil.copytree(relu, tmp_path / "copy")
    forced = ffn_inputs.NeuronRun.forced
    with monkeypatch.context() as patch:
        patch.setattr(ffn_inputs.NeuronRun, "forced", Calls(forced, 2))
        with pytest.raises(Interrupt):
            run(path, text)
    calls = Calls(forced, None)
    with monkeypatch.context() as patch:
        patch.setattr(ffn_inputs, "NeuronRun", type("Counted", (ffn_inputs.NeuronRun,), {"forced": calls}))
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
        patch.setattr(calibrator, "attach", Calls(calibrator.attach, 1))
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
            patch.setattr(calibration_file.os, name, failing(getattr(os, name), at, calls))
            try:
                calibration_file.attach(Checkpoint.open(path), new)
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
