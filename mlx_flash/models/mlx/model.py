"""The model code of the mlx backend: mlx-lm's models of a flash checkpoint, their FFNs read from flash. Needs mlx-lm.

Knows where a family keeps its FFN modules; does not know what the functions in their place do, nor files of bundles.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_flash.engine.backends.base import Backend
from mlx_flash.engine.backends.mlx.backend import cache_limit_bytes
from mlx_flash.engine.storage.checkpoint import Checkpoint
from mlx_flash.errors import ConfigError, FormatError
from mlx_flash.models.prompt_cache import PromptCache
from mlx_flash.models.specs.config_normal_form import normalise
from mlx_flash.models.specs.dense_families import DENSE, DenseSpec
from mlx_flash.models.specs.families import FAMILIES
from mlx_flash.models.specs.known_keys import OWN
from mlx_flash.models.specs.model_spec import ModelSpec
from mlx_flash.models.text.sampling import Sampling
from mlx_flash.models.text.tokenizer import reading_tokenizer

from . import compat
from .compat import MODEL_REMAPPING, architecture, brief, load_model, make_prompt_cache, make_sampler
from .dense_checks import check_kv_cache, check_module
from .dense_corrections import fit_architecture, fit_dense_modules, fit_keys
from .flash_modules import FFN, FlashFFNModule, flash_model
from .positions import mlx_keys, set_positions, set_windows
from .replies import MlxReply, never_reads, steps_ahead, steps_in_turn, wired

LEAST_TEMPERATURE = 1e-30  # logits divided by less are no numbers in fp32


def build(
    checkpoint: Checkpoint, spec: ModelSpec, backend: Backend, make_ffn: Callable[..., FFN], dtype: str, context: int
) -> nn.Module:
    """The model of a flash checkpoint; `make_ffn(layer)` gives each layer's FFN. Errors are those of `build_model`.

    dtype is not used: mlx-lm takes that of the tensors. context: what decides between tables of positions; mlx-lm's KV
    cache grows.
    """
    model = _without_ffns(checkpoint, spec, context)
    modules = [getattr(layer, spec.table.attribute) for layer in model.layers]
    for layer, module in enumerate(modules):
        module._ffn = make_ffn(layer, *module.biases())
    return model


def check(checkpoint: Checkpoint, spec: ModelSpec) -> None:
    """Raise what `build` would raise, from the config and the resident tensors' names and shapes alone."""
    _without_ffns(checkpoint, spec, 0, lazy=True)


def _without_ffns(checkpoint: Checkpoint, spec: ModelSpec, context: int, lazy: bool = False) -> nn.Module:
    model = build_model(checkpoint.path, spec, [_nothing] * len(spec.layers), context, lazy)
    if isinstance(spec, DenseSpec):
        check_kv_cache(model, make_prompt_cache(model), spec)
    return model


def _nothing(x: mx.array) -> mx.array:
    """Where no FFN is yet."""
    return x


def build_model(path: Path, spec: ModelSpec, ffns: Sequence[FFN], context: int = 0, lazy: bool = False) -> nn.Module:
    """mlx-lm's model of a flash checkpoint folder, resident tensors in their own dtype, FFN of layer i = ffns[i], for
    runs of `context` tokens. lazy: without reading any.

    Raises ConfigError for a family or a config that mlx-lm does not run, FormatError when the resident tensors are
    not those of the model or cannot be read.
    """
    if "mlx" not in spec.table.backends:
        known = [name for name, row in (FAMILIES | DENSE).items() if "mlx" in row.backends]
        raise ConfigError(f"family {spec.family!r} does not run on mlx; known: {', '.join(known)}")
    if len(ffns) != len(spec.layers):
        raise ValueError(f"{len(ffns)} FFNs for {len(spec.layers)} layers")

    # Before mlx-lm sees the folder: its older releases run the file without asking.
    config = json.loads((path / "config.json").read_text())
    if (program := config.get("model_file")) is not None:
        raise FormatError(f"{path}: config.json names a program to run ({program!r}); none is run")

    def classes(config: dict[str, Any]) -> Any:
        return _model_class(spec, ffns, normal)

    normal = normalise(config)
    try:
        given = normal | mlx_keys(normal) | fit_keys(normal) | _config(spec)
        model, _ = load_model(path, lazy=lazy, strict=True, model_config=given, get_model_classes=classes)
    except ModuleNotFoundError as error:
        raise ConfigError(f"this mlx-lm does not know {spec.family} ({error}); pip install -U mlx-lm") from error
    except (TypeError, NotImplementedError) as error:  # a dataclass of mlx-lm that misses a field
        raise ConfigError(f"{path / 'config.json'}: mlx-lm cannot build {spec.family}: {brief(error)}") from error
    except (ValueError, RuntimeError, FileNotFoundError) as error:
        raise FormatError(f"{path}: cannot load the resident tensors: {brief(error)}") from error
    set_windows(model, normal)
    set_positions(model, normal, context)
    mx.set_cache_limit(cache_limit_bytes(spec.dim))
    mx.clear_cache()
    return model


