"""From a path to a running model: which backend and selector, how the budget is split, and the parts put together.

`plan_run` decides everything before anything is loaded (that is what `inspect` prints); `load` carries it out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

from mlx_flash.config import FlashConfig, Selection, parse_selection
from mlx_flash.engine.backends.base import Backend, FFNSpec, block_of
from mlx_flash.engine.residency.staging import BlockStream
from mlx_flash.engine.selection.context import Selector, SharedContext
from mlx_flash.engine.selection.factory import EXACT, SelectorFactory
from mlx_flash.engine.storage.bundle import bundle_kinds
from mlx_flash.engine.storage.calibration import Calibration, load_calibration
from mlx_flash.engine.storage.checkpoint import Checkpoint
from mlx_flash.engine.storage.readers import open_reader
from mlx_flash.engine.system.address_space import check_room
from mlx_flash.errors import BackendError, BudgetError, FlashError, FormatError
from mlx_flash.models.specs.config_reader import read_spec
from mlx_flash.models.specs.end_tokens import end_ids
from mlx_flash.models.specs.model_spec import ModelSpec
from mlx_flash.models.specs.quantisation import (
    expected_layout,
    numpy_problem,
    resident_codings,
    resident_plain_shapes,
    resident_shapes,
    usual_coding,
)
from mlx_flash.runtime.planning.cost_model import (
    Prediction,
    Tuning,
    choose_tuning,
    default_tuning,
    given_settings,
    predict,
)
from mlx_flash.runtime.planning.costs import choose_selection, run_costs
from mlx_flash.runtime.planning.demand import Demand, token_demand
from mlx_flash.runtime.planning.selective_persistence import Costs, MemoryPlan, split_budget
from mlx_flash.stats import Stats

from .backends import Entry, check_name, choose
from .machine import Machine, load_machine
from .mixture import ExpertPlan, load_experts, plan_experts
from .model_path import in_place_folder, model_name, resolve_model
from .preflight import PlannedCheckpoint, check_runs
from .run import BaseRun, Context, announce, budget_for, decide_context, report_keys


@dataclass(frozen=True)
class RunPlan:
    """Everything decided about a run: nothing has been loaded yet.

    context: in tokens; context_of: why so many; tuning: how bundles are read; machine: what was measured of this one,
    None where nothing was; machine_problem: why what was measured cannot be used
    """

    checkpoint: Checkpoint
    spec: ModelSpec
    config: FlashConfig
    backend_name: str
    backend: Backend
    models: Any
    selection: Selection
    calibration: Calibration | None
    costs: Costs
    budget_bytes: int
    context: int
    dtype: str
    tuning: Tuning
    machine: Machine | None = None
    machine_problem: str | None = None
    context_of: Context | None = None

    @property
    def context_text(self) -> str:
        """The context, and why it is not the model's."""
        return str(self.context_of or f"{self.context} tokens")

    @property
    def name(self) -> str:
        """What the user calls the model."""
        return self.costs.model

    @property
    def selector(self) -> str:
        """The selector as the user would write it."""
        return str(self.selection)

    @property
    def exact(self) -> bool:
        """Whether the output is that of the whole model."""
        return self.selection.name in EXACT

    @property
    def measured_loss(self) -> dict[str, Any] | None:
        """What `calibrate` measured this selector to lose: nats per token of it and of `all`, tokens scored."""
        losses = self.calibration.summary.get("losses", {}) if self.calibration else {}
        found: dict[str, Any] | None = losses.get(self.selector)
        return found

    @property
    def look_ahead(self) -> str:
        """Whether the next layer's reads begin early. "auto" does it with `predictor`, whose predictors are in memory
        anyway; "on" with `gate` too."""
        mode, name = self.tuning.look_ahead, self.selection.name
        wanted = name == "predictor" or (name == "gate" and mode == "on")
        known = self.calibration is not None and self.calibration.has_predictors
        return mode if wanted and known and not self.all_resident else "off"

    @cached_property
    def memory(self) -> MemoryPlan:
        """How the budget is split; raises BudgetError when it is too small."""
        return split_budget(self.costs, self.budget_bytes)

    @property
    def demand(self) -> Demand:
        """What a decoded token asks for, as far as it is known."""
        return self._demand(self.memory.capacities)

    def _demand(self, capacities: Sequence[int]) -> Demand:
        chunk = min(self.config.prefill_chunk, self.context)
        layouts = self.checkpoint.layouts
        dense = usual_coding(resident_codings(self.checkpoint))
        return token_demand(self.spec, self.dtype, layouts, self.selection, self.calibration, capacities, chunk, dense)

    @cached_property
    def prediction(self) -> Prediction | None:
        """What a token should take; None where the machine was not measured, or the backend's kernels were not."""
        if self.machine is None or self.backend_name != "numpy":
            return None
        tuning = replace(self.tuning, look_ahead=self.look_ahead)
        return predict(self.machine, self.demand, tuning, self.memory.staging_blocks)

    @property
    def all_resident(self) -> bool:
        """Whether nothing is ever read once everything has been."""
        return self.memory.capacities == self.costs.counts

    @property
    def ffn_resident_bytes(self) -> int:
        """Memory that FFN weights may take: slots, and the rows that are resident for all bundles."""
        return sum(size for name, size in self.memory.parts.items() if name == "slots" or name.endswith(" rows"))

    @property
    def worst_bytes_per_token(self) -> int:
        """Most bytes that one token reads. What is selected can be anything: whole layers, but for `all`."""
        pairs = list(zip(self.checkpoint.layouts, self.memory.capacities, strict=True))
        if self.selection.name != "all":
            return sum(layout.count * layout.stride for layout, capacity in pairs if capacity < layout.count)
        return sum((layout.count - capacity) * layout.stride for layout, capacity in pairs)


