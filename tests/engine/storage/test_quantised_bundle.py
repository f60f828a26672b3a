"""Quantised rows, layouts and config.json's "quantization": what is read back is what was written, the rest refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mlx_flash
from mlx_flash.engine.numerics.affine import AffineBundles, AffineRows, quantise, unpack
from mlx_flash.engine.numerics.casting import from_float32, to_float32
from mlx_flash.engine.storage.bundle import Layout, Part, Quantisation, quantised, with_codings
from mlx_flash.engine.storage.bundle_weights import VIEWS
from mlx_flash.engine.storage.checkpoint import Checkpoint
from mlx_flash.engine.storage.header import TensorInfo
from mlx_flash.errors import ConfigError, FormatError, UsageError
from mlx_flash.models.specs.quantisation import Entries, coded_shapes, find_codings, plain_shapes, read_quantisation
from mlx_flash.tools.inspection import inspect_model
from tests.tiny import make_tiny

SHAPES = [(bits, size) for bits in (4, 8) for size in (32, 64, 128)]


def coded(values: np.ndarray, bits: int, size: int, dtype: str = "float32") -> AffineRows:
    codes, scales, biases = quantise(values, bits, size, dtype)
    return AffineRows(codes, scales.view(VIEWS[dtype]), biases.view(VIEWS[dtype]), bits)


def wide(rows: AffineRows) -> np.ndarray:
    out = np.empty(rows.shape, np.float32)
    rows.widen(out)
    return out


@given(
    st.sampled_from(SHAPES),
    st.integers(0, 2**32 - 1),
    st.floats(-2, 2, width=32),
    st.sampled_from([1e-20, 1e-3, 1, 1e9]),
)
def test_what_was_quantised_is_near_what_it_was(
    shape: tuple[int, int], seed: int, middle: float, spread: float
) -> None:
    bits, size = shape
    values = np.random.default_rng(seed).standard_normal((3, 2 * size)).astype(np.float32)
    values = (values + np.float32(middle)) * np.float32(spread)
    rows = coded(values, bits, size)
    step = np.repeat(np.abs(rows.scales), size, axis=1)
    # Half a step; at the other end of the range, which gives way so that zero is a code, up to one.
    assert (np.abs(wide(rows) - values) <= 1.01 * step + 1e-6 * np.abs(values)).all()
    assert (np.abs(wide(rows) - values) <= 0.51 * step + 1e-6 * np.abs(values)).mean() > 0.9
    groups = values.reshape(3, 2, size)
    ends = np.where(np.abs(groups.min(2)) > np.abs(groups.max(2)), groups.min(2), groups.max(2))
    used = rows.biases != 0
    assert (rows.biases[used] == ends[used]).all()  # the end that is farther from zero is kept exactly


def test_zero_is_exact() -> None:
    values = np.random.default_rng(1).standard_normal((8, 128)).astype(np.float32)
    values[:, ::3] = 0
    for bits, size in SHAPES:
        rows = coded(values, bits, size)
        assert np.abs(wide(rows)[:, ::3]).max() <= 4e-7


def test_rows_index_like_an_array() -> None:
    rows = coded(np.random.default_rng(2).standard_normal((9, 128)).astype(np.float32), 4, 32, "bfloat16")
    whole = wide(rows)
    for key in (slice(2, 7), np.array([5, 0, 5]), (slice(1, 4), slice(32, 96)), (np.array([8, 1]), slice(64, None))):
        assert np.array_equal(wide(rows[key]), whole[key])
    with pytest.raises(ValueError, match=r"columns 16\.\.48 are no whole groups of 32"):
        rows[:, 16:48]


def test_bundles_of_neurons_widen_to_their_rows() -> None:
    rng = np.random.default_rng(3)
    values = rng.standard_normal((96, 64)).astype(np.float32)  # (d, neurons), quantised along the neurons
    rows = coded(values, 8, 32)
    fields = (np.ascontiguousarray(a.reshape(96, 2, -1).swapaxes(0, 1)) for a in (rows.codes, rows.scales, rows.biases))
    bundles = AffineBundles(*fields, 8, turned=True)
    assert bundles.neurons == 32 and np.array_equal(bundles.widen(), wide(rows).T)
    assert np.array_equal(bundles[1:].widen(slice(16, 48)), wide(rows).T[32:, 16:48])


def plain(dim: int = 128, count: int = 256, dtype: str = "bfloat16") -> Layout:
    return Layout(tuple(Part(name, dtype, dim) for name in ("gate", "up", "down")), count)


@pytest.mark.parametrize("neurons", [1, 64])
def test_a_layout_is_read_back(neurons: int) -> None:
    layout = quantised(plain(), Quantisation(4, 64), neurons)
    assert Layout.from_json(json.loads(json.dumps(layout.to_json()))) == layout
    assert (layout.dim, layout.dtype, layout.matrices) == (128, "bfloat16", ("gate", "up", "down"))
    assert layout.parts_of("up") == ["up", "up.scales", "up.biases"]
    assert layout.matrix_bytes("up") == neurons * (128 // 2 + 2 * 2 * 2)
    assert layout.count * neurons == 256


FORMATS = [None, *(Quantisation(bits, size) for bits in (1, 2, 3, 4, 5, 6, 8) for size in (32, 64, 128))]
FORMATS += [Quantisation(4, 32, "mxfp4"), Quantisation(8, 32, "mxfp8"), Quantisation(4, 16, "nvfp4")]


@given(st.lists(st.sampled_from(FORMATS), min_size=3, max_size=3), st.sampled_from(["float32", "bfloat16"]))
def test_a_layout_of_matrices_of_any_formats_is_read_back(codings: list[Quantisation | None], dtype: str) -> None:
    layout = with_codings(plain(dtype=dtype), codings, 128)
    assert Layout.from_json(json.loads(json.dumps(layout.to_json()))) == layout
    assert layout.dim == 128 and layout.grouped and layout.count * layout.neurons == 256
    assert [layout.coding(name) for name in layout.matrices] == codings
    item = 4 if dtype == "float32" else 2
    for name, coded in zip(layout.matrices, codings, strict=True):
        weights = 128 * 128
        scales = 0 if coded is None else weights // coded.group_size * (2 * item if coded.mode == "affine" else 1)
        assert layout.matrix_bytes(name) == weights * (8 * item if coded is None else coded.bits) // 8 + scales
    alike = codings[0] is not None and len(set(codings)) == 1
    assert layout.version == (2 if alike and codings[0] in map(lambda b: Quantisation(b, 128), (4, 8)) else 3)


@given(st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8]), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_codes_are_a_row_of_bits(bits: int, words: int, seed: int) -> None:
    """Item i begins at bit i * bits: checked against Python's own big integers."""
    items = np.random.default_rng(seed).integers(0, 1 << bits, (3, 32 * words))
    rows = [sum(int(code) << (bits * i) for i, code in enumerate(row)) for row in items]
    packed = [np.frombuffer(row.to_bytes(4 * bits * words, "little"), "<u4") for row in rows]
    assert np.array_equal(unpack(np.stack(packed), bits), items)


