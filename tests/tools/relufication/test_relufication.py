"""A relufied checkpoint runs with exact zeros and scores what was reported; an interrupted run goes on bit for bit;
what cannot be relufied is named."""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="relufy needs PyTorch (the extra `train`)")

import torch
from safetensors.torch import load_file, save_file

import mlx_flash
from mlx_flash.apps.commands import relufy as relufy_command
from mlx_flash.engine.storage.header import read_header
from mlx_flash.errors import FlashError, FormatError, UsageError
from mlx_flash.models.text.tokenizer import load_tokenizer
from mlx_flash.tools.random_model import make_random
from mlx_flash.tools.relufication import relufication_run, token_rows, torch_decoder
from mlx_flash.tools.relufication.distillation import Distillation, evaluate
from mlx_flash.tools.relufication.options import RelufyConfig
from mlx_flash.tools.relufication.relufication import relufy
from mlx_flash.tools.relufication.token_rows import pick
from tests.tiny import CONFIGS, make_tiny

from .test_torch_decoder import check_against_numpy, read

torch.set_num_threads(1)
QUICK: dict[str, Any] = {"tokens": 800, "steps": 6, "batch": 4, "context": 16, "lr": 3e-3, "device": "cpu"}


@pytest.mark.parametrize("name", ["llama", "openelm", "qwen3"])
def test_a_relu_checkpoint_runs_with_the_gate_selector(name: str, tmp_path: Path) -> None:
    source, out = make_tiny(name, tmp_path), tmp_path / "out"
    report = relufy(source, out, **QUICK | {"lr": 3e-4})
    key = CONFIGS[name].get("activation_fn_name") and "activation_fn_name" or "hidden_act"
    config = json.loads((out / "config.json").read_text())
    assert config[key] == "relu" and "fatrelu_thresholds" not in config and config["vocab_size"] == 300
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in source.iterdir())
    assert report["original"]["zeros"] == 0 and report["original"]["kl"] == pytest.approx(0, abs=1e-5)
    assert 0.3 < report["replaced"]["zeros"] < 0.7 and report["replaced"]["kl"] > report["recovered"]["kl"] > 0
    check_against_numpy(out, "gate")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", ["llama", "openelm"])
def test_a_fatrelu_checkpoint_runs_with_the_gate_selector(name: str, tmp_path: Path) -> None:
    source, out = make_tiny(name, tmp_path), tmp_path / "out"
    report = relufy(source, out, **QUICK, activation="fatrelu", target_sparsity=0.85)
    config = json.loads((out / "config.json").read_text())
    assert config["fatrelu_thresholds"] == report["cutoffs"] and min(report["cutoffs"]) > 0
    assert report["replaced"]["zeros"] == pytest.approx(0.85, abs=0.03)
    check_against_numpy(out, "gate")
    again = relufy(out, tmp_path / "again", **QUICK)  # the new original has zeros of its own
    assert again["original"]["zeros"] == pytest.approx(report["recovered"]["zeros"], abs=0.05)
    assert "fatrelu_thresholds" not in json.loads((tmp_path / "again" / "config.json").read_text())


def test_products_in_16_bits_learn_too(tmp_path: Path) -> None:
    source = make_tiny("qwen2", tmp_path)
    report = relufy(source, tmp_path / "out", **QUICK | {"lr": 3e-4, "steps": 12}, precision="bfloat16")
    assert report["original"]["kl"] < 1e-3 and report["recovered"]["kl"] < 0.95 * report["replaced"]["kl"]
    assert {info.dtype for info in read_header(tmp_path / "out" / "model.safetensors").values()} == {"F32"}


