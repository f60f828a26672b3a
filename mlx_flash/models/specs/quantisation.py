"""How a model's tensors are quantised: config.json's "quantization" object, as mlx-lm reads it, and stored shapes.

Knows names and shapes; neither reads tensors nor computes with them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_flash.engine.numerics.affine import AffineRows
from mlx_flash.engine.storage.bundle import (
    AFFINE,
    AFFINE_BITS,
    BITS,
    GROUP_SIZES,
    SCALE_ONLY_MODES,
    WORD_BITS,
    Layout,
    Part,
    Quantisation,
    with_codings,
)
from mlx_flash.engine.storage.checkpoint import Checkpoint
from mlx_flash.engine.storage.header import TensorInfo
from mlx_flash.errors import ConfigError

from .model_spec import ModelSpec
from .wrappers import unwrap

KEYS = ("group_size", "bits", "mode")
DEFAULTS = {AFFINE: (4, 64)} | SCALE_ONLY_MODES  # MLX's bits and group size, where an entry does not say them
METHODS = {
    "aqlm": "AQLM",
    "awq": "AWQ",
    "bitnet": "BitNet",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "eetq": "EETQ",
    "fp8": "FP8 with block scales",
    "fbgemm_fp8": "FBGEMM FP8",
    "gptq": "GPTQ",
    "higgs": "HIGGS",
    "hqq": "HQQ",
    "modelopt": "NVIDIA ModelOpt",
    "mxfp4": "transformers' MXFP4",
    "quanto": "Quanto",
    "torchao": "torchao",
}
ORIGINAL = "use the original checkpoint, which is not quantised (convert -q quantises it), or one in MLX's formats"
Shape = tuple[int, ...]


def check_quantisation(bits: Any, group_size: Any, what: str) -> Quantisation:
    """The quantisation of so many bits and such groups, as `convert -q` makes it; raises ConfigError if it is not
    known. what: for the message, which setting it is."""
    if type(bits) is not int or bits not in BITS:
        raise ConfigError(f"{what}: {str(bits)[:20]} bits are not known; choose {' or '.join(map(str, BITS))}")
    if type(group_size) is not int or group_size not in GROUP_SIZES:
        known = ", ".join(map(str, GROUP_SIZES))
        raise ConfigError(f"{what}: groups of {str(group_size)[:20]} are not known; choose one of {known}")
    return Quantisation(bits, group_size)


@dataclass(frozen=True)
class Entries:
    """config.json's "quantization". modules: what it says of single ones; True: they are quantised by `default`, False:
    they are not quantised."""

    default: Quantisation
    modules: Mapping[str, Quantisation | bool]


def read_quantisation(config: Mapping[str, Any]) -> Entries | None:
    """What config.json says of MLX's formats, or None. Raises ConfigError for other kinds of quantisation, each by its
    name, and for settings that MLX does not have."""
    config = unwrap(dict(config))  # tensors are called as in the text model
    if not config.get("quantization"):
        if config.get("quantization_config"):
            raise ConfigError(_other_kind(config["quantization_config"]))
        return None
    value = config["quantization"]
    if not isinstance(value, Mapping):
        raise ConfigError(f"config.json: 'quantization' is {str(value)[:40]!r}, which is not an object; {ORIGINAL}")
    if config.get("quantize_activations"):
        raise ConfigError(f"config.json: 'quantize_activations' is set, and FFNs on flash do not do that; {ORIGINAL}")
    for key in ("bits", "group_size"):
        if value.get(key) is None:
            raise ConfigError(f"config.json: 'quantization' lacks {key!r}, so it is not of mlx-lm; {ORIGINAL}")
    modules: dict[str, Quantisation | bool] = {}
    for name, other in value.items():
        if name in KEYS:
            continue
        what = f"config.json: 'quantization' of {name[:80]!r}"
        if isinstance(other, Mapping):
            unknown = sorted(set(other) - set(KEYS))
            if unknown:
                raise ConfigError(f"{what} has {str(unknown[0])[:40]!r}, which is not known for an FFN on flash")
            modules[name] = _one(other, what)
        elif isinstance(other, bool):
            modules[name] = other
        else:
            raise ConfigError(f"config.json: 'quantization' has {name[:80]!r}: {str(other)[:40]!r}, which is neither "
                              f"true, false nor an object; {ORIGINAL}")  # fmt: skip
    return Entries(_one(value, "config.json: 'quantization'"), modules)


def _one(value: Mapping[str, Any], what: str) -> Quantisation:
    """An object's settings; what it does not say is MLX's default for its mode, as in mlx-lm."""
    mode = value.get("mode", AFFINE)
    if not isinstance(mode, str) or mode not in DEFAULTS:
        raise ConfigError(f"{what} is of the mode {str(mode)[:20]!r}; MLX has {', '.join(DEFAULTS)}: {ORIGINAL}")
    given = (value.get("bits"), value.get("group_size"))
    bits, size = (usual if each is None else each for each, usual in zip(given, DEFAULTS[mode], strict=True))
    known_bits = AFFINE_BITS if mode == AFFINE else DEFAULTS[mode][:1]
    if type(bits) is not int or bits not in known_bits:
        known = ", ".join(map(str, known_bits))
        raise ConfigError(f"{what}: {str(bits)[:20]} bits are not known; MLX has {known} ({mode}): {ORIGINAL}")
    known_sizes = GROUP_SIZES if mode == AFFINE else DEFAULTS[mode][1:]
    if type(size) is not int or size not in known_sizes:
        known = ", ".join(map(str, known_sizes))
        raise ConfigError(f"{what}: groups of {str(size)[:20]} are not known; MLX has {known} ({mode}): {ORIGINAL}")
    return Quantisation(bits, size, mode)


def _other_kind(value: Any) -> str:
    method = value.get("quant_method") if isinstance(value, Mapping) else value
    if not isinstance(method, str):
        return f"config.json: 'quantization_config' is {str(value)[:60]!r}, which names no known kind; {ORIGINAL}"
    kind = METHODS.get(method, repr(method[:40]))
    return f"config.json: 'quantization_config': the weights are quantised by {kind}, which is not read; {ORIGINAL}"


def check_no_small_floats(tensors: Mapping[str, TensorInfo]) -> None:
    """Raise ConfigError for tensors of 8-bit floats and smaller ones, whatever config.json says: their scales, if they
    have any, are other tensors, of which nothing is known."""
    small = [name for name, info in tensors.items() if info.dtype.startswith(("F8_", "F6_", "F4"))]
    if small:
        raise ConfigError(
            f"{len(small)} tensors are floats of 8 bits or fewer, such as {small[0]!r} ({tensors[small[0]].dtype}), "
            f"which are not read; {ORIGINAL}"
        )


def find_codings(
    entries: Entries | None,
    tensors: Mapping[str, TensorInfo],
    known: Mapping[str, Shape] | None = None,
    whole: bool = True,
) -> dict[str, Quantisation]:
    """How each quantised tensor `x.weight` is stored, by its name.

    known: the shapes of some matrices. whole: `tensors` are all that the model has. What "quantization" has no entry
    for is what its shapes say, as in mlx-lm. Raises ConfigError for an entry of a module that is not there or is stored
    otherwise, and for codes without scales.
    """
    if entries is None:
        return {}
    found: dict[str, Quantisation] = {}
    for name in quantised_names(tensors, tensors):
        found[name] = _coding(entries, name.removesuffix(".weight"), tensors, (known or {}).get(name))
    for name, info in tensors.items():
        if name.endswith(".weight") and info.dtype == "U32" and name not in found:
            module = name.removesuffix(".weight")
            raise ConfigError(f"the checkpoint lacks 1 of the tensors of {module}: {module}.scales; download it again")
    if whole:
        _check_entries(entries, found, tensors)
    return found


def _check_entries(entries: Entries, found: Mapping[str, Quantisation], tensors: Mapping[str, TensorInfo]) -> None:
    for module, entry in entries.modules.items():
        if entry is False or f"{module}.weight" in found:
            continue
        if f"{module}.weight" in tensors:
            raise ConfigError(
                f"config.json: 'quantization' has an entry for {module[:80]!r}, whose weights are stored as they are, "
                "without scales; take it out, or download the checkpoint again"
            )
        raise ConfigError(
            f"config.json: 'quantization' has an entry for {module[:80]!r}, of which the checkpoint has no weights; "
            "take it out, or download the checkpoint again"
        )


def _coding(entries: Entries, module: str, tensors: Mapping[str, TensorInfo], shape: Shape | None) -> Quantisation:
    """How a module that has scales is stored; shape: of its matrix, if that is known."""
    entry = entries.modules.get(module)
    codes, scales = tensors[f"{module}.weight"], tensors[f"{module}.scales"]
    if entry is False:
        raise ConfigError(
            f"config.json: 'quantization' says that {module[:80]!r} is not quantised, but it has scales; download the "
            "checkpoint again"
        )
    wanted = entries.default if entry is None or entry is True else entry
    choices = [wanted] if entry is not None else [wanted, *_every_format(scales.dtype)]
    for each in choices:
        if _fits(each, codes, scales, shape) and all(
            tensors.get(f"{module}.{field}", scales).shape == scales.shape for field in each.fields
        ):
            found = each
            break
    else:
        raise ConfigError(
            f"config.json: 'quantization' says that {module[:80]!r} has {wanted}, which its tensors are not: codes "
            f"{codes.dtype} {list(codes.shape)}, scales {scales.dtype} {list(scales.shape)}"
            + (f" of a matrix {list(shape)}" if shape else "")
            + "; download the checkpoint again"
        )
    missing = [field for field in found.fields if f"{module}.{field}" not in tensors]
    if missing:
        raise ConfigError(
            f"the checkpoint lacks 1 of the tensors of {module}: {module}.{missing[0]}; download it again"
        )
    return found


def _every_format(dtype: str) -> list[Quantisation]:
    """All of MLX's formats with scales of this dtype, the most usual first."""
    if dtype == "U8":
        return [Quantisation(*numbers, mode) for mode, numbers in SCALE_ONLY_MODES.items()]
    return [Quantisation(bits, size) for size in (64, 32, 128) for bits in (4, 8, 6, 5, 3, 2, 1)]


