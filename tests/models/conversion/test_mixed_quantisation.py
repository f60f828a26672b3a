"""Dense checkpoints that mlx-lm quantised in any of MLX's formats, module by module: at every budget the bits of
mlx-lm's own model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mlx_flash
from mlx_flash.engine.numerics.casting import RAW, to_float32
from mlx_flash.engine.storage.checkpoint import Checkpoint
from mlx_flash.errors import BackendError
from mlx_flash.models.conversion.neuron_groups import Dequantised
from mlx_flash.models.specs.source import read_buffer
from mlx_flash.tools.inspection import inspect_model
from tests import tiny
from tests.models.conversion import test_quantised
from tests.models.conversion.test_quantised import LLAMA, SLOTS, agree, logits, mlx_lm_logits
from tests.tiny import make_tiny

mx = pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")

Rule = Callable[..., Any]
FOUR, EIGHT, SIX = ({"group_size": 32, "bits": bits} for bits in (4, 8, 6))


@pytest.fixture(autouse=True)
def configs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_quantised, "PROMPTS", (1, 20))
    monkeypatch.setattr(test_quantised, "TOKENS", 3)
    wide = LLAMA | {"hidden_size": 128, "num_hidden_layers": 4, "intermediate_size": 384}
    monkeypatch.setitem(tiny.CONFIGS, "llama-640", LLAMA)
    monkeypatch.setitem(tiny.CONFIGS, "wide", wide)
    monkeypatch.setitem(tiny.CONFIGS, "odd", LLAMA | {"intermediate_size": 344})


def by_mlx_lm(name: str, folder: Path, dtype: str = "bfloat16", **options: Any) -> Path:
    """A tiny model as mlx-lm quantises it."""
    from mlx_lm.convert import convert

    source, out = make_tiny(name, folder), folder / "mlx-lm"
    convert(str(source), str(out), quantize=True, dtype=dtype, **options)
    return out


def check(quantised: Path, out: Path) -> Path:
    """Convert, and compare with mlx-lm's model from the smallest capacity up; by slots, and by budgets."""
    wanted = mlx_lm_logits(quantised)
    path = mlx_flash.convert(quantised, out)
    for share in SLOTS:
        assert np.array_equal(logits(path, "mlx", "all", slots=share), wanted), share
    smallest = inspect_model(path, mlx_flash.FlashConfig(backend="mlx", select="all"))["smallest_budget_bytes"]
    assert np.array_equal(logits(path, "mlx", "all", memory=smallest), wanted)
    return path


@pytest.mark.parametrize(
    ("bits", "size", "dtype"),
    [(2, 32, "float32"), (3, 64, "bfloat16"), (5, 32, "bfloat16"), (6, 128, "float32")],
)
def test_every_number_of_bits(bits: int, size: int, dtype: str, tmp_path: Path) -> None:
    quantised = by_mlx_lm("wide", tmp_path, dtype, q_bits=bits, q_group_size=size)
    path = check(quantised, tmp_path / "q")
    layout = Checkpoint.open(path).layouts[0]
    assert layout.quantisation is not None and layout.quantisation.bits == bits and layout.neurons == size


@pytest.mark.parametrize(
    ("mode", "dtype"), [("mxfp4", "float32"), ("mxfp8", "bfloat16"), ("nvfp4", "float32"), ("nvfp4", "bfloat16")]
)
def test_every_mode(mode: str, dtype: str, tmp_path: Path) -> None:
    path = check(by_mlx_lm("llama-640", tmp_path, dtype, q_mode=mode), tmp_path / "q")
    parts = [part.name for part in Checkpoint.open(path).layouts[0].parts]
    assert parts == ["gate", "gate.scales", "up", "up.scales", "down", "down.scales"]


@pytest.mark.parametrize("recipe", ["mixed_2_6", "mixed_4_6"])
def test_every_recipe(recipe: str, tmp_path: Path) -> None:
    quantised = by_mlx_lm("wide", tmp_path, quant_predicate=recipe)
    path = check(quantised, tmp_path / "q")
    layouts = Checkpoint.open(path).layouts
    assert len({layout.stride for layout in layouts}) > 1, "layers alike: the recipe did not mix anything"
    report = inspect_model(path, mlx_flash.FlashConfig(backend="mlx", select="all", slots=0.4))
    assert report["ffn_bytes"] == sum(layout.count * layout.stride for layout in layouts)


def down(path: str, _: Any) -> Any:
    return FOUR if path.endswith("down_proj") else False


