"""A mixture of experts as downloaded, on mlx-lm's own model: where its experts lie in the files, and its memory.

Builds mlx-lm's model without evaluating anything. Which bytes of a file are an expert is not guessed from names: the
array in the model must be the one that was loaded, or a stack of such arrays. Needs mlx-lm.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_flash.engine.backends.base import Backend
from mlx_flash.engine.backends.mlx.backend import available, cache_limit_bytes
from mlx_flash.engine.backends.mlx.slab import DTYPES, PAGE, MlxExpertSlab
from mlx_flash.engine.selection.router import RouterSelector
from mlx_flash.engine.storage.bundle import Layout, Part
from mlx_flash.engine.storage.extents import LayerExtents
from mlx_flash.engine.storage.header import TensorInfo
from mlx_flash.errors import BackendError, ConfigError, FormatError
from mlx_flash.models.specs.attention_windows import text_config
from mlx_flash.models.specs.config_normal_form import normalise
from mlx_flash.models.specs.head_tensors import fields_of, head_of

from .compat import brief, load_model, make_prompt_cache
from .flash_modules import flash_model
from .fused_experts import Piece, unfuse
from .joined_experts import take_joined
from .kv_cache import kv_bytes
from .mixture_corrections import (
    add_correction,
    fit_arithmetic,
    fit_mixture_modules,
    fit_mixture_weights,
    kept_weights,
    note_of,
)
from .positions import mlx_keys, set_positions, set_windows
from .routers import Router, find_router
from .switch_layers import SWITCHES, ExpertModule, SlotExperts, Survey, expert_arrays

NAMES = {dtype: name for name, dtype in DTYPES.items()}
TAGS = {"float32": ("F32",), "float16": ("F16",), "bfloat16": ("BF16",), "uint32": ("U32",), "uint8": ("U8", "F8_E8M0")}
FLOATS = ("float32", "float16", "bfloat16")
Tensors = Mapping[str, tuple[Path, TensorInfo]]
CONVERT = "convert it with mlx_lm.convert first; the result runs in place"


@dataclass
class _Loaded:
    """What was loaded, and what sanitizing made of it: name by the array's id, what part of a tensor it is if not all,
    and the arrays that a stack consists of. Holds them all, so that no id is used twice."""

    names: dict[int, str] = field(default_factory=dict)
    pieces: dict[int, Piece] = field(default_factory=dict)
    stacks: dict[int, list[mx.array]] = field(default_factory=dict)
    held: list[Any] = field(default_factory=list)

    def note(self, weights: Mapping[str, mx.array], pieces: Mapping[str, Piece]) -> None:
        self.names = {id(array): name for name, array in weights.items() if name not in pieces}
        self.pieces = {id(weights[name]): piece for name, piece in pieces.items()}
        self.held.append(dict(weights))

    def clear(self) -> None:
        self.names, self.pieces, self.stacks, self.held = {}, {}, {}, []

    @contextmanager
    def noting_stacks(self) -> Iterator[None]:
        """Within, `mx.stack` over a new first axis is noted: this is how mlx-lm joins experts that have a tensor
        each."""
        real = mx.stack

        def stack(arrays: list[mx.array], axis: int = 0, **options: Any) -> mx.array:
            made = real(arrays, axis, **options)
            if axis == 0:
                self.stacks[id(made)] = list(arrays)
                self.held.append(made)
            return made

        mx.stack = stack  # type: ignore[assignment]
        try:
            yield
        finally:
            mx.stack = real


@dataclass
class ExpertModel:
    """An mlx-lm model that holds no experts. Nothing has been evaluated until `start`.

    config: as mlx-lm read it; original: as the folder has it. paths: its switch layers' names; extents, shapes, top_k,
    kinds per switch layer: where the experts are, each part's shape for one expert, experts chosen per token, and a
    number that layers with equal experts share. routers: what says which experts a layer chooses, None where it was not
    found. note: what is to be told about the checkpoint.
    """

    model: nn.Module
    config: dict[str, Any]
    original: Mapping[str, Any]
    paths: list[str]
    switches: list[nn.Module]
    extents: list[LayerExtents]
    shapes: list[dict[str, tuple[int, ...]]]
    top_k: list[int]
    kinds: list[int]
    routers: list[Router | None]
    note: str | None = None

    @property
    def foresees(self) -> bool:
        """Whether the choice of some layer can be guessed in the layer before it."""
        return any(router is not None for router in self.routers[1:])

    @property
    def dense_bytes(self) -> int:
        parameters: Any = tree_flatten(self.model.parameters())
        return sum(array.nbytes for _, array in parameters)

    @property
    def dtype(self) -> str:
        """The dtype of activations: that of the experts' floats, weights or scales; bfloat16 if they have none."""
        names = [part.dtype for part in self.extents[0].layout.parts if part.dtype in FLOATS]
        return names[0] if names else "bfloat16"

    def slot_bytes(self, layer: int) -> int:
        return self.extents[layer].layout.bundle_bytes

    @property
    def page_bytes(self) -> int:
        """The most bytes that rounding slabs up to pages costs."""
        return 2 * PAGE * sum(len(extents.layout.parts) for extents in self.extents)

    def kv_bytes(self, tokens: int, chunk: int) -> int:
        return kv_bytes(self.model, tokens, chunk)

    def scratch_bytes(self, chunk: int, context: int) -> int:
        """About what a prefill of `chunk` tokens takes beyond weights, slabs and KV cache: hidden states and gathered
        rows of its pairs, their products, the scores of attention where no kernel keeps them small."""
        dim, chunk = self.number("hidden_size", "d_model", "n_embd", default=4096), min(chunk, context)
        widest = max(shape[0] for shapes in self.shapes for shape in shapes.values() if len(shape) == 2)
        pairs = chunk * max(self.top_k)
        heads = self.number("num_attention_heads", "n_heads", "num_heads", default=32)
        scores = 0 if available() else 2 * 4 * heads * chunk * context
        return max(scores, 4 * pairs * (3 * widest + 3 * dim)) + 4 * chunk * 8 * dim + cache_limit_bytes(dim)

    def number(self, *keys: str, default: int) -> int:
        """A whole number of the config, or of the part of it that is about text."""
        for config in (self.config, self.config.get("text_config") or {}):
            for key in keys:
                if type(config.get(key)) is int and config[key] > 0:
                    return int(config[key])
        return default

    def slab(self, layer: int, rows: int) -> MlxExpertSlab | None:
        """Memory for `rows` experts of a layer."""
        return MlxExpertSlab(self.extents[layer].layout, self.shapes[layer], rows) if rows else None

    def start(self, make_selector: Callable[[int], RouterSelector], context: int = 0) -> nn.Module:
        """The model, its dense part in memory and its experts behind the selectors. context: what decides between
        tables of positions; mlx-lm's caches grow. Raises ConfigError, FormatError."""
        set_positions(self.model, self.original, context)
        try:
            mx.eval(self.model.parameters())
        except RuntimeError as error:
            raise FormatError(f"cannot load the resident tensors: {error}") from error
        following = [*self.routers[1:], None]
        for layer, (path, switch) in enumerate(zip(self.paths, self.switches, strict=True)):
            selector = make_selector(layer)
            if selector.look_ahead is not None and self.routers[layer] is not None:
                selector.look_ahead.add_router(layer, np.array)  # the layer before it has applied the router
            _put(self.model, path, ExpertModule(SlotExperts(switch, selector, following[layer])))
        self.switches = []
        mx.set_cache_limit(cache_limit_bytes(self.number("hidden_size", "d_model", "n_embd", default=4096)))
        mx.clear_cache()
        return self.model


