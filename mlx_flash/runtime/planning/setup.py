"""Which model runs on which backend: what is known before a selector is chosen and the budget is split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mlx_flash.config import FlashConfig
from mlx_flash.engine.backends.base import Backend
from mlx_flash.engine.storage.bundle import Layout
from mlx_flash.runtime.model_code import ModelCode

from .context_length import ContextLength


class ModelFolder(Protocol):
    """A folder that a model is read from. layouts: those of its bundles, per layer that has any."""

    @property
    def path(self) -> Path: ...

    @property
    def config(self) -> Mapping[str, Any]: ...

    @property
    def layouts(self) -> Sequence[Layout]: ...


class ModelFacts(Protocol):
    """What every plan knows of a model's architecture."""

    @property
    def family(self) -> str: ...

    @property
    def activation(self) -> str: ...

    @property
    def vocab(self) -> int: ...

    @property
    def eos_ids(self) -> Sequence[int]: ...


@dataclass(frozen=True)
class Setup:
    """A model and the backend that runs it.

    name: what the user calls the model; dtype: of the bundles' numbers
    """

    name: str
    checkpoint: ModelFolder
    spec: ModelFacts
    config: FlashConfig
    backend_name: str
    backend: Backend
    models: ModelCode
    context_of: ContextLength
    dtype: str
