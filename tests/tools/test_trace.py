"""Traces: what was recorded comes back from a file, and a file that is none says so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_flash.errors import FormatError, UsageError
from mlx_flash.tools.trace import Recorder, Trace, read_route_csv, read_trace
from tests.conftest import shared_path


def small() -> Trace:
    ids = [[[0, 3], [], [2]], [[1], [0, 1, 4], [4]]]
    return Trace((4, 5), [[np.array(token, np.int32) for token in layer] for layer in ids], 1)


def as_lists(trace: Trace) -> list[list[list[int]]]:
    return [[token.tolist() for token in layer] for layer in trace.ids]


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    counts, tokens = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)), draw(st.integers(0, 5))
    ids = [
        [np.array(sorted(draw(st.sets(st.integers(0, count - 1)))), np.int32) for _ in range(tokens)]
        for count in counts
    ]
    return Trace(tuple(counts), ids, draw(st.integers(0, tokens)))


@given(traces())
def test_a_trace_comes_back_from_its_file(tmp_path_factory: pytest.TempPathFactory, trace: Trace) -> None:
    path = tmp_path_factory.mktemp("trace") / "t.npz"
    trace.save(path)
    back = read_trace(path)
    assert (back.counts, back.prompt, as_lists(back)) == (trace.counts, trace.prompt, as_lists(trace))
    assert all(token.dtype == np.int32 for layer in back.ids for token in layer)
    assert [p.name for p in path.parent.iterdir()] == ["t.npz"], "no partial file is left"


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small().save(tmp_path / "t.npz")

    def half(file, **arrays):  # type: ignore[no-untyped-def]
        file.write(b"PK")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez_compressed", half)
    with pytest.raises(OSError, match="disk full"):
        Trace((1,), [[]], 0).save(tmp_path / "t.npz")
    assert as_lists(Trace.load(tmp_path / "t.npz")) == as_lists(small())
    assert len(list(tmp_path.iterdir())) == 1


def test_rates_are_shares_of_tokens() -> None:
    first, second = small().rates(1, 3)
    assert first.tolist() == [0, 0, 0.5, 0] and second.tolist() == [0.5, 0.5, 0, 0, 1] and first.dtype == np.float32
    assert small().rates(2, 2)[0].tolist() == [0, 0, 0, 0]


def test_a_file_cut_short_or_changed_is_refused(tmp_path: Path) -> None:
    small().save(tmp_path / "whole.npz")
    data = (tmp_path / "whole.npz").read_bytes()
    path = tmp_path / "cut.npz"
    for length in range(0, len(data), 37):
        path.write_bytes(data[:length])
        with pytest.raises(FormatError, match="cut.npz"):
            Trace.load(path)
    for at in range(0, len(data), 11):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :])
        try:
            trace = Trace.load(path)
        except FormatError:
            continue
        assert as_lists(trace) == as_lists(small()), "a change that is not seen must change nothing"


CHANGES = {
    "another version": {"version": np.array(2)},
    "a version that is no number": {"version": np.array("one")},
    "no layers": {"counts": np.array([], np.int64)},
    "a layer too many": {"counts": np.array([4, 5, 6])},
    "a layer without bundles": {"counts": np.array([4, 0])},
    "a huge layer": {"counts": np.array([4, 1 << 40])},
    "more prompt than tokens": {"prompt": np.array(4)},
    "less prompt than none": {"prompt": np.array(-1)},
    "an id too large": {"ids-0": np.array([0, 4, 2], np.int32)},
    "a negative id": {"ids-0": np.array([-1, 3, 2], np.int32)},
    "ids twice": {"ids-1": np.array([1, 0, 1, 1, 4], np.int32)},
    "ids descending": {"ids-0": np.array([3, 0, 2], np.int32)},
    "ids that are no integers": {"ids-0": np.array([0.0, 3.0, 2.0])},
    "begins that do not end": {"ids-0": np.array([0, 2, 3]), "begins-0": np.array([0, 2, 2, 2])},
    "begins that do not begin": {"begins-0": np.array([1, 2, 2, 3])},
    "begins that fall": {"begins-0": np.array([0, 3, 2, 3])},
    "no begins": {"begins-0": np.array([], np.int64)},
    "one token fewer in a layer": {"begins-0": np.array([0, 2, 3])},
    "objects": {"ids-0": np.array([0, "x", 2], object)},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_lying_file_is_refused(tmp_path: Path, change: dict[str, np.ndarray]) -> None:
    path = tmp_path / "t.npz"
    small().save(path)
    with np.load(path) as arrays:
        np.savez(path, **(dict(arrays) | change))
    with pytest.raises(FormatError, match=r"t\.npz"):
        Trace.load(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    for write in (lambda: path.write_text("hello"), lambda: np.save(path.open("wb"), np.arange(3))):
        write()
        with pytest.raises(FormatError, match=r"t\.npz"):
            Trace.load(path)
    with pytest.raises(UsageError, match="not a file"):
        Trace.load(tmp_path / "none.npz")


HEAD = "# route_trace v1\n# model=m n_layer=2 n_expert=17 n_expert_used=2\nturn,phase,step,layer,slot,expert,weight\n"
ROWS = "0,0,0,0,0,16,0.5\n0,0,0,0,1,9,0.5\n0,1,1,0,0,3,0.5\n0,1,1,1,0,4,0.5\n"


def test_a_route_trace_becomes_ids_by_layer_and_token(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text(HEAD + ROWS)
    trace = read_trace(tmp_path / "r.csv")
    assert (trace.counts, trace.prompt) == ((17, 17), 1)
    assert as_lists(trace) == [[[9, 16], [3]], [[], [4]]]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("hello\n", "n_layer"),
        (HEAD.replace("n_layer=2", "n_layer=0") + ROWS, "0 layers"),
        (HEAD.replace("phase,", "") + ROWS, "line 3"),
        (HEAD + ROWS + "0,1,1,2,0,4,0.5\n", "line 8"),  # no such layer
        (HEAD + ROWS + "0,1,1,1,0,17,0.5\n", "line 8"),  # no such expert
        (HEAD + ROWS + "0,1,3,1,0,4,0.5\n", "line 8"),  # a step is missing
        (HEAD + ROWS + "0,0,1,1,0,4,0.5\n", "both phases"),
        (HEAD + ROWS + "1,1,2,1,0,4,0.5\n", "turn 1"),
        (HEAD + ROWS + "0,0,2,1,0,4,0.5\n", "prompt steps follow"),
        (HEAD + ROWS + "0,1,one,1,0,4\n", "line 8"),
        (HEAD + ROWS + "0,1\n", "line 8"),
    ],
)
def test_a_bad_route_trace_is_refused(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "r.csv").write_text(text)
    with pytest.raises(FormatError, match=says):
        read_route_csv(tmp_path / "r.csv")


def test_a_route_trace_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"r\.csv"):
        read_route_csv(tmp_path / "r.csv")
    (tmp_path / "r.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FormatError, match="not text"):
        read_route_csv(tmp_path / "r.csv")


@pytest.mark.parametrize(("name", "layers", "prompt"), [("qwen", 48, 28), ("gemma", 30, 29)])
def test_the_public_route_traces(name: str, layers: int, prompt: int) -> None:
    trace = read_trace(shared_path(f"data/traces/{name}.route.csv"))
    assert trace.counts == (128,) * layers and (trace.prompt, trace.tokens) == (prompt, prompt + 128)
    assert {len(ids) for layer in trace.ids for ids in layer[prompt:]} == {6}


def test_a_recorder_puts_layers_together_and_drops_a_token_cut_short() -> None:
    recorder, ids = Recorder((4, 5)), np.array([1, 3], np.int32)
    for layer in (0, 1, 0, 1, 0):
        recorder(layer, ids)
    ids[:] = 0  # callers may reuse their array
    trace = recorder.trace(prompt=1)
    assert as_lists(trace) == [[[1, 3]] * 2] * 2 and trace.counts == (4, 5) and trace.prompt == 1
