"""Which tensors of a model are quantised, and how: config.json's "quantization" object, as mlx-lm writes it.

Knows names and shapes; neither reads tensors nor computes with them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..affine import AffineRows
from ..errors import ConfigError
from ..storage.checkpoint import Checkpoint
from ..storage.layout import BITS, GROUP_SIZES, Layout, Quantisation, quantised
from .families import ModelSpec

KEYS = ("group_size", "bits", "mode")


def check_quantisation(bits: Any, group_size: Any, what: str) -> Quantisation:
    """The quantisation of so many bits and such groups; raises ConfigError if it is not known. what: who asks."""
    if type(bits) is not int or bits not in BITS:
        raise ConfigError(f"{what}: {str(bits)[:20]} bits are not known; choose {' or '.join(map(str, BITS))}")
    if type(group_size) is not int or group_size not in GROUP_SIZES:
        known = ", ".join(map(str, GROUP_SIZES))
        raise ConfigError(f"{what}: groups of {str(group_size)[:20]} are not known; choose one of {known}")
    return Quantisation(bits, group_size)


def read_quantisation(config: Mapping[str, Any]) -> Quantisation | None:
    """How config.json says that matrices are quantised, or None. Raises ConfigError for what is not MLX's affine
    format of 4 or 8 bits, and for matrices quantised in different ways."""
    if not config.get("quantization"):
        if config.get("quantization_config"):
            raise ConfigError(
                "config.json: 'quantization_config' is not of MLX's affine format, the only one that is known; "
                "convert the original checkpoint, or an MLX one"
            )
        return None
    value = config["quantization"]
    if not isinstance(value, Mapping):
        raise ConfigError(f"config.json: 'quantization' is {str(value)[:40]!r}, which is not an object")
    found = _one(value, "config.json: 'quantization'")
    for name, other in value.items():
        if name in KEYS or other is False or other is True:
            continue
        if not isinstance(other, Mapping):
            raise ConfigError(f"config.json: 'quantization' has {name[:80]!r}, which is not known")
        if _one({**value, **other}, f"config.json: 'quantization' of {name[:80]!r}") != found:
            raise ConfigError(
                f"config.json: 'quantization' differs for {name[:80]!r}; only matrices that are all quantised alike "
                "are known: convert with --requantize -q"
            )
    return found


def _one(value: Mapping[str, Any], what: str) -> Quantisation:
    if value.get("mode", "affine") != "affine":
        raise ConfigError(f"{what} is of the mode {str(value['mode'])[:20]!r}; only affine is known")
    return check_quantisation(value.get("bits"), value.get("group_size"), what)


def takes(shape: tuple[int, ...], quantisation: Quantisation) -> bool:
    """Whether a resident tensor of this shape is quantised: matrices are, as in mlx-lm, if their rows are whole
    groups."""
    return len(shape) == 2 and shape[1] % quantisation.group_size == 0


def coded_shapes(
    shapes: Mapping[str, tuple[int, ...]], coded: Collection[str], quantisation: Quantisation
) -> dict[str, tuple[int, ...]]:
    """Names and shapes on disk of the tensors in `shapes`, of which those in `coded` are quantised: `x.weight` is then
    codes, and `x.scales` and `x.biases` follow."""
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if name not in coded:
            found[name] = shape
            continue
        rows, columns = shape
        module = name.removesuffix(".weight")
        found[name] = (rows, quantisation.words(columns))
        found[module + ".scales"] = found[module + ".biases"] = (rows, quantisation.groups(columns))
    return found


def coded_names(shapes: Collection[str], names: Collection[str]) -> list[str]:
    """Those of `shapes` that have scales among the tensors `names`."""
    return [name for name in shapes if name.endswith(".weight") and name.removesuffix("weight") + "scales" in names]


def resident_shapes(checkpoint: Checkpoint, spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape on disk of every tensor that stays resident. Raises ConfigError for a quantisation that is not
    known."""
    shapes, found = spec.resident_shapes(), checkpoint.resident_tensors()
    quantisation = read_quantisation(checkpoint.config)
    return shapes if quantisation is None else coded_shapes(shapes, coded_names(shapes, found), quantisation)


def join_coded(tensors: Mapping[str, Any], bits: int) -> dict[str, Any]:
    """Each `x.weight` that has `x.scales` and `x.biases` beside it as one `AffineRows`."""
    found = dict(tensors)
    for name in coded_names(tensors, tensors):
        module = name.removesuffix(".weight")
        found[name] = AffineRows(found[name], found.pop(module + ".scales"), found.pop(module + ".biases"), bits)
    return found


def expected_layout(spec: ModelSpec, layer: int, dtype: str, found: Sequence[Layout]) -> Layout:
    """A layer's layout by the config, quantised as the bundles on flash are."""
    layout = spec.layout(layer, dtype)
    first = found[0]
    return layout if first.quantisation is None else quantised(layout, first.quantisation, first.neurons)
