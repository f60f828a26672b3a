"""Configs, folders and names that make no sense: one clear error, never a traceback, a hang or a memory blow-up."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import mlx_flash
from mlx_flash import cli
from mlx_flash.engine.storage.checkpoint import Checkpoint, verify
from mlx_flash.engine.storage.writer import remove_stale
from mlx_flash.errors import ConfigError, FlashError, FormatError, IntegrityError, UsageError
from mlx_flash.models.specs.config_reader import read_spec
from mlx_flash.runtime.machine import cache_folder
from mlx_flash.runtime.model_path import resolve_model
from mlx_flash.tools.random_model import make_random
from tests.tiny import CONFIGS, make_tiny

NAN, INF = float("nan"), float("inf")
WRONG: list[Any] = [
    "",
    "x",
    "4",
    -1,
    0,
    0.0,
    -2.5,
    NAN,
    INF,
    10**9,
    10**30,
    True,
    [],
    [NAN] * 3,
    [INF] * 3,
    {},
    {"a": 1},
]
FAMILIES = ["openelm-relu", "llama", "mistral", "qwen2", "qwen3", "opt"]
LLAMA3 = {"rope_type": "llama3", "factor": 4.0}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("openelm-relu", tmp_path_factory.mktemp("bad"))


@pytest.fixture(scope="module")
def original(source: Path) -> Path:
    return mlx_flash.convert(source, source.parent / "flash")


@pytest.fixture
def flash(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "flash")


@pytest.mark.parametrize("name", FAMILIES)
def test_any_key_wrong_or_missing_is_a_config_error_or_harmless(name: str) -> None:
    config = CONFIGS[name]
    keys = [*config, "rope_scaling", "rope_parameters", "head_dim", "attention_bias", "mlp_bias", "sliding_window"]
    keys += ["rms_norm_eps", "rope_freq_constant", "share_input_output_layers", "normalize_qk_projections"]
    for key in keys:
        changed = [config | {key: value} for value in WRONG]
        changed.append({k: v for k, v in config.items() if k != key})
        for bad in changed:
            try:
                spec = read_spec(bad)
            except ConfigError as error:
                assert "\n" not in str(error) and len(str(error)) < 500
                continue
            assert len(spec.layers) < 100 and type(spec.tied) is bool
            assert 0 < spec.eps < INF and (spec.rope is None or 0 < spec.rope.base < INF)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ("opt", {"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ("opt", {"num_attention_heads": 7}, "7 heads"),
        ("opt", {"num_attention_heads": 1000}, "1000 heads"),
        ("llama", {"head_dim": 15}, "even"),
        ("llama", {"rms_norm_eps": NAN}, "rms_norm_eps"),
        ("llama", {"tie_word_embeddings": "false"}, "tie_word_embeddings"),
        ("llama", {"eos_token_id": True}, "eos_token_id"),
        ("llama", {"eos_token_id": [-1]}, "eos_token_id"),
        ("llama", {"bos_token_id": "<s>"}, "bos_token_id"),
        ("llama", {"hidden_act": "y" * 10**6}, "known: silu"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 1e-320}}, "factor"),
        ("llama", {"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "low_freq_factor"),
        ("llama", {"rope_scaling": LLAMA3 | {"high_freq_factor": "4"}}, "high_freq_factor"),
        ("llama", {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": INF}}, "original_max_position"),
        ("openelm", {"ffn_multipliers": [1.0, NAN, 1.0]}, "ffn_multipliers"),
        ("openelm", {"ffn_multipliers": [1.0, 1e300, 1.0]}, "ffn_multipliers"),
        ("openelm", {"num_query_heads": [4.5, 4, 8]}, "num_query_heads"),
    ],
)
def test_values_that_make_no_sense(name: str, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        read_spec(CONFIGS[name] | change)
    assert len(str(error.value)) < 300


def test_sizes_beyond_64_bits_do_not_fit_on_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Were they let through, the weights would fill the disk.
    monkeypatch.setattr(sys.modules["mlx_flash.tools.random_model"], "_write_weights", lambda *_: pytest.fail("writes"))
    big = {"hidden_size": 2**31 - 2, "num_attention_heads": 2**31 - 2, "num_key_value_heads": 1, "head_dim": 2**31 - 2}
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["llama"] | big))
    with pytest.raises(FlashError, match="free"):
        make_random(tmp_path, tmp_path / "out")
    assert os.listdir(tmp_path) == ["config.json"]


def test_random_checkpoints_remove_stale_folders_and_name_what_cannot_be_written(tmp_path: Path, source: Path) -> None:
    stale = tmp_path / ".out.partial-999999999"
    stale.mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write"):
        make_random(source, tmp_path / "file" / "out")
    make_random(source, tmp_path / "out")
    assert not stale.exists()


@pytest.mark.parametrize("at", [0, 3, 60, -2])
def test_a_damaged_config_is_named_and_nothing_is_converted(
    flash: Path, at: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = bytearray((flash / "config.json").read_bytes())
    data[at] ^= 1
    (flash / "config.json").write_bytes(data)
    assert cli.main(["verify", "--model", str(flash), "--json"]) == 1
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["type"] == "IntegrityError" and "config.json" in error["message"]
    with pytest.raises(FormatError, match=r"config\.json"):
        mlx_flash.load(flash, backend="numpy")
    assert "converting" not in capsys.readouterr().err and not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", ["config.json", "chat_template.jinja", "tokenizer.json"])
def test_a_link_out_of_the_folder_is_refused(flash: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes((flash / name).read_bytes() if (flash / name).exists() else b"secret")
    (flash / name).unlink(missing_ok=True)
    (flash / name).symlink_to(outside)
    with pytest.raises(FormatError, match=f"{name} is a link that leaves"):
        Checkpoint.open(flash)
    if name != "chat_template.jinja":  # not one of the files that were written
        with pytest.raises((IntegrityError, FormatError), match=f"{name} is a link that leaves"):
            verify(flash)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_a_pipe_in_place_of_the_config_does_not_hang(flash: Path) -> None:
    (flash / "config.json").unlink()
    os.mkfifo(flash / "config.json")
    code = "import sys, mlx_flash.cli; sys.exit(mlx_flash.cli.main(['verify', '--model', sys.argv[1]]))"
    done = subprocess.run([sys.executable, "-c", code, str(flash)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "config.json" in done.stderr


def test_a_name_that_no_file_can_have(tmp_path: Path) -> None:
    name = "x" * 5000
    with pytest.raises(UsageError, match="cannot be"):
        resolve_model(name)
    with pytest.raises(UsageError, match="cannot be"):
        mlx_flash.convert(name, tmp_path / "out")


def test_stop_ids_of_the_generation_config_are_checked(flash: Path) -> None:
    (flash / "generation_config.json").write_text('{"eos_token_id": ["</s>"]}')
    with pytest.raises(FormatError, match="eos_token_id"):
        mlx_flash.load(flash, backend="numpy")


def test_what_a_killed_conversion_left_makes_room_first(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stale = tmp_path / ".flash.partial-999999999"
    (stale / "flash").mkdir(parents=True)
    module = sys.modules["mlx_flash.models.conversion.converter"]
    monkeypatch.setattr(module, "check_free_space", lambda *_: assert_gone(stale))
    mlx_flash.convert(source, tmp_path / "flash")


def assert_gone(path: Path) -> None:
    assert not path.exists()


def test_stale_folders_of_all_names_go_when_they_are_old(tmp_path: Path) -> None:
    old, young, other = (tmp_path / name for name in (".a.partial-1", ".b.partial-2", ".c.partial"))
    for path in (old, young, other):
        path.mkdir()
    os.utime(old, (time.time() - 100,) * 2)
    os.utime(other, (time.time() - 100,) * 2)
    remove_stale(tmp_path)
    assert not old.exists() and young.exists() and other.exists()


def test_a_damaged_copy_in_the_cache_is_made_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    copy = resolve_model(source)
    assert copy.parent == cache_folder()
    (copy / "config.json").write_text("{")
    assert resolve_model(source) == copy
    assert verify(copy) > 0


def test_waiting_for_another_process_is_said(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from filelock import FileLock

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    copy = resolve_model(source)
    shutil.rmtree(copy)
    lock, said = FileLock(f"{copy}.lock"), []
    lock.acquire()

    def announce(message: str) -> None:
        said.append(message)
        lock.release()

    assert resolve_model(source, announce=announce) == copy
    assert "waiting" in said[0] and "converting" in said[1]
