"""Conversion: every bundle holds what the source holds, and what cannot be converted is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_flash.engine.numerics.casting import RAW, cast, from_float32
from mlx_flash.errors import ConfigError, FlashError, FormatError, UsageError
from mlx_flash.models.conversion.plan import normalised_config
from mlx_flash.models.specs.config_reader import read_spec
from tests.checkpoints import (
    CONFIGS,
    LLAMA,
    UP,
    check_same,
    convert,
    make_source,
    module,
    raw_tensors,
    rewrite,
)
from tests.conftest import shared_path


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_round_trip(tmp_path: Path, name: str, dtype: str) -> None:
    source = make_source(tmp_path, CONFIGS[name], dtype)
    assert convert(source, tmp_path / "flash") == tmp_path / "flash"
    check_same(source, tmp_path / "flash", dtype)


@pytest.mark.parametrize("source_dtype", list(RAW))
@pytest.mark.parametrize("dtype", list(RAW))
def test_dtypes(tmp_path: Path, source_dtype: str, dtype: str) -> None:
    source = make_source(tmp_path, CONFIGS["openelm"], source_dtype)
    convert(source, tmp_path / "flash", dtype=dtype)
    check_same(source, tmp_path / "flash", dtype)
    config = json.loads((tmp_path / "flash" / "config.json").read_text())
    assert config["torch_dtype"] == config["flash"]["dtype"] == dtype


@pytest.mark.parametrize("name", ["openelm", "llama", "opt"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_blocks_and_panels_of_any_size(tmp_path: Path, name: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers larger than a block, a panel or a read: the same bytes."""
    monkeypatch.setattr(module, "BLOCK_BYTES", 512 * 7)
    monkeypatch.setattr(module, "PANEL_BYTES", 4096)
    source = make_source(tmp_path, CONFIGS[name])
    convert(source, tmp_path / "flash", dtype=dtype)
    check_same(source, tmp_path / "flash", dtype)


def test_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_flash.tools.random_model.SHARD_BYTES", 40_000)
    source = make_source(tmp_path, LLAMA)
    assert len(list(source.glob("model-*-of-*.safetensors"))) > 3
    convert(source, tmp_path / "flash")
    check_same(source, tmp_path / "flash", "bfloat16")


def test_missing_misshapen_and_extra_tensors(tmp_path: Path) -> None:
    source = make_source(tmp_path, LLAMA)
    original = (source / "model.safetensors").read_bytes()

    def attempt(change: Any, error: type[FlashError], *words: str) -> None:
        (source / "model.safetensors").write_bytes(original)
        rewrite(source, change)
        with pytest.raises(error) as caught:
            convert(source, tmp_path / "flash")
        assert all(word in str(caught.value) for word in words), caught.value
        assert sorted(os.listdir(tmp_path)) == ["card", "hf"]

    attempt(lambda t: t.pop(UP), ConfigError, UP, "lacks 1 of")
    attempt(lambda t: t.update({UP: (t[UP][0][:-1], t[UP][1])}), ConfigError, UP, "[99, 48]", "[100, 48]")
    attempt(lambda t: t.update({"other.weight": t[UP]}), ConfigError, "other.weight")
    attempt(
        lambda t: t.update({UP: (t[UP][0].astype("<u4"), "float32")}),
        ConfigError,
        "mixes bfloat16 and float32",
    )
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"

    (source / "model.safetensors").write_bytes(original)
    rewrite(source, lambda t: t.update({name: (np.zeros(6, "<u4"), "float32")}))
    convert(source, tmp_path / "flash")
    assert name not in raw_tensors(tmp_path / "flash")


HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.mark.parametrize("tied", [True, None])
def test_a_tied_models_head_goes_where_it_is_the_embedding(
    tmp_path: Path, tied: bool | None, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_source(tmp_path, LLAMA | {"tie_word_embeddings": tied})
    rewrite(source, lambda t: t.update({HEAD: t[EMBEDDING]}))
    convert(source, tmp_path / "flash")
    assert HEAD not in raw_tensors(tmp_path / "flash")
    assert json.loads((tmp_path / "flash" / "config.json").read_text())["tie_word_embeddings"] is True
    assert "ties the head" not in capsys.readouterr().err


def test_a_tied_models_head_is_used_where_it_is_another_matrix(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_source(tmp_path, LLAMA | {"tie_word_embeddings": True})

    def add_head(tensors: Any) -> None:
        raw, dtype = tensors[EMBEDDING]
        raw = raw.copy()
        raw[-1, -1] ^= 1  # the last of its numbers
        tensors[HEAD] = (raw, dtype)

    rewrite(source, add_head)
    convert(source, tmp_path / "flash")
    assert HEAD in raw_tensors(tmp_path / "flash")
    assert json.loads((tmp_path / "flash" / "config.json").read_text())["tie_word_embeddings"] is False
    assert capsys.readouterr().err.count("ties the head to the embedding") == 1


def test_a_head_in_another_precision_is_compared_by_its_numbers(tmp_path: Path) -> None:
    source = make_source(tmp_path, LLAMA | {"tie_word_embeddings": True})
    rewrite(source, lambda t: t.update({HEAD: (cast(t[EMBEDDING][0], "bfloat16", "float32", HEAD), "float32")}))
    convert(source, tmp_path / "flash")
    assert HEAD not in raw_tensors(tmp_path / "flash")


def test_a_head_that_is_nowhere_is_named_before_anything_is_written(tmp_path: Path) -> None:
    source = make_source(tmp_path, LLAMA | {"tie_word_embeddings": True})
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(ConfigError, match=r"no lm_head\.weight.*set tie_word_embeddings to true"):
        convert(source, tmp_path / "flash")
    assert not (tmp_path / "flash").exists()


def test_mixed_norms_take_the_ffn_dtype(tmp_path: Path) -> None:
    source = make_source(tmp_path, LLAMA)
    values = np.linspace(0.5, 1.5, 48, dtype=np.float32)
    rewrite(source, lambda t: t.update({"model.norm.weight": (values.view("<u4"), "float32")}))
    convert(source, tmp_path / "flash")
    raw, dtype = raw_tensors(tmp_path / "flash")["model.norm.weight"]
    assert dtype == "bfloat16"
    np.testing.assert_array_equal(raw, from_float32(values, "bfloat16"))


def test_float16_overflow_is_refused(tmp_path: Path) -> None:
    source = make_source(tmp_path, LLAMA, "float32")

    def grow(tensors: Any) -> None:
        raw = tensors[UP][0].copy()
        raw[3, 5] = np.array(70000.0, np.float32).view("<u4")
        tensors[UP] = (raw, "float32")

    rewrite(source, grow)
    with pytest.raises(ConfigError, match=f"{UP}.*7e"):
        convert(source, tmp_path / "flash", dtype="float16")
    assert not (tmp_path / "flash").exists()
    convert(source, tmp_path / "flash", dtype="bfloat16")


def test_config_is_spelled_out() -> None:
    def normal(config: dict[str, Any], names: list[str] | None = None) -> dict[str, Any]:
        return normalised_config(config, read_spec(config, names), "float32")

    config = normal(
        LLAMA | {"auto_map": {"AutoModel": "x.Y"}, "model_file": "x.py", "dtype": "bfloat16"},
        ["lm_head.weight"],
    )
    assert config["tie_word_embeddings"] is False and config["head_dim"] == 12 and config["rope_theta"] == 10000.0
    assert "auto_map" not in config and "model_file" not in config
    assert config["torch_dtype"] == config["dtype"] == "float32"
    assert normal(LLAMA, ["model.norm.weight"])["tie_word_embeddings"] is True
    config = normal(LLAMA | {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}})
    assert config["rope_theta"] == 5e5 and config["rope_scaling"] == {
        "rope_type": "linear",
        "type": "linear",
        "factor": 2.0,
    }
    config = normal(LLAMA | {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}})
    assert config["rope_theta"] == 5e5 and not config.get("rope_scaling")
    assert read_spec(config) == read_spec(LLAMA | {"rope_theta": 5e5, "tie_word_embeddings": False})


