"""The plan of a conversion, made before a byte is written: which tensors the source must have, and what is written of
each.

Where a family keeps its tensors is said in specs/families.py.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_flash.engine.storage.bundle import ITEM_BYTES, Layout, quantised
from mlx_flash.errors import ConfigError, UsageError
from mlx_flash.models.specs.config_normal_form import normalise
from mlx_flash.models.specs.config_reader import family_of, read_spec
from mlx_flash.models.specs.dense_families import DENSE, HARMLESS, DenseSpec
from mlx_flash.models.specs.end_tokens import end_ids
from mlx_flash.models.specs.folder import first_names, is_there, safe_file
from mlx_flash.models.specs.mixtures import is_mixture
from mlx_flash.models.specs.model_spec import ModelSpec
from mlx_flash.models.specs.quantisation import (
    Entries,
    check_no_small_floats,
    coded_shapes,
    find_codings,
    plain_shapes,
    quantization_object,
    read_quantisation,
)
from mlx_flash.models.specs.source import Source, source_hash, tokenizer_files
from mlx_flash.models.specs.tied_head import settle_head
from mlx_flash.models.specs.wrappers import wrapped_type

from .neuron_groups import Codings, Dequantised, group_layouts, known_shapes, numbers_dtype, stored_dtype
from .quantising import Encoder, make_encoder

MARGIN_BYTES = 16 << 20  # config, headers and the file system's own


@dataclass(frozen=True)
class Settings:
    """The options of a conversion.

    quantise: bits, group size, bits of the dense part (None: the same); requantise: also weights that are quantised
    """

    dtype: str | None = None
    quantise: tuple[int, int, int | None] | None = None
    requantise: bool = False

    @property
    def options(self) -> list[Any] | None:
        """The options that the hash of the source covers, besides the dtype; None for none."""
        return None if self.quantise is None else [*self.quantise, *(["requantise"] if self.requantise else [])]

    def encoder(self, spec: ModelSpec, dtype: str) -> Encoder | None:
        return None if self.quantise is None else make_encoder(spec, dtype, *self.quantise, self.requantise)


@dataclass(frozen=True)
class ConversionPlan:
    """What a conversion will write, and from what."""

    spec: ModelSpec
    dtype: str
    config: dict[str, Any]
    layouts: tuple[Layout, ...]
    encoder: Encoder | None
    groups: bool  # whether FFNs are copied as they are, in groups of neurons
    copied: bool  # whether the resident tensors are copied as they are
    resident: dict[str, tuple[int, ...]]  # in the order in which the source holds them
    stored: dict[str, tuple[str, tuple[int, ...]]]  # dtype and shape on disk of the same, scales and biases included
    tokenizer: tuple[Path, ...]
    copies: tuple[Path, ...]
    note: str | None = None  # what to tell the user

    @property
    def nbytes(self) -> int:
        resident = sum(ITEM_BYTES[dtype] * int(np.prod(shape)) for dtype, shape in self.stored.values())
        others = sum(path.stat().st_size for path in self.tokenizer + self.copies)
        return resident + others + sum(layout.file_bytes for layout in self.layouts) + MARGIN_BYTES


@dataclass(frozen=True)
class _Read:
    """A source whose headers have been read and fit its config.

    entries: config.json's "quantization", if any; note: what to tell the user about the head
    """

    spec: ModelSpec
    entries: Entries | None
    codings: Codings
    note: str | None

    @property
    def groups(self) -> bool:
        """Whether the FFNs are quantised, so that they are copied in groups of neurons."""
        return any(name in self.codings for name in self.spec.ffn_shapes())


def make_plan(source: Source, settings: Settings, tokenizer: Path | None) -> ConversionPlan:
    """What a conversion will write; `source` gets its tensors opened and its head settled.

    tokenizer: the folder or file that it is taken from, if not the source's. Raises UsageError, ConfigError,
    FormatError.
    """
    read = _read(source, settings)
    spec, codings = read.spec, read.codings
    kind, layouts = _layouts(source, settings, read)
    encoder = settings.encoder(spec, kind)
    if encoder is not None:
        layouts = tuple(quantised(layout, encoder.bundles) for layout in layouts)
    resident = dict(sorted(spec.resident_shapes().items(), key=lambda item: _place(source, item[0])))
    flash = {
        "format_version": max(layout.version for layout in layouts),
        "activation": spec.activation,
        "dtype": kind,
        "layers": [layout.to_json() for layout in layouts],
        "source_hash": source_hash(source.folder, dtype=settings.dtype, tokenizer=tokenizer, more=settings.options),
    }
    copies = [safe_file(source.folder, n) for n in ("generation_config.json",) if is_there(source.folder, n)]
    return ConversionPlan(
        spec=spec,
        dtype=kind,
        config=_config(source, read, kind, encoder) | {"flash": flash},
        layouts=layouts,
        encoder=encoder,
        groups=read.groups,
        copied=bool(codings),
        resident=resident,
        stored=_stored(source, resident, kind, encoder, codings),
        tokenizer=tuple(tokenizer_files(tokenizer or source.folder)),
        copies=tuple(copies),
        note=read.note,
    )


def _read(source: Source, settings: Settings) -> _Read:
    """Raises what makes a source impossible to convert."""
    if "flash" in source.config:
        raise UsageError(f"{source.folder} is a flash checkpoint already; it needs no conversion")
    if is_mixture(source.config):
        raise UsageError(
            f"{source.folder} is a mixture of experts, which is read in place: give it to generate as it is"
        )
    if family_of(source.config) not in DENSE:
        read_spec(source.config)  # what is unknown is named before its files are looked for
    entries = None if isinstance(source, Dequantised) else read_quantisation(source.config)
    _check_settings(source, settings, None if entries is None else str(entries.default))
    source.open_tensors()
    every = {name: tensor.info for name, tensor in source.tensors.items()}
    check_no_small_floats(every)
    settled = settle_head(source)
    source.config, source.tensors = settled.config, settled.tensors
    # An entry may be about a head that is left out.
    codings = find_codings(entries, every, {} if entries is None else known_shapes(source))
    codings = {name: coding for name, coding in codings.items() if name in source.tensors}
    spec = read_spec(source.config, plain_shapes({name: every[name] for name in source.tensors}, codings))
    end_ids(source.folder, source.config, spec.vocab)  # what is wrong with them is said before anything is written
    check_tensors(source, spec, coded_shapes(spec.resident_shapes() | spec.ffn_shapes(), codings))
    return _Read(spec, entries, codings, settled.note)


def _layouts(source: Source, settings: Settings, read: _Read) -> tuple[str, tuple[Layout, ...]]:
    """The dtype of the numbers, and the layers' bundles before they are quantised."""
    spec = read.spec
    if read.groups:
        layouts = group_layouts(source, spec, read.codings)
        return numbers_dtype(source, spec, layouts), layouts
    for name in spec.resident_shapes() | spec.ffn_shapes():
        stored_dtype(source, name) if name in read.codings else source.dtype(name)  # raises for one that is not known
    kind = settings.dtype or _ffn_dtype(source, spec)
    return kind, tuple(spec.layout(i, kind) for i in range(len(spec.layers)))


