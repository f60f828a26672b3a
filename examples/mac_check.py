"""What the mlx backend takes for granted, checked on your machine: send back what this prints. Not run on a Mac yet.

    python examples/mac_check.py [--json] [--model FOLDER_OR_REPO]

It takes under a minute, writes to a temporary folder only, and ends with status 1 if a check failed. Without Metal the
checks that are about it are skipped. --model: a further model for the bench, at half of its feed-forward weights.
"""

from __future__ import annotations

import argparse
import json
import mmap
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

import mlx_flash
from mlx_flash.models.text.sampling import Sampling
from mlx_flash.runtime.model_path import models_folder
from mlx_flash.tools.inspection import inspect_model

try:
    import mlx.core as mx

    from mlx_flash.engine.backends.mlx.backend import MlxBackend
    from mlx_flash.engine.storage.bundle import Layout, Part
except ImportError:
    mx = None

PROMPT = "One day a little girl"
# The default model's greedy reply, its weights widened to float32: the two best logits lie at least 0.1 apart.
GOLDEN = "309 1436 315 260 3949 326 13 271 1065 389 363 261 1113 13 345 664 260 437 732 1436 315 260 3949 326"
PAGE = 16384
ROUNDS = 200


class Skipped(Exception):
    """A check that this machine cannot make, with the reason."""


@dataclass
class Check:
    name: str
    status: str = "ok"
    detail: str = ""
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)


def need_mlx() -> None:
    if mx is None:
        raise Skipped("mlx is not installed")


def need_metal() -> None:
    need_mlx()
    if not mx.metal.is_available():
        raise Skipped("needs Metal")


def visible_writes() -> tuple[str, dict[str, Any]]:
    """Random bytes into random rows of a slab, then the device's own copy of those rows."""
    need_mlx()
    rng = np.random.default_rng(0)
    layout = Layout((Part("up", "bfloat16", 512), Part("down", "bfloat16", 512)), 2048)
    slab = MlxBackend().slab(layout, 2048, ["up", "down"])
    pending = mx.zeros((128, 128))
    for number in range(ROUNDS):
        rows = rng.permutation(2048)[: rng.integers(1, 400)]
        part = ("up", "down")[number % 2]
        target = slab.targets[number % 2]
        written = rng.integers(0, 256, (len(rows), target.rows.shape[1]), np.uint8)
        target.rows[rows] = written
        copied = mx.take(slab.parts[part].view(mx.uint16), mx.array(rows.astype(np.uint32)), axis=0)
        pending = mx.tanh(pending @ pending + 1)  # the device is busy while the next rows are written
        mx.async_eval(pending)
        if not np.array_equal(np.array(copied).view(np.uint8), written):
            raise AssertionError(f"round {number}: the device saw other bytes than those written")
    return f"{ROUNDS} rounds of up to 400 rows", {"rounds": ROUNDS}


def median_us(step: Callable[[], Any], rounds: int = ROUNDS) -> float:
    step()
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        step()
        times.append(time.perf_counter() - begin)
    return round(1e6 * statistics.median(times), 1)


def latencies() -> tuple[str, dict[str, Any]]:
    need_mlx()
    x = mx.zeros((1, 64))
    done = x + 1
    mx.eval(x, done)
    figures = {
        "eval_us": median_us(lambda: mx.eval(x + 1)),
        "eval_and_read_us": median_us(lambda: np.array(x + 1)),
        "read_of_evaluated_us": median_us(lambda: np.array(done)),
        "async_eval_us": median_us(lambda: mx.async_eval(x + 1)),
    }
    return ", ".join(f"{name[:-3].replace('_', ' ')} {value} us" for name, value in figures.items()), figures


def adopted_memory() -> tuple[str, dict[str, Any]]:
    """Whether MLX computes from page-aligned memory of ours, as it is and as it becomes."""
    need_mlx()
    if not hasattr(mx, "asarray"):
        raise Skipped("this mlx has no asarray")
    memory = mmap.mmap(-1, 64 * PAGE)
    ours = np.frombuffer(memory, np.uint16)
    before = mx.get_active_memory()
    try:
        theirs = mx.asarray(ours, copy=False)
        mx.eval(theirs)
    except (ValueError, TypeError) as error:
        raise Skipped(f"mx.asarray(copy=False): {error}") from error
    grown = mx.get_active_memory() - before
    for number in (1, 2, 3):
        ours[:] = number
        if not mx.array_equal(theirs + 0, mx.full(theirs.shape, number, mx.uint16)):
            raise AssertionError("a later write was not seen")
    return f"adopted, active memory grew by {grown} bytes", {"grown_bytes": grown}


def backends() -> list[str]:
    return ["numpy"] if mx is None else ["numpy", "mlx"]


