"""What runtime asks of a backend's model code: protocols that the modules in models/numpy and models/mlx satisfy.

Models, activations and tokenizers themselves are the backend's own types, which nothing in runtime looks into.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from mlx_flash.engine.selection.router import RouterSelector
from mlx_flash.engine.storage.checkpoint import Checkpoint
from mlx_flash.engine.storage.extents import LayerExtents
from mlx_flash.engine.storage.header import TensorInfo
from mlx_flash.models.prompt_cache import PromptCache
from mlx_flash.models.specs.model_spec import ModelSpec
from mlx_flash.models.text.sampling import Sampling

Tensors = Mapping[str, tuple[Path, TensorInfo]]


class ModelCode(Protocol):
    """A module that builds models and runs their token loops."""

    def build(
        self,
        checkpoint: Checkpoint,
        spec: ModelSpec,
        backend: Any,
        make_ffn: Callable[..., Any],
        dtype: str,
        context: int,
    ) -> Any:
        """The model of a flash checkpoint with its dense part in memory. `make_ffn(layer, *biases)` gives a layer's
        FFN; context: tokens that the KV cache holds. Raises ConfigError, FormatError, ReadError."""

    def steps(
        self,
        model: Any,
        prompt_ids: Sequence[int],
        max_tokens: int,
        sampling: Sampling,
        prefill_chunk: int,
        prompt_cache: PromptCache | None = None,
        /,
    ) -> Iterator[int]:
        """Yield up to `max_tokens` sampled ids after the prompt, whose first tokens `prompt_cache` may hold."""

    def forced(
        self, model: Any, prompt_ids: Sequence[int], next_ids: Sequence[int], prefill_chunk: int
    ) -> Iterator[np.ndarray]:
        """Yield the logits (vocab,) fp32 after the prompt, then after each of `next_ids`."""

    def load_tokenizer(self, path: Path, eos_ids: Sequence[int]) -> Any:
        """The tokenizer of a folder, which stops at any of `eos_ids`."""

    def keys_read(self, config: Mapping[str, Any]) -> frozenset[str]:
        """The keys of a config.json that the model depends on."""


@runtime_checkable
class CheckpointCheck(Protocol):
    """Model code that can refuse a checkpoint from its config and the resident tensors' names and shapes alone."""

    def check(self, checkpoint: Checkpoint, spec: ModelSpec) -> None:
        """Raise what `build` would."""


class OpenedExperts(Protocol):
    """A mixture of experts whose files are open and checked, and of which nothing is loaded.

    extents, top_k, kinds: per layer that has experts: where they lie in the files, how many a token uses, and a number
    that layers with equal experts share. note: what to tell the user about the checkpoint.
    """

    @property
    def extents(self) -> Sequence[LayerExtents]: ...

    @property
    def note(self) -> str | None: ...

    @property
    def top_k(self) -> list[int]: ...

    @property
    def kinds(self) -> list[int]: ...

    @property
    def dtype(self) -> str: ...

    @property
    def foresees(self) -> bool:
        """Whether a layer can guess what the next one chooses."""

    @property
    def dense_bytes(self) -> int: ...

    @property
    def page_bytes(self) -> int:
        """Most bytes that are lost to rounding slabs up to pages."""

    def slot_bytes(self, layer: int) -> int: ...

    def kv_bytes(self, tokens: int, chunk: int) -> int: ...

    def scratch_bytes(self, chunk: int, context: int) -> int: ...

    def slab(self, layer: int, rows: int) -> Any:
        """Memory for `rows` experts of a layer; None for no rows."""

    def start(self, make_selector: Callable[[int], RouterSelector], context: int) -> Any:
        """The model: its dense part in memory, its experts behind the selectors. Can be called once, by the thread that
        opened the files. Raises ConfigError, FormatError, ReadError."""


class ExpertCode(Protocol):
    """A module that opens mixtures of experts as they were downloaded."""

    def open_experts(self, folder: Path, tensors: Tensors, config: Mapping[str, Any], backend: Any) -> OpenedExperts:
        """tensors: every tensor of the folder's files that the model has, checked. Raises ConfigError, FormatError,
        BackendError."""
