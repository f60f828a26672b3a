"""Checks before a conversion: what it would write is derived from config.json and the headers of the files.

A model that cannot run is so refused before its first byte is converted. Reads no weights but those of the head, and
writes nothing but a file without content in a temporary folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from mlx_flash.engine.storage.bundle import ITEM_BYTES, Layout
from mlx_flash.engine.storage.calibration import SHIPPED, Calibration, read_calibration
from mlx_flash.engine.storage.checkpoint import MODEL, Checkpoint
from mlx_flash.engine.storage.header import TensorInfo, read_metadata
from mlx_flash.engine.storage.writer import CONFIG
from mlx_flash.engine.system.address_space import check_room
from mlx_flash.errors import FlashError, FormatError, ReadError, UsageError
from mlx_flash.models.conversion.plan import Settings, make_plan
from mlx_flash.models.specs.folder import is_there, safe_file
from mlx_flash.models.specs.source import TAG_OF, Source, safetensors_header
from mlx_flash.models.text.tokenizer import TOKENIZERS

from .model_code import CheckpointCheck
from .planning.neuron_plan import NeuronPlan


@dataclass(frozen=True)
class PlannedCheckpoint(Checkpoint):
    """A flash checkpoint that a conversion would make.

    path: the folder to convert; stored: dtype and shape of the resident tensors; calibration: one that lies beside the
    model, assumed to be of these weights
    """

    stored: Mapping[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    calibration: Calibration | None = None

    @cached_property
    def _resident(self) -> dict[str, tuple[Path, TensorInfo]]:
        return {
            name: (self.path, TensorInfo(name, TAG_OF[dtype], shape, 0, ITEM_BYTES[dtype] * int(np.prod(shape))))
            for name, (dtype, shape) in self.stored.items()
        }

    @contextmanager
    def hollow(self) -> Iterator[Checkpoint]:
        """A temporary folder with the config and the resident tensors, whose numbers take no room (a sparse file).
        Errors raised within name the folder that would be converted."""
        with TemporaryDirectory(prefix="mlx_flash-") as name:
            (Path(name) / CONFIG).write_text(json.dumps(self.config), encoding="utf-8")
            shapes = {tensor: shape for tensor, (_, shape) in self.stored.items()}
            dtypes = {tensor: dtype for tensor, (dtype, _) in self.stored.items()}
            with open(Path(name) / MODEL, "wb") as file:
                header = safetensors_header(shapes, dtypes, self.stored)
                file.write(header)
                file.truncate(len(header) + sum(info.nbytes for _, info in self._resident.values()))
            try:
                yield replace(self, path=Path(name))
            except FlashError as error:
                raise type(error)(str(error).replace(name, str(self.path))) from error


def planned_checkpoint(folder: Path, dtype: str | None = None) -> PlannedCheckpoint:
    """What `convert` would make of a folder. Raises what `convert` raises before it writes."""
    with Source(folder) as source:
        plan = make_plan(source, Settings(dtype), None)
    layouts = list(plan.layouts)
    return PlannedCheckpoint(folder, plan.config, layouts, {}, plan.stored, _shipped(folder, plan.spec.dim, layouts))


def _shipped(folder: Path, dim: int, layouts: list[Layout]) -> Calibration | None:
    """The calibration that lies beside the model; None where it is unusable, which the conversion reports. Whether it
    was made from these weights is not known before they are hashed."""
    if not is_there(folder, SHIPPED):
        return None
    path = safe_file(folder, SHIPPED)
    try:
        identity = json.loads(read_metadata(path)["calibration"])["model"]
        return read_calibration(path, dim, tuple(layout.count for layout in layouts), identity)
    except (FormatError, ReadError, OSError, ValueError, KeyError, TypeError):
        return None


def check_runs(plan: NeuronPlan, planned: PlannedCheckpoint, loads: bool) -> None:
    """Raise what loading would raise, as far as that is known before the conversion. plan: of `planned`; loads: whether
    the model will be loaded, so that its budget and its tokenizer count."""
    if loads:
        check_room(plan.backend_name, plan.name, plan.memory.total_bytes)
    if isinstance(plan.models, CheckpointCheck):
        with ExitStack() as stack:
            try:
                hollow = stack.enter_context(planned.hollow())
            except OSError:  # no room for temporary files: loading asks again
                hollow = None
            if hollow is not None:
                plan.models.check(hollow, plan.spec)
    if loads:
        if not any(is_there(planned.path, file) for file in TOKENIZERS):
            raise UsageError(
                f"{plan.name} has none of {', '.join(TOKENIZERS)}, so no tokenizer, and cannot be loaded; take one "
                f"from elsewhere: mlx_flash convert --hf-path {planned.path} --flash-path OUT --tokenizer PATH_OR_REPO"
            )
        plan.models.load_tokenizer(planned.path, plan.spec.eos_ids)