class Run(BaseRun):
    """A loaded model of neuron bundles: its selectors, and the ring of staging slabs that they share."""

    plan: RunPlan

    def __init__(self, plan: RunPlan):
        kinds, firsts = bundle_kinds(plan.checkpoint.layouts)
        blocks = [(layout, block_of(layout), [part.name for part in layout.parts]) for layout in firsts]
        rings = [[plan.backend.slab(*block) for _ in range(plan.memory.staging_blocks)] for block in blocks]
        reader = open_reader(plan.checkpoint.layer_files, executor=plan.backend.executor, **plan.tuning.reader_options)
        super().__init__(plan, SharedContext(plan.backend, reader, BlockStream(rings[0], rings[1:], kinds), Stats()))
        self.factory = SelectorFactory(
            plan.selection,
            self.shared,
            plan.checkpoint.layouts,
            plan.memory.capacities,
            plan.calibration,
            plan.config.reselect,
            plan.look_ahead,
        )

    def make_ffn(self, layer: int, up_bias: Any = None, down_bias: Any = None, gate_bias: Any = None) -> Selector:
        """The FFN of one layer: a callable from the normed hidden state to the FFN's output."""
        spec, layout = self.plan.spec, self.plan.checkpoint.layouts[layer]
        cutoff = spec.layers[layer].cutoff
        ffn = FFNSpec(layout, spec.kernel_activation, spec.gated, up_bias, down_bias, cutoff, gate_bias=gate_bias)
        selector = self.factory.make(layer, ffn)
        self.selectors.append(selector)
        return selector


