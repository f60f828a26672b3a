"""The ablation of Table 2: the generator has the statistics it claims, rows read what they say, the table adds up."""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))
try:
    import ablation_parts as parts
    import ablation_report as report
    import ablation_table2 as program
finally:
    sys.path.remove(str(SCRIPTS))

from mlx_flash.engine.backends.numpy.backend import NumpyBackend  # noqa: E402
from mlx_flash.engine.storage.bundle import DATA_START, Layout, Part  # noqa: E402
from mlx_flash.errors import FlashError  # noqa: E402

COUNTS = (1000, 1500)
DIM = 256


def tiny(names: tuple[str, ...] = ("gate", "up", "down")) -> parts.Geometry:
    layouts = tuple(Layout(tuple(Part(n, "bfloat16", DIM) for n in names), count) for count in COUNTS)
    return parts.Geometry("tiny", layouts, 3_000_000, (8, 16))


def new_bytes(geometry: parts.Geometry) -> int:
    return sum(round(0.024 * layout.count) * layout.stride for layout in geometry.layouts)


def table_of(io_ms: dict[str, float], of_fio: float | None = None) -> report.Table:
    rows = []
    for name in report.PAPER_MS:
        readings = [parts.Reading(io_ms[name] / 1e3 * k, 0.001, 10**9, 100) for k in (0.5, 1, 9)]
        sequential = [of_fio] if of_fio and not name.startswith("+") else []
        rows.append(report.Row(name, 10**9, None, 3, readings, sequential))
    return report.Table(tiny(), "made up", rows)


def test_every_token_of_the_generator_has_the_papers_statistics() -> None:
    count = 20_000
    layer = parts.synthetic_layer(count, np.random.default_rng(5))
    tokens = [next(layer) for _ in range(40)]
    for t, (named, firing) in enumerate(tokens):
        assert len(named) == round(0.09 * count) and len(firing) == round(0.03 * count)
        assert np.isin(firing, named).all() and (np.diff(named) > 0).all()
        if t >= 4:
            held = np.unique(np.concatenate([ids for ids, _ in tokens[t - 4 : t]]))
            assert len(held) == pytest.approx(0.24 * count, abs=4)
            assert len(np.setdiff1d(named, held)) == pytest.approx(0.024 * count, abs=1)


def test_the_generator_names_all_neurons_alike_in_the_long_run() -> None:
    layer = parts.synthetic_layer(200, np.random.default_rng(0))
    uses = np.bincount(np.concatenate([next(layer)[0] for _ in range(2000)]), minlength=200)
    assert uses.mean() == pytest.approx(180, rel=0.01) and uses.min() > 70 and uses.max() < 320


def test_a_seed_fixes_the_activations() -> None:
    one, other, third = (parts.synthetic_trace(COUNTS, 3, seed)[0] for seed in (1, 1, 2))
    flat = [np.concatenate([ids for token in trace for ids in token]) for trace in (one, other, third)]
    assert (flat[0] == flat[1]).all() and not (flat[0] == flat[2]).all()


def test_statistics_of_a_trace_that_is_known() -> None:
    tokens = [[np.array([t, 8])] for t in range(6)]
    found = parts.trace_statistics(tokens, [10])
    assert (found.named, found.held, found.new, found.slots) == (0.2, 0.5, 0.1, (5,))
    with pytest.raises(ValueError, match="more than 4"):
        parts.trace_statistics(tokens[:4], [10])


def test_the_geometries_are_those_of_the_papers() -> None:
    models = SCRIPTS.parent / "models"
    openelm, opt = (parts.known_geometry(name, models) for name in ("openelm-3b", "opt-6.7b"))
    assert (len(openelm.layouts), openelm.layouts[0].stride, openelm.dense_bytes) == (36, 18 << 10, 1_486_823_424)
    assert openelm.ffn_bytes == 4_586_471_424
    assert (len(opt.layouts), opt.layouts[0].stride, opt.layouts[0].count) == (32, 16 << 10, 16384)
    assert opt.total_bytes == pytest.approx(13.3e9, rel=0.01)
    weights, predictors = opt.total_bytes / 2 - 50272 * 4096, opt.predictor_bytes - 4 * 32 * 16385
    assert predictors / weights == pytest.approx(0.024, rel=0.02)  # an int8 each; the paper: under 2.4 %


