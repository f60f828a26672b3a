"""Layouts and their JSON, layer file headers, and reading safetensors headers, lying ones above all."""

from __future__ import annotations

import contextlib
import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from mlx_flash.engine.storage.bundle import (
    ALIGN,
    DATA_START,
    ITEM_BYTES,
    Layout,
    Part,
    check_layer_file,
    layer_file,
    layer_header,
)
from mlx_flash.engine.storage.header import TensorInfo, read_header, read_metadata
from mlx_flash.errors import FormatError, ReadError

GLU = Layout((Part("gate", "bfloat16", 100), Part("up", "bfloat16", 100), Part("down", "bfloat16", 100)), 7)

names = st.text(min_size=1, max_size=8)
parts = st.lists(
    st.builds(Part, names, st.sampled_from(sorted(ITEM_BYTES)), st.integers(1, 3000)),
    min_size=1,
    max_size=5,
    unique_by=lambda part: part.name,
)
layouts = st.builds(Layout, parts.map(tuple), st.integers(1, 5000))


@given(layouts)
def test_layout_json_round_trip(layout):
    assert Layout.from_json(json.loads(json.dumps(layout.to_json()))) == layout
    assert layout.stride % ALIGN == 0 and 0 <= layout.stride - layout.bundle_bytes < ALIGN


def test_segments_join_neighbours():
    assert GLU.segments(["down", "up"]) == [(200, 400)]
    assert GLU.segments(("gate", "down")) == [(0, 200), (400, 200)]
    assert GLU.segments(["gate", "up", "down"]) == [(0, 600)]
    assert GLU.segments([]) == []
    with pytest.raises(KeyError):
        GLU.segments(["scales"])


@given(layouts, st.data())
def test_segments_hold_the_parts_bytes(layout, data):
    chosen = data.draw(st.lists(st.sampled_from([part.name for part in layout.parts]), unique=True))
    wanted = [
        byte
        for part in layout.parts
        if part.name in chosen
        for byte in range(layout.offset(part.name), layout.offset(part.name) + part.nbytes)
    ]
    found = layout.segments(chosen)
    assert [byte for at, nbytes in found for byte in range(at, at + nbytes)] == wanted
    assert all(a + n < b for (a, n), (b, _) in zip(found, found[1:], strict=False))


def changed(**fields):
    return GLU.to_json() | fields


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "exactly the fields"),
        ([], "exactly the fields"),
        ({}, "exactly the fields"),
        (changed(extra=1), "exactly the fields"),
        (changed(count=0), "count 0"),
        (changed(count=True), "count True"),
        (changed(count=2.0), r"count 2\.0"),
        (changed(count=2**31), "count 2147483648"),
        (changed(stride=512), "stride 512, its parts need 1024"),
        (changed(stride="1024"), "stride"),
        (changed(parts=[]), "parts"),
        (changed(parts="gate"), "parts"),
        (changed(parts=[3]), "exactly the fields"),
        (changed(parts=[{"name": "", "dtype": "float16", "length": 1}]), "not a name"),
        (changed(parts=[{"name": 3, "dtype": "float16", "length": 1}]), "not a name"),
        (changed(parts=[{"name": "a", "dtype": "int4", "length": 1}]), "unknown dtype 'int4'"),
        (changed(parts=[{"name": "a", "dtype": ["float16"], "length": 1}]), "unknown dtype"),
        (changed(parts=[{"name": "a", "dtype": "float16", "length": -1}]), "length -1"),
        (changed(parts=[{"name": "a", "dtype": "float16", "length": 1}] * 2), "twice"),
    ],
)
def test_layout_json_is_strict(value, message):
    with pytest.raises(FormatError, match=message):
        Layout.from_json(value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("float16"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.one_of(
        json_values,
        st.fixed_dictionaries({"count": json_values, "stride": json_values, "parts": json_values}),
        st.fixed_dictionaries({"name": json_values, "dtype": json_values, "length": json_values}).map(
            lambda part: changed(parts=[part])
        ),
    )
)
def test_layout_json_never_fails_otherwise(value):
    with contextlib.suppress(FormatError):
        Layout.from_json(value)


def write_layer(path, layout, data=None):
    if data is None:
        data = np.arange(layout.count * layout.stride, dtype=np.uint64).astype(np.uint8)
    path.write_bytes(layer_header(layout) + data.tobytes())
    return path


def test_layer_file_name():
    assert layer_file(0) == "flash/layer-000.safetensors"
    assert layer_file(1234) == "flash/layer-1234.safetensors"


@given(layouts)
def test_layer_header_is_exactly_as_long_as_promised(layout):
    header = layer_header(layout)
    assert len(header) == DATA_START == int.from_bytes(header[:8], "little") + 8
    assert json.loads(header[8:])["bundles"]["shape"] == [layout.count, layout.stride]


def test_layer_file_opens_in_safetensors(tmp_path):
    path = write_layer(tmp_path / "layer", GLU)
    with safe_open(path, "numpy") as file:
        bundles = file.get_tensor("bundles")
    assert bundles.shape == (GLU.count, GLU.stride) and bundles.dtype == np.uint8
    assert bundles.tobytes() == path.read_bytes()[DATA_START:]
    check_layer_file(path, GLU)


def test_check_layer_file_refuses_what_differs(tmp_path):
    path = write_layer(tmp_path / "layer", GLU)
    with pytest.raises(FormatError, match=r"holds \"bundles\" U8 \[7, 1024\].*says \"bundles\" U8 \[8, 1024\]"):
        check_layer_file(path, Layout(GLU.parts, 8))
    with open(path, "ab") as file:
        file.write(b"\0")
    with pytest.raises(FormatError, match=f"too long.*{GLU.file_bytes + 1}"):
        check_layer_file(path, GLU)
    path.write_bytes(path.read_bytes()[: GLU.file_bytes - 1])
    with pytest.raises(FormatError, match="truncated"):
        check_layer_file(path, GLU)


def test_check_layer_file_refuses_an_early_data_start(tmp_path):
    path = tmp_path / "layer"
    save_file({"bundles": np.zeros((GLU.count, GLU.stride), np.uint8)}, path)
    with pytest.raises(FormatError, match=f"at byte {DATA_START}"):
        check_layer_file(path, GLU)


def test_read_header_agrees_with_safetensors(tmp_path):
    tensors = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a": np.arange(5, dtype=np.float16),
        "empty": np.zeros((0, 4), np.int64),
        "scalar": np.array(3, np.uint8),
    }
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    found = read_header(path)
    data = path.read_bytes()
    assert set(found) == set(tensors)
    for name, info in found.items():
        assert info.shape == tensors[name].shape
        assert data[info.offset : info.offset + info.nbytes] == tensors[name].tobytes()
    assert found["a"].dtype == "F16"


