"""The calibration file of a checkpoint: each layer's statistics, cut-offs and predictor, as `calibrate` measured them.

The file's name holds its hash, and config.json names the file. So a new calibration becomes valid when config.json is
replaced, and the old one stays valid if writing is interrupted. Knows arrays and names, not their use.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlx_flash.engine.system.memory import anonymous_memory
from mlx_flash.errors import FlashError, FormatError, ReadError, SpaceError

from .checkpoint import Checkpoint
from .header import read_header, read_metadata
from .json_file import format_error
from .writer import CONFIG, config_bytes, sync_folder

VERSION = 1
SHIPPED = "calibration.safetensors"  # its name in a folder that `convert` reads
ARRAY_DTYPES = {"F32": np.float32, "I8": np.int8}
ARRAYS = {
    "F32": ("rate", "energy", "curve", "predicted_curve", "bias", "step"),
    "I8": ("a", "b"),
}


@dataclass(frozen=True)
class LayerCalibration:
    """The calibration of one layer, of m neurons of width d. Its predictor, of rank r, says that a neuron fires if
    step * (b @ (a @ x)) + bias > 0.

    rate (m,) fp32: share of tokens that fire the neuron; energy (m,) fp32: mean of (h |down|)^2
    curve, predicted_curve (k, 2) fp32: slots, and misses per token of a window that needs them; (0, 2) when unknown
    a (r, d), b (m, r) int8, bias (m,) and step (1,) fp32; None without a predictor
    figures: plain values: rank, recall, precision, ..., cut-offs; `inspect` shows them
    """

    rate: np.ndarray
    energy: np.ndarray
    curve: np.ndarray
    predicted_curve: np.ndarray
    a: np.ndarray | None = None
    b: np.ndarray | None = None
    bias: np.ndarray | None = None
    step: np.ndarray | None = None
    figures: Mapping[str, Any] = field(default_factory=dict)

    @property
    def predictor_bytes(self) -> int:
        """Bytes that the predictor takes in memory and on disk."""
        return sum(array.nbytes for array in (self.a, self.b, self.bias, self.step) if array is not None)


@dataclass(frozen=True)
class Calibration:
    """The calibration of a model. summary: figures of the whole model: tokens seen, measured losses, ..."""

    layers: tuple[LayerCalibration, ...]
    summary: Mapping[str, Any]

    @property
    def has_predictors(self) -> bool:
        return all(layer.a is not None for layer in self.layers)


def model_identity(files: Mapping[str, Mapping[str, Any]]) -> str:
    """A hash of the weights that a calibration belongs to, from the hashes recorded in config.json."""
    weights = sorted((name, record["sha256"]) for name, record in files.items() if _is_weights(name))
    return hashlib.sha256(json.dumps(weights).encode()).hexdigest()


def _is_weights(name: str) -> bool:
    return name.endswith(".safetensors") and not name.startswith("flash/calibration-")


def encode(calibration: Calibration, identity: str) -> bytes:
    """The bytes of the file: safetensors, with tensors `layer-000.rate`, ... and the rest as JSON in its metadata."""
    tensors: dict[str, tuple[str, np.ndarray]] = {}
    for index, layer in enumerate(calibration.layers):
        for tag, names in ARRAYS.items():
            for name in names:
                value = getattr(layer, name)
                if value is not None:
                    tensors[f"layer-{index:03d}.{name}"] = (tag, np.ascontiguousarray(value, ARRAY_DTYPES[tag]))
    about = {
        "version": VERSION,
        "model": identity,
        "summary": dict(calibration.summary),
        "layers": [dict(layer.figures) for layer in calibration.layers],
    }
    header: dict[str, Any] = {"__metadata__": {"calibration": json.dumps(about)}}
    at = 0
    for name, (tag, value) in tensors.items():
        header[name] = {"dtype": tag, "shape": list(value.shape), "data_offsets": [at, at + value.nbytes]}
        at += value.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 16)
    return b"".join([len(text).to_bytes(8, "little"), text, *(value.tobytes() for _, value in tensors.values())])


def read_calibration(path: Path, dim: int, counts: tuple[int, ...], identity: str) -> Calibration:
    """Read a calibration and check that it fits the model. Raises FormatError naming the file, or ReadError."""
    try:
        tensors = read_header(path)
    except FormatError as error:
        raise FormatError(f"{error}, or make it anew: mlx_flash calibrate") from None
    try:
        about = json.loads(read_metadata(path).get("calibration", "null"))
        version, model, summary, figures = (about[k] for k in ("version", "model", "summary", "layers"))
    except (TypeError, KeyError, json.JSONDecodeError):
        raise _bad(path, "is not a calibration") from None
    if version != VERSION:
        raise _bad(path, f"has version {str(version)[:20]}, this mlx_flash reads {VERSION}")
    if model != identity:
        raise _bad(path, "belongs to another model")
    if not isinstance(figures, list) or len(figures) != len(counts) or not isinstance(summary, dict):
        raise _bad(path, f"has figures for {len(figures) if isinstance(figures, list) else 0} of {len(counts)} layers")
    data = _read(path)

    def array(layer: int, name: str, tag: str, shape: tuple[int | None, ...]) -> np.ndarray | None:
        info = tensors.get(f"layer-{layer:03d}.{name}")
        if info is None:
            return None
        fits = len(info.shape) == len(shape) and all(w in (None, n) for w, n in zip(shape, info.shape, strict=True))
        if info.dtype != tag or not fits:
            raise _bad(path, f"has layer {layer}'s {name} as {info.dtype} {list(info.shape)}, the model needs {tag} "
                             f"{['any' if n is None else n for n in shape]}")  # fmt: skip
        value = data[info.offset : info.offset + info.nbytes].view(ARRAY_DTYPES[tag]).reshape(info.shape)
        if not np.isfinite(value).all():
            raise _bad(path, f"has values in layer {layer}'s {name} that are not numbers")
        return value

    layers = []
    for index, count in enumerate(counts):
        plain = {name: array(index, name, "F32", (count,)) for name in ("rate", "energy")}
        curves = {name: array(index, name, "F32", (None, 2)) for name in ("curve", "predicted_curve")}
        missing = [name for name, value in (plain | curves).items() if value is None]
        a = array(index, "a", "I8", (None, dim))
        b = array(index, "b", "I8", (count, None if a is None else len(a)))
        bias, step = array(index, "bias", "F32", (count,)), array(index, "step", "F32", (1,))
        parts = {"a": a, "b": b, "bias": bias, "step": step}
        if missing or len({value is None for value in parts.values()}) > 1 or not isinstance(figures[index], dict):
            raise _bad(path, f"lacks a part of layer {index} ({', '.join(missing) or 'predictor'})")
        layers.append(LayerCalibration(**plain, **curves, **parts, figures=figures[index]))  # type: ignore[arg-type]
        if any(len(value) == 1 or (value < 0).any() for value in (layers[-1].curve, layers[-1].predicted_curve)):
            raise _bad(path, f"has a curve in layer {index} that is not one")
    try:
        _check_plain_values(summary, layers)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _bad(path, f"has figures that make no sense ({type(error).__name__}: {str(error)[:80]})") from None
    return Calibration(tuple(layers), summary)


def _check_plain_values(summary: Mapping[str, Any], layers: Sequence[LayerCalibration]) -> None:
    """Check the values that a run uses: `lead`, `sparsities`, `losses`, each layer's cut-offs and look-ahead margin.
    Raises errors of several types."""
    sparsities = _numbers(summary.get("sparsities", []))
    if sparsities != sorted(sparsities):
        raise ValueError("sparsities do not ascend")
    if (lead := summary.get("lead")) not in (None, "gate", "up"):
        raise ValueError(f"lead is {lead!r}")
    if not isinstance(summary.get("policy", {}), dict):
        raise ValueError("policy")
    for loss in summary.get("losses", {}).values():
        _numbers([loss["loss"], loss["tokens"]])
    for layer in layers:
        if lead and len(_numbers(layer.figures["cutoffs"][lead])) != len(sparsities):
            raise ValueError("cut-offs are not those of the sparsities")
        if layer.a is not None:
            _numbers([layer.figures["look_ahead"]["margin"]])


def _numbers(values: Any) -> list[float]:
    if not isinstance(values, list) or not all(type(v) in (int, float) and math.isfinite(v) for v in values):
        raise ValueError("not a list of numbers")
    return values


def load_calibration(checkpoint: Checkpoint) -> Calibration | None:
    """The calibration that a checkpoint names, or None if it has none. Raises FormatError or ReadError."""
    name = checkpoint.config["flash"].get("calibration")
    if name is None:
        return None
    if not isinstance(name, str) or name not in checkpoint.files:
        raise _bad(checkpoint.path / CONFIG, f"names the calibration {str(name)[:80]!r}, which is not one of its files")
    return read_calibration(
        checkpoint.path / name,
        checkpoint.layouts[0].dim,
        tuple(layout.count for layout in checkpoint.layouts),
        model_identity(checkpoint.files),
    )


def file_name(data: bytes) -> str:
    """The file's name, relative to the checkpoint."""
    return f"flash/calibration-{hashlib.sha256(data).hexdigest()[:8]}.safetensors"


