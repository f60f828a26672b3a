"""Rotary positions and attention windows against transformers: tokens and logits stored by positions/make_golden.py."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mlx_flash
from mlx_flash.config import FlashConfig
from mlx_flash.models.specs.families import FAMILIES
from mlx_flash.models.specs.mixtures import MIXTURES, is_mixture
from mlx_flash.runtime.loading import load_model, load_planned
from mlx_flash.runtime.planning.expert_plan import plan_experts
from mlx_flash.runtime.planning.planner import plan_checkpoint
from mlx_flash.tools.inspection import inspect_model, print_inspection
from tests.positions.configs import LONG, ORIGINAL, longrope
from tests.positions.weights import prompt_ids, write_checkpoint

GOLDEN = {path.stem: path for path in sorted((Path(__file__).parents[2] / "positions" / "golden").glob("*.json"))}
PAIRS = [(name, backend) for name in GOLDEN for backend in ("mlx", "numpy")
         if backend == "mlx" or name in FAMILIES or name in MIXTURES]  # fmt: skip
CHUNK = 32  # of a prompt: longer than the windows, so that a piece sees across a border
TOLERANCE = 1e-4


def load(path: Path, backend: str, **fields: Any) -> Any:
    """A model without a tokenizer, as `mlx_flash.load` makes it."""
    config = FlashConfig(backend=backend, memory="100MB", prefill_chunk=CHUNK, **fields)
    mixture = is_mixture(json.loads((path / "config.json").read_text()))
    return load_model(plan_experts(path, config) if mixture else plan_checkpoint(path, config))


def prepared(name: str, folder: Path) -> tuple[dict[str, Any], Path]:
    """A family's record, and its model as it runs: every case has the same tensors."""
    record = json.loads(GOLDEN[name].read_text())
    source = write_checkpoint(folder / name, record["base"], record["shapes"]["all"])
    return record, source if is_mixture(record["base"]) else mlx_flash.convert(source, folder / "flash")


def each_case(name: str, folder: Path) -> Iterator[tuple[dict[str, Any], Path]]:
    record, path = prepared(name, folder)
    config = json.loads((path / "config.json").read_text())
    for case in record["cases"]:
        (path / "config.json").write_text(json.dumps(config | case["changes"]))
        yield case, path


def answer(model: Any, case: dict[str, Any]) -> tuple[list[int], float]:
    """The tokens of a reply, and how far the logits after the prompt are from those stored, relative to the largest."""
    ids = prompt_ids(case["prompt"], 96)
    logits = list(model.flash.forced(model, ids, case["tokens"][:-1]))
    wanted = np.array(case["logits"])
    return [int(each.argmax()) for each in logits], float(np.abs(logits[0][::6] - wanted).max() / np.abs(wanted).max())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "backend"), PAIRS)
def test_tokens_and_logits_are_those_of_transformers(name: str, backend: str, tmp_path: Path) -> None:
    if backend == "mlx":
        pytest.importorskip("mlx_lm")
    wrong = []
    for case, path in each_case(name, tmp_path):
        beyond = {"max_context": 256} if case["name"] == "longrope" and case["prompt"] > ORIGINAL else {}
        model = load(path, backend, **beyond)
        tokens, error = answer(model, case)
        if tokens != case["tokens"] or error > TOLERANCE:
            wrong.append(f"{case['name']}/{case['prompt']}: {tokens} for {case['tokens']}, logits {error:.1e}")
        model.flash.close()
    assert not wrong, "\n".join(wrong)


def test_the_cases_tell_scalings_apart() -> None:
    """No two kinds of a family have the same logits, or a test that passes would say nothing."""
    for path in GOLDEN.values():
        of_long = {}
        for case in json.loads(path.read_text())["cases"]:
            unlike = case["name"] not in ("dynamic", "unused-window", "no-layer-types", "layer-types", "late-window")
            if case["prompt"] >= LONG and unlike:
                of_long[case["name"]] = tuple(case["logits"])
        assert len(set(of_long.values())) >= len(of_long) - 1, path.stem


