"""From the name of a model and the settings of a run to its plan.

Opens and checks headers, and converts a model that must be converted; loads nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mlx_flash.config import FlashConfig
from mlx_flash.engine.storage.calibration import load_calibration
from mlx_flash.engine.storage.checkpoint import Checkpoint
from mlx_flash.errors import FlashError
from mlx_flash.runtime.backends import check_name
from mlx_flash.runtime.machine import Machine, load_machine
from mlx_flash.runtime.model_path import in_place_folder, model_name, resolve_model
from mlx_flash.runtime.notices import announce
from mlx_flash.runtime.preflight import PlannedCheckpoint, check_runs

from .expert_plan import plan_experts
from .neuron_plan import NeuronPlan, plan_neurons
from .neuron_setup import MeasuredMachine, make_setup
from .run_plan import RunPlan

LoadMachine = Callable[[Path], Machine | None]


def plan_model(
    model: str | Path | None, config: FlashConfig, *, loads: bool = True, machine: LoadMachine | None = None
) -> RunPlan:
    """How a model would run: a mixture of experts from the folder as it was downloaded, any other as `plan_checkpoint`
    says, which has the arguments too."""
    check_name(config.backend)  # before anything is downloaded
    folder = in_place_folder(model)
    if folder is None:
        return plan_checkpoint(model, config, loads=loads, machine=machine)
    plan = plan_experts(folder, config, model_name(model))
    if loads:
        _ = plan.memory
    return plan


def plan_checkpoint(
    model: str | Path | None,
    config: FlashConfig,
    *,
    calibrated: bool = True,
    name: str | None = None,
    loads: bool = False,
    machine: LoadMachine | None = None,
) -> NeuronPlan:
    """How a flash checkpoint would run. A model that must be converted first is planned before that from its own
    headers, so that a model that cannot run is refused before it is converted.

    calibrated=False: as if it had no calibration. name: what it is called, if not `model`. loads: the model will be
    loaded, so that a budget that is too small and a missing tokenizer are errors; without, BudgetError shows at
    `.memory`. machine: finds what was measured of this machine, see `load_machine`. Raises FormatError, ConfigError,
    BackendError, UsageError.
    """
    name = name or model_name(model)
    check_name(config.backend)

    def check(planned: PlannedCheckpoint) -> None:
        calibration = planned.calibration if calibrated else None
        check_runs(plan_neurons(make_setup(planned, config, calibration, name)), planned, loads)

    path = resolve_model(None if model is None else str(model), announce=announce, check=check)
    checkpoint = Checkpoint.open(path, calibrated)
    measured = _measured(checkpoint, machine or load_machine)
    plan = plan_neurons(make_setup(checkpoint, config, load_calibration(checkpoint), name, measured))
    if loads:
        _ = plan.memory
    return plan


def _measured(checkpoint: Checkpoint, machine: LoadMachine) -> MeasuredMachine:
    try:
        return MeasuredMachine(machine(checkpoint.path))
    except FlashError as error:
        return MeasuredMachine(problem=str(error))
