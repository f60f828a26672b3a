"""From a path to a running model: which backend and selector, how the budget is split, and the parts put together.

`plan_run` decides everything before anything is loaded (that is what `inspect` prints); `load` carries it out.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

from .backends import choose
from .backends.base import BLOCK, Backend, FFNSpec, Widths
from .config import FlashConfig
from .errors import FormatError, UsageError
from .models.families import ModelSpec
from .models.read_config import read_spec
from .residency.budget import Costs, MemoryPlan, auto_budget, split_budget
from .residency.stream import BlockStream
from .resolve import resolve_model
from .sampling import Sampling
from .selection.selectors import AllSelector, GateSelector, Shared
from .stats import Stats
from .storage.checkpoint import Checkpoint
from .storage.layout import ITEM_BYTES
from .storage.reader import open_reader

DEFAULT_CONTEXT = 2048
EXACT = {"all": True, "gate": True}


@dataclass(frozen=True)
class RunPlan:
    """Everything decided about a run: nothing has been loaded yet. `context` in tokens."""

    checkpoint: Checkpoint
    spec: ModelSpec
    config: FlashConfig
    backend_name: str
    backend: Backend
    models: Any
    selector: str
    costs: Costs
    budget_bytes: int
    context: int
    dtype: str

    @cached_property
    def memory(self) -> MemoryPlan:
        """How the budget is split; raises BudgetError when it is too small."""
        return split_budget(self.costs, self.budget_bytes)

    @property
    def all_resident(self) -> bool:
        """Whether nothing is ever read once everything has been."""
        return self.memory.capacities == self.costs.counts

    @property
    def worst_bytes_per_token(self) -> int:
        """Most bytes that one token reads. `gate`: whole layers, as reads of near neighbours are merged."""
        layouts = self.checkpoint.layouts
        per_bundle = layouts[0].stride
        if self.selector == "gate":
            pairs = zip(layouts, self.memory.capacities, strict=True)
            return sum(layout.count * per_bundle for layout, capacity in pairs if capacity < layout.count)
        return sum(b.count - c for b, c in zip(layouts, self.memory.capacities, strict=True)) * per_bundle


class Run:
    """A loaded model's plan, counters and reader; `model.flash` is one. `close` gives its files and threads back."""

    def __init__(self, plan: RunPlan):
        self.plan, self.stats = plan, Stats()
        layout = plan.checkpoint.layouts[0]
        names = [part.name for part in layout.parts]
        staging = [plan.backend.slab(layout, BLOCK, names) for _ in range(plan.memory.staging_blocks)]
        reader = open_reader(plan.checkpoint.layer_files)
        self.shared = Shared(plan.backend, reader, BlockStream(staging), self.stats)

    def make_ffn(self, layer: int, up_bias: Any = None, down_bias: Any = None) -> AllSelector | GateSelector:
        """The FFN of one layer: a callable from the normed hidden state to the FFN's output."""
        plan = self.plan
        layout, capacities = plan.checkpoint.layouts[layer], plan.memory.capacities
        spec = FFNSpec(layout, plan.spec.activation, plan.spec.gated, up_bias, down_bias)
        if plan.selector == "gate":
            return GateSelector(layer, spec, self.shared, capacities[layer])
        counts = [layout.count for layout in plan.checkpoint.layouts]
        return AllSelector(layer, spec, self.shared, capacities, counts)

    def steps(self, model: Any, prompt_ids: Sequence[int], max_tokens: int, sampling: Sampling) -> Iterator[int]:
        """Yield sampled ids after the prompt, `max_tokens` at most."""
        yield from self.plan.models.steps(model, prompt_ids, max_tokens, sampling, self.plan.config.prefill_chunk)

    def close(self) -> None:
        self.shared.stream.stop()
        self.shared.reader.close()


def run_costs(
    checkpoint: Checkpoint, spec: ModelSpec, backend: Backend, selector: str, context: int, chunk: int
) -> Costs:
    """What this model needs with this selector, part by part, in bytes."""
    layouts = checkpoint.layouts
    largest = max(layouts, key=lambda layout: layout.count)
    names = [part.name for part in largest.parts]
    resident = names[:1] if selector == "gate" else []
    slot_parts = names[len(resident) :]
    item = ITEM_BYTES[layouts[0].parts[0].dtype]
    fixed = {
        "dense part": sum(info.nbytes for _, info in checkpoint.resident_tensors().values()),
        "KV cache": spec.kv_items_per_token * item * context,
        "prefill scratch": backend.prefill_scratch_bytes(largest, spec_widths(spec), chunk, context),
    }
    if selector == "gate":
        fixed[f"{names[0]} rows"] = sum(backend.slab_bytes(layout, layout.count, resident) for layout in layouts)
    slot = backend.slab_bytes(layouts[0], 8 * BLOCK, slot_parts) // (8 * BLOCK)
    fixed["page rounding"] = len(layouts) * (backend.slab_bytes(layouts[0], 1, slot_parts) - slot)
    return Costs(
        checkpoint.path.name,
        fixed,
        backend.slab_bytes(layouts[0], BLOCK, names),
        slot,
        tuple(layout.count for layout in layouts),
        unit=1 if selector == "gate" else BLOCK,
    )


