"""`mlx_flash perplexity`: against other ways to compute the same, and with selectors at work as in decoding."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mlx_flash
from mlx_flash import cli
from mlx_flash.tools import perplexity
from mlx_flash.tools.perplexity import measure_perplexity, windows_of_files
from mlx_flash.tools.text_windows import CONTEXT_TOKENS, SCORED_TOKENS, Window, cut_windows, encode_text, spread_evenly
from tests.calibrated import calibrate_by_hand
from tests.tiny import make_tiny

KEYS = {"selector", "exact", "backend", "tokens", "windows", "nats_per_token", "bits_per_byte", "perplexity"}
KEYS |= {"bytes_read_per_token", "hit_rate", "resident_bytes", "peak_bytes", "ffn_bytes", "ffn_resident_bytes"}
WORDS = "the cat saw a small red fox by the river and ran home again to sleep until it was morning "


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("perplexity"))


@pytest.fixture(scope="module")
def flash(source: Path) -> Path:
    return calibrate_by_hand(mlx_flash.convert(source, source.parent / "flash"), None)


def write(path: Path, characters: int, begin: int = 0) -> Path:
    path.write_text((WORDS * 20)[begin : begin + characters])
    return path


def config(backend: str = "numpy", **fields: Any) -> mlx_flash.FlashConfig:
    return mlx_flash.FlashConfig(backend=backend, **fields)


def nats_of(logits: np.ndarray, token: int) -> float:
    wide = logits.astype(np.float64)
    return float(np.log(np.exp(wide - wide.max()).sum()) + wide.max() - wide[token])


# Windows


@settings(max_examples=200)
@given(st.integers(0, 700), st.integers(1, 150), st.integers(1, 300), st.integers(0, 2))
def test_every_token_but_the_first_is_scored_once(length: int, context: int, scored: int, before: int) -> None:
    ids, front = list(range(1000, 1000 + length)), list(range(before))
    found = cut_windows(front, ids, context, scored)
    assert [token for window in found for token in window.scored] == ids[context:]
    for window in found:
        at = window.scored[0] - 1000
        assert window.prompt == front + ids[at - context : at], "what stands before a window is not its context"
        assert 1 <= len(window.scored) <= scored


@settings(max_examples=100)
@given(st.lists(st.integers(1, 256), min_size=1, max_size=30), st.integers(1, 4000))
def test_spread_takes_about_as_many_from_all_over(sizes: list[int], tokens: int) -> None:
    found = [Window([at], [0] * size) for at, size in enumerate(sizes)]
    chosen = spread_evenly(found, tokens)
    places = [window.prompt[0] for window in chosen]
    assert places == sorted(set(places)) and chosen
    assert spread_evenly(found, None) == found
    if tokens >= sum(sizes):
        assert chosen == found
    elif len(chosen) > 1:
        assert np.ptp(np.diff(places)) <= 1, "the windows are not evenly spread"
        assert abs(len(chosen) - len(sizes) * tokens / sum(sizes)) <= 0.5


def test_the_real_windows_are_those_of_the_paper_text(flash: Path, tmp_path: Path) -> None:
    assert (CONTEXT_TOKENS, SCORED_TOKENS) == (128, 256)
    _, tokenizer = load_and_close(flash)
    paths = [write(tmp_path / "a.txt", 700), write(tmp_path / "b.txt", 129, begin=5)]
    found, size = windows_of_files(tokenizer, paths, 512, None)
    assert [len(w.scored) for w in found] == [256, 256, 700 - 128 - 512, 1]
    assert [len(w.prompt) for w in found] == [129] * 4 and all(w.prompt[0] == 256 for w in found), "BOS, and 128"
    assert size == 700 - 128 + 1, "bytes of the scored tokens"
    short, _ = windows_of_files(tokenizer, paths[:1], 140, None)
    assert all(len(w.prompt) + len(w.scored) <= 140 for w in short)
    assert sum(len(w.scored) for w in short) == 700 - 128


def load_and_close(path: Path) -> tuple[Any, Any]:
    model, tokenizer = mlx_flash.load(path, backend="numpy")
    model.flash.close()
    return model, tokenizer


def test_bytes_are_those_of_the_text_also_beyond_ascii(flash: Path, tmp_path: Path) -> None:
    _, tokenizer = load_and_close(flash)
    text = "Ein Fuchs läuft über die Straße — naïve Fälle… " * 20
    (tmp_path / "a.txt").write_text(text)
    before, ids = encode_text(tokenizer, text)
    assert before == [256] and len(ids) == len(text.encode())
    _, size = windows_of_files(tokenizer, [tmp_path / "a.txt"], 512, None)
    assert abs(size - (len(ids) - 128)) <= 6, "a character cut by a window's border may count a few bytes more"


# Against other ways


def test_all_equals_a_prefill_per_token(flash: Path, tmp_path: Path) -> None:
    """Every scored token's logits from a prompt of its own, which passes through other kernels than decoding."""
    path = write(tmp_path / "a.txt", CONTEXT_TOKENS + 12)
    found = measure_perplexity(flash, [path], config(select="all"))
    model, tokenizer = mlx_flash.load(flash, backend="numpy", select="all")
    ids = [256, *tokenizer.encode(path.read_text(), add_special_tokens=False)]
    wanted = []
    for at in range(CONTEXT_TOKENS + 1, len(ids)):
        logits = next(iter(model.flash.forced(model, ids[:at], [])))
        wanted.append(nats_of(logits, ids[at]))
    model.flash.close()
    assert found["tokens"] == len(wanted) == 12
    assert found["nats_per_token"] == pytest.approx(np.mean(wanted), abs=1e-4)
    assert found["perplexity"] == pytest.approx(math.exp(np.mean(wanted)), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(np.sum(wanted) / math.log(2) / 12, rel=1e-4)


@pytest.mark.parametrize("backend", ["numpy", "mlx"])
def test_all_equals_mlx_lm(source: Path, flash: Path, tmp_path: Path, backend: str) -> None:
    pytest.importorskip("mlx_lm", reason="mlx-lm is the independent implementation")
    import mlx.core as mx
    from mlx_lm.utils import load_model

    path = write(tmp_path / "a.txt", CONTEXT_TOKENS + SCORED_TOKENS + 20)
    found = measure_perplexity(flash, [path], config(backend, select="all"))
    model, _ = load_model(source)
    text = list(path.read_bytes())
    _, tokenizer = load_and_close(flash)
    ids = list(tokenizer.encode(path.read_text(), add_special_tokens=False))
    assert len(ids) == len(text)
    wanted = []
    for begin in (CONTEXT_TOKENS, CONTEXT_TOKENS + SCORED_TOKENS):
        window = [256, *ids[begin - CONTEXT_TOKENS : begin + SCORED_TOKENS]]
        logits = np.array(model(mx.array([window]))[0].astype(mx.float32))
        wanted += [nats_of(logits[at], window[at + 1]) for at in range(CONTEXT_TOKENS, len(window) - 1)]
    assert found["tokens"] == len(wanted) == SCORED_TOKENS + 20 and found["windows"] == 2
    assert found["nats_per_token"] == pytest.approx(np.mean(wanted), abs=1e-4)
    assert found["backend"] == backend


@pytest.mark.parametrize("select", ["all", "static:0.5", "prompt:0.5", "threshold:0.5"])
def test_both_backends_agree(flash: Path, tmp_path: Path, select: str) -> None:
    pytest.importorskip("mlx_lm")
    path = write(tmp_path / "a.txt", CONTEXT_TOKENS + 25)
    one, other = (measure_perplexity(flash, [path], config(backend, select=select)) for backend in ("numpy", "mlx"))
    assert one["nats_per_token"] == pytest.approx(other["nats_per_token"], abs=1e-3)
    assert one["bundles_per_token"] == pytest.approx(other["bundles_per_token"], rel=0.01)


# Selectors at work


def test_selectors_work_while_tokens_are_scored_and_not_before(flash: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", CONTEXT_TOKENS + 9)
    exact = measure_perplexity(flash, [path], config(select="all"))
    static = measure_perplexity(flash, [path], config(select="static:0.25"))
    whole = measure_perplexity(flash, [path], config(select="static:1"))
    assert abs(static["nats_per_token"] - exact["nats_per_token"]) > 1e-3
    assert whole["nats_per_token"] == pytest.approx(exact["nats_per_token"], abs=1e-6)
    assert (exact["exact"], static["exact"], static["selector"]) == (True, False, "static:0.25")
    assert static["bundles_per_token"] == 3 * round(0.25 * 344) and exact["bundles_per_token"] == 3 * 344
    one = write(tmp_path / "b.txt", CONTEXT_TOKENS + 1)
    first = [measure_perplexity(flash, [one], config(select=s))["nats_per_token"] for s in ("all", "static:0.25")]
    assert first[0] == pytest.approx(first[1], abs=1e-6), "the first scored token follows from an exact prompt"


def test_the_budget_does_not_change_it_and_only_decoding_is_counted(flash: Path, tmp_path: Path) -> None:
    from mlx_flash.tools.inspection import inspect_model

    path = write(tmp_path / "a.txt", CONTEXT_TOKENS + 12)
    low = inspect_model(flash, config(select="static:0.5"))["smallest_budget_bytes"]
    small, large = (measure_perplexity(flash, [path], config(select="static:0.5", memory=m)) for m in (low, "auto"))
    assert small["nats_per_token"] == large["nats_per_token"]
    bundle = 3 * 64 * 4
    assert small["hit_rate"] == 0 and small["bytes_read_per_token"] == pytest.approx(3 * 172 * bundle, rel=0.5)
    assert large["hit_rate"] == 1 and large["bytes_read_per_token"] == 0, "the prompt's reads are counted"
    assert large["ffn_bytes"] >= 3 * 344 * bundle and small["resident_bytes"] <= low


# The command


def test_json_and_tokens(flash: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.txt", 1500)
    command = ["perplexity", "--model", str(flash), "--data", str(path), "--backend", "numpy", "--tokens", "300"]
    assert cli.main([*command, "--json"]) == 0
    out = capsys.readouterr().out
    found = json.loads(out)
    assert out.count("\n") == 1 and found.keys() >= KEYS
    assert found["tokens"] == 256 and found["windows"] == 1
    assert cli.main([*command, "--select", "prompt:0.5"]) == 0
    printed = capsys.readouterr().out
    for word in ("prompt:0.5 (not exact)", "nats per token", "bits per byte", "256 tokens scored", "per token"):
        assert word in printed


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        (WORDS[:50].encode(), [], "has 50 tokens; at least 129 are needed"),
        ((WORDS * 2)[:128].encode(), [], "has 128 tokens; at least 129 are needed"),
        (b"", [], "is empty"),
        (b"abc\xff", [], "not UTF-8 text (byte 3)"),
        (None, [], "is not a file"),
        (WORDS.encode() * 3, ["--max-context", "129"], "context of 129 tokens is too short; at least 130"),
        (WORDS.encode() * 3, ["--tokens", "0"], "tokens is 0"),
        (WORDS.encode() * 3, ["--tokens", "-5"], "tokens is -5"),
        (WORDS.encode() * 3, ["--select", "static:1.5"], "static:0.5"),
    ],
)
def test_bad_input(
    flash: Path,
    tmp_path: Path,
    content: bytes | None,
    options: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    command = ["perplexity", "--model", str(flash), "--data", str(path), "--backend", "numpy", "--json", *options]
    assert cli.main(command) == 2
    assert words in json.loads(capsys.readouterr().out)["error"]["message"]


def test_a_context_that_is_just_long_enough(flash: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", CONTEXT_TOKENS + 3)
    found = measure_perplexity(flash, [path], config(select="all", max_context=130))
    assert found["windows"] == 3 and found["tokens"] == 3


def test_a_tokenizer_of_another_model_is_refused(flash: Path) -> None:
    model, _ = mlx_flash.load(flash, backend="numpy")
    try:
        with pytest.raises(mlx_flash.UsageError, match="id 300, the model has 300"):
            perplexity.measure(model, [Window([1, 2], [3, 300])])
    finally:
        model.flash.close()