WRONG: list[tuple[Any, str]] = [
    (lambda j: j["quantization"].update(bits=7), "7 bits"),
    (lambda j: j["quantization"].update(bits=3), "is quantised, but"),
    (lambda j: j["quantization"].update(group_size=True), "groups of True"),
    (lambda j: j.update(neurons=7), "is quantised, but"),
    (lambda j: j.update(neurons=512), "512 neurons"),
    (lambda j: j.update(neurons=True), "True neurons"),
    (lambda j: j.update(neurons=64), "is quantised, but"),
    (lambda j: j["quantization"].update(group_size=32), "is quantised, but"),
    (lambda j: j["parts"].pop(), "is quantised, but"),
    (lambda j: j["parts"][0].update(dtype="float32"), "is quantised, but"),
    (lambda j: j["parts"][1].update(dtype="uint32"), "is quantised, but"),
    (lambda j: j.pop("neurons"), "exactly the fields"),
    (lambda j: j["quantization"].update(mode="x"), "which is not known"),
    (lambda j: j["quantization"].update(mode=7), "which is not known"),
    (lambda j: j["quantization"].update(what=1), "exactly the fields"),
    (lambda j: j.update(quantization=4), "exactly the fields"),
    (lambda j: j.update(quantization={"gate": None}), "exactly the fields"),
    (lambda j: j.update(quantization={"gate": None, "up": None, "down": None}), "is quantised, but"),
]


