"""The command line: values out of range are refused before a model is looked for; output names models as typed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import mlx_flash
import mlx_flash.tools.inspection
from mlx_flash.cli import main, make_parser
from mlx_flash.models.text.sampling import Sampling
from tests.tiny import make_tiny

SAMPLING = [
    ("--temp", "-1", "temp"),
    ("--temp", "nan", "temp"),
    ("--temp", "inf", "temp"),
    ("--top-p", "1.5", "top_p"),
    ("--top-p", "nan", "top_p"),
    ("--top-k", "-1", "top_k"),
    ("--max-tokens", "0", "max"),
]
RUN = [
    ("--max-context", "0", "max_context"),
    ("--memory", "lots", "size"),
    ("--memory", "-1", "size"),
    ("--select", "prompt:0", "above 0"),
    ("--select", "threshold:1", "below 1"),
    ("--select", "static:nan", "at most 1"),
    ("--slots", "1.5", "slots"),
    ("--slots", "nan", "slots"),
    ("--reselect", "4", "reselect"),
    ("--merge-gap", "2GB", "merge_gap"),
    ("--reads-in-flight", "0", "reads_in_flight"),
    ("--staging-blocks", "0", "staging_blocks"),
    ("--backend", "cuda", "known: auto"),
]
SEED = ("--seed", "-1", "seed"), ("--seed", str(1 << 64), "seed")
NEEDED = {"generate": ["--prompt", "x"], "perplexity": ["--data", "text"], "simulate": ["--data", "text"]}
CASES = [(command, *case) for command in ("generate", "chat") for case in [*SAMPLING, *SEED, *RUN]]
CASES += [("server", *case) for case in [*SAMPLING, *RUN[:-1]]]  # which runs on one backend only
CASES += [("server", "--port", "70000", "--port"), ("server", "--replies", "0", "--replies")]
CASES += [(command, *case) for command in ("perplexity", "simulate", "bench", "inspect") for case in RUN]
CASES += [("perplexity", "--tokens", "0", "--tokens"), ("simulate", "--tokens", "0", "--tokens")]
CASES += [("simulate", "--fractions", "2", "--fractions"), ("simulate", "--fractions", "nan", "--fractions")]
CASES += [("bench", "--tokens", "0", "--tokens"), ("bench", "--recall", "nan", "--recall")]


@pytest.mark.parametrize(("command", "option", "value", "words"), CASES)
def test_a_wrong_value_is_refused_before_anything_is_loaded(
    command: str,
    option: str,
    value: str,
    words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("some text")
    arguments = [command, "--model", "no/model", *NEEDED.get(command, []), f"{option}={value}", "--json"]
    assert main(arguments) == 2
    message = json.loads(capsys.readouterr().out)["error"]["message"]
    assert words in message and "no/model" not in message, "a model that is not there was looked for first"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-q", "--q-bits", "3"], "3 bits"),
        (["-q", "--q-group-size", "7"], "groups of 7"),
        (["-q", "--dense-bits", "5"], "5 bits"),
        (["--dense-bits", "4"], "goes with -q"),
    ],
)
def test_settings_of_a_conversion(
    options: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["convert", "--hf-path", "no/model", "--flash-path", str(tmp_path / "out"), *options, "--json"]
    assert main(arguments) == 2 and words in json.loads(capsys.readouterr().out)["error"]["message"]


def test_texts_that_are_not_there_are_named_before_a_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("perplexity", "simulate", "calibrate"):
        assert main([command, "--model", "no/model", "--data", str(tmp_path / "gone"), "--json"]) == 2
        assert "gone is not a file" in json.loads(capsys.readouterr().out)["error"]["message"]


def test_the_module_is_the_command(tmp_path: Path) -> None:
    for module in ("mlx_flash", "mlx_flash.cli"):
        done = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True)
        assert done.stdout == f"mlx_flash {mlx_flash.__version__}\n", done.stderr
        done = subprocess.run(
            [sys.executable, "-m", module, "generate", "--prompt", ""], capture_output=True, text=True
        )
        assert done.returncode == 2 and done.stderr == "UsageError: the prompt is empty\n"


def test_models_are_called_what_the_user_wrote(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    make_tiny("llama", tmp_path)
    options = ["--model", "./llama", "--backend", "numpy"]
    assert main(["generate", *options, "--prompt", "x", "--max-tokens", "2"]) == 0
    assert "\n./llama: select all, backend numpy" in capsys.readouterr().err
    assert main(["inspect", *options]) == 0
    assert capsys.readouterr().out.startswith(f"./llama ({tmp_path / 'cache'}")
    assert main(["inspect", *options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "./llama"
    assert main(["generate", *options, "--prompt", "x", "--memory", "1kB"]) == 2
    assert capsys.readouterr().err.startswith("BudgetError: ./llama needs at least")
    assert main(["verify", "--model", "./llama"]) == 0
    assert capsys.readouterr().out.startswith("./llama (")
    monkeypatch.setattr("builtins.input", lambda *_: (_ for _ in ()).throw(EOFError))
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["chat", *options]) == 0
    assert capsys.readouterr().err.startswith("./llama (no chat template")


def test_help_says_what_switches_sampling_off() -> None:
    for command in ("generate", "chat"):
        parser: Any = make_parser()
        text = " ".join(parser._subparsers._group_actions[0].choices[command].format_help().split())
        assert "likeliest P mass; 0 (default) = off" in text and "K likeliest tokens; 0 (default) = off" in text


@pytest.mark.parametrize("backend", ["numpy", "mlx"])
def test_values_at_the_ends_of_their_ranges_run(backend: str, tmp_path: Path) -> None:
    if backend == "mlx":
        pytest.importorskip("mlx_lm", reason="the mlx backend is not installed")
    path = mlx_flash.convert(make_tiny("llama", tmp_path), tmp_path / "flash")
    model, _ = mlx_flash.load(path, backend=backend)

    def tokens(**sampling: Any) -> list[int]:
        return list(model.flash.steps(model, [1, 2, 3], 6, Sampling(**sampling)))

    greedy = tokens()
    assert tokens(temp=1e-300, seed=1) == greedy == tokens(temp=5.0, top_k=1, seed=(1 << 64) - 1)
    assert tokens(temp=1.0, top_k=10**9, seed=3) == tokens(temp=1.0, seed=3)
    assert tokens(temp=1.0, top_p=1.0, seed=3) == tokens(temp=1.0, top_p=0.0, seed=3)
    model.flash.close()
