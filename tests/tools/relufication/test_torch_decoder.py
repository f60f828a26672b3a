"""The torch decoder says what the numpy decoder and transformers say; what it learns from, scores and is steered by."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="relufy needs PyTorch (the extra `train`)")

import torch
from safetensors.torch import load_file

import mlx_flash
from mlx_flash.errors import FlashError
from mlx_flash.models.specs.config_reader import read_spec
from mlx_flash.tools.relufication.distillation import (
    Distillation,
    Pressure,
    activity,
    choose_cutoffs,
    divergence,
    evaluate,
    learning_rate,
)
from mlx_flash.tools.relufication.torch_decoder import Seen, TorchCache, TorchDecoder, sample_texts
from tests.tiny import CONFIGS, make_tiny

torch.set_num_threads(1)
GATED = [name for name in CONFIGS if name != "opt"]


def read(folder: Path) -> TorchDecoder:
    config = json.loads((folder / "config.json").read_text())
    weights = {name: weight.float() for name, weight in load_file(folder / "model.safetensors").items()}
    spec = read_spec(config, weights)
    cutoffs = None if spec.activation == "silu" else config.get("fatrelu_thresholds", [0.0] * len(spec.layers))
    return TorchDecoder(spec, weights, cutoffs, 64)


def ids_for(decoder: TorchDecoder, rows: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(decoder.spec.vocab, (rows, length), generator=generator)


def check_against_numpy(folder: Path, select: str) -> None:
    """The logits of the numpy decoder, prefilled and decoding, are those of the torch decoder."""
    decoder = read(folder)
    ids = ids_for(decoder, 1, 40)
    logits = decoder(ids)[0].detach().numpy()
    model, _ = mlx_flash.load(folder, backend="numpy", select=select)
    cache, begin = model.make_cache(), 0
    for end in (23, 24, 25, 39, 40):
        ours = model(ids[0, begin:end].tolist(), cache)
        assert np.abs(ours - logits[end - 1]).max() < 1e-4 * np.abs(logits[end - 1]).max()
        begin = end
    model.flash.close()


@pytest.mark.parametrize("name", GATED)
def test_the_torch_decoder_says_what_the_numpy_decoder_says(name: str, tmp_path: Path) -> None:
    check_against_numpy(make_tiny(name, tmp_path), "all")


@pytest.mark.parametrize("name", ["llama", "llama3-rope", "qwen2", "qwen3-relu", "openelm"])
def test_a_cache_changes_nothing(name: str, tmp_path: Path) -> None:
    decoder = read(make_tiny(name, tmp_path))
    ids = ids_for(decoder, 3, 30)
    cache, begin = TorchCache(decoder.spec, 3, 30, decoder.embed), 0
    parts = []
    for end in (11, 12, 20, 29, 30):  # many tokens after some, one token, the first ones
        parts.append(decoder(ids[:, begin:end], cache))
        begin = end
    whole = decoder(ids)
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-4 * float(whole.abs().max()))


@pytest.mark.parametrize("name", ["llama", "llama-relu", "llama3-rope"])
def test_the_torch_decoder_says_what_transformers_says(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="compares with transformers' Llama")
    folder = make_tiny(name, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    decoder = read(folder)
    ids = ids_for(decoder, 2, 40)
    with torch.no_grad():
        wanted = theirs(ids).logits
    assert torch.allclose(decoder(ids), wanted, atol=1e-4 * float(wanted.abs().max()))


def test_what_is_seen_gives_the_activations(tmp_path: Path) -> None:
    plain = read(make_tiny("llama", tmp_path))
    decoder = TorchDecoder(plain.spec, plain.weights, [0.5, 0.0, 1.0], 64)
    seen = Seen()
    decoder(ids_for(decoder, 2, 12), seen=seen)
    for i, gate in enumerate(seen.gates):
        cutoff = [0.5, 0.0, 1.0][i]
        assert gate.shape == (2, 12, 344)
        assert decoder.activate(i, gate).tolist() == [
            [[x if x > cutoff else 0 for x in t] for t in b] for b in gate.tolist()
        ]
    assert [tuple(h.shape) for h in seen.hidden] == [(2, 12, 64)] * 3


def test_written_text_is_drawn_from_the_model_and_begins_anew_after_an_end(tmp_path: Path) -> None:
    decoder = read(make_tiny("llama", tmp_path))
    weights = {name: weight / 4 if weight.ndim == 2 else weight for name, weight in decoder.weights.items()}
    decoder = TorchDecoder(decoder.spec, weights, None, 64)  # flat enough to draw many tokens
    ends = list(range(40))
    ids = sample_texts(decoder, 200, 12, 256, ends, torch.Generator().manual_seed(1))
    again = sample_texts(decoder, 200, 12, 256, ends, torch.Generator().manual_seed(1))
    assert torch.equal(ids, again) and (ids[:, 0] == 256).all()
    after = ids[:, 1:][torch.isin(ids[:, :-1], torch.tensor(ends))]
    assert len(after) > 50 and (after == 256).all()
    # Second tokens are drawn at temperature 1: they are as likely, on average, as the entropy says.
    scores = decoder(torch.tensor([[256]]))[0, -1].log_softmax(-1)
    many = sample_texts(decoder, 4000, 2, 256, [], torch.Generator().manual_seed(2))[:, 1]
    entropy, twice = -float(scores.exp() @ scores), -float((2 * scores).softmax(-1) @ scores)
    assert entropy - twice > 0.2
    assert -float(scores[many].mean()) == pytest.approx(entropy, abs=0.06)


def test_the_sparsity_loss_is_what_exceeds_the_cutoff_over_the_mean_gate(tmp_path: Path) -> None:
    plain = read(make_tiny("openelm", tmp_path))  # layers of different widths
    decoder = TorchDecoder(plain.spec, plain.weights, [0.5, 0.0, 1.0], 64)
    seen = Seen(gates=[torch.full((1, 2, layer.intermediate), 2.0, requires_grad=True) for layer in plain.spec.layers])
    widths = np.array([layer.intermediate for layer in plain.spec.layers])
    l1, zeros = activity(decoder, seen)
    assert float(l1.detach()) == pytest.approx(np.average([0.75, 1.0, 0.5], weights=widths)) and float(zeros) == 0
    l1.backward()
    assert float(seen.gates[0].grad.sum()) == pytest.approx(0.5 * widths[0] / widths.sum(), rel=1e-4)
    seen.gates[2] = seen.gates[2].detach() / 2  # at the cut-off: zero
    assert float(activity(decoder, seen)[1]) == pytest.approx(widths[2] / widths.sum())


def test_divergence_is_the_kl_of_the_softmaxes() -> None:
    a, b = torch.tensor([[[0.0, math.log(3.0)]]]), torch.tensor([[[0.0, 0.0]]])
    wanted = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert divergence(a, b).item() == pytest.approx(wanted, rel=1e-5)
    assert divergence(a, a).item() == pytest.approx(0, abs=1e-7)


def test_a_score_is_the_mean_over_tokens_and_bos_is_not_scored(tmp_path: Path) -> None:
    original = read(make_tiny("openelm", tmp_path))  # layers of different widths
    copy = TorchDecoder(original.spec, original.weights, [0.0, 0.3, 1.0], 64)
    ids = ids_for(copy, 5, 20)
    ids[2:4, 10] = 256
    score = evaluate(copy, original, ids, 2, 256)
    nats, kl, zeros, neurons = [], [], 0, 0
    seen = Seen()
    theirs, ours = original(ids).double().log_softmax(-1), copy(ids, seen=seen).double().log_softmax(-1)
    for row in range(5):
        for at in range(19):
            if ids[row, at + 1] != 256:
                nats.append(-float(ours[row, at, ids[row, at + 1]]))
                kl.append(float((theirs[row, at].exp() * (theirs[row, at] - ours[row, at])).sum()))
    for gate, cutoff in zip(seen.gates, [0.0, 0.3, 1.0], strict=True):
        zeros, neurons = zeros + int((gate <= cutoff).sum()), neurons + gate.numel()
    assert score.nats_per_token == pytest.approx(np.mean(nats), rel=1e-5)
    assert score.kl == pytest.approx(np.mean(kl), rel=1e-4)
    assert score.zeros == pytest.approx(zeros / neurons, abs=1e-6)
    assert evaluate(original, original, ids, 5, 256).zeros == 0.0


def test_cutoffs_give_the_share_of_zeros_asked_for(tmp_path: Path) -> None:
    original = read(make_tiny("llama", tmp_path))
    ids = ids_for(original, 8, 32)
    for target in (0.7, 0.95):
        cutoffs = choose_cutoffs(original, ids, 4, target, seed=0)
        seen = Seen()
        original(ids, seen=seen)
        shares = [float((gate <= t).float().mean()) for gate, t in zip(seen.gates, cutoffs, strict=True)]
        assert shares == pytest.approx([target] * 3, abs=0.01)
    assert choose_cutoffs(original, ids, 4, 0.01, seed=0) == [0.0] * 3


def test_the_pressure_rises_while_zeros_are_missing_and_falls_beyond_the_target() -> None:
    pressure = Pressure(0.9, 100)
    weights = []
    for step in range(50):
        pressure.update(step, 0.5)
        weights.append(pressure.weight)
    assert weights[-1] > 5 * weights[0] > 0
    for step in range(50, 60):
        pressure.update(step, 0.99)
    assert pressure.weight < 0.2 * weights[-1]
    none = Pressure(None, 100)
    none.update(0, 0.5)
    assert none.weight == 0


def test_the_rate_rises_then_falls() -> None:
    rates = [learning_rate(step, 100, 1.0) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and max(rates) == rates[5] == pytest.approx(1.0)
    assert rates[4] <= 1.0 and rates[5:] == sorted(rates[5:], reverse=True) and 0.05 <= rates[-1] < 0.06


def test_the_copy_learns_and_pressure_brings_zeros(tmp_path: Path) -> None:
    original = read(make_tiny("llama", tmp_path))
    ids = ids_for(original, 8, 24)
    reached: dict[bool, tuple[float, float]] = {}
    for pressed in (False, True):
        run = Distillation(original, [0.0] * 3, steps=40, lr=3e-3, led_to=0.9 if pressed else None)
        before = run.step(ids)
        for _ in range(38):
            run.step(ids)
        reached[pressed] = run.step(ids)
        if not pressed:
            assert reached[pressed][0] < 0.5 * before[0]
    assert reached[True][1] > reached[False][1] + 0.05
    unchanged = read(tmp_path / "llama").weights
    assert all(torch.equal(weight, unchanged[name]) for name, weight in original.weights.items())


def test_hidden_states_count_when_asked(tmp_path: Path) -> None:
    original = read(make_tiny("llama", tmp_path))
    ids = ids_for(original, 2, 16)
    runs = [Distillation(original, [0.0] * 3, steps=4, lr=1e-3, hidden_weight=w) for w in (0.0, 10.0)]
    for run in runs:
        run.step(ids)
    names = [name for name in runs[0].weights if not torch.equal(runs[0].weights[name], runs[1].weights[name])]
    assert names


def test_a_run_that_diverges_says_so(tmp_path: Path) -> None:
    original = read(make_tiny("llama", tmp_path))
    run = Distillation(original, [0.0] * 3, steps=4, lr=1e-3)
    with torch.no_grad():
        run.weights["model.norm.weight"].fill_(math.inf)
    with pytest.raises(FlashError, match="lower lr"):
        run.step(ids_for(original, 2, 16))