@pytest.mark.parametrize(("change", "match"), WRONG)
def test_a_layout_that_lies_is_refused(change: Any, match: str) -> None:
    value = json.loads(json.dumps(quantised(plain(), Quantisation(4, 64)).to_json()))
    change(value)
    with pytest.raises(FormatError, match=match):
        Layout.from_json(value)


def test_shapes_that_no_group_fits() -> None:
    with pytest.raises(FormatError, match="rows of 96 items are no whole groups of 64"):
        quantised(plain(96), Quantisation(4, 64))
    with pytest.raises(FormatError, match="250 neurons are no whole bundles of 32"):
        quantised(plain(count=250), Quantisation(4, 32), 32)


FOUR = {"group_size": 64, "bits": 4}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"quantization": {"group_size": 64, "bits": 7}}, "7 bits are not known; MLX has 1, 2, 3, 4, 5, 6, 8"),
    ({"quantization": {"group_size": 64, "bits": "4"}}, "4 bits are not known"),
    ({"quantization": {"group_size": 64, "bits": True}}, "True bits are not known"),
    ({"quantization": {"group_size": 48, "bits": 4}}, "groups of 48 are not known; MLX has 32, 64, 128"),
    ({"quantization": {"group_size": 16, "bits": 4}}, "groups of 16 are not known"),
    ({"quantization": {"group_size": 64, "bits": 4, "mode": "mxfp4"}}, r"groups of 64.*MLX has 32 \(mxfp4\)"),
    ({"quantization": {"group_size": 32, "bits": 8, "mode": "mxfp4"}}, r"8 bits.*MLX has 4 \(mxfp4\)"),
    ({"quantization": {"group_size": 64, "bits": 4, "mode": "fp3"}}, "mode 'fp3'; MLX has affine, mxfp4"),
    ({"quantization": {"group_size": 64, "bits": 4, "mode": ["affine"]}}, "mode .*MLX has affine"),
    ({"quantization": {"group_size": 64}}, "lacks 'bits'"),
    ({"quantization": {"bits": 4}}, "lacks 'group_size'"),
    ({"quantization": FOUR | {"a.down_proj": {"bits": 9}}}, "of 'a.down_proj': 9 bits"),
    ({"quantization": FOUR | {"a.down_proj": {"bits": 8, "global_scale": True}}}, "has 'global_scale'"),
    ({"quantization": FOUR | {"what": 7}}, "'what'.*neither true, false nor an object"),
    ({"quantization": FOUR | {"what": None}}, "'what'.*neither true, false nor an object"),
    ({"quantization": FOUR, "quantize_activations": True}, "'quantize_activations'"),
    ({"quantization": "4 bits"}, "not an object"),
    ({"quantization": [4]}, "not an object"),
    ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, "by FP8 with block scales"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "by GPTQ"),
    ({"quantization_config": {"quant_method": "awq"}}, "by AWQ"),
    ({"quantization_config": {"quant_method": "bitsandbytes"}}, "by bitsandbytes"),
    ({"quantization_config": {"quant_method": "compressed-tensors"}}, "by compressed-tensors"),
    ({"quantization_config": {"quant_method": "hqq"}}, "by HQQ"),
    ({"quantization_config": {"quant_method": "mxfp4"}}, "by transformers' MXFP4"),
    ({"quantization_config": {"quant_method": "newest"}}, "by 'newest'"),
    ({"quantization_config": {"load_in_8bit": True}}, "names no known kind"),
    ({"quantization_config": "int8"}, "by 'int8'"),
]


