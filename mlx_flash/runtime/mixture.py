"""A mixture of experts as downloaded: the plan of a run whose experts are read in place, and the run itself.

Knows budgets, slots and selectors; what the experts are, and what computes them, is the backend's model code
(`open_experts`), which nothing here names.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

from mlx_flash.config import FlashConfig, Selection, parse_selection
from mlx_flash.engine.backends.base import Backend
from mlx_flash.engine.residency.expert_staging import ExpertStaging
from mlx_flash.engine.residency.slots import Residency
from mlx_flash.engine.residency.staging import BlockStream
from mlx_flash.engine.selection.context import SharedContext
from mlx_flash.engine.selection.look_ahead import GUESS_SHARE, ExpertLookAhead
from mlx_flash.engine.selection.router import RouterSelector
from mlx_flash.engine.storage.bundle import Layout
from mlx_flash.engine.storage.json_file import read_json
from mlx_flash.engine.storage.readers import open_reader
from mlx_flash.errors import BackendError, FormatError, UsageError
from mlx_flash.models.specs.config_normal_form import normalise
from mlx_flash.models.specs.config_reader import read_limits
from mlx_flash.models.specs.end_tokens import end_ids
from mlx_flash.models.specs.folder import SHARDS, safe_file, weight_files
from mlx_flash.models.specs.key_checks import check_fixed
from mlx_flash.models.specs.mixtures import mixture_backends
from mlx_flash.models.specs.model_spec import ContextLimit
from mlx_flash.models.specs.source import Source, tokenizer_files
from mlx_flash.models.specs.tied_head import settle_head
from mlx_flash.runtime.planning.cost_model import Tuning, default_tuning, given_settings
from mlx_flash.runtime.planning.expert_budget import ExpertCosts
from mlx_flash.runtime.planning.selective_persistence import MemoryPlan
from mlx_flash.stats import Stats

from .backends import choose
from .run import DEFAULT_CONTEXT, BaseRun, Context, announce, budget_for, decide_context, report_keys

MAX_CONTEXT_KEYS = ("max_position_embeddings", "max_sequence_length", "n_positions", "seq_length", "model_max_length")


@dataclass(frozen=True)
class ExpertFolder:
    """A folder as downloaded. layouts: those of the experts, per layer that has any."""

    path: Path
    config: dict[str, Any]
    layouts: list[Layout]


@dataclass(frozen=True)
class ExpertSpec:
    """What is known of a model besides its experts. Lengths in items and tokens; limit: why a run's context may have to
    be shorter."""

    family: str
    activation: str
    vocab: int
    max_context: int
    eos_ids: tuple[int, ...]
    limit: ContextLimit | None = None


@dataclass(frozen=True)
class ExpertPlan:
    """Everything decided about a run: nothing has been loaded yet.

    opened: the backend's model of the folder; note: what is to be told about it
    """

    checkpoint: ExpertFolder
    spec: ExpertSpec
    config: FlashConfig
    backend_name: str
    backend: Backend
    models: Any
    opened: Any
    costs: ExpertCosts
    budget_bytes: int
    context_of: Context
    dtype: str
    tuning: Tuning
    note: str | None = None

    selection = Selection("router")
    selector = "router"
    exact = True
    measured_loss = calibration = machine = machine_problem = prediction = None

    @property
    def name(self) -> str:
        """What the user calls the model."""
        return self.costs.model

    @property
    def context(self) -> int:
        return self.context_of.tokens

    @property
    def context_text(self) -> str:
        """The context, and why it is not the model's."""
        return str(self.context_of)

    @property
    def look_ahead(self) -> str:
        """Whether the next layer's experts are guessed and their reads begin early."""
        enough = any(
            GUESS_SHARE <= capacity < count
            for capacity, count in zip(self.memory.capacities[1:], self.costs.counts[1:], strict=True)
        )
        return self.tuning.look_ahead if enough and self.opened.foresees else "off"

    @cached_property
    def memory(self) -> MemoryPlan:
        """How the budget is split; raises BudgetError when it is too small."""
        return self.costs.split(self.budget_bytes)

    @property
    def all_resident(self) -> bool:
        """Whether nothing is ever read once everything has been."""
        return self.memory.capacities == self.costs.counts

    @property
    def ffn_resident_bytes(self) -> int:
        """Memory that experts may take."""
        return self.memory.parts["slots"]

    @property
    def worst_bytes_per_token(self) -> int:
        """Most bytes that one token reads: none of its experts is there."""
        costs = self.costs
        each = zip(costs.top_k, costs.slots, self.memory.capacities, costs.counts, strict=True)
        return sum(top_k * slot for top_k, slot, capacity, count in each if capacity < count)


class ExpertRun(BaseRun):
    """A loaded mixture of experts."""

    plan: ExpertPlan

    def __init__(self, plan: ExpertPlan):
        costs, opened = plan.costs, plan.opened
        rows = costs.staging_rows(plan.memory.staging_blocks)
        self._staging = {kind: ExpertStaging(opened.slab(costs.kinds.index(kind), n), n) for kind, n in rows.items()}
        reader = open_reader(opened.extents, **plan.tuning.reader_options)
        super().__init__(plan, SharedContext(plan.backend, reader, BlockStream([]), Stats()))
        mode = plan.look_ahead
        self.look_ahead = None if mode == "off" else ExpertLookAhead(self.shared, costs.top_k, mode)

    def make_selector(self, layer: int) -> RouterSelector:
        """The selector of one layer's experts, and memory for its slots."""
        plan = self.plan
        capacity, count = plan.memory.capacities[layer], plan.costs.counts[layer]
        slab, staging = plan.opened.slab(layer, capacity), self._staging.get(plan.costs.kinds[layer])
        look_ahead = self.look_ahead if capacity < count else None
        selector = RouterSelector(layer, self.shared, Residency(count, capacity), slab, staging, look_ahead)
        self.selectors.append(selector)
        return selector


