"""Quantised checkpoints, made by `convert -q` or by mlx-lm: the same bits at every budget, tokens equal mlx-lm's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mlx_flash
from mlx_flash.engine.numerics.casting import to_float32
from mlx_flash.errors import ConfigError, UsageError
from mlx_flash.models.text.sampling import Sampling
from mlx_flash.tools.inspection import inspect_model
from tests import tiny
from tests.calibrated import calibrate_by_hand
from tests.conftest import shared_path
from tests.tiny import make_tiny

mx = pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")

TOKENS = 6
PROMPTS = (1, 17, 300)
SLOTS = (0.0, 0.4, 1.0)  # shares of the bundles
LLAMA = tiny.CONFIGS["llama"] | {"intermediate_size": 640}  # whole groups, and blocks that are not whole


@pytest.fixture(autouse=True)
def configs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiny.CONFIGS, "llama-640", LLAMA)
    monkeypatch.setitem(tiny.CONFIGS, "openelm-640", tiny.CONFIGS["openelm"] | {"ffn_multipliers": [1.0, 3.0, 7.0]})


def replies() -> Iterator[tuple[list[int], list[int]]]:
    """Prompts and what follows them."""
    rng = np.random.default_rng(5)
    for length in PROMPTS:
        ids = rng.integers(0, 256, length + TOKENS).tolist()
        yield ids[:length], ids[length:]


def logits(path: Path, backend: str, select: str, **fields: Any) -> np.ndarray:
    """After each prompt and along each reply, (prompts, 1 + TOKENS, vocab)."""
    model, _ = mlx_flash.load(path, backend=backend, select=select, **fields)
    try:
        return np.array([list(model.flash.forced(model, prompt, rest)) for prompt, rest in replies()])
    finally:
        model.flash.close()


def mlx_lm_logits(folder: Path) -> np.ndarray:
    """The same from mlx-lm, everything in memory; the prompt in the same chunks."""
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    found = []
    for prompt, rest in replies():
        cache = make_prompt_cache(model)
        for begin in range(0, len(prompt) - 1, 256):
            model(mx.array([prompt[begin : min(begin + 256, len(prompt) - 1)]]), cache=cache)
        steps = [model(mx.array([[token]]), cache=cache)[0, -1] for token in (prompt[-1], *rest)]
        found.append([np.array(step.astype(mx.float32)) for step in steps])
    return np.array(found)


def by_mlx_lm(source: Path, out: Path, bits: int, size: int, dtype: str) -> Path:
    """The checkpoint as mlx-lm quantises it."""
    from mlx_lm.convert import convert

    convert(str(source), str(out), quantize=True, q_bits=bits, q_group_size=size, dtype=dtype)
    return out


def numbers_of(source: Path, out: Path, bits: int, size: int) -> Path:
    """A plain fp32 checkpoint of the numbers that `convert -q` stores: each matrix through `mx.quantize`, down with its
    columns as rows."""
    out.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (out / name).write_bytes((source / name).read_bytes())
    tensors = mx.load(str(source / "model.safetensors"))
    for name, values in tensors.items():
        if values.ndim == 2:
            down = "down_proj" in name or "proj_2" in name
            rows = mx.contiguous(values.T) if down else values
            back = mx.dequantize(*mx.quantize(rows, size, bits), size, bits)
            tensors[name] = mx.contiguous(back.T) if down else back
    mx.save_safetensors(str(out / "model.safetensors"), tensors, {"format": "pt"})
    return out


def agree(found: np.ndarray, wanted: np.ndarray, within: float = 1e-4) -> None:
    """Equal tokens, but where the two best logits lie within 1e-4; logits within `within` of the largest."""
    assert np.abs(found - wanted).max() <= within * np.abs(wanted).max()
    best = np.sort(wanted, axis=-1)
    sure = best[..., -1] - best[..., -2] > 1e-4
    assert (found.argmax(-1) == wanted.argmax(-1))[sure].all() and sure.mean() > 0.9


@pytest.mark.parametrize(("name", "bits"), [("openelm-relu", 4), ("llama-640", 8), ("qwen3-relu", 4)])
def test_neuron_bundles(name: str, bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    relu = "relu" in name
    if relu:
        module = "openelm" if "openelm" in name else "qwen3"
        monkeypatch.setattr(f"mlx_lm.models.{module}.swiglu", lambda gate, x: mx.maximum(gate, 0) * x)
    source = make_tiny(name, tmp_path)
    wanted = mlx_lm_logits(numbers_of(source, tmp_path / "numbers", bits, 32))
    path = mlx_flash.convert(source, tmp_path / "q", quantize=True, q_bits=bits, q_group_size=32)
    for backend in ("numpy", "mlx"):
        for select in ("all", "gate") if relu else ("all",):
            found = [logits(path, backend, select, slots=share) for share in SLOTS]
            agree(found[0], wanted)
            assert all(np.array_equal(each, found[0]) for each in found[1:]), (backend, select)


@pytest.mark.parametrize("select", ["predictor", "prompt:0.5", "threshold:0.5", "static:0.5"])
def test_lossy_selectors(select: str, tmp_path: Path) -> None:
    source = make_tiny("openelm-relu", tmp_path)
    path = mlx_flash.convert(source, tmp_path / "q", dtype="bfloat16", quantize=True, q_bits=4, q_group_size=32)
    calibrate_by_hand(path)
    for backend in ("numpy", "mlx"):
        first = logits(path, backend, select, slots=0.1)
        assert np.isfinite(first).all() and np.array_equal(first, logits(path, backend, select, slots=1.0))


@pytest.mark.parametrize(
    ("name", "bits", "size", "dtype"),
    [("llama-640", 4, 32, "float32"), ("openelm-640", 8, 32, "bfloat16")],
)
def test_group_bundles_are_mlx_lm_s_model(name: str, bits: int, size: int, dtype: str, tmp_path: Path) -> None:
    quantised = by_mlx_lm(make_tiny(name, tmp_path), tmp_path / "mlx-lm", bits, size, dtype)
    wanted = mlx_lm_logits(quantised)
    path = mlx_flash.convert(quantised, tmp_path / "q")
    for share in SLOTS:
        assert np.array_equal(logits(path, "mlx", "all", slots=share), wanted)
    found = [logits(path, "numpy", "all", slots=share) for share in SLOTS]
    assert all(np.array_equal(each, found[0]) for each in found[1:])
    if dtype == "float32":
        agree(found[0], wanted)
    for backend in ("numpy", "mlx"):
        first = logits(path, backend, "prompt:0.5", slots=0.0)
        assert np.array_equal(first, logits(path, backend, "prompt:0.5", slots=0.3))
        assert not np.array_equal(first[:, 1:], found[0][:, 1:])
    whole = logits(path, "numpy", "prompt:1")
    assert np.abs(whole - found[0]).max() <= 1e-3 * np.abs(found[0]).max()


@pytest.mark.parametrize("backend", ["numpy", "mlx"])
def test_a_trained_model_says_what_mlx_lm_says(backend: str, tmp_path: Path) -> None:
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    quantised = by_mlx_lm(shared_path("data/models/llama2xs"), tmp_path / "mlx-lm", 4, 64, "float32")
    reference, _ = load_model(quantised)
    path = mlx_flash.convert(quantised, tmp_path / "q")
    model, tokenizer = mlx_flash.load(path, backend=backend, slots=0.4)
    prompt = tokenizer.encode("Once upon a time there was a little girl")
    found = list(model.flash.steps(model, prompt, 60, Sampling()))
    model.flash.close()
    assert found == [int(token) for token, _ in generate_step(mx.array(prompt), reference, max_tokens=60)]


def test_requantised(tmp_path: Path) -> None:
    """In another form at a small loss, which is said; 8 bits of what were 4 lose next to nothing."""
    quantised = by_mlx_lm(make_tiny("llama-640", tmp_path), tmp_path / "mlx-lm", 4, 32, "float32")
    wanted, said = mlx_lm_logits(quantised), []
    options: dict[str, Any] = {"quantize": True, "requantize": True, "q_group_size": 32, "announce": said.append}
    eight = mlx_flash.convert(quantised, tmp_path / "8", q_bits=8, **options)
    four = mlx_flash.convert(quantised, tmp_path / "4", q_bits=4, **options)
    lost = [float(line.split()[5].rstrip("%")) for line in said]
    assert lost[0] < 0.5 < lost[1] < 10
    assert (
        np.abs(logits(eight, "numpy", "all") - wanted).max() < 0.5 < np.abs(logits(four, "numpy", "all") - wanted).max()
    )


def test_what_groups_cannot_do_is_refused(tmp_path: Path) -> None:
    quantised = by_mlx_lm(make_tiny("llama-640", tmp_path), tmp_path / "mlx-lm", 4, 32, "bfloat16")
    for options, match in (
        ({"quantize": True}, "quantised already, to 4 bits in groups of 32.*--requantize"),
        ({"dtype": "float16"}, "copied as it is, without --dtype"),
    ):
        with pytest.raises(UsageError, match=match):
            mlx_flash.convert(quantised, tmp_path / "q", **options)
    path = mlx_flash.convert(quantised, tmp_path / "q")
    for select in ("gate", "predictor", "threshold:0.5", "static:0.5"):
        with pytest.raises(UsageError, match=f"--select {select.split(':')[0]} needs single neurons.*--requantize -q"):
            inspect_model(path, mlx_flash.FlashConfig(select=select))
    from mlx_flash.tools.calibration.calibrator import calibrate

    (tmp_path / "text.txt").write_text("Once upon a time")
    with pytest.raises(UsageError, match="groups of 32 neurons share scales"):
        calibrate(path, [tmp_path / "text.txt"])


def test_codes_that_are_missing_or_of_another_kind(tmp_path: Path) -> None:
    quantised = by_mlx_lm(make_tiny("llama-640", tmp_path), tmp_path / "mlx-lm", 4, 32, "bfloat16")
    weights = quantised / "model.safetensors"
    tensors = mx.load(str(weights))
    name = "model.layers.1.mlp.up_proj.scales"
    for change, match in (
        (None, "lacks 1 of .*up_proj.scales"),
        (tensors[name].astype(mx.float32), "is U32 with scales of F32 and biases of BF16"),
        (tensors[name][:, :1], r"up_proj' has 4 bits in groups of 32 .*codes U32 \[640, 8\], scales BF16 \[640, 1\]"),
    ):
        changed = {key: value for key, value in tensors.items() if key != name}
        mx.save_safetensors(str(weights), changed | ({} if change is None else {name: change}), {"format": "mlx"})
        with pytest.raises(ConfigError, match=match):
            mlx_flash.convert(quantised, tmp_path / "q")


def test_mlx_lm_s_own_conversion_of_the_dense_part(tmp_path: Path) -> None:
    """The resident tensors of `convert -q` are those that mlx-lm writes, byte for byte."""
    source = make_tiny("openelm-640", tmp_path)
    theirs = mx.load(str(by_mlx_lm(source, tmp_path / "mlx-lm", 8, 32, "bfloat16") / "model.safetensors"))
    options: dict[str, Any] = {"dtype": "bfloat16", "quantize": True, "q_group_size": 32}
    path = mlx_flash.convert(source, tmp_path / "q", q_bits=4, dense_bits=8, **options)
    ours = mx.load(str(path / "model.safetensors"))
    assert ours and ours.keys() == {name for name in theirs if "ffn.proj" not in name}
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype and bool(mx.array_equal(value, theirs[name])), name
    assert json.loads((path / "config.json").read_text())["quantization"] == {
        "group_size": 32,
        "bits": 8,
        "mode": "affine",
    }
    kept = mlx_flash.convert(source, tmp_path / "16", dense_bits=16, **options)
    assert "quantization" not in json.loads((kept / "config.json").read_text())
    name = next(iter(mx.load(str(kept / "model.safetensors"))))
    raw = np.array(mx.load(str(source / "model.safetensors"))[name])
    stored = np.array(mx.load(str(kept / "model.safetensors"))[name].view(mx.uint16))
    assert np.allclose(to_float32(stored, "bfloat16"), raw, rtol=2**-8)