@pytest.mark.parametrize(("config", "match"), REFUSED)
def test_another_quantisation_is_refused(config: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match) as error:
        read_quantisation(config)
    assert "\n" not in str(error.value)


def test_mlx_lm_spells_a_quantisation_in_several_ways() -> None:
    def spelt(**entries: Any) -> Entries | None:
        return read_quantisation({"quantization": FOUR | entries, "quantization_config": FOUR})

    four = Quantisation(4, 64)
    assert spelt() == spelt(mode="affine") == Entries(four, {})
    assert spelt(x=False, y=dict(FOUR), z=True) == Entries(four, {"x": False, "y": four, "z": True})
    # What an entry leaves out is MLX's default for its mode, whatever is said for all.
    entries = spelt(x={"bits": 6}, y={"mode": "nvfp4"}, z={"bits": 8, "group_size": None, "mode": "mxfp8"})
    assert entries is not None and entries.modules == {
        "x": Quantisation(6, 64),
        "y": Quantisation(4, 16, "nvfp4"),
        "z": Quantisation(8, 32, "mxfp8"),
    }
    assert read_quantisation({}) is None


def infos(**shapes: tuple[str, tuple[int, ...]]) -> dict[str, TensorInfo]:
    return {name.replace("__", "."): TensorInfo(name, tag, shape, 0, 0) for name, (tag, shape) in shapes.items()}


STORED = {
    "a__weight": ("U32", (7, 24)),
    "a__scales": ("BF16", (7, 4)),
    "a__biases": ("BF16", (7, 4)),
    "b__weight": ("BF16", (7, 128)),
}
SIX_OF_32 = {"bits": 6, "group_size": 32}
CONTRADICTIONS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"a": {"bits": 4, "group_size": 32}}, {}, r"'a' has 4 bits in groups of 32 .*codes U32 \[7, 24\].*download"),
    ({"a": {"bits": 6, "group_size": 64}}, {}, "'a' has 6 bits in groups of 64"),
    ({"a": {"mode": "mxfp4"}}, {}, r"'a' has 4 bits in groups of 32 \(mxfp4\)"),
    ({"a": True}, {}, "'a' has 4 bits in groups of 64"),
    ({"a": False}, {}, "'a' is not quantised, but it has scales"),
    ({"b": SIX_OF_32}, {}, "'b', whose weights are stored as they are"),
    ({"c": SIX_OF_32}, {}, "'c', of which the checkpoint has no weights"),
    ({"c": True}, {}, "'c', of which the checkpoint has no weights"),
    ({}, {"a__scales": ("BF16", (7, 3))}, "'a' has 4 bits in groups of 64"),
    ({}, {"a__scales": ("U8", (7, 4))}, "'a' has 4 bits in groups of 64"),
    ({}, {"a__weight": ("F32", (7, 24))}, "'a' has .*codes F32"),
    ({"a": SIX_OF_32}, {"a__biases": None}, "lacks 1 of the tensors of a: a.biases"),
    ({}, {"a__scales": None}, "lacks 1 of the tensors of a: a.scales"),
]


@pytest.mark.parametrize(("entries", "changes", "match"), CONTRADICTIONS)
def test_entries_that_contradict_the_tensors(entries: dict[str, Any], changes: dict[str, Any], match: str) -> None:
    tensors = infos(**{name: value for name, value in (STORED | changes).items() if value is not None})
    with pytest.raises(ConfigError, match=match):
        find_codings(read_quantisation({"quantization": FOUR | entries}), tensors)