def decide_experts(folder: Path, config: FlashConfig, name: str | None = None) -> ExpertPlan:
    """How a mixture of experts would run; whether the budget is enough is only seen at `.memory`. Opens and checks the
    files' headers, loads nothing. name: of the model, if not the folder's. Raises FormatError,
    ConfigError, BackendError, UsageError."""
    values = read_json(safe_file(folder, "config.json"))
    if (program := values.get("model_file")) is not None:
        raise FormatError(f"{folder}: config.json names a program to run ({program!r}); none is run")
    if parse_selection(config.select).name not in ("auto", "router"):
        raise UsageError(f"--select {config.select} names neurons; a mixture of experts runs with router (or auto)")
    backend_name, entry = choose(config.backend, mixture_backends(values))
    if entry.experts is None:
        raise BackendError(f"the {backend_name} backend runs no mixtures of experts; use --backend mlx")
    check_fixed(values, mixture=True)
    spec = read_expert_spec(folder, values)
    context_of = decide_context(config.max_context, spec.max_context, spec.limit)
    context = context_of.tokens
    with Source(folder) as source:
        source.open_tensors()
        settled = settle_head(source)
    values, tensors = settled.config, {name: (each.path, each.info) for name, each in settled.tensors.items()}
    _check_strays(folder)
    tokenizer_files(folder)  # links that lead nowhere and Git LFS pointers, before anything is loaded
    backend = entry.make()
    opened = import_module(entry.experts).open_experts(folder, tensors, values, backend)
    layouts = [extents.layout for extents in opened.extents]
    chunk = min(config.prefill_chunk, context)
    fixed = {
        "dense part": opened.dense_bytes,
        "KV cache": opened.kv_bytes(context, chunk) * config.sequences,
        "prefill scratch": opened.scratch_bytes(chunk, context),
        "page rounding": opened.page_bytes,
    }
    costs = ExpertCosts(
        name or str(folder),
        fixed,
        tuple(opened.slot_bytes(layer) for layer in range(len(layouts))),
        tuple(layout.count for layout in layouts),
        tuple(opened.top_k),
        tuple(opened.kinds),
        None if config.slots == "auto" else float(config.slots),
    )
    return ExpertPlan(
        ExpertFolder(folder, values, layouts),
        spec,
        config,
        backend_name,
        backend,
        import_module(entry.models),
        opened,
        costs,
        budget_for(config, costs),
        context_of,
        opened.dtype,
        default_tuning(given_settings(config)),
        "; ".join(filter(None, (settled.note, opened.note))) or None,
    )


def plan_experts(folder: Path, config: FlashConfig, name: str | None = None) -> ExpertPlan:
    """`decide_experts`, and BudgetError when the budget is too small."""
    plan = decide_experts(folder, config, name)
    _ = plan.memory
    return plan


def load_experts(folder: Path, config: FlashConfig, name: str | None = None) -> tuple[Any, Any]:
    """The model and its tokenizer; see `load.load`."""
    plan = plan_experts(folder, config, name)
    report_keys(plan.models, plan.checkpoint.config)
    if plan.note is not None:
        announce(plan.note)
    run = ExpertRun(plan)
    try:
        model = plan.opened.start(run.make_selector, plan.context)
        tokenizer = plan.models.load_tokenizer(folder, plan.spec.eos_ids)
    except BaseException:
        run.close()
        raise
    model.flash = run
    return model, tokenizer


def read_expert_spec(folder: Path, config: dict[str, Any]) -> ExpertSpec:
    """What config.json and generation_config.json say of a mixture of experts, whatever its family."""
    normal = normalise(config)
    places = [normal, normal.get("text_config") or {}]

    def number(*keys: str) -> int | None:
        found = (place.get(key) for key in keys for place in places if isinstance(place, dict))
        return next((value for value in found if type(value) is int and value > 0), None)

    vocab = number("vocab_size")
    if vocab is None:
        raise FormatError(f"{folder / 'config.json'} does not say how many tokens there are ('vocab_size')")
    most = number(*MAX_CONTEXT_KEYS) or DEFAULT_CONTEXT
    return ExpertSpec(
        family=str(config.get("model_type"))[:80],
        activation=str(config.get("hidden_act", "its own activation"))[:80],
        vocab=vocab,
        max_context=most,
        limit=read_limits(normal, most),
        eos_ids=end_ids(folder, config, vocab),
    )


def _check_strays(folder: Path) -> None:
    """mlx-lm loads every file of this name, whatever the index says: a stray one could replace tensors."""
    known = set(weight_files(folder))
    strays = sorted(path.name for path in folder.glob(SHARDS) if path.name not in known)
    if strays:
        raise FormatError(
            f"{folder} has weights that do not belong to the model: {', '.join(strays[:5])}; move them away"
        )
