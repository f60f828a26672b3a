"""Calibrations that are spoiled, and texts and settings that calibrate refuses."""

from __future__ import annotations

import json
import shutil
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
from mlx_flash.engine.storage import calibration as calibration_file
from mlx_flash.engine.storage.calibration import Calibration, LayerCalibration, encode, load_calibration, model_identity
from mlx_flash.engine.storage.checkpoint import Checkpoint
from mlx_flash.tools.calibration import calibrator
from tests.calibrated import made_up_layer
from tests.tools.calibration.small_calibration import (
    TOKENS,
    logits,
    run,
)

pytestmark = pytest.mark.usefixtures("quick")


def plant(path: Path, data: bytes) -> Path:
    """Make `data` the calibration that a checkpoint names."""
    name = calibration_file.file_name(data)
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
    "no calibration": (lambda p: made_up(p).replace(b'"calibration"', b'"calibrated!"', 1), "is not a calibration"),
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
def spoiled(relu: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(relu, tmp_path_factory.mktemp("spoiled") / "flash")


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
        found = calibration_file.read_calibration(file, dim, counts, model_identity(checkpoint.files))
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
    monkeypatch.setattr(calibrator, "encode_text", lambda tokenizer, text: ([256], [300] * 600))
    with pytest.raises(mlx_flash.UsageError, match="id 300, the model has 300"):
        run(path, text)