def open_experts(folder: Path, tensors: Tensors, config: Mapping[str, Any], backend: Backend) -> ExpertModel:
    """mlx-lm's model of a folder, its switch layers taken out, and where their experts lie.

    tensors: every tensor of the folder's files that the model has, checked. config: its config.json, with whether the
    head is tied set right. backend: not used, mlx-lm's modules compute.

    Raises ConfigError for an architecture that mlx-lm does not have or whose experts are no switch layers, FormatError
    for tensors that are not the model's or that no expert's bytes can be read from as they are, BackendError for what
    MLX cannot compute here.
    """
    loaded, normal = _Loaded(), normalise(config)
    model, built = _build(folder, tensors, normal, loaded)
    set_windows(model, text_config(normal))
    fit_arithmetic(model, normal)
    switches = [(path, module) for path, module in model.named_modules() if type(module) in SWITCHES]
    switches.sort(key=_in_order)
    if not switches:
        raise ConfigError(
            f"{folder}: mlx-lm's {built.get('model_type')!r} keeps its experts in no SwitchGLU or SwitchMLP, so that "
            "they cannot be read one by one; run it with mlx-lm itself"
        )
    extents, shapes, surveys = [], [], []
    for path, switch in switches:
        arrays = expert_arrays(switch)
        extents.append(_extents(path, arrays, tensors, loaded))
        shapes.append({name: tuple(array.shape[1:]) for name, array in arrays.items()})
        surveys.append(Survey())
        _put(model, path, ExpertModule(surveys[-1]))
    for (path, _), each in zip(switches, extents, strict=True):
        _check_arithmetic(folder, path, each.layout)
    model(mx.zeros((1, 1), mx.int32), cache=make_prompt_cache(model))  # shapes only: the surveys note what is chosen
    alike = [(each.layout.parts, shape) for each, shape in zip(extents, shapes, strict=True)]
    kinds = [alike.index(each) for each in alike]
    paths, modules = [path for path, _ in switches], [module for _, module in switches]
    top_k = [max(1, survey.top_k) for survey in surveys]
    found = zip(paths, extents, surveys, strict=True)
    routers = [find_router(model, path, each.layout.count, survey.width) for path, each, survey in found]
    for module in modules:  # the lazy arrays, and the files that they hold open
        for part, array in expert_arrays(module).items():
            name, key = part.split(".")
            module[name][key] = mx.zeros((0, *array.shape[1:]), array.dtype)
    loaded.clear()
    note = note_of(normal, tensors.keys())
    return ExpertModel(model, built, config, paths, modules, extents, shapes, top_k, kinds, routers, note)


