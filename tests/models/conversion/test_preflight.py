"""What a model is refused for is found before it is converted, and leaves nothing in the cache."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mlx_flash
from mlx_flash.cli import main
from mlx_flash.config import FlashConfig
from mlx_flash.engine.storage.checkpoint import is_checkpoint
from mlx_flash.errors import BackendError, BudgetError, ConfigError, FlashError, FormatError, UsageError
from mlx_flash.runtime.machine import cache_folder
from mlx_flash.runtime.planning.neuron_plan import plan_neurons
from mlx_flash.runtime.planning.neuron_setup import make_setup
from mlx_flash.runtime.planning.planner import plan_checkpoint
from mlx_flash.runtime.preflight import planned_checkpoint
from mlx_flash.tools.inspection import inspect_model
from tests.tiny import CONFIGS, make_tiny

BACKENDS = ("numpy", "mlx")


def need(backend: str) -> None:
    if backend == "mlx":
        pytest.importorskip("mlx_lm", reason="the mlx backend is not installed")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "cache"))
    return cache_folder()


@pytest.fixture
def refused(cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Try to load a folder: the error must come before a conversion, and name nothing temporary."""
    monkeypatch.setattr("mlx_flash.runtime.model_path.convert", lambda *_, **__: pytest.fail("it was converted"))

    def attempt(source: Path, error: type[FlashError], words: str, **fields: Any) -> None:
        with pytest.raises(error, match=words) as found:
            mlx_flash.load(source, **fields)
        assert "mlx_flash-" not in str(found.value) and str(cache) not in str(found.value)
        assert not list(cache.iterdir()) if cache.exists() else True
        assert "converting" not in capsys.readouterr().err

    return attempt


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_plan_before_a_conversion_is_the_plan_after_it(name: str, backend: str, tmp_path: Path) -> None:
    need(backend)
    if name == "opt" and backend == "mlx":
        pytest.skip("mlx-lm has no OPT")
    source = make_tiny(name, tmp_path)
    config = FlashConfig(backend=backend)
    before = plan_neurons(make_setup(planned_checkpoint(source), config, None, str(source)))
    after = plan_checkpoint(source, config)
    assert before.costs == after.costs and before.selection == after.selection and before.spec == after.spec
    assert before.memory == after.memory and after.name == str(source)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"memory": "1kB"}, BudgetError, "needs at least .* use --memory"),
        ({"max_context": 513}, UsageError, "beyond the model's 512 tokens"),
        ({"select": "gate"}, UsageError, "needs a ReLU model"),
        ({"select": "router"}, UsageError, "needs a mixture of experts"),
        ({"select": "threshold:0.5"}, UsageError, "needs a calibration"),
        ({"select": "static:0.5"}, UsageError, "needs a calibration"),
        ({"select": "some"}, UsageError, "unknown selector"),
    ],
)
def test_settings_that_the_model_cannot_have(
    fields: dict[str, Any], error: type[FlashError], words: str, backend: str, tmp_path: Path, refused: Any
) -> None:
    need(backend)
    refused(make_tiny("llama", tmp_path), error, words, backend=backend, **fields)


def test_a_budget_error_calls_the_model_what_the_user_did(tmp_path: Path, refused: Any) -> None:
    source = make_tiny("llama", tmp_path)
    refused(source, BudgetError, f"^{source} needs at least", backend="numpy", memory="1kB")