def test_tokenizer_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_source(tmp_path, LLAMA)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    (source / "secret.txt").write_text("not a part of it")
    convert(source, tmp_path / "a")
    assert capsys.readouterr().err == ""
    names = {"config.json", "flash", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in (tmp_path / "a").iterdir()} == names | {
        "chat_template.jinja",
        "generation_config.json",
    }

    (source / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    convert(source, tmp_path / "b")
    assert "no tokenizer" in capsys.readouterr().err
    heard: list[str] = []
    convert(source, tmp_path / "c", announce=heard.append)
    assert len(heard) == 1 and capsys.readouterr().err == ""

    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.model").write_bytes(b"model")
    convert(source, tmp_path / "d", tokenizer=other)
    assert (tmp_path / "d" / "tokenizer.model").read_bytes() == b"model"
    assert not (tmp_path / "d" / "tokenizer_config.json").exists()  # no mixture of two tokenizers
    assert (tmp_path / "d" / "generation_config.json").exists()
    convert(source, tmp_path / "e", tokenizer=tmp_path / "tokenizer.json")
    assert (tmp_path / "e" / "tokenizer.json").exists()
    with pytest.raises(UsageError, match="is not a tokenizer"):
        convert(source, tmp_path / "f", tokenizer=source / "secret.txt")
    with pytest.raises(UsageError, match="has no tokenizer"):
        convert(source, tmp_path / "f", tokenizer=tmp_path / "card")


def test_wrong_sources(tmp_path: Path) -> None:
    source = make_source(tmp_path, LLAMA)
    out = tmp_path / "flash"

    def attempt(error: type[FlashError], match: str, path: Any = source, **options: Any) -> None:
        with pytest.raises(error, match=match):
            convert(path, out, **options)
        assert not out.exists()

    attempt(UsageError, "does not exist", tmp_path / "nothing")
    attempt(UsageError, "does not exist", str(tmp_path / "nothing"))
    attempt(UsageError, "is a file", source / "config.json")
    attempt(FormatError, "lacks config.json", tmp_path)
    attempt(UsageError, "unknown dtype", dtype="int8")
    (source / "model.safetensors").rename(tmp_path / "weights")
    attempt(FormatError, "neither")
    (source / "pytorch_model.bin").write_bytes(b"\x80")
    attempt(FormatError, "pickle")
    (source / "model.safetensors").write_bytes((tmp_path / "weights").read_bytes()[:-1])
    attempt(FormatError, "truncated")
    (source / "model.safetensors").write_bytes((tmp_path / "weights").read_bytes())
    config = json.loads((source / "config.json").read_text())
    for change, error, match in (
        ({"quantization": {"bits": 4}}, ConfigError, "lacks .group_size."),
        ({"quantization_config": {"bits": 4}}, ConfigError, "names no known kind"),
        ({"model_type": "mamba"}, ConfigError, "gpt2"),
        ({"hidden_act": "gelu_new"}, ConfigError, "gelu_new"),
        ({"flash": {}}, UsageError, "already"),
    ):
        (source / "config.json").write_text(json.dumps(config | change))
        attempt(error, match)
    (source / "config.json").write_text("[1]")
    attempt(FormatError, "object")
    (source / "config.json").write_text(json.dumps(config))
    out.mkdir()
    with pytest.raises(UsageError, match="exists"):
        convert(source, out)


@pytest.mark.parametrize("name", ["stories260K", "llama2xs", "babyllama361"])
def test_real_models(tmp_path: Path, name: str) -> None:
    source = shared_path(f"data/models/{name}")
    convert(source, tmp_path / "flash")
    check_same(source, tmp_path / "flash", "float32")