def _in_order(switch: tuple[str, nn.Module]) -> list[tuple[int, str]]:
    """By the numbers in a path, as layers are called: mlx lists modules the other way round."""
    return [(int(name), "") if name.isdigit() else (-1, name) for name in switch[0].split(".")]


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    model.update_modules(tree_unflatten([(path, module)]))


def _build(
    folder: Path, tensors: Tensors, config: Mapping[str, Any], loaded: _Loaded
) -> tuple[nn.Module, dict[str, Any]]:
    """mlx-lm's model, everything lazy. config: normalised."""
    given, normal = dict(config) | mlx_keys(config), config
    classes = inspect.signature(load_model).parameters["get_model_classes"].default
    tied = config.get("tie_word_embeddings") is True

    def watched(config: dict[str, Any]) -> tuple[Any, Any]:
        model_class, args_class = classes(config)
        return _watched(flash_model(model_class, tied), loaded, tensors, normal), args_class

    try:
        return load_model(folder, lazy=True, strict=True, model_config=given, get_model_classes=watched)
    except (TypeError, KeyError, AttributeError) as error:  # a key that mlx-lm's config or code misses
        raise ConfigError(f"{folder / 'config.json'}: mlx-lm cannot build this model: {error!r}") from error
    except (ValueError, RuntimeError, FileNotFoundError) as error:
        if "not supported" in str(error) and not loaded.names:
            raise ConfigError(f"{folder / 'config.json'}: mlx-lm has no such model: {error}") from error
        raise FormatError(f"{folder}: the tensors are not those of the model: {brief(error)}") from error


def _watched(model_class: type, loaded: _Loaded, tensors: Tensors, config: Mapping[str, Any]) -> type:
    """The class, with the modules that a normalised config asks for, whose `sanitize` notes what comes in and which
    stacks it makes. A head that is not among `tensors`, because the model shares the embedding's, is left out."""

    class Watched(model_class):
        def __init__(self, *arguments: Any):
            super().__init__(*arguments)
            fit_mixture_modules(self, config)

        def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            head = head_of(weights)
            if head is not None and head not in tensors:
                unused = fields_of(head, weights)
                weights = {name: array for name, array in weights.items() if name not in unused}
            kept, pieces = unfuse(kept_weights(config, weights), config)
            aside, more = take_joined(self, config, kept)
            loaded.note(kept | aside, pieces | more)
            with loaded.noting_stacks():
                found: dict[str, mx.array] = super().sanitize(kept) if hasattr(model_class, "sanitize") else kept
                found = fit_mixture_weights(self, config, found)
            add_correction(self, weights, found)
            return found | aside

    return Watched