def gate(path: str, _: Any) -> Any:
    return SIX if path.endswith("gate_proj") else False


def all_but_down(path: str, module: Any) -> Any:
    return False if path.endswith("down_proj") else hasattr(module, "to_quantized")


def by_layer(path: str, module: Any) -> Any:
    """Layers of three kinds: 3 bits of 128, MXFP4, nothing; beside them NVFP4."""
    if ".mlp." not in path:
        return {"group_size": 16, "bits": 4, "mode": "nvfp4"}
    layer = int(path.split(".")[2])
    return [{"group_size": 128, "bits": 3}, {"group_size": 32, "bits": 4, "mode": "mxfp4"}, False, FOUR][layer]


def within(path: str, module: Any) -> Any:
    """All three matrices of an FFN differ, down in 32s and the others in 64s."""
    kinds = {"gate_proj": {"group_size": 64, "bits": 5}, "up_proj": {"group_size": 64, "bits": 8}, "down_proj": SIX}
    return kinds.get(path.split(".")[-1], True)


@pytest.mark.parametrize(
    ("rule", "dtype"),
    [(down, "bfloat16"), (gate, "float32"), (all_but_down, "bfloat16"), (by_layer, "float32"), (within, "bfloat16")],
)
def test_modules_that_are_not_quantised_beside_others(rule: Rule, dtype: str, tmp_path: Path) -> None:
    quantised = by_mlx_lm("wide", tmp_path, dtype, q_group_size=32, quant_predicate=rule)
    check(quantised, tmp_path / "q")


def test_neurons_that_are_no_whole_groups_are_left_as_they_are(tmp_path: Path) -> None:
    """344 neurons: mlx-lm quantises gate and up, along d, and cannot quantise down."""
    path = check(by_mlx_lm("odd", tmp_path, q_group_size=32), tmp_path / "q")
    layout = Checkpoint.open(path).layouts[0]
    assert layout.neurons == 8 and layout.coding("down") is None and layout.coding("gate") is not None


def test_a_dense_part_of_other_bits_runs_on_both_backends(tmp_path: Path) -> None:
    """Head and embedding 8 bits, the rest 4: FFNs alike, so that NumPy's kernels take them too."""

    def head8(path: str, module: Any) -> Any:
        return EIGHT if path.endswith(("lm_head", "embed_tokens", "v_proj")) else hasattr(module, "to_quantized")

    quantised = by_mlx_lm("llama-640", tmp_path, "float32", q_bits=4, q_group_size=32, quant_predicate=head8)
    wanted, path = mlx_lm_logits(quantised), check(quantised, tmp_path / "q")
    found = [logits(path, "numpy", "all", slots=share) for share in SLOTS]
    assert all(np.array_equal(each, found[0]) for each in found[1:])
    agree(found[0], wanted)


def test_layers_of_other_bits_run_on_both_backends(tmp_path: Path) -> None:
    """Layers of 4 and of 8 bits, of 32s and of 64s, each alike within."""

    def layers(path: str, module: Any) -> Any:
        if ".mlp." not in path:
            return False
        return [FOUR, EIGHT, {"group_size": 64, "bits": 4}][int(path.split(".")[2])]

    quantised = by_mlx_lm("llama-640", tmp_path, "float32", q_group_size=32, quant_predicate=layers)
    wanted, path = mlx_lm_logits(quantised), check(quantised, tmp_path / "q")
    found = [logits(path, "numpy", "all", slots=share) for share in SLOTS]
    assert all(np.array_equal(each, found[0]) for each in found[1:])
    agree(found[0], wanted)


def test_only_the_dense_part_is_quantised(tmp_path: Path) -> None:
    """FFNs of numbers: bundles of single neurons, as of a checkpoint that is not quantised at all."""

    def attention(path: str, module: Any) -> Any:
        return ".mlp." not in path and hasattr(module, "to_quantized")

    quantised = by_mlx_lm("llama-640", tmp_path, "float32", q_bits=8, q_group_size=32, quant_predicate=attention)
    wanted, path = mlx_lm_logits(quantised), mlx_flash.convert(quantised, tmp_path / "q")
    for backend in ("numpy", "mlx"):
        found = [logits(path, backend, "all", slots=share) for share in SLOTS]
        assert all(np.array_equal(each, found[0]) for each in found[1:])
        agree(found[0], wanted)