def budgets(path: Path | str, backend: str, select: str = "auto") -> list[int]:
    """Everything resident, and a third of the feed-forward weights beyond the smallest legal budget."""
    report = inspect_model(path, mlx_flash.FlashConfig(backend=backend, select=select))
    low, high = report["smallest_budget_bytes"], report["everything_resident_bytes"]
    return [high, min(high, low + report["ffn_bytes"] // 3)]


def golden_tokens(path: Path) -> tuple[str, dict[str, Any]]:
    wanted, made = [int(token) for token in GOLDEN.split()], {}
    for backend in backends():
        for memory in budgets(path, backend):
            model, tokenizer = mlx_flash.load(path, backend=backend, memory=memory)
            ids = list(tokenizer.encode(PROMPT))
            made[f"{backend} {memory}"] = list(model.flash.steps(model, ids, len(wanted), Sampling()))
            model.flash.close()
    wrong = {name: tokens for name, tokens in made.items() if tokens != wanted}
    if wrong:
        raise AssertionError(f"other tokens: {wrong}")
    return f"{len(wanted)} tokens, {' and '.join(backends())} at two budgets each", {}


def same_bits(path: Path) -> tuple[str, dict[str, Any]]:
    """Logits in the dtype of the weights do not depend on the budget."""
    need_mlx()
    selectors = ("all", "gate", "prompt:0.5")
    for select in selectors:
        found = set()
        for memory in budgets(path, "mlx", select):
            model, tokenizer = mlx_flash.load(path, backend="mlx", memory=memory, select=select)
            ids = list(tokenizer.encode(PROMPT))
            found.add(b"".join(row.tobytes() for row in model.flash.forced(model, ids, [309, 1436, 315, 260])))
            model.flash.close()
        if len(found) > 1:
            raise AssertionError(f"--select {select}: the budget changes the logits")
    return f"{', '.join(selectors)} at two budgets each", {}


def bench(path: Path | str, tokens: int = 48) -> tuple[str, dict[str, Any]]:
    need_mlx()
    lines, figures = [], {}
    for name, memory in zip(("everything resident", "a third"), budgets(path, "mlx"), strict=True):
        model, tokenizer = mlx_flash.load(path, backend="mlx", memory=memory)
        for _ in range(2):  # the first time, kernels are compiled
            last = list(mlx_flash.stream_generate(model, tokenizer, PROMPT, max_tokens=tokens))[-1]
        stats = model.flash.stats
        rate = stats.bytes_read / stats.wait_s / 1e9 if stats.wait_s else 0.0
        figures[name] = {
            "budget_bytes": memory,
            "selector": model.flash.plan.selector,
            "tokens_per_s": round(last.generation_tps, 2),
            "bytes_per_token": round(last.bytes_read_per_token),
            "waited_share": round(stats.wait_s * last.generation_tps / max(last.generation_tokens - 1, 1), 3),
            "gb_per_s_waited_for": round(rate, 3),
            "active_bytes": mx.get_active_memory(),
            "peak_bytes": mx.get_peak_memory(),
        }
        lines.append(
            f"{name} ({memory / 1e6:.0f} MB, {figures[name]['selector']}): {last.generation_tps:.1f} tokens/s, "
            f"{last.bytes_read_per_token / 1e3:.0f} kB read per token, {rate:.2f} GB/s while waiting"
        )
        model.flash.close()
    return "; ".join(lines), figures


def metal_facts() -> tuple[str, dict[str, Any]]:
    """The wired limit can be set to what is in use and back, and the device says what it recommends."""
    need_metal()
    info = mx.device_info()
    before = mx.set_wired_limit(mx.get_active_memory())
    mx.set_wired_limit(before)
    most = int(info["max_recommended_working_set_size"])
    return f"recommended working set {most / 1e9:.1f} GB, wired limit was {before}", {"wired_limit_bytes": before}


def machine() -> dict[str, Any]:
    def installed(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "missing"

    names = ("mlx-flash-runtime", "mlx", "mlx-lm", "numpy")
    found: dict[str, Any] = {"platform": platform.platform(), "python": platform.python_version()}
    found |= {name: installed(name) for name in names}
    if mx is not None:
        found |= {"device": str(mx.default_device()), "metal": mx.metal.is_available(), **mx.device_info()}
    return found


def run(checks: list[tuple[str, Callable[[], tuple[str, dict[str, Any]]]]]) -> Iterator[Check]:
    for name, check in checks:
        done, begin = Check(name), time.perf_counter()
        try:
            done.detail, done.figures = check()
        except Skipped as reason:
            done.status, done.detail = "skipped", str(reason)
        except Exception as error:  # whatever it is, the other checks are still worth having
            done.status, done.detail = "FAILED", f"{type(error).__name__}: {error}"
        done.seconds = round(time.perf_counter() - begin, 1)
        yield done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--model", help="a further model to bench: flash checkpoint, Hugging Face folder or repository")
    args = parser.parse_args()
    about, done = machine(), []
    if not args.json:
        print("\n".join(f"{name}: {value}" for name, value in about.items()))
    default = models_folder() / "flash-stories-6m"
    with tempfile.TemporaryDirectory() as work:
        stored, widened = (Path(work) / name for name in ("stored", "float32"))
        mlx_flash.convert(default, stored)
        mlx_flash.convert(default, widened, dtype="float32")
        checks = [
            ("writes of the CPU are seen", visible_writes),
            ("latencies", latencies),
            ("page-aligned memory is adopted", adopted_memory),
            ("wired limit", metal_facts),
            ("golden tokens", lambda: golden_tokens(widened)),
            ("the same bits at every budget", lambda: same_bits(stored)),
            ("bench of the default model", lambda: bench(stored)),
        ]
        if args.model:
            checks.append((f"bench of {args.model}", lambda: bench(args.model)))
        for check in run(checks):
            done.append(check)
            if not args.json:
                print(f"{check.status:>8}  {check.name}: {check.detail}", flush=True)
    counts = {status: sum(check.status == status for check in done) for status in ("ok", "skipped", "FAILED")}
    if args.json:
        print(json.dumps({"machine": about, "checks": [asdict(check) for check in done], **counts}, default=str))
    else:
        print(f"mac_check: {counts['ok']} passed, {counts['skipped']} skipped, {counts['FAILED']} failed")
    return 1 if counts["FAILED"] else 0


if __name__ == "__main__":
    sys.exit(main())