def changed(name: str, folder: Path, **changes: Any) -> Path:
    """A family's model with keys of its config changed, or taken out where they are None."""
    record, path = prepared(name, folder)
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return path


def test_inspect_and_the_first_line_say_why_a_context_is_shorter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = changed("llama", tmp_path, rope_scaling=longrope(8))
    report = inspect_model(path, FlashConfig(backend="numpy"))
    assert report["max_context"] == ORIGINAL
    assert report["context_text"].startswith("64 of 256: short RoPE factors ('original_max_position_embeddings')")
    print_inspection(report)
    assert "selector all (exact), context 64 of 256: short RoPE factors" in capsys.readouterr().out
    plan = plan_checkpoint(path, FlashConfig(backend="numpy", max_context=65))
    assert plan.context_text.startswith("65 of 256: long RoPE factors for all of it")
    (path / "tokenizer.json").unlink(missing_ok=True)
    with pytest.raises(mlx_flash.FlashError):  # there is no tokenizer, which is looked for after the line
        load_planned(plan)
    assert "context 65 of 256: long RoPE factors" in capsys.readouterr().err
    with pytest.raises(mlx_flash.UsageError, match="--max-context 257 is beyond the model's 256 tokens"):
        plan_checkpoint(path, FlashConfig(backend="numpy", max_context=257))


def test_a_window_that_no_backend_has_ends_the_context(tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm")
    path = changed("llama", tmp_path, model_type="mimo", sliding_window=64)
    assert inspect_model(path, FlashConfig(backend="mlx"))["context_text"] == "64 of 256: attention window"
    with pytest.raises(mlx_flash.UsageError, match="--max-context 65 is beyond 64 .*: attention window"):
        plan_checkpoint(path, FlashConfig(backend="mlx", max_context=65))


@pytest.mark.parametrize("name", ["mistral", "mixtral", "qwen2"])
def test_backends_agree_on_the_context(name: str, tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm")
    path = changed(name, tmp_path, sliding_window=24, use_sliding_window=True, rope_scaling=longrope(8))
    texts = {inspect_model(path, FlashConfig(backend=each))["context_text"] for each in ("auto", "mlx", "numpy")}
    assert len(texts) == 1


@pytest.mark.parametrize("name", ["llama", "mixtral", "gemma3_text"])
def test_unknown_scalings_are_refused_by_name(name: str, tmp_path: Path) -> None:
    path = changed(name, tmp_path, rope_scaling={"rope_type": "spiral", "factor": 2.0})
    for backend in ("numpy", "auto") if name == "mixtral" else ("auto",):
        with pytest.raises(mlx_flash.ConfigError, match="unknown RoPE type 'spiral'"):
            inspect_model(path, FlashConfig(backend=backend))


def test_a_batch_with_padding_keeps_to_the_window(tmp_path: Path) -> None:
    """As mlx-lm's server runs several replies at once."""
    mx = pytest.importorskip("mlx.core")
    pytest.importorskip("mlx_lm")
    from mlx_lm.models.cache import BatchKVCache

    path = changed("mistral", tmp_path, sliding_window=24)
    model = load(path, "mlx")
    long, short = prompt_ids(60, 96), prompt_ids(33, 96)
    padding = len(long) - len(short)
    cache = [BatchKVCache([0, padding]) for _ in model.layers]
    ids = mx.array([long, [0] * padding + short])
    both = [model(ids[:, :40], cache=cache), model(ids[:, 40:], cache=cache)[:, -1]]
    both.append(model(mx.array([[5], [6]]), cache=cache)[:, -1])
    for row, (prompt, token) in enumerate(((long, 5), (short, 6))):
        alone = np.array(model(mx.array([[*prompt, token]])))[0]
        for found, wanted in ((both[1][row], alone[-2]), (both[2][row], alone[-1])):
            assert np.abs(np.array(found) - wanted).max() <= TOLERANCE * np.abs(wanted).max()
    model.flash.close()