def _fits(coded: Quantisation, codes: TensorInfo, scales: TensorInfo, shape: Shape | None) -> bool:
    if len(codes.shape) != 2 or len(scales.shape) != 2 or codes.shape[0] != scales.shape[0] or codes.dtype != "U32":
        return False
    if (scales.dtype == "U8") != (coded.mode != AFFINE):
        return False
    columns = scales.shape[1] * coded.group_size
    return codes.shape[1] * WORD_BITS == columns * coded.bits and shape in (None, (codes.shape[0], columns))


def takes(shape: tuple[int, ...], quantisation: Quantisation) -> bool:
    """Whether a resident tensor of this shape is quantised: matrices are, as in mlx-lm, if their rows are whole
    groups."""
    return len(shape) == 2 and shape[1] % quantisation.group_size == 0


def coded_shapes(shapes: Mapping[str, Shape], codings: Mapping[str, Quantisation]) -> dict[str, Shape]:
    """Names and shapes on disk of the tensors in `shapes`, of which those in `codings` are quantised: `x.weight` is
    then codes, and `x.scales` and, if there are any, `x.biases` follow."""
    found: dict[str, Shape] = {}
    for name, shape in shapes.items():
        coded = codings.get(name)
        if coded is None:
            found[name] = shape
            continue
        rows, columns = shape
        found[name] = (rows, coded.words(columns))
        module = name.removesuffix(".weight")
        found |= {f"{module}.{field}": (rows, coded.groups(columns)) for field in coded.fields}
    return found