@pytest.mark.parametrize("bundled", [False, True])
@pytest.mark.parametrize("names", [("gate", "up", "down"), ("up", "down")])
def test_slots_hold_the_parts_of_the_neurons_of_the_window(
    tmp_path: Path, names: tuple[str, ...], bundled: bool
) -> None:
    geometry = tiny(names)
    files = parts.write_geometry(geometry, tmp_path, 0)
    trace, _ = parts.synthetic_trace(COUNTS, 8, 0)
    slots = parts.trace_statistics(trace, COUNTS).slots
    row = parts.NamedRow(geometry, files, NumpyBackend(), slots, bundled, 200)
    try:
        readings = [row.token(token) for token in trace]
    finally:
        row.close()
    for layer, layout in enumerate(geometry.layouts):
        residency = row.residencies[layer]
        window = np.unique(np.concatenate([token[layer] for token in trace[-4:]]))
        assert (np.flatnonzero(residency.slot_of >= 0) == window).all()
        data = np.fromfile(files[layer].path, np.uint8)[DATA_START:]
        records = data.reshape(-1, layout.stride if bundled else 2 * DIM)
        each = 1 if bundled else len(names)
        held = row.slabs[layer].targets[0].rows.reshape(-1, each, records.shape[1])[residency.slot_of[window]]
        for part in range(each):
            assert (held[:, part] == records[window + part * layout.count]).all()
    for reading in readings[4:]:  # the gaps that neighbours are read over are a tenth at most
        assert 1 <= reading.bytes / new_bytes(geometry) <= 1.1
    assert readings[0].bytes > 3 * readings[4].bytes


def test_predictor_row_keeps_nothing(tmp_path: Path) -> None:
    geometry = tiny()
    files = parts.write_geometry(geometry, tmp_path, 0)
    trace, _ = parts.synthetic_trace(COUNTS, 2, 0)
    row = parts.NamedRow(geometry, files, NumpyBackend(), None, False, 200)
    try:
        first, again = row.token(trace[0]), row.token(trace[0])
    finally:
        row.close()
    named = sum(len(ids) for ids in trace[0]) * geometry.layouts[0].stride
    assert first.bytes == again.bytes and 1 <= first.bytes / named <= 1.1 and row.resident_bytes == 0


def test_naive_reads_everything_and_hybrid_half(tmp_path: Path) -> None:
    geometry = tiny()
    files = parts.write_geometry(geometry, tmp_path, 0)
    for share in (1.0, 0.5):
        row = parts.StreamRow(geometry, files, NumpyBackend(), int((1 - share) * geometry.total_bytes))
        try:
            reading = row.token([])
        finally:
            row.close()
        on_disk = sum(file.path.stat().st_size - DATA_START for file in files)
        assert row.resident_bytes + reading.bytes == on_disk
        assert row.capacities[-1] == (0 if share == 1 else geometry.dense_layout.count)
        # Blocks of 256 neurons are resident whole or not at all.
        assert reading.bytes == pytest.approx(share * on_disk, abs=len(COUNTS) * 256 * geometry.layouts[0].stride)


def test_files_that_are_not_bundles_of_equal_parts_cannot_be_read_part_by_part(tmp_path: Path) -> None:
    odd = Layout((Part("up", "bfloat16", 100), Part("down", "bfloat16", 100)), 4)
    with pytest.raises(ValueError, match="not 2 equal parts"):
        parts.unbundled(parts.LayerFile(tmp_path / "x", odd))