def _config(source: Source, read: _Read, kind: str, encoder: Encoder | None) -> dict[str, Any]:
    """The config of the flash checkpoint, without its "flash" object."""
    config = normalised_config(source.config, read.spec, kind)
    if read.entries is not None:
        config["quantization"] = quantization_object(read.entries, read.codings, read.spec.resident_shapes())
    if encoder is not None and encoder.dense is not None:  # for mlx-lm
        sizes = {"group_size": encoder.dense.group_size, "bits": encoder.dense.bits}
        config["quantization"] = sizes | {"mode": "affine"}
    return config


def _check_settings(source: Source, settings: Settings, quantised: str | None) -> None:
    """Raise UsageError for options that do not go with the source. quantised: how it is quantised; None: it is not."""
    if settings.requantise and settings.quantise is None:
        raise UsageError("--requantize goes with -q, which says how")
    if settings.requantise and not isinstance(source, Dequantised):
        raise UsageError(f"{source.folder} is not quantised; -q without --requantize quantises it")
    if quantised is None:
        return
    if settings.quantise is not None:
        raise UsageError(
            f"{source.folder} is quantised already, to {quantised}; convert it as it is, without -q, or add "
            "--requantize, which loses a little"
        )
    if settings.dtype is not None:
        raise UsageError(f"{source.folder} is quantised already and is copied as it is, without --dtype")