def plain_shapes(tensors: Mapping[str, TensorInfo], codings: Mapping[str, Quantisation]) -> dict[str, Shape]:
    """Name and shape of every tensor as if none were quantised: the inverse of `coded_shapes`."""
    gone = {f"{name.removesuffix('.weight')}.{field}" for name, coded in codings.items() for field in coded.fields}
    found = {name: tuple(info.shape) for name, info in tensors.items() if name not in gone}
    for name, coded in codings.items():
        groups = tensors[f"{name.removesuffix('.weight')}.scales"].shape[1]
        found[name] = (found[name][0], groups * coded.group_size)
    return found


def quantised_names(shapes: Collection[str], names: Collection[str]) -> list[str]:
    """Those of `shapes` that have scales among the tensors `names`."""
    return [name for name in shapes if name.endswith(".weight") and name.removesuffix("weight") + "scales" in names]


def resident_codings(checkpoint: Checkpoint) -> dict[str, Quantisation]:
    """How each quantised tensor that stays resident is stored. Raises ConfigError for what is not known."""
    tensors = {name: info for name, (_, info) in checkpoint.resident_tensors().items()}
    return find_codings(read_quantisation(checkpoint.config), tensors, whole=False)


def resident_plain_shapes(checkpoint: Checkpoint) -> dict[str, Shape]:
    """Name and shape of every tensor that stays resident, as if none were quantised."""
    tensors = {name: info for name, (_, info) in checkpoint.resident_tensors().items()}
    return plain_shapes(tensors, resident_codings(checkpoint))


