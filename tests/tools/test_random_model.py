"""Random checkpoints: the cards' geometry, the same weights for the same seed, whole or not there."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest

from mlx_flash.engine.numerics.casting import to_float32
from mlx_flash.errors import ConfigError, SpaceError, UsageError
from mlx_flash.models.specs.config_reader import make_divisible, read_spec
from mlx_flash.models.specs.source import read_tensors
from mlx_flash.runtime.model_path import models_folder
from mlx_flash.tools import random_model
from mlx_flash.tools.random_model import make_random
from tests.checkpoints import CONFIGS, LLAMA, make_source, raw_tensors

CARDS = {  # parameters, FFN share in percent, bundle KiB, layers, width, head
    "openelm-270m": (271_527_168, 65.9, 7.5, 16, 1280, 64),
    "openelm-450m": (457_179_136, 69.7, 9, 20, 1536, 64),
    "openelm-1.1b": (1_079_891_456, 73.4, 12, 28, 2048, 64),
    "openelm-3b": (3_036_647_424, 75.5, 18, 36, 3072, 128),
}


@pytest.mark.parametrize("card", CARDS)
def test_cards_are_openelm(card: str) -> None:
    parameters, share, bundle_kib, layers, dim, head_dim = CARDS[card]
    config = json.loads((models_folder() / card / "config.json").read_text())
    spec = read_spec(config)
    resident = sum(int(np.prod(shape)) for shape in spec.resident_shapes().values())
    ffn = sum(int(np.prod(shape)) for shape in spec.ffn_shapes().values())
    assert resident + ffn == parameters
    assert round(100 * ffn / (resident + ffn), 1) == share
    assert spec.layout(0, "bfloat16").bundle_bytes == bundle_kib * 1024
    assert (len(spec.layers), spec.dim, spec.head_dim, spec.vocab) == (layers, dim, head_dim, 32000)
    assert (spec.activation, spec.tied, spec.qk_norm, spec.eps) == ("silu", True, True, 1e-6)
    assert (spec.bos_id, spec.eos_ids, spec.max_context) == (1, (2,), 2048)
    multipliers = [round(float(m), 2) for m in np.linspace(0.5, 1.0, layers)]  # the rule of arXiv 2404.14619
    heads = [make_divisible(dim * m, head_dim * 4) // head_dim for m in multipliers]
    assert [layer.heads for layer in spec.layers] == heads
    assert [layer.kv_heads for layer in spec.layers] == [count // 4 for count in heads]
    readme = (models_folder() / card / "README.md").read_text()
    assert f"{parameters:,}" in readme and f"{share} %" in readme and "No weights here" in readme


def test_weights_depend_on_name_and_seed_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = raw_tensors(make_source(tmp_path / "a", LLAMA))
    again = raw_tensors(make_source(tmp_path / "b", LLAMA | {"num_hidden_layers": 1}))
    other = raw_tensors(make_random(tmp_path / "a" / "card", tmp_path / "c", seed=1))
    assert again.keys() < first.keys() == other.keys()
    for name in again:
        np.testing.assert_array_equal(again[name][0], first[name][0])
    for name, (raw, dtype) in first.items():
        values = to_float32(raw, dtype)
        if "norm" in name:
            assert (values == 1).all()
            continue
        assert not np.array_equal(raw, other[name][0])
        assert abs(values.std() - 0.02) < 0.002 and abs(values.mean()) < 0.002
    assert len({raw.tobytes() for name, (raw, _) in first.items() if "norm" not in name}) == sum(
        "norm" not in name for name in first
    )


def test_long_tensors_from_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_model, "DRAWN_ITEMS", 100)
    monkeypatch.setattr(random_model, "TABLE_ITEMS", 1009)
    source = make_source(tmp_path, LLAMA, "float32")
    tensors = raw_tensors(source)
    for name, (raw, _) in tensors.items():
        if raw.ndim == 2:
            assert len({row.tobytes() for row in raw[:20]}) == 20, name
    table = np.sort(tensors["lm_head.weight"][0].ravel()[:1009])  # from wherever one begins, all of it comes
    np.testing.assert_array_equal(np.sort(tensors["model.embed_tokens.weight"][0].ravel()[:1009]), table)
    gate, up = (tensors[f"model.layers.0.mlp.{part}_proj.weight"][0] for part in ("gate", "up"))
    assert not np.array_equal(gate, up)
    assert make_random(tmp_path / "card", tmp_path / "again", dtype="float32").exists()
    np.testing.assert_array_equal(raw_tensors(tmp_path / "again")["lm_head.weight"][0], tensors["lm_head.weight"][0])


def test_shards_and_their_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = raw_tensors(make_source(tmp_path / "a", LLAMA))
    monkeypatch.setattr(random_model, "SHARD_BYTES", 60_000)
    source = make_source(tmp_path / "b", LLAMA)
    shards = sorted(path.name for path in source.glob("*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert all((source / name).stat().st_size < 64_000 for name in shards)
    for name, (raw, _) in raw_tensors(source).items():
        np.testing.assert_array_equal(raw, whole[name][0])
    index = json.loads((source / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(raw.nbytes for raw, _ in whole.values())


def test_other_readers_agree(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    source = make_source(tmp_path, LLAMA, "float16")
    ours = raw_tensors(source)
    theirs = safetensors.load_file(source / "model.safetensors")
    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(value.view("<u2"), ours[name][0])


def test_byte_tokenizer(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    text = "Zürich, 20 °C\n\t<s> 🐈"
    for i, ids in enumerate(({"bos_token_id": 1, "eos_token_id": 2}, {}, {"bos_token_id": 0, "eos_token_id": [0]})):
        source = make_source(tmp_path / str(i), LLAMA | ids)
        tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
        assert tokenizer.get_vocab_size() == 258
        bos, eos = tokenizer.token_to_id("<s>"), tokenizer.token_to_id("</s>")
        assert (bos, eos) == ((1, 2) if i == 0 else (256, 257))
        encoded = tokenizer.encode("ab").ids
        assert encoded[0] == bos and len(encoded) == 3 and max(encoded) < 300
        assert tokenizer.decode(tokenizer.encode(text.replace("<s>", "")).ids) == text.replace("<s>", "")
    small = make_source(tmp_path / "small", LLAMA | {"vocab_size": 257})
    assert not (small / "tokenizer.json").exists()


def test_tokenizer_of_the_card_is_copied(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "tokenizer.model").write_bytes(b"own")
    out = make_random(tmp_path / "config.json", tmp_path / "out")
    assert (out / "tokenizer.model").read_bytes() == b"own" and not (out / "tokenizer.json").exists()


def test_wrong_use(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="known: .*openelm-3b"):
        make_random("openelm-7b", tmp_path / "out")
    with pytest.raises(UsageError, match="no model card"):
        make_random(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(UsageError, match="int8"):
        make_random("openelm-270m", tmp_path / "out", dtype="int8")
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(ConfigError, match="mamba"):
        make_random(tmp_path, tmp_path / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="exists"):
        make_random("openelm-270m", tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["config.json", "out"]


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = 5

    def write_all(file: object, data: object) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(random_model, "_write_all", write_all)
    with pytest.raises(SpaceError, match="No space left"):
        make_source(tmp_path, CONFIGS["openelm"])
    assert os.listdir(tmp_path) == ["card"]
    monkeypatch.undo()
    assert read_tensors(make_random(tmp_path / "card", tmp_path / "hf"))
