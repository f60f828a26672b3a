"""The command line's contract: text, JSON, exit status, and errors that say what to do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import mlx_flash
from mlx_flash import cli
from tests.tiny import make_tiny

REPLY_KEYS = {
    "text": str,
    "tokens": list,
    "finish_reason": str,
    "prompt_tokens_per_s": float,
    "decode_tokens_per_s": float,
    "bytes_read_per_token": float,
    "hit_rate": float,
    "resident_bytes": int,
    "peak_bytes": int,
    "selector": str,
    "exact": bool,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("openelm-relu", tmp_path_factory.mktemp("cli"))


@pytest.fixture(scope="module")
def flash(source: Path) -> Path:
    return mlx_flash.convert(source, source.parent / "flash")


def run_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict]:
    status = cli.main([str(a) for a in arguments] + ["--json"])
    out = capsys.readouterr().out
    assert out.count("\n") == 1, "stdout is one object"
    return status, json.loads(out)


def generate(flash: Path, *more: object) -> list[object]:
    return ["generate", "--model", flash, "--prompt", "Once", "--backend", "numpy", "--max-tokens", 8, *more]


def test_generate_json(capsys: pytest.CaptureFixture[str], flash: Path) -> None:
    status, reply = run_json(capsys, *generate(flash))
    assert status == 0
    assert {key: type(value) for key, value in reply.items()} == REPLY_KEYS
    assert len(reply["tokens"]) == 8 and reply["finish_reason"] == "length"
    assert reply["selector"] == "gate" and reply["exact"] is True


def test_text_streams_to_stdout_and_the_summary_to_stderr(capsys: pytest.CaptureFixture[str], flash: Path) -> None:
    _, reply = run_json(capsys, *generate(flash))
    assert cli.main([str(a) for a in generate(flash)]) == 0
    captured = capsys.readouterr()
    assert captured.out == reply["text"] + "\n"
    for word in ("tokens/s", "per token", "hit rate", "resident", "peak", "selector gate (exact)"):
        assert word in captured.err


def test_the_budget_does_not_change_the_reply(capsys: pytest.CaptureFixture[str], flash: Path) -> None:
    _, report = run_json(capsys, "inspect", "--model", flash, "--backend", "numpy")
    _, wanted = run_json(capsys, *generate(flash))
    _, small = run_json(capsys, *generate(flash, "--memory", report["smallest_budget_bytes"]))
    assert small["tokens"] == wanted["tokens"] and small["bytes_read_per_token"] > 0


def test_a_seed_repeats_a_sample(capsys: pytest.CaptureFixture[str], flash: Path) -> None:
    options = ("--temp", 1.0, "--top-p", 0.95, "--top-k", 50, "--seed")
    first, again, other = (run_json(capsys, *generate(flash, *options, s))[1]["tokens"] for s in (1, 1, 2))
    assert first == again != other


def test_the_prompt_may_come_from_stdin(flash: Path) -> None:
    command = [sys.executable, "-m", "mlx_flash.cli", *map(str, generate(flash, "--json"))]
    command[command.index("Once")] = "-"
    done = subprocess.run(command, input="Once", capture_output=True, text=True)
    assert done.returncode == 0 and len(json.loads(done.stdout)["tokens"]) == 8


def test_stdin_that_is_not_text_is_refused(flash: Path) -> None:
    command = [sys.executable, "-m", "mlx_flash.cli", *map(str, generate(flash, "--json"))]
    command[command.index("Once")] = "-"
    done = subprocess.run(command, input=b"a\xff", capture_output=True)
    assert done.returncode == 2 and "not UTF-8" in json.loads(done.stdout)["error"]["message"]
    assert b"Traceback" not in done.stderr


def test_a_config_that_is_not_the_tensors_is_refused(
    capsys: pytest.CaptureFixture[str], flash: Path, tmp_path: Path
) -> None:
    import shutil

    copy = shutil.copytree(flash, tmp_path / "copy")
    text = (copy / "config.json").read_text()
    (copy / "config.json").write_text(text.replace('"vocab_size": 300', '"vocab_size": 1000000000'))
    status, result = run_json(capsys, "inspect", "--model", copy)
    assert status == 2 and "token_embeddings" in result["error"]["message"]


@pytest.mark.parametrize(
    ("more", "kind", "words"),
    [
        (["--memory", "1kB"], "BudgetError", ["dense part", "KV cache", "staging", "use --memory"]),
        (["--memory", "lots"], "BudgetError", ["cannot read the size 'lots'"]),
        (["--prompt", ""], "UsageError", ["the prompt is empty"]),
        (["--prompt", "x" * 600], "UsageError", ["601 tokens", "context 512"]),
        (["--max-context", "4096"], "UsageError", ["4096", "512"]),
        (["--max-tokens", "0"], "UsageError", ["max_tokens is 0"]),
        (["--temp", "-1"], "UsageError", ["temp"]),
        (["--backend", "cuda"], "BackendError", ["known: auto, mlx, numpy"]),
        (["--select", "some"], "UsageError", ["known: auto, all, gate, router, predictor"]),
        (["--model", "no/such/folder/at/all"], "UsageError", ["does not exist"]),
    ],
)
def test_bad_input_exits_with_2(
    capsys: pytest.CaptureFixture[str], flash: Path, more: list[str], kind: str, words: list[str]
) -> None:
    status, result = run_json(capsys, *generate(flash), *more)
    assert status == 2 and result["error"]["type"] == kind
    for word in words:
        assert word in result["error"]["message"]
    assert cli.main([str(a) for a in generate(flash)] + more) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err and kind in captured.err


def test_gate_needs_relu(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    flash = mlx_flash.convert(make_tiny("llama", tmp_path), tmp_path / "flash")
    status, result = run_json(capsys, *generate(flash, "--select", "gate"))
    assert status == 2 and "needs a ReLU model" in result["error"]["message"]
    assert run_json(capsys, *generate(flash))[1]["selector"] == "all"


def test_verify_names_a_changed_file(capsys: pytest.CaptureFixture[str], flash: Path, tmp_path: Path) -> None:
    import shutil

    assert run_json(capsys, "verify", "--model", flash)[0] == 0
    copy = shutil.copytree(flash, tmp_path / "copy")
    file = copy / "flash" / "layer-002.safetensors"
    with file.open("r+b") as handle:
        handle.seek(20000)
        byte = handle.read(1)
        handle.seek(20000)
        handle.write(bytes([byte[0] ^ 1]))
    status, result = run_json(capsys, "verify", "--model", copy)
    assert status == 1 and result["error"]["type"] == "IntegrityError"
    assert "flash/layer-002.safetensors" in result["error"]["message"]


def test_a_hugging_face_folder_is_converted_once(
    capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    arguments = [str(a) for a in generate(source)]
    assert cli.main(arguments) == 0
    assert "converting" in capsys.readouterr().err
    assert cli.main(arguments) == 0
    assert "converting" not in capsys.readouterr().err


def test_inspect(capsys: pytest.CaptureFixture[str], flash: Path) -> None:
    status, report = run_json(capsys, "inspect", "--model", flash, "--backend", "numpy")
    assert status == 0 and report["fits"] and report["capacities"] == report["bundles"]
    status, small = run_json(capsys, "inspect", "--model", flash, "--backend", "numpy", "--memory", "1kB")
    assert status == 0 and not small["fits"] and "needs at least" in small["problem"]
    assert cli.main(["inspect", "--model", str(flash)]) == 0
    assert "a token reads at worst" in capsys.readouterr().out


def test_convert_and_make_random(capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path) -> None:
    card = source.parent / "openelm-relu-card"
    status, made = run_json(capsys, "make-random", "--card", card, "--out", tmp_path / "r", "--dtype", "float16")
    assert status == 0
    convert = ["convert", "--hf-path", made["path"], "--flash-path", tmp_path / "f", "--dtype", "float32"]
    assert run_json(capsys, *convert)[0] == 0
    status, result = run_json(capsys, *convert)
    assert status == 2 and str(tmp_path / "f") in result["error"]["message"]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"mlx_flash {mlx_flash.__version__}\n"


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_keeps_the_text_and_exits_with_130(flash: Path) -> None:
    command = [sys.executable, "-u", "-m", "mlx_flash.cli", *map(str, generate(flash))]
    command[command.index("8")] = "400"
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    first = process.stdout.read(1)
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    assert process.returncode in (0, 130), errors.decode()  # 0: it had finished already
    assert len(first + rest) > 1 and b"Traceback" not in errors and b"decode" in errors


def test_help_names_every_command() -> None:
    text = cli.make_parser().format_help()
    for name in ("generate", "inspect", "verify", "convert", "make-random"):
        assert name in text
