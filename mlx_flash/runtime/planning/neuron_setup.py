"""A flash checkpoint on the backend that runs it: what is known of a model of neuron bundles before a selector is
chosen."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mlx_flash.config import FlashConfig
from mlx_flash.engine.backends.base import Backend
from mlx_flash.engine.storage.calibration import Calibration
from mlx_flash.engine.storage.checkpoint import Checkpoint
from mlx_flash.errors import BackendError, FormatError
from mlx_flash.models.specs.config_reader import read_spec
from mlx_flash.models.specs.end_tokens import end_ids
from mlx_flash.models.specs.model_spec import ModelSpec
from mlx_flash.models.specs.quantisation import (
    expected_layout,
    numpy_problem,
    resident_codings,
    resident_plain_shapes,
    resident_shapes,
)
from mlx_flash.runtime.backends import Entry, choose
from mlx_flash.runtime.machine import Machine

from .context_length import decide_context
from .setup import Setup


@dataclass(frozen=True)
class MeasuredMachine:
    """What was measured of this machine and the checkpoint's device, or why that cannot be used; neither: nothing was
    measured."""

    machine: Machine | None = None
    problem: str | None = None


@dataclass(frozen=True)
class NeuronSetup(Setup):
    """See `Setup`. calibration: None where the model was not calibrated."""

    checkpoint: Checkpoint
    spec: ModelSpec
    calibration: Calibration | None
    measured: MeasuredMachine = MeasuredMachine()


def make_setup(
    checkpoint: Checkpoint,
    config: FlashConfig,
    calibration: Calibration | None,
    name: str,
    measured: MeasuredMachine = MeasuredMachine(),  # noqa: B008 - frozen
) -> NeuronSetup:
    """The setup of a checkpoint that exists, or that a conversion would make. Raises FormatError, ConfigError,
    UsageError, BackendError."""
    spec = read_spec(checkpoint.config, resident_plain_shapes(checkpoint))
    spec = replace(spec, eos_ids=end_ids(checkpoint.path, checkpoint.config, spec.vocab))
    check_checkpoint(checkpoint, spec)
    context = decide_context(config.max_context, spec.max_context, spec.limit)
    backend_name, entry, backend = _make_backend(config, spec, checkpoint)
    return NeuronSetup(
        name=name,
        checkpoint=checkpoint,
        spec=spec,
        config=config,
        backend_name=backend_name,
        backend=backend,
        models=entry.models(),
        context_of=context,
        dtype=checkpoint.config["flash"]["dtype"],
        calibration=calibration,
        measured=measured,
    )


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


def _make_backend(config: FlashConfig, spec: ModelSpec, checkpoint: Checkpoint) -> tuple[str, Entry, Backend]:
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