def check_checkpoint(checkpoint: Checkpoint, spec: ModelSpec) -> None:
    """Raise FormatError unless config.json describes the bundles and the resident tensors that are there."""
    flash = checkpoint.config["flash"]
    layouts = [expected_layout(spec, i, flash["dtype"], checkpoint.layouts) for i in range(len(spec.layers))]
    # Older copies of dense architectures name what mlx-lm computes, which can be another form of the same function.
    named = (spec.activation, getattr(spec.table, "activation", spec.activation))
    if layouts != checkpoint.layouts or flash["activation"] not in named:
        raise FormatError(
            f"{checkpoint.path}: config.json does not describe the bundles ({len(layouts)} layers by the config, "
            f"{len(checkpoint.layouts)} on flash); convert the model again"
        )
    found = {name: info.shape for name, (_, info) in checkpoint.resident_tensors().items()}
    wanted = resident_shapes(checkpoint, spec)
    wrong = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    if wrong:
        raise FormatError(
            f"{checkpoint.path}: config.json and the resident tensors disagree on {len(wrong)}, such as {wrong[0]!r}: "
            f"{found.get(wrong[0])} on disk, {wanted.get(wrong[0])} by the config; convert the model again"
        )


def decide(
    model: str | Path | None,
    config: FlashConfig,
    calibrated: bool = True,
    name: str | None = None,
    loads: bool = False,
) -> RunPlan:
    """How a flash checkpoint would run; whether the budget is enough is only seen at `.memory`. Opens and checks the
    files' headers, loads nothing. A model that must be converted first is planned before that from its own headers, so
    that what is refused is refused then.

    calibrated=False: as if it had no calibration. name: what it is called, if not `model`. loads: the model will be
    loaded, so that a budget that is too small and a missing tokenizer too are found before a conversion. Raises
    FormatError, ConfigError, BackendError, UsageError.
    """
    name = name or model_name(model)
    check_name(config.backend)

    def check(planned: PlannedCheckpoint) -> None:
        plan = plan_checkpoint(planned, config, planned.calibration if calibrated else None, name)
        check_runs(plan, planned, loads)

    path = resolve_model(None if model is None else str(model), announce=announce, check=check)
    checkpoint = Checkpoint.open(path, calibrated)
    return plan_checkpoint(checkpoint, config, load_calibration(checkpoint), name, measured_machine(checkpoint))


def plan_checkpoint(
    checkpoint: Checkpoint,
    config: FlashConfig,
    calibration: Calibration | None,
    name: str,
    measured: tuple[Machine | None, str | None] = (None, None),
) -> RunPlan:
    """The plan of a checkpoint that is there, or would be. measured: of this machine, and why there is nothing."""
    spec = read_spec(checkpoint.config, resident_plain_shapes(checkpoint))
    spec = replace(spec, eos_ids=end_ids(checkpoint.path, checkpoint.config, spec.vocab))
    check_checkpoint(checkpoint, spec)
    context_of = decide_context(config.max_context, spec.max_context, spec.limit)
    context = context_of.tokens
    backend_name, entry, backend = make_backend(config, spec, checkpoint)
    machine, problem = measured

    def plan(selection: Selection, tuning: Tuning) -> RunPlan:
        costs = run_costs(name, checkpoint, spec, backend, selection, calibration, config, context, tuning)
        return RunPlan(
            checkpoint,
            spec,
            config,
            backend_name,
            backend,
            import_module(entry.models),
            selection,
            calibration,
            costs,
            budget_for(config, costs),
            context,
            checkpoint.config["flash"]["dtype"],
            tuning,
            machine,
            problem,
            context_of,
        )

    tuning = default_tuning(given_settings(config))
    neurons = max(max(2, layout.neurons) if layout.grouped else 1 for layout in checkpoint.layouts)
    selection = choose_selection(
        config, spec, calibration, lambda each: plan(each, tuning).costs, neurons, backend.lazy
    )
    if machine is None:
        return plan(selection, tuning)
    tuning = tuned(plan(selection, tuning))
    if parse_selection(config.select) == Selection("prompt"):  # what fits beside the staging that was chosen
        selection = choose_selection(
            config, spec, calibration, lambda each: plan(each, tuning).costs, neurons, backend.lazy
        )
    return plan(selection, tuning)


