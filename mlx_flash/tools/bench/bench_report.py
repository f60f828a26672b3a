"""The report of `mlx_flash bench`: a table, rows for a CSV, a picture. Measures nothing itself."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from mlx_flash.config import format_bytes
from mlx_flash.runtime.machine import device_of
from mlx_flash.runtime.notices import announce
from mlx_flash.runtime.planning.cost_model import Prediction
from mlx_flash.runtime.planning.neuron_plan import NeuronPlan
from mlx_flash.tools.inspection import loss_text

from .measuring import Measured, Start
from .options import BenchOptions
from .timeline import TimedToken, middle

COLUMNS = ("machine", "model", "selector", "budget", "what", "quantity", "value", "unit")
LABELS = {
    "reads": "waiting for reads",
    "read calls": "beginning reads",
    "dense": "dense: attention, output",
    "sparse": "sparse: FFN",
    "selection": "selection: which neurons",
    "python": "Python, the rest",
    "all else": "all else",
}
COLOURS = {
    "reads": "#cc3311",
    "read calls": "#ee7733",
    "dense": "#0077bb",
    "sparse": "#33bbee",
    "selection": "#009988",
    "python": "#999999",
    "all else": "#999999",
}
UNITS = (("tokens_per_s", "tokens/s"), ("bytes_per_s", "B/s"), ("bytes_per_token", "B"), ("_bytes", "B"), ("_s", "s"))
MECHANISM = "random weights: mechanism, not quality"
REPLAYED = "a trace in place of the predictors: mechanism, not quality"
UNSTEADY = 1.5  # median over shortest
PICTURED = 2  # consecutive tokens


def describe(found: Measured, model: str, random: bool, options: BenchOptions, place: Path) -> dict[str, Any]:
    """The figures as plain values: seconds, bytes, shares; None for unknown ones. place: a folder on the disk that
    was read, which still exists after the run."""
    plan, tokens, stats = found.plan, found.decoded, found.stats
    typical = median(found.untimed_s)
    split = middle(found.timed, found.phases)
    return {
        "machine": plan.machine.device if plan.machine else device_of(plan.checkpoint.path),
        "model": model,
        "random_weights": random,
        "trace": options.trace,
        "selector": plan.selector,
        "exact": plan.exact,
        "measured_loss": plan.measured_loss,
        "backend": plan.backend_name,
        "max_context": plan.context,
        "budget_bytes": plan.memory.budget_bytes,
        "page_cache_dropped": found.dropped,
        "prompt_tokens": options.prompt,
        "cold": _start(found.cold, options.prompt),
        "warm": _start(found.warm, options.prompt) if found.warm else None,
        "decode": {
            "tokens": len(found.untimed_s),
            "tokens_per_s": 1 / typical,
            "median_s": typical,
            "min_s": min(found.untimed_s),
            "max_s": max(found.untimed_s),
            "cpu_s": found.cpu_s / len(found.untimed_s),
            "warming_tokens": len(found.warming_s),
            "warming_median_s": median(found.warming_s) if found.warming_s else None,
            "bytes_per_token": stats.bytes_read / tokens,
            "reads_per_token": stats.reads / tokens,
            "read_bytes_per_s": stats.bytes_read / (sum(found.untimed_s) + sum(t.seconds for t in found.timed)),
            "hit_rate": stats.hit_rate,
            "guessed_per_token": stats.guessed / tokens,
            "guessed_right_per_token": stats.guessed_right / tokens,
        },
        "split": {f"{name}_s": seconds for name, seconds in split.items()},
        "clocks": {
            "median_s": median(token.seconds for token in found.timed),
            "over_speed": median(token.seconds for token in found.timed) / typical,
        },
        "predicted": _predicted(found.prediction, typical),
        "unpredicted": None if found.prediction else _why_not(found.plan, place),
        "memory": {
            "budget_bytes": plan.memory.budget_bytes,
            "planned_bytes": plan.memory.total_bytes,
            "peak_bytes": found.memory.peak,
            "anonymous_bytes": found.memory.anonymous,
        },
    }


def _start(start: Start, tokens: int) -> dict[str, float]:
    first = start.load_s + start.prompt_s
    return {"load_s": start.load_s, "prompt_tokens_per_s": tokens / start.prompt_s, "first_token_s": first}


def _predicted(prediction: Prediction | None, typical: float) -> dict[str, Any] | None:
    if prediction is None:
        return None
    return {
        "tokens_per_s": prediction.tokens_per_s,
        "measured_over_predicted": 1 / typical / prediction.tokens_per_s,
        "reads_s": prediction.waited_s,
        "dense_s": prediction.dense_s,
        "sparse_s": prediction.sparse_s,
        "selection_s": prediction.selection_s,
        "other_s": prediction.other_s,
        "bytes_per_token": prediction.bytes_per_token,
        "assumption": prediction.assumption,
    }


def _why_not(plan: NeuronPlan, place: Path) -> str:
    if plan.machine is not None:
        return "a probe measures the kernels of the numpy backend only"
    return plan.machine_problem or f"this disk was not probed: mlx_flash bench --probe --dir {place}"


def report_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows for a CSV, one per figure; a cold start with a page cache that could not be emptied is named so."""
    shared = {name: report[name] for name in ("machine", "model", "selector")} | {"budget": report["budget_bytes"]}
    rows = []
    for what in ("cold", "warm", "decode", "split", "clocks", "predicted", "memory"):
        name = "page cache not emptied" if what == "cold" and not report["page_cache_dropped"] else what
        for quantity, value in (report[what] or {}).items():
            if isinstance(value, (int, float)):
                unit = next((unit for ending, unit in UNITS if quantity.endswith(ending)), "")
                plain = quantity[:-2] if unit == "s" else quantity
                rows.append(shared | {"what": name, "quantity": plain, "value": value, "unit": unit})
    return rows


