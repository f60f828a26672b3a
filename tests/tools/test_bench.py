"""`mlx_flash bench`: every moment belongs to one phase, clocks change nothing, what cannot be measured is refused."""

from __future__ import annotations

import csv
import gc
import json
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import mlx_flash
from mlx_flash import cli
from mlx_flash.engine.backends.numpy.backend import NumpyBackend
from mlx_flash.engine.backends.numpy.decode_pass import DecodePass
from mlx_flash.engine.residency.slots import Residency
from mlx_flash.engine.selection.context import SharedContext
from mlx_flash.engine.selection.selectors import PredictorSelector
from mlx_flash.engine.storage import writer
from mlx_flash.errors import SpaceError
from mlx_flash.runtime.loading import plan_run
from mlx_flash.tools.bench import card as card_module
from mlx_flash.tools.bench import machine_probe as probe
from mlx_flash.tools.bench import measuring as bench_run
from mlx_flash.tools.bench import read_probe
from mlx_flash.tools.bench import report as bench_report
from mlx_flash.tools.bench.measuring import replay_trace, replies
from mlx_flash.tools.bench.options import BenchOptions
from mlx_flash.tools.bench.report import COLUMNS, consecutive
from mlx_flash.tools.bench.timeline import (
    CALLS,
    DENSE,
    LAZY_PHASES,
    LEAVE,
    PHASES,
    READS,
    SELECTION,
    SPARSE,
    TimedToken,
    Timeline,
    TimeSpan,
    exclusive,
    middle,
)
from mlx_flash.tools.bench.trace_replay import Replay, synthetic_trace
from mlx_flash.tools.inspection import inspect_model
from mlx_flash.tools.trace import Trace
from tests.calibrated import make_calibrated
from tests.runtime.test_cost_model import machine
from tests.tiny import CONFIGS

COMPILES = NumpyBackend().compiles
SLOW_S = 0.003
LAYERS = 3


