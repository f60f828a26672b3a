"""One contestant of `measure_decode_3b.py`: a prompt and fixed tokens on a flash checkpoint, one JSON object on stdout.

    python scripts/decode_once.py --model FLASH --select predictor --memory 2.84GB [--trace FILE] [--tokens 16] ...

With a trace its ids replace what the predictors name, and count as fired: on random weights half of the gates would be
negative, and the work half of what it is in a model that fires so.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import mlx_flash
from mlx_flash.tools.bench.trace_replay import Replay, replay_trace
from mlx_flash.tools.trace import Trace, read_route_csv


def follow_routes(model: Any, path: str) -> None:
    """Let a route trace's decoded tokens choose the experts of a mixture on the numpy backend: its layers evenly taken,
    its experts folded onto the model's."""
    trace = read_route_csv(path)
    layers = [layer.ffn for layer in model.layers if hasattr(layer.ffn, "route")]
    for number, ffn in enumerate(layers):
        steps = iter(trace.ids[number * len(trace.ids) // len(layers)][trace.prompt :])

        def route(x: Any, ffn: Any = ffn, own: Any = ffn.route, steps: Any = steps) -> tuple[Any, Any]:
            if len(x) > 1:
                return own(x)
            chosen = np.unique(next(steps) % ffn.selector.residency.count)[None]
            return chosen, np.full(chosen.shape, 1 / chosen.size, np.float32)

        ffn.route = route


def seconds_each(steps: Iterator[Any], count: int) -> list[float]:
    found = []
    for _ in range(count):
        begin = time.perf_counter()
        next(steps)
        found.append(time.perf_counter() - begin)
    return found


def anonymous_bytes() -> int:
    """Memory of this process that is no file's (Linux); 0 where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon:", "RssShmem:")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--select", required=True)
    parser.add_argument("--memory", required=True)
    parser.add_argument("--look-ahead", default="auto")
    parser.add_argument("--trace")
    parser.add_argument("--routes", help="a route trace whose choices replace those of a mixture's routers")
    parser.add_argument("--recall", type=float, default=0.95)
    parser.add_argument("--precision", type=float, default=0.95)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--prompt", type=int, default=4)
    parser.add_argument("--length", type=int, default=0, help="pretend that so many tokens went before")
    parser.add_argument("--again", action="store_true", help="pass the prompt twice, and time the second")
    parser.add_argument("--warm", type=int, default=28, help="tokens before timing: look-ahead times itself in 24")
    parser.add_argument("--tokens", type=int, default=16)
    args = parser.parse_args()
    config = mlx_flash.FlashConfig(args.memory, args.context, "numpy", args.select, look_ahead=args.look_ahead)
    begin = time.perf_counter()
    model, _ = mlx_flash.load(args.model, config)
    load_s = time.perf_counter() - begin
    if args.trace:
        replay_trace(model, Replay(Trace.load(args.trace), args.recall, args.precision))
    if args.routes:
        follow_routes(model, args.routes)
    run = model.flash
    ids = [5 + k % 1000 for k in range(args.prompt)]
    if args.again:
        next(run.forced(model, ids, []))
        run.stats.reset()
    steps = run.forced(model, ids, [100 + k for k in range(args.warm + args.tokens)])
    prefill_s = seconds_each(steps, 1)[0]
    prefill_read = run.stats.bytes_read
    seconds_each(steps, args.warm)
    if args.length:  # what the KV cache holds does not matter for the time
        model._cache.length = max(1, args.length - args.tokens)
    run.stats.reset()
    cpu = time.process_time()
    found = seconds_each(steps, args.tokens) if args.tokens else [0.0]
    count, stats = len(found), run.stats
    print(
        json.dumps(
            {
                "s_per_token": statistics.median(found),
                "cpu_s_per_token": (time.process_time() - cpu) / count,
                "bytes_per_token": stats.bytes_read / count,
                "reads_per_token": stats.reads / count,
                "waited_s_per_token": stats.wait_s / count,
                "prefill_s": prefill_s,
                "prefill_bytes": prefill_read,
                "load_s": load_s,
                "anonymous_bytes": anonymous_bytes(),
                "budget_bytes": run.plan.memory.total_bytes,
                "predicted_s_per_token": run.plan.prediction.total_s if run.plan.prediction else 0.0,
            }
        )
    )
    run.close()


if __name__ == "__main__":
    main()