def raw(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor(dtype="F32", shape=(2,), offsets=(0, 8), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)} | more


EIGHT = b"12345678"
BAD_HEADERS = {
    "empty": (b"", "too short"),
    "seven bytes": (b"\0" * 7, "too short"),
    "no header": (raw(b""), "JSON"),
    "longer than the file": (raw(b"{}", length=3), "claims a header of 3 bytes, but the file has 10"),
    "absurd length": (raw(b"{}", length=2**63), "claims a header of 9223372036854775808"),
    "negative length": (b"\xff" * 8 + b"{}", "at most"),
    "not JSON": (raw(b"{]"), "JSON"),
    "array": (raw([]), "a JSON list"),
    "not UTF-8": (raw(b'{"\xff": 1}'), "JSON"),
    "byte order mark": (raw(b"\xef\xbb\xbf{}"), "JSON"),
    "deep nesting": (raw(b'{"a":' * 100_000), "JSON"),
    "deep list": (raw(b"[" * 100_000 + b"]" * 100_000), "JSON"),
    "many digits": (raw(b'{"a":' + b"9" * 10_000 + b"}"), "JSON"),
    "same name twice": (
        raw(b'{"a":' + b",".join([json.dumps(tensor()).encode()] * 2).replace(b",{", b',"a":{') + b"}", EIGHT),
        "twice",
    ),
    "same field twice": (
        raw(b'{"a":{"dtype":"U8","dtype":"U8","shape":[8],"data_offsets":[0,8]}}', EIGHT),
        "twice",
    ),
    "metadata list": (raw({"__metadata__": []}), "__metadata__"),
    "metadata number": (raw({"__metadata__": {"a": 1}}), "__metadata__"),
    "tensor list": (raw({"a": []}, EIGHT), "exactly the fields"),
    "field missing": (raw({"a": {"dtype": "F32", "shape": [2]}}, EIGHT), "exactly the fields"),
    "field more": (raw({"a": tensor(stride=1)}, EIGHT), "exactly the fields"),
    "unknown dtype": (raw({"a": tensor("F33")}, EIGHT), "unknown dtype 'F33'"),
    "dtype list": (raw({"a": tensor(["F32"])}, EIGHT), "unknown dtype"),
    "negative shape": (raw({"a": tensor(shape=(-1, -2))}, EIGHT), "not a list of sizes"),
    "bool shape": (raw({"a": tensor(shape=(2, True))}, EIGHT), "not a list of sizes"),
    "float shape": (raw({"a": tensor(shape=(2.0,))}, EIGHT), "not a list of sizes"),
    "huge shape": (raw({"a": tensor(shape=(2**64,))}, EIGHT), "not a list of sizes"),
    "huge product": (raw({"a": tensor(shape=(2**62,) * 30)}, EIGHT), "bits, not bytes 0 to 8"),
    "huge rank": (raw({"a": tensor(shape=(1,) * 1000)}, EIGHT), "not a list of sizes"),
    "shape text": (raw({"a": tensor() | {"shape": "2"}}, EIGHT), "not a list of sizes"),
    "one offset": (raw({"a": tensor(offsets=(0,))}, EIGHT), "two positions"),
    "negative offset": (raw({"a": tensor(offsets=(-8, 0))}, EIGHT), "two positions"),
    "bool offset": (raw({"a": tensor("U8", (1,), (False, True))}, b"1"), "two positions"),
    "offsets swapped": (raw({"a": tensor(offsets=(8, 0))}, EIGHT), "not bytes 8 to 0"),
    "wrong size": (raw({"a": tensor(shape=(3,))}, EIGHT), "96 bits, not bytes 0 to 8"),
    "half a byte": (raw({"a": tensor("F4", (3,), (0, 1))}, b"1"), "12 bits"),
    "beyond the data": (raw({"a": tensor(offsets=(8, 16))}, EIGHT), "hole"),
    "hole": (raw({"a": tensor("U8", (2,), (0, 2)), "b": tensor("U8", (5,), (3, 8))}, EIGHT), "hole"),
    "overlap": (raw({"a": tensor("U8", (4,), (0, 4)), "b": tensor("U8", (5,), (3, 8))}, EIGHT), "overlaps"),
    "same place": (raw({"a": tensor(), "b": tensor()}, EIGHT), "overlaps"),
    "truncated": (raw({"a": tensor()}, EIGHT[:7]), "truncated"),
    "oversized": (raw({"a": tensor()}, EIGHT + b"9"), "too long"),
    "data without tensors": (raw({}, b"1"), "too long"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_read_header_refuses(tmp_path, case):
    data, message = BAD_HEADERS[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(FormatError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value) and "again" in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 400


def test_read_header_sparse_file_with_a_long_header(tmp_path):
    path = tmp_path / "model.safetensors"
    with open(path, "wb") as file:
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(200_000_000)
    with pytest.raises(FormatError, match="at most 100000000"):
        read_header(path)


def test_read_header_needs_a_readable_file(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ReadError, match=re.escape(str(path))):
            read_header(path)


def read_or_format_error(path, data):
    path.write_bytes(data)
    try:
        found = read_header(path)
    except FormatError:
        return
    assert sum(info.nbytes for info in found.values()) + 8 + int.from_bytes(data[:8], "little") == len(data)
    assert all(isinstance(info, TensorInfo) for info in found.values())


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.binary(max_size=64), st.binary(max_size=64).map(raw), json_values.map(raw)))
def test_random_bytes_are_refused_or_true(tmp_path_factory, data):
    read_or_format_error(tmp_path_factory.getbasetemp() / "random.safetensors", data)


def test_null_metadata_is_none(tmp_path):
    """MLX writes it where its caller gave none."""
    file = tmp_path / "null.safetensors"
    file.write_bytes(raw({"a": tensor(), "__metadata__": None}, EIGHT))
    assert list(read_header(file)) == ["a"] and read_metadata(file) == {}


VALID = raw({"a": tensor(), "b.c": tensor("BF16", (2, 2), (8, 16)), "__metadata__": {"k": "v"}}, EIGHT * 2)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), max_size=3), st.integers(-9, 9))
def test_mutated_headers_are_refused_or_true(tmp_path_factory, changes, growth):
    data = bytearray(VALID)
    for at, byte in changes:
        data[at] = byte
    data = bytes(data[:growth]) if growth < 0 else bytes(data) + b"\0" * growth
    read_or_format_error(tmp_path_factory.getbasetemp() / "mutated.safetensors", data)


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["a", "b", "__metadata__"]),
        st.one_of(
            json_values,
            st.fixed_dictionaries(
                {
                    "dtype": st.sampled_from(["F32", "F4", "U8", "X"]) | json_values,
                    "shape": st.lists(st.integers(-1, 9), max_size=3) | json_values,
                    "data_offsets": st.lists(st.integers(-1, 9), min_size=1, max_size=3) | json_values,
                }
            ),
        ),
    ),
    st.binary(max_size=9),
)
def test_plausible_headers_are_refused_or_true(tmp_path_factory, header, data):
    read_or_format_error(tmp_path_factory.getbasetemp() / "plausible.safetensors", raw(header, data))