@pytest.fixture(scope="module")
def flash(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_calibrated("openelm-relu", tmp_path_factory.mktemp("bench"), "float32")


@pytest.fixture(autouse=True)
def keep_page_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests, and whoever else works here, need it."""
    monkeypatch.setattr(bench_run, "drop_page_cache", lambda: False)


@pytest.fixture
def card(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny-card"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIGS["openelm"]))
    return folder


def loaded(path: Path, **more: Any) -> Any:
    fields = {"slots": 0.3, "select": "predictor", "backend": "numpy", "look_ahead": "off", "max_context": 64}
    return mlx_flash.load(path, **(fields | more))[0]


def replay_for(plan: Any) -> Replay:
    return Replay(synthetic_trace([layout.count for layout in plan.checkpoint.layouts], 16))


def decoding(model: Any, tokens: int = 12) -> Any:
    """The steps after a prompt and three tokens more; with slots for some, each layer reads."""
    steps = model.flash.forced(model, [1, 2, 3], [5 + k for k in range(tokens + 3)])
    next(steps)
    if model.flash.plan.selector == "predictor":
        replay_trace(model, replay_for(model.flash.plan))
    for _ in range(3):
        next(steps)
    return steps


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict]:
    status = cli.main(["bench", *map(str, arguments), "--json"])
    return status, json.loads(capsys.readouterr().out)


# The clocks


def test_the_innermost_phase_counts() -> None:
    marks = [(1.0, SELECTION), (2.0, CALLS), (3.0, LEAVE), (3.0, CALLS), (4.0, LEAVE), (6.0, LEAVE), (6.5, READS)]
    spans = exclusive([*marks, (7.0, LEAVE)], 0.5, 8.0)
    found = [(span.phase, span.begin, span.end) for span in spans]
    assert found == [
        ("python", 0, 0.5),
        ("selection", 0.5, 1.5),
        ("read calls", 1.5, 3.5),
        ("selection", 3.5, 5.5),
        ("python", 5.5, 6),
        ("reads", 6, 6.5),
        ("python", 6.5, 7.5),
    ]
    token = TimedToken(7.5, spans, (), np.zeros((0, 3)))
    assert token.split == {"python": 2, "selection": 3, "read calls": 2, "reads": 0.5}
    lazy = exclusive([(1.0, READS), (2.0, LEAVE)], 0.0, 3.0, LAZY_PHASES)
    assert [span.phase for span in lazy] == ["all else", "reads", "all else"]


def test_the_middle_half_adds_up() -> None:
    def token(reads: float, python: float) -> TimedToken:
        spans = (TimeSpan("reads", 0, reads), TimeSpan("python", reads, reads + python))
        return TimedToken(reads + python, spans, (), np.zeros((0, 3)))

    tokens = [token(9, 90), token(2, 3), token(1, 1), token(4, 3)]
    assert middle(tokens, ("reads", "dense", "python")) == {"reads": 3, "dense": 0, "python": 3}
    assert middle(tokens[:1], ("reads", "python")) == {"reads": 9, "python": 90}


def test_split_is_the_whole_token_and_clocks_change_nothing(flash: Path) -> None:
    model = loaded(flash, look_ahead="on")
    wanted = [logits.tobytes() for logits in decoding(model)]
    model.flash.close()
    model, found = loaded(flash, look_ahead="on"), []
    stats, shared = model.flash.stats, model.flash.shared
    steps = decoding(model)
    before = [set(vars(thing)) for thing in (shared, shared.backend, shared.reader, stats, model.layers[0].ffn)]
    timeline = Timeline(model)
    asked: list[tuple[int, int]] = []
    for k in range(12):
        stats.reset()
        shared.recorder = lambda layer, ids: asked.append((layer, len(ids)))
        begin = time.perf_counter()
        token = timeline.time(lambda: found.append(next(steps).tobytes()))
        outside = time.perf_counter() - begin
        assert sum(token.split.values()) == pytest.approx(token.seconds, rel=1e-9) and token.seconds <= outside
        assert token.spans[0].begin == 0 and token.spans[-1].end == pytest.approx(token.seconds)
        assert all(a.end == b.begin and a.phase != b.phase for a, b in zip(token.spans, token.spans[1:], strict=False))
        assert [layer for layer, _ in token.layers] == list(range(LAYERS))
        assert token.use[:, 0].tolist() == [count for _, count in asked[LAYERS * k :]]
        assert token.use[:, 1].sum() == stats.misses and (token.use[:, 2] <= token.use[:, 0]).all()
        assert set(token.split) >= {"dense", "sparse", "selection", "python"}
    assert found == wanted
    after = [set(vars(thing)) for thing in (shared, shared.backend, shared.reader, stats, model.layers[0].ffn)]
    assert after == before
    model.flash.close()


def test_clocks_let_go_of_the_model(flash: Path) -> None:
    def used() -> tuple[Timeline, weakref.ref[Any]]:
        model = loaded(flash)
        timeline, steps = Timeline(model), decoding(model)
        timeline.time(lambda: next(steps))
        model.flash.close()
        timeline.end()
        return timeline, weakref.ref(model.layers[0].ffn.slab)

    gc.disable()
    try:
        timeline, slab = used()
        assert slab() is None, "memory that a cycle keeps is missed by the warm start"
    finally:
        gc.enable()


def slowly(call: Callable[..., Any]) -> Callable[..., Any]:
    def slow(*args: Any, **options: Any) -> Any:
        time.sleep(SLOW_S)
        return call(*args, **options)

    return slow


@pytest.mark.parametrize(
    ("owner", "name", "phase"),
    [
        pytest.param(NumpyBackend, "decode", DENSE, marks=pytest.mark.skipif(not COMPILES, reason="numba is missing")),
        (NumpyBackend, "linear", DENSE),
        (DecodePass, "scalars", SPARSE),
        (DecodePass, "down", SPARSE),
        (DecodePass, "gate", SELECTION),
        (PredictorSelector, "choose", SELECTION),
        (Residency, "plan", SELECTION),
        (Residency, "commit", SELECTION),
        (SharedContext, "read", PHASES.index("python")),
        ("reader", "submit", CALLS),
        ("pending", "wait", READS),
    ],
)
def test_what_takes_long_is_found(
    owner: Any, name: str, phase: int, flash: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(flash, **({"select": "gate", "slots": 1.0} if name == "gate" else {}))
    if owner == "reader":
        owner = type(model.flash.shared.reader)
    steps = decoding(model)
    if owner == "pending":
        submit = type(model.flash.shared.reader).submit

        def slow_to_end(self: Any, *args: Any) -> Any:
            pending = submit(self, *args)
            return SimpleNamespace(wait=slowly(pending.wait), ended=pending.ended, give_up=pending.give_up)

        monkeypatch.setattr(type(model.flash.shared.reader), "submit", slow_to_end)
    else:
        monkeypatch.setattr(owner, name, slowly(getattr(owner, name)))
    split = Timeline(model).time(lambda: next(steps)).split
    model.flash.close()
    times = 1 if name == "linear" and COMPILES else LAYERS  # the output layer's only, where layers decode in one call
    assert split[PHASES[phase]] >= times * SLOW_S


def test_a_lazy_backend_is_not_split_further(flash: Path) -> None:
    pytest.importorskip("mlx_lm")
    model = loaded(flash, backend="mlx")
    steps = decoding(model)
    token = Timeline(model).time(lambda: next(steps))
    model.flash.close()
    assert set(token.split) == {"reads", "read calls", "all else"}
    assert [layer for layer, _ in token.layers] == list(range(LAYERS)) and token.use[:, 1].all()


# What is run


def test_tokens_are_fixed_and_kinds_alternate(flash: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    order: list[int] = []
    plan = plan_run(flash, mlx_flash.FlashConfig(select="predictor", backend="numpy", slots=0.3, max_context=64))
    forced, timed, untimed = plan.models.forced, Timeline.time, bench_run._seconds

    def spy(model: Any, prompt: list[int], following: list[int], chunk: int) -> Any:
        seen.append([*prompt, -1, *following])
        return forced(model, prompt, following, chunk)

    monkeypatch.setattr(plan.models, "forced", spy)
    monkeypatch.setattr(Timeline, "time", lambda self, step: order.append(1) or timed(self, step))
    monkeypatch.setattr(bench_run, "_seconds", lambda steps: order.append(0) or untimed(steps))
    load, slabs = bench_run.load, []

    def alone(*arguments: Any) -> Any:
        assert all(slab() is None for slab in slabs), "two models in memory"
        loaded = load(*arguments)
        slabs.append(weakref.ref(loaded[0].layers[0].ffn.slab))
        return loaded

    monkeypatch.setattr(bench_run, "load", alone)
    options = BenchOptions(tokens=3, warm=2, prompt=5, rounds=2)
    gc.disable()
    found = bench_run.run_bench(plan, options, replay_for(plan))
    gc.enable()
    assert order == 2 * [0, 0, *(0, 1, 1, 0, 0, 1)]
    assert seen[0] == seen[2] != seen[1], "the warm start has the first round's"
    assert seen[:2] == [[*prompt, -1, *reply] for prompt, reply in replies(plan, options)]
    assert all(len(each) == 5 + 1 + 2 + 6 and max(each) < plan.spec.vocab for each in seen)
    assert (len(found.warming_s), len(found.untimed_s), len(found.timed), found.decoded) == (4, 6, 6, 12)
    asked = sum(len(layer[0]) for layer in replay_for(plan).trace.ids)
    assert found.warm is not None and found.stats.hits + found.stats.misses == 12 * asked
    assert found.stats.bytes_read > 0 and found.memory.peak > plan.memory.total_bytes


def test_what_a_trace_names_is_asked_for_and_fires(flash: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def use(fires: bool) -> np.ndarray:
        model = loaded(flash)
        steps = model.flash.forced(model, [1, 2, 3], [4])
        next(steps)
        replay = replay_for(model.flash.plan)
        with monkeypatch.context() as patch:
            if not fires:
                patch.setattr(bench_run, "let_named_neurons_fire", lambda model: None)
            replay_trace(model, replay)
        token = Timeline(model).time(lambda: next(steps))
        model.flash.close()
        assert token.use[:, 0].tolist() == [len(layer[0]) for layer in replay.trace.ids]
        return token.use

    assert (use(True)[:, 2] == use(True)[:, 0]).all()
    assert use(False)[:, 2].sum() < 0.8 * use(False)[:, 0].sum(), "ReLU drops half of random gates"


def test_the_picture_shows_tokens_that_followed_each_other() -> None:
    tokens = [TimedToken(seconds, (), (), np.zeros((0, 3))) for seconds in (1, 9, 2, 2.5, 2, 8, 2, 2)]
    assert consecutive(tokens, 6) == tokens[2:4]
    assert consecutive(tokens[:1], 1) == tokens[:1] and consecutive(tokens[:3], 3) == tokens[:2]


# The command


def test_a_checkpoint_is_measured(
    capsys: pytest.CaptureFixture[str], flash: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["mlx_flash.runtime.loading"], "load_machine", lambda path: machine())
    demands: list[Any] = []
    predict = bench_run.predict
    monkeypatch.setattr(bench_run, "predict", lambda *known: demands.append(known[1]) or predict(*known))
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
    named = [len(ids) for ids, *_ in replay_for(plan_run(flash, mlx_flash.FlashConfig())).trace.ids]
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

    monkeypatch.setattr(bench_run, "run_bench", stop)
    status, _ = run(capsys, "--card", card, "--work", tmp_path / "work", "--tokens", 1, "--backend", "numpy")
    assert status == (130 if isinstance(error, KeyboardInterrupt) else 1)
    assert len(there) == 1 and list((tmp_path / "work").iterdir()) == []


def test_a_full_disk_is_seen_before_anything_is_written(
    capsys: pytest.CaptureFixture[str], card: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "_free_bytes", lambda folder: 1000)
    monkeypatch.setattr(card_module, "make_card", lambda *_: pytest.fail("writes"))
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
    monkeypatch.setattr(bench_run, "run_bench", lambda *_, **__: pytest.fail("measures"))
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
    monkeypatch.setattr(probe, "probe", lambda folder, **_: found)
    monkeypatch.setattr(read_probe, "fio_rates", lambda file, **_: [(found.reads[0], found.reads[1])])
    status, result = run(capsys, "--probe", "--csv", tmp_path / "probe.csv")
    assert status == 0 and Path(result["path"]).is_file() and result["machine"]["device"] == "disk"
    assert result["beside_fio"][0]["fio"]["bytes_per_s"] == found.reads[1].bytes_per_s
    rows = list(csv.DictReader((tmp_path / "probe.csv").open()))
    assert {"reads", "reads beside fio", "memory", "kernel"} <= {row["what"] for row in rows}
    assert cli.main(["bench", "--probe", "--dir", str(tmp_path)]) == 0
    assert "kept in" in capsys.readouterr().out
    assert run(capsys, "--probe", "--dir", tmp_path / "nowhere")[0] == 2
