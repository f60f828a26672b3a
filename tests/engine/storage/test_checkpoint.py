"""Opening and verifying checkpoints: whole ones open, anything missing, changed or hostile is named."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_flash.engine.storage.bundle import (
    DATA_START,
    FORMAT_VERSION,
    MIXED_VERSION,
    QUANTISED_VERSION,
    Layout,
    Part,
    layer_file,
    layer_header,
)
from mlx_flash.engine.storage.checkpoint import Checkpoint, is_checkpoint, verify
from mlx_flash.engine.storage.reader import Target
from mlx_flash.engine.storage.readers import open_reader
from mlx_flash.engine.storage.writer import FolderWriter
from mlx_flash.errors import FormatError, IntegrityError

LAYOUTS = [Layout(tuple(Part(name, "bfloat16", 16) for name in ("gate", "up", "down")), count) for count in (3, 5)]


def tensor_file(tensors):
    """A safetensors file of float32 arrays."""
    header, data = {}, b""
    for name, array in tensors.items():
        header[name] = {
            "dtype": "F32",
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + array.nbytes],
        }
        data += array.tobytes()
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def bundles(layer):
    layout = LAYOUTS[layer]
    return np.random.default_rng(layer).integers(0, 256, (layout.count, layout.stride), np.uint8)


TENSORS = {
    "embed.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "norm.weight": np.ones(3, np.float32),
}


def build(path, sharded=False):
    flash = {
        "format_version": FORMAT_VERSION,
        "activation": "relu",
        "dtype": "bfloat16",
        "layers": [layout.to_json() for layout in LAYOUTS],
        "source_hash": "abc",
    }
    with FolderWriter(path) as writer:
        for i, layout in enumerate(LAYOUTS):
            writer.write_bytes(layer_file(i), layer_header(layout) + bundles(i).tobytes())
        if sharded:
            weight_map = {}
            for i, (name, array) in enumerate(TENSORS.items()):
                weight_map[name] = f"model-{i}.safetensors"
                writer.write_bytes(weight_map[name], tensor_file({name: array}))
            writer.write_bytes("model.safetensors.index.json", json.dumps({"weight_map": weight_map}).encode())
        else:
            writer.write_bytes("model.safetensors", tensor_file(TENSORS))
        writer.write_bytes("tokenizer.json", b"{}")
        writer.commit({"model_type": "llama", "flash": flash})
    return path


@pytest.fixture
def folder(tmp_path):
    return build(tmp_path / "model")


def edit(folder, change, name="config.json"):
    """Change a JSON file in place, as somebody with an editor would."""
    value = json.loads((folder / name).read_text())
    change(value.get("flash", value))
    (folder / name).write_text(json.dumps(value))


@pytest.mark.parametrize("sharded", [False, True])
def test_a_whole_checkpoint_opens(tmp_path, sharded):
    folder = build(tmp_path / "model", sharded)
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.path == folder and checkpoint.layouts == LAYOUTS
    assert checkpoint.config["model_type"] == "llama" and "tokenizer.json" in checkpoint.files
    resident = checkpoint.resident_tensors()
    assert set(resident) == set(TENSORS)
    for name, (path, info) in resident.items():
        assert path.read_bytes()[info.offset : info.offset + info.nbytes] == TENSORS[name].tobytes()
        assert info.shape == TENSORS[name].shape and info.dtype == "F32"
    with open_reader(checkpoint.layer_files) as reader:
        for i, layout in enumerate(LAYOUTS):
            rows = np.zeros((layout.count, layout.stride), np.uint8)
            ids = np.arange(layout.count)
            reader.submit(i, ids, ids, [Target(0, rows)]).wait()
            np.testing.assert_array_equal(rows, bundles(i))
    seen = []
    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert verify(folder, lambda name, count: seen.append((name, count))) == total == verify(str(folder))
    assert dict(seen) == {name: record["bytes"] for name, record in checkpoint.files.items()}


def test_is_checkpoint(tmp_path, folder):
    assert is_checkpoint(folder)
    assert not is_checkpoint(tmp_path)
    assert not is_checkpoint(tmp_path / "missing")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    assert not is_checkpoint(folder)
    (folder / "config.json").write_text("{")
    assert not is_checkpoint(folder)


def test_what_is_no_checkpoint(tmp_path, folder):
    with pytest.raises(FormatError, match="is not a folder"):
        Checkpoint.open(tmp_path / "missing")
    for check in (Checkpoint.open, verify):
        with pytest.raises(FormatError, match=r"has no config\.json"):
            check(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(FormatError, match='no "flash" object.*mlx_flash convert'):
        Checkpoint.open(tmp_path)
    with pytest.raises(FormatError, match='no "flash" object'):
        verify(tmp_path)


@pytest.mark.parametrize("version", [0, MIXED_VERSION + 1, None, "1", True, 1.0])
def test_another_version(folder, version):
    edit(folder, lambda flash: flash.update(format_version=version))
    with pytest.raises(FormatError, match=f"format version {version}, this mlx_flash reads 1 to 3; convert"):
        Checkpoint.open(folder)


def test_a_version_that_is_not_that_of_the_bundles(folder):
    edit(folder, lambda flash: flash.update(format_version=QUANTISED_VERSION))
    with pytest.raises(FormatError, match="format version 2, and bundles that are not quantised"):
        Checkpoint.open(folder)


def drop(key):
    return lambda flash: flash.pop(key)


def record(name, value):
    return lambda flash: flash["files"].update({name: value})


GOOD = {"bytes": 2, "sha256": "0" * 64}
WRONG_CONFIGS = {
    "no activation": (drop("activation"), 'no text under "flash"."activation"'),
    "no dtype": (drop("dtype"), '"dtype"'),
    "no source hash": (drop("source_hash"), '"source_hash"'),
    "no layers": (drop("layers"), "no list of 1 to"),
    "empty layers": (lambda flash: flash.update(layers=[]), "no list of 1 to"),
    "layers object": (lambda flash: flash.update(layers={}), "no list of 1 to"),
    "bad layer": (lambda flash: flash["layers"][1].pop("count"), "layer 1: a layout needs exactly"),
    "more layers": (
        lambda flash: flash["layers"].append(flash["layers"][0]),
        r"does not list 'flash/layer-002\.safe",
    ),
    "fewer layers": (
        lambda flash: flash["layers"].pop(),
        r"lists flash/layer-001\.safetensors, but only 1 layers",
    ),
    "layers swapped": (lambda flash: flash["layers"].reverse(), r"layer-000\.safetensors holds .*\[3, 512\]"),
    "no files": (drop("files"), "no table of files"),
    "files list": (lambda flash: flash.update(files=[]), "no table of files"),
    "no record": (record("a", None), "does not give bytes and sha256 of 'a'"),
    "no size": (record("a", {"bytes": True, "sha256": "0" * 64}), "no size or no SHA-256"),
    "no hash": (record("a", {"bytes": 1, "sha256": 5}), "no size or no SHA-256"),
    "model not listed": (
        lambda flash: flash["files"].pop("model.safetensors"),
        r"does not list 'model\.safetensors'",
    ),
    "parent": (record("../secret", GOOD), r"'\.\./secret', which is not within the folder"),
    "parent inside": (record("flash/../../secret", GOOD), "not within the folder"),
    "absolute": (record("/etc/passwd", GOOD), "not within the folder"),
    "drive": (record("c:\\secret", GOOD), "not within the folder"),
    "itself": (record("config.json", GOOD), "not within the folder"),
    "missing file": (record("extra.json", GOOD), r"extra\.json is missing"),
    "folder": (record("flash", GOOD), "flash is not a regular file"),
    "wrong size": (
        record("tokenizer.json", GOOD | {"bytes": 3}),
        r"tokenizer\.json has 2 bytes, 3 were written",
    ),
}


@pytest.mark.parametrize("case", WRONG_CONFIGS)
def test_a_wrong_config(folder, case):
    change, message = WRONG_CONFIGS[case]
    edit(folder, change)
    with pytest.raises(FormatError, match=message) as caught:
        Checkpoint.open(folder)
    assert "again" in str(caught.value)


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"\xff{}", b'{"a":' * 99_999])
def test_an_unreadable_config(folder, text):
    (folder / "config.json").write_bytes(text)
    with pytest.raises(FormatError, match=r"config\.json"):
        Checkpoint.open(folder)
    with pytest.raises(IntegrityError, match=r"config\.json"):
        verify(folder)


@pytest.mark.parametrize("name", [layer_file(1), "model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(FormatError, match=f"{name} is missing"):
        Checkpoint.open(folder)
    with pytest.raises(IntegrityError, match=f"{name} \\(missing\\)"):
        verify(folder)


@pytest.mark.parametrize("name", [layer_file(0), "model.safetensors"])
@pytest.mark.parametrize("growth", [-1, 1])
def test_a_file_of_another_size(folder, name, growth):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-1] if growth < 0 else data + b"\0")
    with pytest.raises(FormatError, match=f"{name} has {len(data) + growth} bytes, {len(data)} were written"):
        Checkpoint.open(folder)
    with pytest.raises(IntegrityError, match=name):
        verify(folder)


def test_a_lying_header(folder):
    path = folder / layer_file(0)
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"U8"', b'"I8"'))
    with pytest.raises(FormatError, match=r"layer-000\.safetensors holds .* I8 "):
        Checkpoint.open(folder)
    path.write_bytes(data)
    model = folder / "model.safetensors"
    model.write_bytes(model.read_bytes().replace(b'"F32"', b'"F99"', 1))
    with pytest.raises(FormatError, match="unknown dtype 'F99'"):
        Checkpoint.open(folder)


def test_links_must_stay_within(tmp_path, folder):
    outside = tmp_path / "outside"
    shutil.move(folder / "tokenizer.json", outside)
    (folder / "tokenizer.json").symlink_to(outside)
    with pytest.raises(FormatError, match=r"tokenizer\.json is a link that leaves the checkpoint"):
        Checkpoint.open(folder)
    with pytest.raises(IntegrityError, match=r"tokenizer\.json"):
        verify(folder)
    shutil.move(outside, folder / "moved")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("moved")
    Checkpoint.open(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("tokenizer.json")
    with pytest.raises(FormatError, match=r"tokenizer\.json is missing"):
        Checkpoint.open(folder)


def test_a_hugging_face_cache_links_into_its_blobs(tmp_path, folder):
    cache = tmp_path / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    shutil.move(folder, cache / "snapshots" / "abc")
    snapshot = cache / "snapshots" / "abc"
    shutil.move(snapshot / "model.safetensors", cache / "blobs" / "123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/123")
    Checkpoint.open(snapshot)
    verify(snapshot)


WRONG_INDEXES = {
    "no map": (lambda index: index.pop("weight_map"), 'no table of names under "weight_map"'),
    "map of numbers": (lambda index: index["weight_map"].update(a=1), "no table of names"),
    "unknown tensor": (
        lambda index: index["weight_map"].update(a="model-0.safetensors"),
        "'a' in model-0.*lacks it",
    ),
    "unlisted shard": (
        lambda index: index["weight_map"].update(a="model-9.safetensors"),
        "does not list 'model-9",
    ),
    "hostile shard": (lambda index: index["weight_map"].update(a="../x"), r"does not list '\.\./x'"),
}


@pytest.mark.parametrize("case", WRONG_INDEXES)
def test_a_wrong_index(tmp_path, case):
    folder = build(tmp_path / "model", sharded=True)
    name = "model.safetensors.index.json"
    change, message = WRONG_INDEXES[case]
    edit(folder, change, name)
    edit(folder, lambda flash: flash["files"][name].update(bytes=(folder / name).stat().st_size))
    with pytest.raises(FormatError, match=message):
        Checkpoint.open(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return build(tmp_path_factory.mktemp("verify") / "model", sharded=True)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_verify_finds_any_changed_byte(whole, data):
    files = sorted(path for path in whole.rglob("*") if path.is_file())
    path = data.draw(st.sampled_from(files))
    content = path.read_bytes()
    at = data.draw(st.integers(0, len(content) - 1))
    byte = content[at] ^ data.draw(st.integers(1, 255))
    path.write_bytes(content[:at] + bytes([byte]) + content[at + 1 :])
    try:
        with pytest.raises(IntegrityError, match=path.name):
            verify(whole)
    finally:
        path.write_bytes(content)
    assert verify(whole) > 0


def test_verify_names_everything_that_is_wrong(whole, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    (folder / "unknown").write_bytes(b"nobody asked")
    verify(folder)
    (folder / "tokenizer.json").unlink()
    (folder / layer_file(0)).write_bytes(b"short")
    with open(folder / layer_file(1), "r+b") as file:
        file.seek(DATA_START)
        file.write(b"\0\1\2\3")
    edit(folder, lambda flash: flash.update(activation="silu"))
    with pytest.raises(IntegrityError) as caught:
        verify(folder)
    message = str(caught.value)
    assert "4 damaged" in message and "5 bytes, " in message
    assert all(name in message for name in ("tokenizer.json (missing)", layer_file(0), layer_file(1), "config.json"))


@given(st.binary(max_size=80) | st.text(max_size=80).map(str.encode))
@settings(max_examples=60, deadline=None)
def test_random_configs_are_refused(whole, text):
    content = (whole / "config.json").read_bytes()
    (whole / "config.json").write_bytes(text)
    try:
        with pytest.raises(FormatError):
            Checkpoint.open(whole)
    finally:
        (whole / "config.json").write_bytes(content)