def test_the_reported_score_is_that_of_the_written_checkpoint(tmp_path: Path) -> None:
    card = tmp_path / "card"
    card.mkdir()
    (card / "config.json").write_text(json.dumps(CONFIGS["llama"]))
    source = make_random(card, tmp_path / "source", dtype="bfloat16", seed=7)
    weights = {n: w * 8 if w.ndim == 2 else w for n, w in load_file(source / "model.safetensors").items()}
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})  # so that rounding is felt
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} little words, {i * i} more. \n" for i in range(120)))
    report = relufy(source, tmp_path / "out", **QUICK, data=text)
    kinds = {info.dtype for info in read_header(tmp_path / "out" / "model.safetensors").values()}
    assert kinds == {"BF16"}
    tokens = np.frombuffer(text.read_bytes(), np.uint8)[: 800 // 16 * 15].reshape(-1, 15)
    tokenizer = load_tokenizer(source)
    rows = [[256, *tokenizer.encode(bytes(row).decode(), add_special_tokens=False)] for row in tokens]
    held = torch.tensor(rows[-2:])  # 5 % of 50 rows
    score = evaluate(read(tmp_path / "out"), read(source), held, 4, 256)
    assert score.nats_per_token == pytest.approx(report["recovered"]["nats_per_token"], rel=1e-5)
    assert score.kl == pytest.approx(report["recovered"]["kl"], rel=1e-4)


def test_held_out_text_is_not_learnt_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    held: list[torch.Tensor] = []
    step, score = Distillation.step, Distillation.score
    monkeypatch.setattr(Distillation, "step", lambda run, ids: (seen.append(ids), step(run, ids))[1])
    monkeypatch.setattr(Distillation, "score", lambda run, d, rows, *a: (held.append(rows), score(run, d, rows, *a))[1])
    relufy(make_tiny("llama", tmp_path), tmp_path / "out", **QUICK | {"steps": 20})
    learnt = {tuple(row) for ids in seen for row in ids.tolist()}
    assert len(learnt) == 48 and len(held) == 3  # all 48 rows in 20 steps of 4
    assert not learnt & {tuple(row) for rows in held for row in rows.tolist()}


class Stop(BaseException):
    """As sudden as Ctrl-C."""


@pytest.mark.parametrize("at", ["text", "steps"])
def test_an_interrupted_run_leaves_nothing_that_loads_and_goes_on_bit_for_bit(
    at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_tiny("llama", tmp_path)
    settings = QUICK | {"target_sparsity": 0.8, "hidden_weight": 0.1, "save_every_s": 0}
    whole = relufy(source, tmp_path / "whole", **settings)
    made: list[int] = []

    def fail_at(calls: int, owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def call(*arguments: Any) -> Any:
            made.append(1)
            if len(made) == calls:
                raise Stop
            return real(*arguments)

        monkeypatch.setattr(owner, name, call)

    fail_at(*((3, torch_decoder, "sample_texts") if at == "text" else (4, Distillation, "step")))
    with pytest.raises(Stop):
        relufy(source, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()
    before, saved = len(made), tmp_path / ".out.relufy.pt"
    assert saved.exists() and not list(tmp_path.glob(".out.partial*"))
    with pytest.raises(UsageError, match="other settings"):
        relufy(source, tmp_path / "out", **settings | {"lr": 1e-4})
    report = relufy(source, tmp_path / "out", **settings)
    assert len(made) - before == (4 - 2 if at == "text" else 6 - 3)  # what was done is not done again
    same = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert same[0] == same[1] and report | {"path": ""} == whole | {"path": ""}
    assert not saved.exists()


def test_a_damaged_unfinished_run_is_named_and_can_be_dropped(tmp_path: Path) -> None:
    source, saved = make_tiny("llama", tmp_path), tmp_path / ".out.relufy.pt"
    saved.write_bytes(b"no checkpoint")
    with pytest.raises(FormatError, match="delete it"):
        relufy(source, tmp_path / "out", **QUICK)
    relufy(source, tmp_path / "out", **QUICK, resume=False)
    assert not saved.exists()


def test_a_write_that_fails_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_tiny("llama", tmp_path)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(relufication_run.os, "rename", full)
    with pytest.raises(FlashError, match="no room"):
        relufy(source, tmp_path / "out", **QUICK)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out.partial*"))


def test_every_epoch_sees_every_row_once() -> None:
    walk = np.concatenate([pick(4 * step, 4, 10, seed=1) for step in range(10)])
    epochs = walk.reshape(4, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4
    assert pick(0, 25, 10, seed=1)[:20].tolist() == walk[:20].tolist()


def test_no_more_of_a_text_is_read_than_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_rows, "PIECE_BYTES", 100)
    text = tmp_path / "text.txt"
    text.write_bytes(b"a line of words\n" * 20_000 + b"\xff")
    tokenizer = load_tokenizer(make_tiny("llama", tmp_path))
    rows = token_rows.read_rows(text, tokenizer, 256, 300, 10, 17)
    assert rows.shape == (10, 17) and (rows[:, 0] == 256).all()
    assert [tokenizer.decode(row[1:].tolist()) for row in rows] == ["a line of words\n"] * 10
    with pytest.raises(UsageError, match="not UTF-8"):
        token_rows.read_rows(text, tokenizer, 256, 300, 30_000, 17)


def test_bad_input_is_named(tmp_path: Path) -> None:
    source, out = make_tiny("llama", tmp_path), tmp_path / "out"
    text = tmp_path / "text.txt"
    text.write_text("short")
    with pytest.raises(UsageError, match="5 tokens; at least 30 are needed"):
        relufy(source, out, **QUICK, data=text)
    text.write_bytes(b"")
    with pytest.raises(UsageError, match="0 tokens"):
        relufy(source, out, **QUICK, data=text)
    text.write_bytes(b"abc \xff def")
    with pytest.raises(UsageError, match="not UTF-8"):
        relufy(source, out, **QUICK, data=text)
    with pytest.raises(UsageError, match="cannot read"):
        relufy(source, out, **QUICK, data=tmp_path / "missing.txt")
    with pytest.raises(UsageError, match="two contexts"):
        relufy(source, out, **QUICK | {"tokens": 31})
    with pytest.raises(UsageError, match="beyond the model's 512"):
        relufy(source, out, **QUICK | {"context": 513})
    with pytest.raises(UsageError, match="exists"):
        relufy(source, source, **QUICK)
    with pytest.raises(UsageError, match="ReLU model as it is"):
        relufy(make_tiny("opt", tmp_path), out, **QUICK)
    with pytest.raises(UsageError, match="flash"):
        relufy(mlx_flash.convert(source, tmp_path / "flash"), out, **QUICK)
    config = json.loads((source / "config.json").read_text())
    for key in ("bos_token_id", "eos_token_id"):
        config.pop(key)
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="bos_token_id"):
        relufy(source, out, **QUICK)
    assert not out.exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"activation": "gelu"},
        {"target_sparsity": 1.0},
        {"target_sparsity": -0.5},
        {"pressure": True},
        {"steps": 0},
        {"batch": 2.5},
        {"context": 4},
        {"lr": math.nan},
        {"hidden_weight": -1.0},
        {"precision": "int8"},
        {"device": "tpu"},
        {"seed": -1},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        RelufyConfig(**wrong)


def test_without_torch_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UsageError, match=r"pip install 'mlx-flash-runtime\[train\]'"):
        relufy("somewhere", tmp_path / "out")


def test_every_setting_has_an_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    relufy_command.add_arguments(parser)
    args = parser.parse_args(["--hf-path", "x", "--out", "y"])
    assert RelufyConfig(**{field.name: getattr(args, field.name) for field in fields(RelufyConfig)}) == RelufyConfig()
    options = [word for name, value in QUICK.items() for word in (f"--{name}", str(value))]
    source, out = make_tiny("llama", tmp_path), tmp_path / "out"
    args = parser.parse_args(["--hf-path", str(source), "--out", str(out), *options])
    report = relufy_command.run(args)
    printed = capsys.readouterr().out
    assert f"{report['recovered']['nats_per_token']:.4f}" in printed and str(out) in printed
    assert json.loads(json.dumps(report)) == report