def write_rows(path: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """A CSV with the rows' own columns."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def label_of(report: Mapping[str, Any]) -> str:
    """The label that these figures need; "" for figures of a real model that ran as it is."""
    return MECHANISM if report["random_weights"] else REPLAYED if report["trace"] else ""


def print_report(report: Mapping[str, Any]) -> None:
    """Print the table on stdout."""
    if label := label_of(report):
        print(label)
    exact = "exact" if report["exact"] else loss_text(report["measured_loss"])
    trace = f", trace {report['trace']}" if report["trace"] else ""
    print(f"{report['model']}: select {report['selector']} ({exact}), backend {report['backend']}, context "
          f"{report['max_context']} tokens{trace}\n{report['machine']}")  # fmt: skip
    _print_starts(report)
    _print_decoding(report["decode"], report["trace"])
    _print_split(report)
    _print_prediction(report)
    memory = report["memory"]
    anonymous = memory["anonymous_bytes"]
    print(f"\nmemory: budget {format_bytes(memory['budget_bytes'])}, planned {format_bytes(memory['planned_bytes'])}, "
          f"peak of the process {format_bytes(memory['peak_bytes'])}"
          + (f", {format_bytes(anonymous)} of it no file's" if anonymous else ""))  # fmt: skip


def _print_starts(report: Mapping[str, Any]) -> None:
    print(f"\n{'':<8} {'load s':>8} {'prompt tokens/s':>16} {'first token s':>14}")
    mark = "" if report["page_cache_dropped"] else " *"
    for name in ("cold", "warm"):
        if (start := report[name]) is not None:
            print(f"{name:<8} {start['load_s']:>8.3f} {start['prompt_tokens_per_s']:>16.1f} "
                  f"{start['first_token_s']:>14.3f}{mark if name == 'cold' else ''}")  # fmt: skip
    print(f"(a prompt of {report['prompt_tokens']} tokens)")
    if mark:
        print("* the page cache could not be emptied (that takes Linux and root): not comparable with cold starts")


def _print_decoding(decode: Mapping[str, Any], trace: str | None) -> None:
    print(f"\ndecoding {decode['tokens_per_s']:.3g} tokens/s: median {_ms(decode['median_s'])} ms a token "
          f"({_ms(decode['min_s'])} to {_ms(decode['max_s'])}), {decode['tokens']} tokens"
          + (f", after {decode['warming_tokens']} of {_ms(decode['warming_median_s'])} ms"
             if decode["warming_tokens"] else "")
          + f"; processor {_ms(decode['cpu_s'])} ms a token")  # fmt: skip
    print(f"a token reads {format_bytes(decode['bytes_per_token'])} in {decode['reads_per_token']:.0f} reads, "
          f"{format_bytes(decode['read_bytes_per_s'])}/s while decoding; hit rate {decode['hit_rate']:.1%}"
          + (f"; guessed {decode['guessed_per_token']:.0f} bundles ahead, {decode['guessed_right_per_token']:.0f} right"
             if decode["guessed_per_token"] else ""))  # fmt: skip
    if decode["median_s"] > UNSTEADY * decode["min_s"]:
        print("tokens took very different times: other programs may have been busy")
    if not trace:
        print(
            "the tokens are drawn at random, the same in every run: a text's neurons may be found in memory more often"
        )


def _print_split(report: Mapping[str, Any]) -> None:
    split, predicted, clocks = report["split"], report["predicted"], report["clocks"]
    total = sum(split.values())
    print(f"\n{'where a token goes':<28} {'ms':>8} {'%':>5}" + (f" {'predicted ms':>13}" if predicted else ""))
    for name, seconds in split.items():
        phase = name[: -len("_s")]
        of_phase = (predicted or {}).get(name)
        if predicted and phase == "python":
            of_phase = predicted["other_s"]
        beside = f" {_ms(of_phase):>13}{' with beginning reads' if phase == 'python' else ''}" if of_phase else ""
        print(f"{LABELS[phase]:<28} {_ms(seconds):>8} {seconds / total:>5.0%}{beside}")
    print(f"{'together':<28} {_ms(total):>8}  ({clocks['over_speed'] - 1:+.1%} with the clocks inside)")
    if "all else_s" in split:
        print("this backend computes lazily: what it computes and what Python takes cannot be told apart")


def _print_prediction(report: Mapping[str, Any]) -> None:
    predicted, decode = report["predicted"], report["decode"]
    if predicted is None:
        print(f"\nno prediction: {report['unpredicted']}")
        return
    print(f"\npredicted {predicted['tokens_per_s']:.3g} tokens/s, measured {decode['tokens_per_s']:.3g}: "
          f"{predicted['measured_over_predicted']:.2f} of it")  # fmt: skip
    if predicted["assumption"]:
        print(f"  {predicted['assumption']}")


def _ms(seconds: float) -> str:
    ms = seconds * 1e3
    return f"{ms:.{0 if ms >= 1000 else 1 if ms >= 100 else 2 if ms >= 1 else 3}f}"


def consecutive(tokens: Sequence[TimedToken], in_round: int) -> list[TimedToken]:
    """Two tokens of the first round that followed each other and took about as long as most; one token where no two
    did. Of every four tokens the middle two have clocks."""
    pairs = [list(tokens[at : at + PICTURED]) for at in range(0, in_round - 1, PICTURED)]
    typical = median(token.seconds for token in tokens)
    distances = [max(abs(token.seconds - typical) for token in pair) for pair in pairs]
    return pairs[distances.index(min(distances))] if pairs else list(tokens[:1])


def can_draw() -> bool:
    """Whether matplotlib is installed; says on stderr when it is not."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        announce("no picture: matplotlib is not installed (pip install 'mlx-flash-runtime[bench]')")
        return False
    return True


def save_picture(path: str, found: Measured, report: Mapping[str, Any], in_round: int) -> None:
    """Draw two tokens along time, a row per phase; below them, the time of a token, measured and predicted."""
    from matplotlib.figure import Figure

    phases = found.phases
    figure = Figure(figsize=(11, 2.6 + 0.35 * len(phases)), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=[len(phases), 1.6])
    at = 0.0
    for token in consecutive(found.timed, in_round):
        for row, phase in enumerate(phases):
            spans = [(1e3 * (at + s.begin), 1e3 * (s.end - s.begin)) for s in token.spans if s.phase == phase]
            above.broken_barh(spans, (row - 0.4, 0.8), color=COLOURS[phase], linewidth=0)
        for layer, begin in token.layers:
            above.axvline(1e3 * (at + begin), color="black", alpha=0.12, linewidth=0.5)
            if layer % max(1, len(token.layers) // 6) == 0:
                above.text(1e3 * (at + begin), -0.55, f"layer {layer}", fontsize=6, rotation=45, va="bottom")
        above.axvline(1e3 * at, color="black", linewidth=1)
        at += token.seconds
    above.set_yticks(range(len(phases)), [LABELS[phase] for phase in phases])
    above.set_ylim(len(phases) - 0.5, -1.3)
    above.set_xlim(0, 1e3 * at)
    above.set_xlabel("ms; thin lines: a layer's FFN begins")
    _draw_bars(below, report)
    title = f"{report['model']}, {report['selector']}, {format_bytes(report['budget_bytes'])}"
    title += f": {report['decode']['tokens_per_s']:.3g} tokens/s"
    if label := label_of(report):
        title += f" ({label})"
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=120)


def _draw_bars(axes: Any, report: Mapping[str, Any]) -> None:
    """Stacked bars of a token's phases: the measured ones above, the predicted ones below."""
    bars = {"measured": {name[: -len("_s")]: value for name, value in report["split"].items()}}
    if predicted := report["predicted"]:
        bars["predicted"] = {name: predicted[f"{name}_s"] for name in ("reads", "dense", "sparse", "selection")}
        bars["predicted"]["python"] = predicted["other_s"]
    for row, parts in enumerate(bars.values()):
        left = 0.0
        for phase, seconds in parts.items():
            axes.barh(row, 1e3 * seconds, left=left, color=COLOURS[phase], height=0.7)
            left += 1e3 * seconds
    axes.set_yticks(range(len(bars)), list(bars))
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.set_xlabel("ms a token")
    axes.spines[["top", "right"]].set_visible(False)