def _extents(path: str, arrays: Mapping[str, mx.array], tensors: Tensors, loaded: _Loaded) -> LayerExtents:
    """Where the experts of one switch layer lie. Raises FormatError."""
    counts = {array.shape[0] for array in arrays.values()}
    if len(counts) != 1:
        raise FormatError(f"{path}: its tensors are stacks of {sorted(counts)} experts, not all of as many")
    count = counts.pop()
    parts, files, offsets, paths = [], [], [], []
    for name, array in arrays.items():
        label = f"{path}.{name}"
        if array.dtype not in NAMES:
            raise FormatError(f"{label} is {array.dtype}, which experts cannot be; {CONVERT}")
        part = Part(name, NAMES[array.dtype], array.size // count)
        piece = loaded.pieces.get(id(array))
        whole = piece.source if piece else loaded.names.get(id(array))
        sources = [whole] if whole else [loaded.names.get(id(each)) for each in loaded.stacks.get(id(array), [])]
        if not sources or None in sources:
            raise FormatError(
                f"{label} is computed from what is in the files (mlx-lm joins, cuts, turns or decodes it), so no "
                f"expert can be read from them as it is; {CONVERT}"
            )
        shape = piece.shape if piece else tuple(array.shape if whole else array.shape[1:])
        tags = (*TAGS[part.dtype], "U8") if piece else TAGS[part.dtype]  # MXFP4's codes are bytes, read by fours
        found = [_tensor(str(source), label, part, shape, tags, tensors) for source in sources]
        step, first = (part.nbytes if whole else 0), 0
        if piece:
            step, first = step * piece.pieces, step * piece.which
        at = [info.offset + first + e * step for e, (_, info) in enumerate(found * (count if whole else 1))]
        paths += [file for file, _ in found if file not in paths]
        files.append([paths.index(file) for file, _ in found] * (count if whole else 1))
        offsets.append(at)
        parts.append(part)
    floats = {
        part.name: part.dtype for part in parts if part.dtype in FLOATS and not part.name.endswith(".global_scale")
    }
    if len(set(floats.values())) > 1:
        mixture = ", ".join(f"{name} {dtype}" for name, dtype in floats.items())
        raise FormatError(
            f"{path} mixes precisions ({mixture}), which MLX would cast at every step; convert the model to one "
            "with mlx_lm.convert --dtype"
        )
    return LayerExtents(
        tuple(paths), Layout(tuple(parts), count), np.array(files, np.int64), np.array(offsets, np.int64)
    )


def _tensor(
    source: str, label: str, part: Part, shape: Sequence[int], tags: Sequence[str], tensors: Tensors
) -> tuple[Path, TensorInfo]:
    """A tensor that holds an expert's part, or all of them: as the model has it. Raises FormatError."""
    if source not in tensors:
        raise FormatError(f"{label}: tensor {source!r} is in a file that the folder's index does not name")
    file, info = tensors[source]
    if info.dtype not in tags or tuple(info.shape) != tuple(shape):
        raise FormatError(
            f"{label} is {part.dtype} {list(shape)} in the model, but tensor {source!r} in {file.name} is {info.dtype} "
            f"{list(info.shape)}: experts of several precisions or shapes; {CONVERT}"
        )
    return file, info


def _check_arithmetic(folder: Path, path: str, layout: Layout) -> None:
    """Raise BackendError where MLX has no kernel for these experts on this machine."""
    weights = {part.dtype for part in layout.parts if part.name.endswith(".weight")}
    if not available() and weights & {"bfloat16", "float16"}:
        raise BackendError(
            f"{folder}: {path} is {', '.join(sorted(weights))}; without a GPU MLX multiplies experts in float32 or "
            "quantised ones only: use a quantised checkpoint (mlx_lm.convert -q), or --backend numpy where it runs "
            "this family"
        )