def _model_class(
    spec: ModelSpec, ffns: Sequence[FFN], config: Mapping[str, Any]
) -> tuple[Callable[[Any], nn.Module], type]:
    """What mlx-lm calls to make a model: its own class, with the FFN modules replaced before weights are loaded. Strict
    loading then asks for the resident tensors only, and the FFNs' own, lazy until used, are never allocated."""
    attribute = spec.table.attribute
    code = fit_architecture(spec.table.mlx_module or spec.family, config)

    def make(args: Any) -> nn.Module:
        model = flash_model(code.Model, spec.tied, config)(args)
        if len(model.layers) != len(ffns):
            raise ConfigError(f"mlx-lm builds {len(model.layers)} layers, the checkpoint has {len(ffns)}")
        for i, (layer, ffn) in enumerate(zip(model.layers, ffns, strict=True)):
            biases: list[tuple[str, int]] = []
            if isinstance(spec, DenseSpec):
                check_module(getattr(layer, attribute), spec, i)
            if spec.ffn_bias:
                sizes = {"up": spec.layers[i].intermediate, "down": spec.dim, "gate": spec.layers[i].intermediate}
                names = {role: spec.table.names[role].rpartition(".")[2] for role in sizes if role in spec.table.names}
                biases = [(name, sizes[role]) for role, name in names.items()]
            setattr(layer, attribute, FlashFFNModule(ffn, biases))
        fit_dense_modules(model, config)
        return model

    return make, code.ModelArgs


def _config(spec: ModelSpec) -> dict[str, Any]:
    """What the spec says, in mlx-lm's keys: its own defaults and spellings (`rope_parameters`, whether the head is
    tied when the config is silent) are not those of every config.json, and both backends must read one config alike."""
    if isinstance(spec, DenseSpec):  # MiniCPM's scale of the head is left out by mlx-lm where it is tied
        return {"tie_word_embeddings": False} if spec.family == "minicpm" else {}
    rope = spec.rope
    if rope is None:
        raise ConfigError(f"family {spec.family!r} without rotary positions does not run on mlx")
    if spec.table.config_form == "openelm":
        return {
            "share_input_output_layers": spec.tied,
            "normalize_qk_projections": spec.qk_norm,
            "rms_norm_eps": spec.eps,
            "rope_freq_constant": rope.base,
        }
    return {
        "tie_word_embeddings": spec.tied,
        "head_dim": spec.head_dim,
        "num_key_value_heads": spec.layers[0].kv_heads,
        "max_position_embeddings": spec.max_context,
        "rope_theta": rope.base,
        "rope_scaling": None,  # positions are set when the model is built
        "layer_types": None,
        "sliding_window": None,
    }


def load_tokenizer(path: Path, eos_ids: Sequence[int]) -> Any:
    """mlx-lm's tokenizer of a folder, which stops at any of `eos_ids` (none given: at the tokenizer's own)."""
    with reading_tokenizer(path) as keywords:
        return compat.load_tokenizer(path, dict(keywords), eos_token_ids=list(eos_ids) or None)


def steps(
    model: nn.Module,
    prompt_ids: Sequence[int],
    max_tokens: int,
    sampling: Sampling,
    prefill_chunk: int,
    prompt_cache: PromptCache | None = None,
) -> Iterator[int]:
    """Yield the ids of a reply, at most `max_tokens`. The prompt runs in chunks of `prefill_chunk` tokens, except for
    the tokens at its beginning that `prompt_cache` holds."""
    if max_tokens < 1:
        return
    if sampling.seed is not None:
        mx.random.seed(sampling.seed)
    temp = 0.0 if sampling.temp < LEAST_TEMPERATURE else sampling.temp
    top_k = sampling.top_k if sampling.top_k < model.flash.plan.spec.vocab else 0  # mlx-lm refuses more
    sampler = make_sampler(temp=temp, top_p=sampling.top_p, top_k=top_k)
    reply = MlxReply(model, prefill_chunk, prompt_cache or PromptCache())
    with wired(model):
        loop = steps_ahead if never_reads(model.flash.plan) else steps_in_turn
        yield from loop(reply, prompt_ids, max_tokens, sampler)


def forced(
    model: nn.Module, prompt_ids: Sequence[int], next_ids: Sequence[int], prefill_chunk: int
) -> Iterator[np.ndarray]:
    """Yield the logits (vocab,) fp32 after the prompt, then after each of `next_ids`."""
    reply = MlxReply(model, prefill_chunk, PromptCache())
    logits = reply.prefill(prompt_ids)
    yield np.array(logits[0].astype(mx.float32))
    for token in next_ids:
        yield np.array(reply.decode(mx.array([token], mx.int32))[0].astype(mx.float32))


def keys_read(config: Mapping[str, Any]) -> frozenset[str]:
    """The keys of a config that are read: by our readers, or by mlx-lm's code of the architecture."""
    values = normalise(config)
    if values.get("model_type") in FAMILIES:
        return OWN
    text = values.get("text_config")
    kinds = [values.get("model_type"), text.get("model_type") if isinstance(text, Mapping) else None]
    found: set[str] = set()
    for kind in kinds:
        try:
            module = architecture(MODEL_REMAPPING.get(str(kind), str(kind)))
        except ImportError:  # the text model has no file of its own
            continue
        used = {
            str(getattr(each, "__module__", None) or getattr(each, "__name__", "")) for each in vars(module).values()
        }
        for name in used | {module.__name__}:
            for each in vars(sys.modules[name]).values() if name.startswith("mlx_lm.models.") else ():
                if isinstance(each, type) and is_dataclass(each):
                    found |= {field.name for field in fields(each)}
    return frozenset(found)