def resident_shapes(checkpoint: Checkpoint, spec: ModelSpec) -> dict[str, Shape]:
    """Name and shape on disk of every tensor that stays resident. Raises ConfigError for a quantisation that is not
    known."""
    return coded_shapes(spec.resident_shapes(), resident_codings(checkpoint))


def quantization_object(
    entries: Entries, codings: Mapping[str, Quantisation], names: Collection[str]
) -> dict[str, Any]:
    """What config.json says of these `names`' codings, so that it can be read without knowing the matrices' shapes."""

    def spelt(coded: Quantisation) -> dict[str, Any]:
        return {"group_size": coded.group_size, "bits": coded.bits, "mode": coded.mode}

    special = {name.removesuffix(".weight"): coded for name, coded in codings.items() if name in names}
    each = {module: spelt(coded) for module, coded in special.items() if coded != entries.default}
    return spelt(entries.default) | each


def usual_coding(codings: Mapping[str, Quantisation]) -> Quantisation | None:
    """The quantisation of most tensors; None if none is quantised."""
    found = Counter(codings.values()).most_common(1)
    return found[0][0] if found else None


def join_coded(tensors: Mapping[str, Any], codings: Mapping[str, Quantisation]) -> dict[str, Any]:
    """Each `x.weight` of `codings`, and the `x.scales` and `x.biases` beside it, as one `AffineRows`."""
    found = dict(tensors)
    for name, coded in codings.items():
        module = name.removesuffix(".weight")
        found[name] = AffineRows(found[name], found.pop(module + ".scales"), found.pop(module + ".biases"), coded.bits)
    return found


def expected_layout(spec: ModelSpec, layer: int, dtype: str, found: Sequence[Layout]) -> Layout:
    """A layer's layout by the config, quantised as the bundles on flash are. Raises FormatError where they cannot be of
    this model."""
    layout = spec.layout(layer, dtype)
    if (
        layer >= len(found)
        or not (found[layer].coded or found[layer].grouped)
        or found[layer].matrices != layout.matrices
    ):
        return layout
    stored = found[layer]
    dtypes = {part.name: part.dtype for part in stored.parts}
    numbers = [dtypes[name if stored.coding(name) is None else f"{name}.scales"] for name in layout.matrices]
    parts = tuple(Part(part.name, number, part.length) for part, number in zip(layout.parts, numbers, strict=True))
    codings = [stored.coding(name) for name in layout.matrices]
    return with_codings(Layout(parts, layout.count), codings, stored.neurons)


def numpy_problem(spec: ModelSpec, layouts: Sequence[Layout], codings: Mapping[str, Quantisation]) -> str | None:
    """Why the numpy backend cannot compute with these bundles and resident tensors, naming what is quantised so; None
    where it can."""
    odd: dict[str, Quantisation | None] = {
        name.removesuffix(".weight"): coded for name, coded in codings.items() if not _plain(coded)
    }
    for layer, layout in enumerate(layouts):
        alike = layout.quantisation
        if not (layout.coded or layout.grouped) or (
            alike is not None and _plain(alike) and layout.neurons in (1, alike.group_size)
        ):
            continue
        sources = spec.ffn_sources(layer)
        each = {sources[matrix].name.removesuffix(".weight"): layout.coding(matrix) for matrix in layout.matrices}
        odd |= {name: coded for name, coded in each.items() if coded is None or not _plain(coded)} or each
    if not odd:
        return None
    name, coded = next(iter(odd.items()))
    kind = "not quantised, as others are" if coded is None else f"of {coded}"
    ways = (["use --backend mlx"] if "mlx" in spec.table.backends else []) + ["convert with --requantize -q"]
    return (
        "the numpy backend computes with MLX's affine codes of 4 or 8 bits, alike in the matrices of an FFN; here "
        f"{name} is {kind}"
        + (f", and {len(odd) - 1} more modules differ" if len(odd) > 1 else "")
        + f": {', or '.join(ways)}"
    )


def _plain(coded: Quantisation) -> bool:
    """Whether the numpy backend has kernels for it."""
    return coded.mode == AFFINE and coded.bits in BITS
