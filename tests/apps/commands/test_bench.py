"""`mlx_flash bench`: figures as JSON, CSV and a table, and options that do not go together."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mlx_flash
from mlx_flash import cli
from mlx_flash.engine.storage import writer
from mlx_flash.errors import SpaceError
from mlx_flash.runtime.planning.planner import plan_checkpoint
from mlx_flash.tools.bench import bench_report, machine_probe, measuring, random_checkpoint, read_probe
from mlx_flash.tools.bench.bench_report import COLUMNS
from mlx_flash.tools.bench.timeline import (
    PHASES,
)
from mlx_flash.tools.inspection import inspect_model
from mlx_flash.tools.trace import Trace
from tests.calibrated import make_calibrated
from tests.runtime.machines import machine
from tests.tools.bench.tiny_bench import make_card_folder, replay_for


@pytest.fixture(scope="module")
def flash(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_calibrated("openelm-relu", tmp_path_factory.mktemp("bench"), "float32")


@pytest.fixture(autouse=True)
def keep_page_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the page cache, which other tests and other processes use."""
    monkeypatch.setattr(measuring, "drop_page_cache", lambda: False)


@pytest.fixture
def card(tmp_path: Path) -> Path:
    return make_card_folder(tmp_path)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict]:
    status = cli.main(["bench", *map(str, arguments), "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_a_checkpoint_is_measured(
    capsys: pytest.CaptureFixture[str], flash: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_flash.runtime.planning.planner.load_machine", lambda path: machine())
    demands: list[Any] = []
    predict = measuring.predict
    monkeypatch.setattr(measuring, "predict", lambda *known: demands.append(known[1]) or predict(*known))
    wanted = ("--model", flash, "--select", "predictor", "--backend", "numpy", "--slots", 0.3)
    wanted += ("--max-context", 64, "--trace", "synthetic", "--tokens", 2, "--warm", 1, "--prompt", 4)
    picture = tmp_path / "where.png"
    status, report = run(capsys, *wanted, "--csv", tmp_path / "found.csv", "--picture", picture)
    assert status == 0 and report["trace"] == "synthetic" and not report["random_weights"]
    assert list(report["split"]) == [f"{phase}_s" for phase in PHASES]
    assert sum(report["split"].values()) == pytest.approx(report["clocks"]["median_s"], rel=0.5)
    speed = report["decode"]["tokens_per_s"]
    assert report["predicted"]["measured_over_predicted"] * report["predicted"]["tokens_per_s"] == pytest.approx(speed)
    assert report["predicted"]["assumption"] == "" and report["machine"] == "disk"
    assert picture.exists() == bench_report.can_draw()
    named = [len(ids) for ids, *_ in replay_for(plan_checkpoint(flash, mlx_flash.FlashConfig())).trace.ids]
    assert [layer.asked for layer in demands[0].layers] == [layer.fired for layer in demands[0].layers] == named
    assert {(layer.recall, layer.precision) for layer in demands[0].layers} == {(0.95, 0.95)}
    rows = list(csv.DictReader((tmp_path / "found.csv").open()))
    assert tuple(rows[0]) == COLUMNS
    assert {row["what"] for row in rows} == {
        *("page cache not emptied", "warm", "decode", "split", "clocks", "predicted", "memory")
    }
    shares = {row["quantity"]: float(row["value"]) for row in rows if row["what"] == "split"}
    assert shares == {phase: pytest.approx(report["split"][f"{phase}_s"]) for phase in PHASES}
    units = {(row["quantity"], row["unit"]) for row in rows}
    assert {("load", "s"), ("tokens_per_s", "tokens/s"), ("bytes_per_token", "B"), ("hit_rate", "")} <= units
    assert {row["budget"] for row in rows} == {str(report["budget_bytes"])}


def test_the_table_says_what_it_is(
    capsys: pytest.CaptureFixture[str], card: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    arguments = ["bench", "--card", str(card), "--dtype", "float32", "--work", str(tmp_path / "work"), "--keep"]
    arguments += ["--select", "predictor", "--backend", "numpy", "--tokens", "1", "--warm", "0", "--prompt", "3"]
    assert cli.main([*arguments, "--picture", str(tmp_path / "no.png")]) == 0
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert lines[0] == "random weights: mechanism, not quality"
    assert lines[1].startswith("tiny-card float32: select predictor (not exact") and "trace synthetic" in lines[1]
    for words in ("page cache could not be emptied", "waiting for reads", "mlx_flash bench --probe --dir", "planned"):
        assert words in shown.out
    assert "mlx-flash-runtime[bench]" in shown.err and not (tmp_path / "no.png").exists()
    kept = tmp_path / "work" / "tiny-card-float32-relu-random"
    assert lines[-1] == f"kept {kept}" and [each.name for each in kept.parent.iterdir()] == [kept.name]
    assert inspect_model(kept, mlx_flash.FlashConfig(select="predictor", backend="numpy"))["activation"] == "relu"
    assert cli.main(arguments) == 2 and f"{kept} exists" in capsys.readouterr().err


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SpaceError("full")])
def test_a_cards_folder_goes_however_it_ends(
    error: BaseException,
    capsys: pytest.CaptureFixture[str],
    card: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    there: list[str] = []

    def stop(plan: Any, *_: Any, **__: Any) -> None:
        there.extend(path.name for path in (tmp_path / "work").iterdir())
        raise error

    monkeypatch.setattr(measuring, "run_bench", stop)
    status, _ = run(capsys, "--card", card, "--work", tmp_path / "work", "--tokens", 1, "--backend", "numpy")
    assert status == (130 if isinstance(error, KeyboardInterrupt) else 1)
    assert len(there) == 1 and list((tmp_path / "work").iterdir()) == []


def test_a_full_disk_is_seen_before_anything_is_written(
    capsys: pytest.CaptureFixture[str], card: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "_free_bytes", lambda folder: 1000)
    monkeypatch.setattr(random_checkpoint, "make_card", lambda *_: pytest.fail("writes"))
    status, result = run(capsys, "--card", card, "--work", tmp_path / "work", "--tokens", 1)
    assert status == 1 and result["error"]["type"] == "SpaceError" and "1000 bytes" in result["error"]["message"]
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize(
    ("more", "kind", "words"),
    [
        (["--tokens", 0], "UsageError", ["--tokens is 0"]),
        (["--warm", -1], "UsageError", ["--warm is -1"]),
        (["--rounds", 0], "UsageError", ["--rounds is 0"]),
        (["--recall", 2], "UsageError", ["--recall 2"]),
        (["--precision", 0], "UsageError", ["--precision 0"]),
        (["--tokens", 400], "UsageError", ["872 tokens", "holds 512", "--max-context"]),
        (["--card", "openelm-3b"], "UsageError", ["--card openelm-3b and --model"]),
        (["--dtype", "float16"], "UsageError", ["--dtype goes with --card"]),
        (["--work", "here"], "UsageError", ["--work goes with --card"]),
        (["--dir", "here"], "UsageError", ["--dir goes with --probe"]),
        (["--trace", "synthetic", "--select", "gate"], "UsageError", ["--select gate takes none"]),
        (["--trace", "nowhere.npz"], "UsageError", ["nowhere.npz is not a file"]),
        (["--trace", __file__], "FormatError", ["is not a trace"]),
        (["--csv", "no/where.csv"], "UsageError", ["--csv: cannot write 'no/where.csv'"]),
        (["--picture", "where.doc"], "UsageError", [".png, .pdf, .svg"]),
        (["--memory", "1kB"], "BudgetError", ["needs at least"]),
        (["--probe"], "UsageError", ["--model goes with a model"]),
    ],
)
def test_bad_input(
    more: list[object],
    kind: str,
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    flash: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measuring, "run_bench", lambda *_, **__: pytest.fail("measures"))
    monkeypatch.chdir(tmp_path)
    status, result = run(capsys, "--model", flash, "--backend", "numpy", "--select", "predictor", *more)
    assert status == 2 and result["error"]["type"] == kind
    assert all(word in result["error"]["message"] for word in words), result["error"]["message"]
    assert list(tmp_path.iterdir()) == []


def test_cards_and_traces_that_do_not_fit(capsys: pytest.CaptureFixture[str], flash: Path, tmp_path: Path) -> None:
    trace = tmp_path / "other.npz"
    Trace((7, 9), [[np.arange(2, dtype=np.int32)], [np.arange(3, dtype=np.int32)]], 0).save(trace)
    status, result = run(capsys, "--model", flash, "--select", "predictor", "--trace", trace)
    assert status == 2 and "2 layers of 7 to 9 bundles (16 in all)" in result["error"]["message"]
    status, result = run(capsys, "--card", "no-such-card")
    assert status == 2 and "openelm-3b" in result["error"]["message"]
    status, result = run(capsys, "--probe", "--card", "openelm-3b")
    assert status == 2 and "--card goes with a model" in result["error"]["message"]


def test_the_probe_is_kept(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = machine()
    probe_file = read_probe.probe_file
    monkeypatch.setattr(read_probe, "probe_file", lambda folder, progress: probe_file(folder, 1 << 20, progress))
    monkeypatch.setattr(machine_probe, "probe", lambda folder, **_: found)
    monkeypatch.setattr(read_probe, "fio_rates", lambda file, **_: [(found.reads[0], found.reads[1])])
    status, result = run(capsys, "--probe", "--csv", tmp_path / "probe.csv")
    assert status == 0 and Path(result["path"]).is_file() and result["machine"]["device"] == "disk"
    assert result["beside_fio"][0]["fio"]["bytes_per_s"] == found.reads[1].bytes_per_s
    rows = list(csv.DictReader((tmp_path / "probe.csv").open()))
    assert {"reads", "reads beside fio", "memory", "kernel"} <= {row["what"] for row in rows}
    assert cli.main(["bench", "--probe", "--dir", str(tmp_path)]) == 0
    assert "kept in" in capsys.readouterr().out
    assert run(capsys, "--probe", "--dir", tmp_path / "nowhere")[0] == 2
