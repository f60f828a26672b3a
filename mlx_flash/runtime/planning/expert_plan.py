"""The plan of a run of a mixture of experts, whose experts are read from the files as they were downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mlx_flash.config import FlashConfig, Selection, parse_selection
from mlx_flash.engine.selection.look_ahead import GUESS_SHARE
from mlx_flash.engine.storage.json_file import read_json
from mlx_flash.errors import BackendError, FormatError, UsageError
from mlx_flash.models.specs.folder import safe_file
from mlx_flash.models.specs.key_checks import check_fixed
from mlx_flash.models.specs.mixtures import mixture_backends
from mlx_flash.runtime.backends import choose

from .context_length import decide_context
from .expert_budget import ExpertCosts
from .expert_folder import ExpertFolder, ExpertSpec, read_expert_spec
from .run_plan import RunPlan
from .selective_persistence import budget_for
from .setup import Setup
from .tuning import default_tuning, given_settings

ROUTER = Selection("router")


@dataclass(frozen=True)
class ExpertSetup(Setup):
    """See `Setup`."""

    checkpoint: ExpertFolder
    spec: ExpertSpec


@dataclass(frozen=True)
class ExpertPlan(RunPlan):
    """How a mixture of experts will run."""

    setup: ExpertSetup
    costs: ExpertCosts

    @property
    def checkpoint(self) -> ExpertFolder:
        return self.setup.checkpoint

    @property
    def spec(self) -> ExpertSpec:
        return self.setup.spec

    @property
    def exact(self) -> bool:
        """The model's own router selects."""
        return True

    @property
    def note(self) -> str | None:
        """What to tell the user about the checkpoint."""
        return self.checkpoint.note

    @property
    def notices(self) -> list[str]:
        return [*super().notices, *([] if self.note is None else [self.note])]

    @property
    def look_ahead(self) -> str:
        """See `RunPlan`: whether the next layer's experts are guessed and their reads begin early."""
        enough = any(
            GUESS_SHARE <= capacity < count
            for capacity, count in zip(self.memory.capacities[1:], self.costs.counts[1:], strict=True)
        )
        return self.tuning.look_ahead if enough and self.checkpoint.experts.foresees else "off"

    @property
    def ffn_resident_bytes(self) -> int:
        """Memory that experts may take."""
        return self.memory.parts["slots"]

    @property
    def worst_bytes_per_token(self) -> int:
        """Most bytes that one token reads: where a layer has too few slots, all of its top-k experts."""
        costs = self.costs
        each = zip(costs.top_k, costs.slots, self.memory.capacities, costs.counts, strict=True)
        return sum(top_k * slot for top_k, slot, capacity, count in each if capacity < count)


def plan_experts(path: Path, config: FlashConfig, name: str | None = None) -> ExpertPlan:
    """How a mixture of experts would run; whether the budget is enough shows at `.memory`. Opens and checks the files'
    headers, loads nothing. name: of the model, if not the folder's. Raises FormatError, ConfigError, BackendError,
    UsageError."""
    values = read_json(safe_file(path, "config.json"))
    if (program := values.get("model_file")) is not None:
        raise FormatError(f"{path}: config.json names a program to run ({program!r}); none is run")
    if parse_selection(config.select).name not in ("auto", "router"):
        raise UsageError(f"--select {config.select} names neurons; a mixture of experts runs with router (or auto)")
    backend_name, entry = choose(config.backend, mixture_backends(values))
    if entry.experts is None:
        raise BackendError(f"the {backend_name} backend runs no mixtures of experts; use --backend mlx")
    check_fixed(values, mixture=True)
    spec = read_expert_spec(path, values)
    context = decide_context(config.max_context, spec.max_context, spec.limit)
    backend = entry.make()
    folder = ExpertFolder(path, entry.experts(), backend)
    setup = ExpertSetup(
        name=name or str(path),
        checkpoint=folder,
        spec=spec,
        config=config,
        backend_name=backend_name,
        backend=backend,
        models=entry.models(),
        context_of=context,
        dtype=folder.experts.dtype,
    )
    costs = _costs(setup)
    return ExpertPlan(setup, ROUTER, default_tuning(given_settings(config)), costs, budget_for(config, costs))


def _costs(setup: ExpertSetup) -> ExpertCosts:
    experts, config, context = setup.checkpoint.experts, setup.config, setup.context_of.tokens
    layouts, chunk = setup.checkpoint.layouts, min(setup.config.prefill_chunk, setup.context_of.tokens)
    return ExpertCosts(
        model=setup.name,
        fixed={
            "dense part": experts.dense_bytes,
            "KV cache": experts.kv_bytes(context, chunk) * config.sequences,
            "prefill scratch": experts.scratch_bytes(chunk, context),
            "page rounding": experts.page_bytes,
        },
        slots=tuple(experts.slot_bytes(layer) for layer in range(len(layouts))),
        counts=tuple(layout.count for layout in layouts),
        top_k=tuple(experts.top_k),
        kinds=tuple(experts.kinds),
        share=None if config.slots == "auto" else float(config.slots),
    )