def _stored(
    source: Source, resident: dict[str, tuple[int, ...]], dtype: str, encoder: Encoder | None, codings: Codings
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape on disk of the tensors that stay resident."""
    if encoder is not None:
        return encoder.tensors(resident)
    if not codings:
        return {name: (dtype, shape) for name, shape in resident.items()}
    return {name: (stored_dtype(source, name), shape) for name, shape in coded_shapes(resident, codings).items()}


def _place(source: Source, name: str) -> tuple[str, int]:
    tensor = source.tensors[name]
    return tensor.path.name, tensor.info.offset


def check_tensors(source: Source, spec: ModelSpec, wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ConfigError unless the checkpoint has exactly the tensors in `wanted`, which its config describes."""
    missing = [name for name in wanted if name not in source.tensors]
    if missing == [spec.table.names.get("head", "") + ".weight"]:
        raise ConfigError(
            f"{source.folder} has no {missing[0]}, while config.json says that the head is not the embedding; set "
            "tie_word_embeddings to true there if it is, else the checkpoint is incomplete"
        )
    if missing:
        raise ConfigError(f"{source.folder} lacks {len(missing)} of {len(wanted)} tensors: {first_names(missing)}")
    wrong = [
        f"{name} is {list(source.tensors[name].info.shape)}, config.json says {list(shape)}"
        for name, shape in wanted.items()
        if source.tensors[name].info.shape != shape
    ]
    if wrong:
        raise ConfigError(f"{source.folder} has {len(wrong)} tensors of another shape: {first_names(wrong)}")
    head = spec.name("head") + "." if spec.tied and "head" in spec.table.names else None
    extra = [
        name
        for name in source.tensors
        if name not in wanted
        and not (head is not None and name.startswith(head))
        and not any(fnmatch.fnmatchcase(name, pattern) for pattern in HARMLESS)
    ]
    if extra:
        raise ConfigError(
            f"{source.folder} has {len(extra)} tensors that {spec.table.title} does not have, so it is "
            f"not what config.json says: {first_names(extra)}"
        )


def _ffn_dtype(source: Source, spec: ModelSpec) -> str:
    found = {source.dtype(name) for name in spec.ffn_shapes()}
    if len(found) > 1:
        raise ConfigError(f"{source.folder} mixes {' and '.join(sorted(found))} in its FFNs; choose one with dtype")
    return found.pop()


def normalised_config(config: Mapping[str, Any], spec: ModelSpec, dtype: str) -> dict[str, Any]:
    """The config with every default spelled out on which readers differ, so that all read the same model.

    Keys that name Python code of the original repository go: it is not copied, and nothing here runs it.
    """
    result = {key: value for key, value in config.items() if key not in ("auto_map", "model_file")}
    result["torch_dtype"] = dtype
    if "dtype" in result:
        result["dtype"] = dtype
    if isinstance(spec, DenseSpec):
        return result  # mlx-lm's own code reads it
    if wrapped_type(config) is not None:  # the text model's keys are read from where they are
        return result | {"tie_word_embeddings": spec.tied}
    if spec.family == "openelm":
        return result | {"share_input_output_layers": spec.tied}
    result["tie_word_embeddings"] = spec.tied
    if spec.rope is None:
        return result
    layer = spec.layers[0]
    result |= {"head_dim": spec.head_dim, "num_key_value_heads": layer.kv_heads, "rope_theta": spec.rope.base}
    result["max_position_embeddings"] = config.get("max_position_embeddings") or 2048
    if not result.get("rope_scaling") and spec.rope.kind != "default":
        result["rope_scaling"] = normalise(config)["rope_scaling"]
    return result
