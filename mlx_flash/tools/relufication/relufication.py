"""Relufication: replaces SiLU by ReLU or FATReLU in a checkpoint, then recovers by distillation from the original.

Owns which checkpoints can be relufied; the settings are in options.py, a run is in relufication_run.py. PyTorch is
imported only when something runs.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mlx_flash.engine.storage.writer import check_free_space
from mlx_flash.errors import UsageError
from mlx_flash.models.conversion.plan import check_tensors
from mlx_flash.models.specs.config_reader import read_spec
from mlx_flash.models.specs.end_tokens import end_ids
from mlx_flash.models.specs.model_spec import ModelSpec
from mlx_flash.models.specs.source import Source, find_folder

from .options import RelufyConfig
from .relufication_run import SAVE_S, RelufyRun, tensor_names

SAVED_BYTES = 24  # per weight: the copy and AdamW's two means in fp32, and the file that replaces them


def relufy(
    hf_path: str | Path,
    out: str | Path,
    config: RelufyConfig | None = None,
    *,
    data: str | Path | np.ndarray | None = None,
    revision: str | None = None,
    resume: bool = True,
    progress: bool = False,
    save_every_s: float = SAVE_S,
    **settings: Any,
) -> dict[str, Any]:
    """Write to `out` the checkpoint `hf_path` (folder or repository id) with ReLU or FATReLU in place of SiLU.

    data: a text file to learn from, UTF-8, or token ids (rows, context); None: text that the original writes itself, at
        temperature 1
    settings: those of RelufyConfig, over `config`
    resume: go on from `.{out}.relufy.pt`, which an unfinished run leaves beside `out`; False: start from the beginning
    save_every_s: seconds between saves of the unfinished run; 0: after every step

    Returns nats per token, perplexity, zeros and KL divergence on held-out text of the `original`, of the copy just
    after the activation is `replaced`, and `recovered`, rounded as it is written ("ReLU Strikes Back", section 4;
    "ProSparse", section 3). Memory: five times the weights in fp32, and activations. Raises UsageError, ConfigError or
    FormatError for what cannot be relufied, FlashError if it diverges, SpaceError, ReadError.
    """
    chosen = replace(config or RelufyConfig(), **settings)
    _check_device(import_torch(), chosen.device)
    out = Path(out)
    if os.path.lexists(out):
        raise UsageError(f"{out} exists; remove it or choose another folder")
    folder = find_folder(hf_path, revision=revision)
    with Source(folder) as source:
        spec = _check_source(source)
        context = chosen.context or min(512, spec.max_context)
        if context > spec.max_context:
            raise UsageError(f"a context of {context} is beyond the model's {spec.max_context} tokens")
        infos = [source.tensors[name].info for name in tensor_names(spec)]
        needed = sum(info.nbytes + SAVED_BYTES * math.prod(info.shape) for info in infos)
        check_free_space(out.absolute().parent, needed)
        run = RelufyRun(source, spec, chosen, context, out, progress, save_every_s)
        run.begin(data, resume)
        run.learn()
        return run.write()


def import_torch() -> Any:
    """PyTorch; where it is missing, UsageError that names the extra to install."""
    try:
        import torch
    except ImportError as error:
        raise UsageError(f"relufy needs PyTorch ({error}): pip install 'mlx-flash-runtime[train]'") from None
    return torch


def _check_device(torch: Any, device: str) -> None:
    if device == "auto":
        return
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter from a build without CUDA
        raise UsageError(f"--device {device} cannot be used here: {str(error).splitlines()[0]}") from None


def _check_source(source: Source) -> ModelSpec:
    """The spec of a checkpoint that can be relufied."""
    for key in ("flash", "quantization", "quantization_config"):
        if source.config.get(key):
            raise UsageError(f"{source.folder} has {key!r} in its config.json; relufy needs the original weights")
    spec = read_spec(source.config)
    if not spec.gated:
        raise UsageError(f"{spec.table.title} has no gated FFN to relufy: it is a ReLU model as it is")
    source.open_tensors()
    spec = read_spec(source.config, source.shapes)
    spec = replace(spec, eos_ids=end_ids(source.folder, source.config, spec.vocab))
    check_tensors(source, spec, spec.resident_shapes() | spec.ffn_shapes())
    return spec