def test_backends_that_do_not_run_the_family(tmp_path: Path, refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_tiny("opt", tmp_path)
    refused(source, BackendError, "runs on numpy only, not on mlx", backend="mlx")
    refused(source, BackendError, "unknown backend 'cuda'", backend="cuda")
    monkeypatch.setitem(sys.modules, "mlx_flash.engine.backends.mlx.backend", None)
    refused(make_tiny("llama", tmp_path), BackendError, "needs mlx and mlx-lm", backend="mlx")


def test_a_predictor_that_was_never_learnt(tmp_path: Path, refused: Any) -> None:
    refused(make_tiny("openelm-relu", tmp_path), UsageError, "needs a calibration", backend="numpy", select="predictor")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tokenizer_that_is_not_there(backend: str, tmp_path: Path, refused: Any) -> None:
    need(backend)
    source = make_tiny("llama", tmp_path)
    for path in source.glob("tokenizer*"):
        path.unlink()
    refused(source, UsageError, "so no tokenizer.* --tokenizer", backend=backend)
    (source / "tokenizer.json").write_text("{")
    with pytest.raises(Exception):  # noqa: B017 - whatever reads it
        mlx_flash.load(source, backend=backend)
    assert not list(cache_folder().iterdir())


def test_inspect_needs_no_tokenizer(tmp_path: Path) -> None:
    source = make_tiny("llama", tmp_path)
    for path in source.glob("tokenizer*"):
        path.unlink()
    assert inspect_model(source, FlashConfig(backend="numpy"))["fits"]


def test_inspect_too_refuses_before_converting(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_tiny("opt", tmp_path)
    assert main(["inspect", "--model", str(source), "--backend", "mlx", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["type"] == "BackendError"
    assert not list(cache.iterdir())


def test_a_shipped_calibration_counts_before_the_conversion(cache: Path) -> None:
    model, _ = mlx_flash.load(None, backend="numpy", select="predictor")
    assert model.flash.plan.selector == "predictor" and is_checkpoint(model.flash.plan.checkpoint.path)
    assert model.flash.plan.name == "flash-stories-6m"
    model.flash.close()


def test_what_mlx_lm_cannot_build(tmp_path: Path, refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mx = pytest.importorskip("mlx.core", reason="mlx-lm alone runs these")
    nn = pytest.importorskip("mlx.nn")
    from tests.models.specs.test_dense_families import make

    source = make("stablelm", tmp_path)
    config = json.loads((source / "config.json").read_text())
    refused(source, BackendError, "runs on mlx only, not on numpy", backend="numpy")
    (source / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "layer_norm_eps"}))
    refused(source, ConfigError, "mlx-lm cannot build stablelm", backend="mlx")
    (source / "config.json").write_text(json.dumps(config | {"head_dim": 4}))
    refused(source, ConfigError, "takes 64 items a token", backend="mlx")
    (source / "config.json").write_text(json.dumps(config))
    whole = mx.load(str(source / "model.safetensors"))
    mx.eval(whole)
    rest = {k: v for k, v in whole.items() if "layers.1.self_attn.q" not in k}
    mx.save_safetensors(str(source / "model.safetensors"), rest, metadata={"format": "pt"})
    refused(source, FormatError, f"{source}: cannot load .*layers.1.self_attn.q_proj", backend="mlx")
    monkeypatch.setattr("mlx_lm.models.nemotron.relu_squared", nn.relu)
    refused(make("nemotron", tmp_path), ConfigError, "is not the relu2 one", backend="mlx")


def test_looking_reads_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model as large as the disk is refused as fast as a small one."""
    source = make_tiny("llama", tmp_path)
    monkeypatch.setattr("mlx_flash.models.specs.source.Source.read", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(BudgetError):
        mlx_flash.load(source, backend="numpy", memory="1kB")


def test_pairs_of_neighbours_turn_on_mlx_and_are_refused_on_numpy(tmp_path: Path, refused: Any, cache: Path) -> None:
    """mlx-lm's own key, which transformers does not have."""
    source = make_tiny("llama", tmp_path)
    config = json.loads((source / "config.json").read_text()) | {"rope_traditional": True}
    (source / "config.json").write_text(json.dumps(config))
    refused(source, BackendError, "'rope_traditional' is true.*--backend mlx", backend="numpy")
    need("mlx")
    import mlx.core as mx
    from mlx_lm.utils import load_model

    path = mlx_flash.convert(source, tmp_path / "flash")
    plain, _ = load_model(source)
    ids = [3, 5, 7, 9, 11]
    model, _ = mlx_flash.load(path)  # auto takes what can run it
    found = list(model.flash.forced(model, ids, []))[0]
    assert model.flash.plan.backend_name == "mlx"
    assert abs(found - [float(x) for x in plain(mx.array([ids]))[0, -1]]).max() < 1e-4
    model.flash.close()
