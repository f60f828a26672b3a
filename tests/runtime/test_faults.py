"""Reads that fail while a reply is being made: the error names the place, and the model works afterwards."""

from __future__ import annotations

import os
from itertools import chain
from pathlib import Path

import pytest

import mlx_flash
from mlx_flash.engine.storage.readers import FaultyReader
from mlx_flash.models.text.sampling import Sampling
from mlx_flash.tools.inspection import inspect_model
from tests.tiny import make_tiny

PROMPT, TOKENS = [5, 6, 7, 8], 6


@pytest.fixture(scope="module")
def flash(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    return mlx_flash.convert(make_tiny("openelm-relu", folder), folder / "flash")


def load(path: Path, select: str, share: float):
    report = inspect_model(path, mlx_flash.FlashConfig(backend="numpy", select=select))
    low, high = report["smallest_budget_bytes"], report["everything_resident_bytes"]
    return mlx_flash.load(path, backend="numpy", select=select, memory=int(low + share * (high - low)))


def reply(model) -> list[int]:
    return list(model.flash.steps(model, PROMPT, TOKENS, Sampling()))


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("select", ["all", "gate"])
def test_fail_reads_from_the_first_until_a_run_passes(flash: Path, select: str, share: float) -> None:
    model, _ = load(flash, select, share)
    wanted = reply(model)
    model.flash.close()
    for fail_at in chain(range(1, 9), range(9, 2000, 3)):  # every third of the later ones, which are alike
        model, _ = load(flash, select, share)
        reader = model.flash.shared.reader
        model.flash.shared.reader = FaultyReader(reader, fail_at)
        try:
            got = reply(model)
        except mlx_flash.ReadError:
            model.flash.shared.reader = reader
            assert reply(model) == wanted, f"after read {fail_at} failed the model gives other tokens"
            continue
        finally:
            model.flash.close()
        assert got == wanted
        break
    else:
        pytest.fail("no run passed")
    assert fail_at > 3, "the run made almost no reads: this tested nothing"


def test_a_file_that_ends_early_is_named(flash: Path, tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(flash, tmp_path / "copy")
    model, tokenizer = load(copy, "all", 0.0)
    file = copy / "flash" / "layer-001.safetensors"
    os.truncate(file, file.stat().st_size - 4096)
    with pytest.raises(mlx_flash.ReadError, match=r"layer-001\.safetensors.*layer 1.*bundle"):
        list(mlx_flash.stream_generate(model, tokenizer, PROMPT, max_tokens=3))
    model.flash.close()


def test_stopping_midway_leaves_a_working_model(flash: Path) -> None:
    for select in ("all", "gate"):
        model, tokenizer = load(flash, select, 0.2)
        wanted = reply(model)
        for stop_after in range(1, TOKENS):
            for at, _ in enumerate(mlx_flash.stream_generate(model, tokenizer, PROMPT, max_tokens=TOKENS), 1):
                if at == stop_after:
                    break
            assert reply(model) == wanted
        model.flash.close()
