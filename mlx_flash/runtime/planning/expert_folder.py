"""A mixture of experts as it was downloaded: its folder checked, its config read, its experts found in the files."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_flash.engine.backends.base import Backend
from mlx_flash.engine.storage.bundle import Layout
from mlx_flash.errors import FormatError
from mlx_flash.models.specs.config_normal_form import normalise
from mlx_flash.models.specs.config_reader import read_limits
from mlx_flash.models.specs.end_tokens import end_ids
from mlx_flash.models.specs.folder import SHARDS, weight_files
from mlx_flash.models.specs.model_spec import ContextLimit
from mlx_flash.models.specs.source import Source, tokenizer_files
from mlx_flash.models.specs.tied_head import settle_head
from mlx_flash.runtime.model_code import ExpertCode, OpenedExperts, Tensors

from .context_length import DEFAULT_CONTEXT

MAX_CONTEXT_KEYS = ("max_position_embeddings", "max_sequence_length", "n_positions", "seq_length", "model_max_length")


class ExpertFolder:
    """A folder whose headers have been read and whose experts have been opened by a backend's code.

    config: with whether the head is tied set right; note: what to tell the user about the head. Raises FormatError,
    ReadError, and what `ExpertCode.open_experts` raises.
    """

    def __init__(self, path: Path, code: ExpertCode, backend: Backend):
        self.path, self._code, self._backend = path, code, backend
        with Source(path) as source:
            source.open_tensors()
            settled = settle_head(source)
        self.config: Mapping[str, Any] = settled.config
        self._tensors: Tensors = {name: (each.path, each.info) for name, each in settled.tensors.items()}
        _check_strays(path)
        tokenizer_files(path)  # links that lead nowhere and Git LFS pointers, before anything is loaded
        self.experts = self._open()
        self._unused: OpenedExperts | None = self.experts
        self._thread = threading.get_ident()
        self.note = "; ".join(filter(None, (settled.note, self.experts.note))) or None

    @property
    def layouts(self) -> Sequence[Layout]:
        """Those of the experts, per layer that has any."""
        return [extents.layout for extents in self.experts.extents]

    def take(self) -> OpenedExperts:
        """The experts for one run. The first run on the thread that planned gets those that the plan was made from. Any
        other run opens its own, without reading the headers again: the opened experts become the model, and MLX's lazy
        arrays can be evaluated by one thread only."""
        taken, self._unused = self._unused, None
        if taken is None or self._thread != threading.get_ident():
            taken = self._open()
        self.experts = taken
        return taken

    def _open(self) -> OpenedExperts:
        return self._code.open_experts(self.path, self._tensors, self.config, self._backend)


@dataclass(frozen=True)
class ExpertSpec:
    """What a config.json says of a mixture of experts, whatever its family. vocab, max_context: in tokens; limit: why a
    run's context may have to be shorter."""

    family: str
    activation: str
    vocab: int
    max_context: int
    eos_ids: tuple[int, ...]
    limit: ContextLimit | None = None


def read_expert_spec(folder: Path, config: dict[str, Any]) -> ExpertSpec:
    """What config.json and generation_config.json say. Raises FormatError."""
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