def attach(checkpoint: Checkpoint, calibration: Calibration) -> Path:
    """Write a calibration into its checkpoint, replacing the old one. The old one stays valid until config.json is
    replaced, which is the last step and an atomic one. Raises SpaceError or FlashError."""
    data = encode(calibration, model_identity(checkpoint.files))
    name, old = file_name(data), checkpoint.config["flash"].get("calibration")
    files = {known: record for known, record in checkpoint.files.items() if known != old}
    files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    flash = {**checkpoint.config["flash"], "files": files, "calibration": name}
    try:
        _replace(checkpoint.path / name, data)
        _replace(checkpoint.path / CONFIG, config_bytes({**checkpoint.config, "flash": flash}))
        for path in (checkpoint.path / "flash").glob("calibration-*"):
            if path.name != Path(name).name:
                path.unlink(missing_ok=True)
    except OSError as error:
        kind = SpaceError if error.errno in (28, 122) else FlashError  # ENOSPC, EDQUOT
        raise kind(f"cannot write the calibration into {checkpoint.path}: {error.strerror or error}") from error
    return checkpoint.path / name


def _replace(path: Path, data: bytes) -> None:
    """Write a file atomically: it is there whole, or not at all."""
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _read(path: Path) -> np.ndarray:
    """All bytes of a file. Predictors are used in this memory, without a copy."""
    try:
        with path.open("rb", buffering=0) as file:
            data = anonymous_memory(os.fstat(file.fileno()).st_size)
            done = 0
            while done < len(data) and (count := file.readinto(data[done:].data)):
                done += count
    except OSError as error:
        raise ReadError(f"cannot read {path}: {error.strerror or error}") from error
    if done < len(data):
        raise ReadError(f"cannot read {path}: it ends after {done} of {len(data)} bytes")
    return data


def _bad(path: Path, problem: str) -> FormatError:
    return format_error(path, problem, "make it anew: mlx_flash calibrate")