def spec_widths(spec: ModelSpec) -> Widths:
    return Widths(
        spec.dim,
        max(layer.intermediate for layer in spec.layers),
        max((layer.heads + 2 * layer.kv_heads) * spec.head_dim for layer in spec.layers),
        spec.head_dim,
        max(layer.heads for layer in spec.layers),
    )


def choose_selector(config: FlashConfig, spec: ModelSpec, costs: dict[str, Costs]) -> str:
    """`auto` is exact: `gate` for ReLU models whose gate rows fit the budget, else `all`."""
    if config.select == "gate" and spec.activation != "relu":
        raise UsageError(f"--select gate needs a ReLU model; this one has {spec.activation!r}: use all")
    if config.select != "auto":
        return config.select
    if spec.activation != "relu":
        return "all"
    return "gate" if budget_for(config, costs["gate"]) >= costs["gate"].smallest else "all"


def budget_for(config: FlashConfig, costs: Costs) -> int:
    return auto_budget(costs) if config.memory == "auto" else int(config.memory)


def announce(message: str) -> None:
    """What takes a while is said before it begins, on stderr."""
    print(message, file=sys.stderr, flush=True)


def check_checkpoint(checkpoint: Checkpoint, spec: ModelSpec) -> None:
    """Raise FormatError unless config.json describes the bundles and the resident tensors that are there."""
    flash = checkpoint.config["flash"]
    layouts = [spec.layout(i, flash["dtype"]) for i in range(len(spec.layers))]
    if layouts != checkpoint.layouts or flash["activation"] != spec.activation:
        raise FormatError(
            f"{checkpoint.path}: config.json does not describe the bundles ({len(layouts)} layers by the config, "
            f"{len(checkpoint.layouts)} on flash); convert the model again"
        )
    found = {name: info.shape for name, (_, info) in checkpoint.resident_tensors().items()}
    wanted = spec.resident_shapes()
    wrong = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    if wrong:
        raise FormatError(
            f"{checkpoint.path}: config.json and the resident tensors disagree on {len(wrong)}, such as {wrong[0]!r}: "
            f"{found.get(wrong[0])} on disk, {wanted.get(wrong[0])} by the config; convert the model again"
        )


def decide(model: str | Path | None, config: FlashConfig) -> RunPlan:
    """How a flash checkpoint would run; whether the budget is enough is only seen at `.memory`. Opens and checks the
    files' headers, loads nothing. Raises FormatError, ConfigError, BackendError, UsageError."""
    checkpoint = Checkpoint.open(resolve_model(None if model is None else str(model), announce=announce))
    spec = read_spec(checkpoint.config, checkpoint.resident_tensors())
    check_checkpoint(checkpoint, spec)
    context = config.max_context or min(DEFAULT_CONTEXT, spec.max_context)
    if context > spec.max_context:
        raise UsageError(f"--max-context {context} is beyond the model's {spec.max_context} tokens")
    backend_name, entry = choose(config.backend, spec.table.backends)
    backend = entry.make()
    costs = {s: run_costs(checkpoint, spec, backend, s, context, config.prefill_chunk) for s in ("all", "gate")}
    selector = choose_selector(config, spec, costs)
    return RunPlan(
        checkpoint,
        spec,
        config,
        backend_name,
        backend,
        import_module(entry.models),
        selector,
        costs[selector],
        budget_for(config, costs[selector]),
        context,
        checkpoint.config["flash"]["dtype"],
    )


def plan_run(model: str | Path | None, config: FlashConfig) -> RunPlan:
    """`decide`, and raise BudgetError when the budget is too small."""
    plan = decide(model, config)
    _ = plan.memory
    return plan


def load(path: str | Path | None = None, config: FlashConfig | None = None, **fields: Any) -> tuple[Any, Any]:
    """Load a model to run within a memory budget: `model, tokenizer = mlx_flash.load("folder", memory="2GB")`.

    path: flash checkpoint, Hugging Face folder or repo id (converted once into the user's cache); None: the default
    model. fields: those of FlashConfig, over `config`. On the mlx backend `model` is an mlx-lm model, which
    `mlx_lm.generate` takes unchanged; on numpy it is a `Decoder`. `model.flash` has the plan and the counters.
    The budget holds for `generate` and `stream_generate` of this package; mlx-lm's own functions pass prompts in
    chunks of 2048 tokens and let the KV cache grow beyond `max_context`. Raises the errors of `plan_run`, ReadError.
    """
    plan = plan_run(path, replace(config or FlashConfig(), **fields))
    run = Run(plan)
    try:
        model = plan.models.build(plan.checkpoint, plan.spec, plan.backend, run.make_ffn, plan.dtype, plan.context)
        tokenizer = plan.models.load_tokenizer(plan.checkpoint.path, plan.spec.eos_ids)
    except BaseException:
        run.close()
        raise
    model.flash = run
    return model, tokenizer