def test_what_tensors_say_where_config_json_does_not() -> None:
    tensors = infos(**STORED)
    known = {"a.weight": (7, 128), "b.weight": (7, 128)}
    for entries, shapes in (({}, known), ({"a": SIX_OF_32}, {}), ({"b": False, "c": False}, known)):
        codings = find_codings(read_quantisation({"quantization": FOUR | entries}), tensors, shapes)
        assert codings == {"a.weight": Quantisation(6, 32)}
        assert plain_shapes(tensors, codings) == {"a.weight": (7, 128), "b.weight": (7, 128)}
        assert coded_shapes(plain_shapes(tensors, codings), codings) == {n: info.shape for n, info in tensors.items()}
    # 4 bits of 64s and 2 bits of 128s have one shape: the matrix' own tells them apart.
    ambiguous = infos(a__weight=("U32", (7, 16)), a__scales=("F16", (7, 2)), a__biases=("F16", (7, 2)))
    four = read_quantisation({"quantization": FOUR})
    assert find_codings(four, ambiguous) == {"a.weight": Quantisation(4, 64)}
    assert find_codings(four, ambiguous, {"a.weight": (7, 256)}) == {"a.weight": Quantisation(2, 128)}
    assert find_codings(four, ambiguous, {"a.weight": (7, 64)}) == {"a.weight": Quantisation(8, 32)}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("openelm-relu", tmp_path_factory.mktemp("source"))


BAD_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"quantize": True}, "--q-group-size 64: the rows of this model have 96 items.*use --q-group-size 32"),
    ({"quantize": True, "q_group_size": 48}, "groups of 48 are not known; choose one of 32, 64, 128"),
    ({"quantize": True, "q_group_size": 32, "q_bits": 2}, "2 bits are not known; choose 4 or 8"),
    ({"quantize": True, "q_group_size": 32, "dense_bits": 5}, "dense-bits.*5 bits are not known"),
    ({"dense_bits": 16}, "--dense-bits goes with -q"),
    ({"requantize": True}, "--requantize goes with -q"),
    ({"requantize": True, "quantize": True, "q_group_size": 32}, "is not quantised"),
]


@pytest.mark.parametrize(("settings", "match"), BAD_SETTINGS)
def test_settings_that_the_model_cannot_take(
    source: Path, tmp_path: Path, settings: dict[str, Any], match: str
) -> None:
    with pytest.raises((ConfigError, UsageError), match=match):
        mlx_flash.convert(source, tmp_path / "out", **settings)
    assert not list(tmp_path.iterdir())


def test_the_budget_counts_what_is_quantised(source: Path, tmp_path: Path) -> None:
    whole = mlx_flash.convert(source, tmp_path / "16", dtype="bfloat16")
    small = mlx_flash.convert(source, tmp_path / "4", dtype="bfloat16", quantize=True, q_group_size=32)
    config = mlx_flash.FlashConfig(backend="numpy", select="gate")
    of_whole, of_small = (inspect_model(path, config)["parts"] for path in (whole, small))
    assert of_small["KV cache"] == of_whole["KV cache"]
    assert 0.3 < of_small["dense part"] / of_whole["dense part"] < 0.34  # 5 bits of 16, and norms
    layouts = Checkpoint.open(small).layouts
    assert layouts[0].stride == 512 and layouts[0].bundle_bytes == 3 * (96 // 2 + 2 * 2 * 3)


def test_numbers_that_cannot_be_quantised(source: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.numpy import load_file, save_file

    broken = tmp_path / "hf"
    shutil.copytree(source, broken)
    tensors = load_file(broken / "model.safetensors")
    name = next(name for name in tensors if "ffn.proj_2" in name)
    tensors[name] = tensors[name].copy()
    tensors[name][0, 0] = np.inf
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="FFN of layer 0 has numbers that are not finite"):
        mlx_flash.convert(broken, tmp_path / "out", quantize=True, q_group_size=32)
    assert not (tmp_path / "out").exists()


def test_rounding_of_scales() -> None:
    values = np.random.default_rng(5).standard_normal((4, 64)).astype(np.float32)
    for dtype in ("float16", "bfloat16"):
        rows, exact = coded(values, 4, 32, dtype), coded(values, 4, 32)
        assert np.array_equal(rows.codes, exact.codes)  # chosen before the scales are rounded
        rounded = to_float32(from_float32(exact.scales, dtype), dtype)
        assert np.array_equal(to_float32(rows.scales.view("<u2"), dtype), rounded)