def test_a_small_table_from_files_to_csv_and_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = iter([1e9, 1e6])
    monkeypatch.setattr(program, "fio_rate", lambda files, random=False: 5e8 if random else next(rates))
    geometry = tiny()
    files = parts.write_geometry(geometry, tmp_path, 0)
    trace, _ = parts.synthetic_trace(COUNTS, 4 + 2 * 3, 0)
    table = program.run_table(geometry, files, trace, "generated", rounds=2, tokens=3)
    figures = table.figures()
    assert [row["row"] for row in figures] == list(report.PAPER_MS)
    assert [row["tokens"] for row in figures] == [2, 2, 6, 6, 6]
    gb = [row["gb_per_token"] for row in figures]
    assert gb[0] > gb[1] > gb[2] > gb[3] >= gb[4] > 0
    assert figures[0]["resident_gb"] == 0 and figures[3]["resident_gb"] > figures[2]["resident_gb"]
    assert figures[2]["reads_per_token"] > figures[4]["reads_per_token"]
    assert figures[0]["of_fio_sequential"] > 0 and figures[2]["of_fio_sequential"] is None
    assert figures[2]["predictor_ms"] > 0 and figures[0]["predictor_ms"] is None
    for row in table.rows[:2]:  # each round against its own fio
        (first, second), rate = row.of_fio, [r.bytes / r.io_s for r in row.readings]
        assert (first, second) == pytest.approx((rate[0] / 1e9, rate[1] / 1e6))
    for row in table.rows[3:]:  # from the first timed token on
        assert all(1 <= reading.bytes / new_bytes(geometry) <= 1.1 for reading in row.readings)
    assert "9.0% named per token, 24.0% held" in table.about

    about: dict[str, Any] = report.machine(tmp_path, None) | {"seed": 0}
    report.save_csv(tmp_path / "out" / "t.csv", [table, table], about)
    with (tmp_path / "out" / "t.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 10 and lines[0]["fio_random_gb_per_s"] == "0.5"
    assert {"machine", "cpu", "disk", "date", "versions", "seed", "io_ms", "ratio_to_naive"} <= set(lines[0])
    assert float(lines[4]["gb_per_token"]) == pytest.approx(gb[4], rel=1e-4)
    report.print_table(table)
    assert "mechanism, not quality" in capsys.readouterr().out

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    report.save_picture(tmp_path / "t.png", [table], about)
    assert "no picture" in capsys.readouterr().out and not (tmp_path / "t.png").exists()


def test_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    tables = [table_of(report.PAPER_MS), table_of(report.PAPER_MS)]
    report.save_picture(tmp_path / "t.png", tables, {"cpu": "some", "disk": "any"})
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


def test_ratios_are_of_medians_and_verdicts_follow_them() -> None:
    good = table_of(report.PAPER_MS, of_fio=0.95)
    last = good.figures()[-1]
    assert (last["io_ms"], last["io_ms_fastest"], last["io_ms_slowest"]) == pytest.approx((87, 43.5, 783))
    assert last["ratio_to_naive"] == pytest.approx(2196 / 87) and last["gb_per_s"] == pytest.approx(1 / 0.087)
    assert "25.2" in report.verdicts(good)[0] and not any("MISSED" in line for line in report.verdicts(good))
    bad = table_of(report.PAPER_MS | {"+ bundling": 100}, of_fio=0.85)
    assert [("MISSED" in line) for line in report.verdicts(bad)] == [True, True, True]
    assert len(report.verdicts(table_of(report.PAPER_MS))) == 1


def test_fio_is_asked_for_all_files_and_missed_where_it_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = tiny().files(tmp_path)
    monkeypatch.setattr(program.shutil, "which", lambda name: None)
    assert program.fio_rate(files) is None
    monkeypatch.setattr(program.shutil, "which", lambda name: name)

    def run(command: list[str], **options: Any) -> Any:
        asked = next(word for word in command if word.startswith("--filename="))
        assert asked.split("=", 1)[1].split(":") == [str(file.path) for file in files]
        assert {"--readonly", "--direct=1"} <= set(command)
        assert {"--rw=randread", f"--bs={3 * 2 * DIM}"} <= set(command) or {"--rw=read", "--bs=1M"} <= set(command)
        return type("Done", (), {"returncode": 0, "stdout": 'note: x\n{"jobs": [{"read": {"bw_bytes": 7}}]}'})

    monkeypatch.setattr(program.subprocess, "run", run)
    assert program.fio_rate(files) == program.fio_rate(files, random=True) == 7


def test_the_default_model_reads_what_its_own_neurons_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "SMALL_TOKENS", 5)
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little bear who lived in the woods. " * 20)
    folder = tmp_path / "work"
    folder.mkdir()
    args = argparse.Namespace(
        dir=folder, text=[text], rounds=1, seed=0, model=SCRIPTS.parent / "models/flash-stories-6m"
    )
    table = program.default_table(args)
    assert not list(folder.iterdir())  # all is deleted
    figures = table.figures()
    assert [row["tokens"] for row in figures] == [5] * 5
    gb = [row["gb_per_token"] for row in figures]
    assert gb[0] == pytest.approx(table.geometry.total_bytes / 1e9, rel=0.001) and gb[0] > gb[1] > gb[2] > gb[4] > 0
    assert "neurons that" in table.about and "text.txt" in table.about
    with pytest.raises(FlashError, match="give --text"):
        monkeypatch.setattr(program, "HELD_OUT", tmp_path / "nowhere")
        program.default_table(argparse.Namespace(**vars(args) | {"text": None}))


def test_a_folder_in_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parts.mount_of(tmp_path)[1] != "unknown"
    monkeypatch.setattr(parts, "mount_of", lambda folder: ("tmpfs", "tmpfs"))
    with pytest.raises(OSError, match="in memory"):
        parts.needs_disk(tmp_path)