def make_backend(config: FlashConfig, spec: ModelSpec, checkpoint: Checkpoint) -> tuple[str, Entry, Backend]:
    """The backend that runs, see `backends.choose`, by name and made. Raises BackendError, which names what is in the
    way: a quantisation, or mlx-lm's own key for RoPE over pairs of neighbours."""
    problem = numpy_problem(spec, checkpoint.layouts, resident_codings(checkpoint))
    if checkpoint.config.get("rope_traditional"):
        problem = "config.json: 'rope_traditional' is true, which the numpy backend does not compute: use --backend mlx"
    name, entry = choose(config.backend, spec.table.backends, {} if problem is None else {"numpy": problem})
    try:
        return name, entry, entry.make()
    except BackendError as error:
        if problem is None:
            raise
        # What it says of the numpy backend is not true of this model.
        missing = str(error).replace(", or use --backend numpy", "")
        raise BackendError(f"{missing}; {problem}") from error


def measured_machine(checkpoint: Checkpoint) -> tuple[Machine | None, str | None]:
    """What was measured of this machine and the checkpoint's device, or why that cannot be used."""
    try:
        return load_machine(checkpoint.path), None
    except FlashError as error:
        return None, str(error)


def tuned(plan: RunPlan) -> Tuning:
    """The settings that suit the plan's machine; with a budget that is too small, as if there were no slots."""
    assert plan.machine is not None
    try:
        capacities: Sequence[int] = plan.memory.capacities
    except BudgetError:
        capacities = [0] * len(plan.costs.counts)
    return choose_tuning(plan.machine, plan._demand(capacities), given_settings(plan.config))


def plan_run(
    model: str | Path | None, config: FlashConfig, calibrated: bool = True, name: str | None = None
) -> RunPlan:
    """`decide`, and raise BudgetError when the budget is too small."""
    plan = decide(model, config, calibrated, name, loads=True)
    _ = plan.memory
    return plan


def load(path: str | Path | None = None, config: FlashConfig | None = None, **fields: Any) -> tuple[Any, Any]:
    """Load a model to run within a memory budget: `model, tokenizer = mlx_flash.load("folder", memory="2GB")`.

    path: flash checkpoint, Hugging Face folder or repo id (converted once into the user's cache; a mixture of experts
    is read in place); None: the default model. fields: those of FlashConfig, over `config`. On the mlx backend `model`
    is an mlx-lm model, which `mlx_lm.generate` takes unchanged; on numpy it is a `Decoder`. `model.flash` has the plan
    and the counters.
    The budget holds for `generate` and `stream_generate` of this package; mlx-lm's own functions pass prompts in
    chunks of 2048 tokens and let the KV cache grow beyond `max_context`. Raises the errors of `plan_run`, ReadError.
    """
    return load_planned(any_plan(path, replace(config or FlashConfig(), **fields)))


def any_plan(path: str | Path | None, config: FlashConfig) -> RunPlan | ExpertPlan:
    """`plan_run`, or the same for a mixture of experts, which runs from the folder as it was downloaded."""
    check_name(config.backend)  # before what has to be downloaded is
    folder = in_place_folder(path)
    return plan_run(path, config) if folder is None else plan_experts(folder, config, model_name(path))


def load_planned(plan: RunPlan | ExpertPlan) -> tuple[Any, Any]:
    """The model and the tokenizer of a plan, see `load`. MLX's arrays belong to the thread that calls this."""
    check_room(plan.backend_name, plan.name, plan.memory.total_bytes)
    if plan.context_of is not None and plan.context_of.reason is not None:
        announce(f"context {plan.context_text}")
    if isinstance(plan, ExpertPlan):
        return load_experts(plan.checkpoint.path, plan.config, plan.name)
    report_keys(plan.models, plan.checkpoint.config)
    if plan.machine_problem:
        announce(f"reads as where nothing was measured: {plan.machine_problem}")
    run = Run(plan)
    try:
        model = plan.models.build(plan.checkpoint, plan.spec, plan.backend, run.make_ffn, plan.dtype, plan.context)
        tokenizer = plan.models.load_tokenizer(plan.checkpoint.path, plan.spec.eos_ids)
    except BaseException:
        run.close()
        raise
    model.flash = run
    return model, tokenizer