@pytest.mark.parametrize("entries", [{}, {"model.layers.0.mlp.up_proj": True}, {"lm_head2": False}])
def test_what_has_no_entry_is_what_its_shapes_say(entries: dict[str, Any], tmp_path: Path) -> None:
    """As in mlx-lm: the settings for all are asked only where an entry is `true`."""
    quantised = by_mlx_lm("llama-640", tmp_path, q_bits=4, q_group_size=32, quant_predicate=within)
    config = json.loads((quantised / "config.json").read_text())
    config["quantization"] = {"group_size": 64, "bits": 8, "mode": "affine"} | entries
    (quantised / "config.json").write_text(json.dumps(config))
    check(quantised, tmp_path / "q")


def test_auto_takes_mlx_where_numpy_cannot(tmp_path: Path) -> None:
    path = mlx_flash.convert(by_mlx_lm("llama-640", tmp_path, q_bits=6, q_group_size=32), tmp_path / "q")
    assert inspect_model(path, mlx_flash.FlashConfig())["backend"] == "mlx"
    with pytest.raises(BackendError, match=r"here \S+ is of 6 bits.* more .*--backend mlx.*--requantize -q"):
        inspect_model(path, mlx_flash.FlashConfig(backend="numpy"))


def test_prompt_selects_groups_of_any_format(tmp_path: Path) -> None:
    """What it sums up on its own is computed from the codes."""
    quantised = by_mlx_lm("wide", tmp_path, "float32", q_group_size=32, quant_predicate=by_layer)
    path = mlx_flash.convert(quantised, tmp_path / "q")
    whole, first = logits(path, "mlx", "all"), logits(path, "mlx", "prompt:0.5", slots=0.0)
    assert np.array_equal(first, logits(path, "mlx", "prompt:0.5", slots=0.3))
    assert not np.array_equal(first[:, 1:], whole[:, 1:])
    near = np.abs(logits(path, "mlx", "prompt:1") - whole).max()
    assert near <= 1e-3 * np.abs(whole).max()


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"q_bits": 3, "q_group_size": 64}, "bfloat16"),
        ({"q_mode": "mxfp4"}, "float32"),
        ({"q_mode": "nvfp4"}, "bfloat16"),
        ({"q_mode": "mxfp8"}, "float16"),
        ({"quant_predicate": "mixed_2_6"}, "float32"),
        ({"q_group_size": 32, "quant_predicate": by_layer}, "bfloat16"),
        ({"q_group_size": 32, "quant_predicate": down}, "float32"),
    ],
)
def test_requantised(options: dict[str, Any], dtype: str, tmp_path: Path) -> None:
    """Whatever it was is read as the numbers that MLX makes of it; as 8 bits it runs on both backends, at a loss that
    is told."""
    quantised, said = by_mlx_lm("wide", tmp_path, dtype, **options), []
    tensors, config = mx.load(str(quantised / "model.safetensors")), json.loads((quantised / "config.json").read_text())
    with Dequantised(quantised) as source:
        source.open_tensors()
        for name in source.tensors:
            wanted = plain(name.removesuffix(".weight"), tensors, config["quantization"]).astype(mx.float32)
            count = source.tensors[name].info.nbytes
            raw = source.read(name, 0, count, read_buffer(count)).view(RAW[source.dtype(name)])
            found = to_float32(raw, source.dtype(name)).reshape(wanted.shape)
            # MLX rounds twice in 16 bits: the product, and the sum with the bias.
            within = 0 if source.dtype(name) == "float32" else 2**-7 * float(mx.abs(wanted).max())
            assert np.abs(found - np.array(wanted)).max() <= within, name
    path = mlx_flash.convert(quantised, tmp_path / "q", quantize=True, q_bits=8, requantize=True, announce=said.append)
    assert float(said[0].split()[5].rstrip("%")) < 1.5
    wanted = mlx_lm_logits(quantised)
    for backend in ("numpy", "mlx"):
        assert np.abs(logits(path, backend, "all") - wanted).mean() < 0.05 * np.abs(wanted).max()


def plain(module: str, tensors: dict[str, Any], config: dict[str, Any]) -> Any:
    """A tensor as MLX makes it of its codes."""
    if f"{module}.scales" not in tensors:
        return tensors[f"{module}.weight"]
    entry = config.get(module)
    entry = entry if isinstance(entry, dict) else {key: config.get(key) for key in ("bits", "group_size", "mode")}
    entry = {key: value for key, value in entry.items() if value is not None}
    fields = (tensors.get(f"{module}.{field}") for field in ("weight", "scales", "biases"))
    return mx.dequantize(*fields, **entry)
