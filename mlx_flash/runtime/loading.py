"""From a plan to a running model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_flash.config import FlashConfig
from mlx_flash.engine.storage.readers import open_reader
from mlx_flash.engine.system.address_space import check_room

from .notices import announce, report_keys
from .planning.expert_plan import ExpertPlan
from .planning.neuron_plan import NeuronPlan
from .planning.planner import plan_model
from .planning.run_plan import RunPlan
from .run import ExpertRun, NeuronRun, OpenReader, Run


def load(path: str | Path | None = None, config: FlashConfig | None = None, **fields: Any) -> tuple[Any, Any]:
    """Load a model to run within a memory budget: `model, tokenizer = mlx_flash.load("folder", memory="2GB")`.

    path: flash checkpoint, Hugging Face folder or repo id (converted once into the user's cache; a mixture of experts
    is read in place); None: the default model. fields: those of FlashConfig, over `config`. On the mlx backend `model`
    is an mlx-lm model, which `mlx_lm.generate` takes unchanged; on numpy it is a `Decoder`. `model.flash` has the plan
    and the counters.
    The budget holds for `generate` and `stream_generate` of this package; mlx-lm's own functions pass prompts in
    chunks of 2048 tokens and let the KV cache grow beyond `max_context`. Raises the errors of `plan_checkpoint`,
    ReadError.
    """
    return load_planned(plan_model(path, replace(config or FlashConfig(), **fields)))


def load_planned(plan: RunPlan, reader: OpenReader = open_reader) -> tuple[Any, Any]:
    """The model and the tokenizer of a plan, see `load`. MLX's arrays belong to the thread that calls this. reader:
    opens the reader of the bundles."""
    model = load_model(plan, reader)
    try:
        return model, plan.models.load_tokenizer(plan.checkpoint.path, plan.spec.eos_ids)
    except BaseException:
        model.flash.close()
        raise


def load_model(plan: RunPlan, reader: OpenReader = open_reader) -> Any:
    """The model of a plan, without its tokenizer; `model.flash` is its run."""
    check_room(plan.backend_name, plan.name, plan.memory.total_bytes)
    report_keys(plan.models, plan.checkpoint.config)
    for notice in plan.notices:
        announce(notice)
    run = start_run(plan, reader)
    try:
        model = run.build()
    except BaseException:
        run.close()
        raise
    model.flash = run
    return model


def start_run(plan: RunPlan, reader: OpenReader = open_reader) -> Run:
    """The run of a plan: its slots, its reader and its selectors, without the model."""
    if isinstance(plan, ExpertPlan):
        return ExpertRun(plan, reader)
    assert isinstance(plan, NeuronPlan)
    return NeuronRun(plan, reader)
