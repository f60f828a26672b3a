"""config.json as transformers 5 writes it, for model types that the golden grid does not have (wrappers among them):
tokens and logits are those of transformers, on both backends where they run. End ids, keys that contradict each other
or that nothing reads.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mlx_flash
from mlx_flash.errors import FlashError
from mlx_flash.models.specs.config_normal_form import normalise
from mlx_flash.models.specs.families import FAMILIES
from mlx_flash.models.specs.mixtures import MIXTURES
from tests.golden.weights import GRID

from .config_forms import OUT, PROMPT, write

CASES: dict[str, dict[str, Any]] = json.loads(OUT.read_text())
NUMPY = FAMILIES.keys() | MIXTURES.keys()
TOLERANCE = 1e-4  # of the largest logit; two orders of summation in fp32
RUNS = [
    (name, backend)
    for name, case in CASES.items()
    for backend in ("numpy", "mlx")
    if backend == "mlx" or normalise(case["config"])["model_type"] in NUMPY
]
IN_NO_GRID = [(name, backend) for name, backend in RUNS if not (GRID / f"{name}.json").exists()]


def checkpoint(folder: Path, config: dict[str, Any], shapes: dict[str, list[int]]) -> Path:
    """A checkpoint of a case with a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    write(folder, config, shapes)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(128)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "w127", "bos_token": "w1"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def forced(folder: Path, backend: str, tokens: list[int]) -> tuple[list[int], np.ndarray]:
    """What a model says after the prompt and after each of `tokens` but the last, and its first logits."""
    if backend == "mlx":
        pytest.importorskip("mlx_lm")
    model, _ = mlx_flash.load(folder, backend=backend)
    logits = [np.asarray(each, np.float64) for each in model.flash.forced(model, PROMPT, tokens[:-1])]
    model.flash.close()
    return [int(each.argmax()) for each in logits], logits[0]


@pytest.mark.parametrize(("name", "backend"), IN_NO_GRID, ids=lambda value: str(value))
def test_tokens_are_those_of_transformers(
    name: str, backend: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = CASES[name]
    folder = checkpoint(tmp_path / name, case["config"], case["shapes"])
    said, logits = forced(folder, backend, case["tokens"])
    assert said == case["tokens"]
    right = np.array(case["logits"])
    assert np.abs(logits[: len(right)] - right).max() <= TOLERANCE * np.abs(logits).max()
    told = capsys.readouterr().err
    assert "not understood" not in told
    assert ("sees pictures" in told) == ("vision_config" in case["config"])


@pytest.mark.parametrize(("name", "backend"), [run for run in RUNS if "vision_config" in CASES[run[0]]["config"]])
def test_a_text_model_is_found_by_either_name(name: str, backend: str, tmp_path: Path) -> None:
    """transformers writes `language_model.model.` or `model.language_model.`, as its release has it."""
    case = CASES[name]
    folder = checkpoint(tmp_path / name, case["config"], case["shapes"])
    from safetensors.numpy import load_file, save_file

    def renamed(tensor: str) -> str:
        if tensor.startswith("language_model.model."):
            return "model.language_model." + tensor.removeprefix("language_model.model.")
        if tensor.startswith("language_model.lm_head."):
            return tensor.removeprefix("language_model.")
        if tensor.startswith(("model.layers.", "model.embed_tokens.", "model.norm.")):
            return "language_model." + tensor
        if tensor.startswith("model.language_model."):
            return "language_model.model." + tensor.removeprefix("model.language_model.")
        return "language_model." + tensor if tensor.startswith("lm_head.") else tensor

    path = folder / "model.safetensors"
    save_file({renamed(k): v for k, v in load_file(path).items()}, path, metadata={"format": "pt"})
    assert forced(folder, backend, case["tokens"])[0] == case["tokens"]


@pytest.mark.parametrize("backend", ["numpy", "mlx"])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_every_end_id_stops(name: str, backend: str, tmp_path: Path) -> None:
    case = CASES[name]
    folder = checkpoint(tmp_path / name, case["config"], case["shapes"])
    if backend == "mlx":
        pytest.importorskip("mlx_lm")
    stop = next(token for i, token in enumerate(case["tokens"]) if token not in case["tokens"][:i] and i)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, stop]}))
    model, tokenizer = mlx_flash.load(folder, backend=backend)
    assert {5, stop, 127} <= set(tokenizer.eos_token_ids)
    reply = list(mlx_flash.stream_generate(model, tokenizer, PROMPT, max_tokens=len(case["tokens"])))
    assert reply[-1].finish_reason == "stop" and len(reply) == case["tokens"].index(stop) + 1
    model.flash.close()


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize("backend", ["auto", "numpy", "mlx"])
def test_bad_ends_are_named_before_anything_is_written(name: str, backend: str, tmp_path: Path) -> None:
    case = CASES[name]
    if backend == "mlx":
        pytest.importorskip("mlx_lm")
    folder = checkpoint(tmp_path / name, case["config"], case["shapes"])
    for text, words in (
        ("{", "generation_config.json"),
        ("[]", "generation_config.json"),
        ('{"eos_token_id": 128}', "128, but the model has 128 tokens"),
        ('{"eos_token_id": [2, -1]}', "-1"),
        ('{"eos_token_id": [true]}', "True"),
        ('{"eos_token_id": 2.0}', "2.0"),
    ):
        (folder / "generation_config.json").write_text(text)
        with pytest.raises(FlashError, match=words):
            mlx_flash.load(folder, backend=backend)
    left = tmp_path / "cache" / "mlx_flash"
    assert not left.exists() or not [path for path in left.iterdir() if path.is_dir()]


@pytest.mark.parametrize("backend", ["auto", "numpy", "mlx"])
@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("llama", {"rope_theta": 10000.0}, "'rope_theta' is 10000.0, but 'rope_parameters.rope_theta' is 500000.0"),
        ("mixtral", {"rope_theta": 10000.0}, "'rope_theta' is 10000.0, but 'rope_parameters.rope_theta' is 500000.0"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "'rope_scaling.rope_type' is 'linear'"),
        ("qwen3_moe", {"num_experts": 8}, "'num_local_experts' is 4, but 'num_experts' is 8"),
        ("olmoe", {"clip_qkv": "four"}, "'clip_qkv' is 'four'"),
        ("mixtral", {"hidden_act": "gelu"}, "'?gelu'?"),
    ],
)
def test_contradictions_are_refused_on_every_backend(
    name: str, changes: dict[str, Any], words: str, backend: str, tmp_path: Path
) -> None:
    case = CASES[name]
    if backend == "mlx":
        pytest.importorskip("mlx_lm")
    folder = checkpoint(tmp_path / name, case["config"] | changes, case["shapes"])
    with pytest.raises(FlashError, match=words):
        mlx_flash.load(folder, backend=backend)


@pytest.mark.parametrize(("name", "backend"), [("llama", "numpy"), ("llama", "mlx"), ("granite", "mlx")])
def test_keys_that_nothing_reads_are_named_once(
    name: str, backend: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if backend == "mlx":
        pytest.importorskip("mlx_lm")
    case = CASES[name]
    strange = {"mup_width_scale": 2.0, "attention_sinks": 4, "unset": None, "use_cache": False}
    folder = checkpoint(tmp_path / name, case["config"] | strange, case["shapes"])
    model, _ = mlx_flash.load(folder, backend=backend)
    model.flash.close()
    lines = [line for line in capsys.readouterr().err.splitlines() if "not understood" in line]
    assert lines == ["config.json: not understood and not used: attention_sinks, mup_width_scale"]


def test_strays_in_a_wrapper_are_named(tmp_path: Path) -> None:
    case = CASES["mistral3"]
    shapes = case["shapes"] | {"model.audio_tower.weight": [4, 4]}
    folder = checkpoint(tmp_path / "strange", case["config"], shapes)
    with pytest.raises(FlashError, match="neither of text nor of vision: model.audio_tower.weight"):
        mlx_flash.load(folder, backend="numpy")
    text = case["config"]["text_config"] | {"model_type": "qwen9"}
    folder = checkpoint(tmp_path / "other", case["config"] | {"text_config": text}, case["shapes"])
    with pytest.raises(FlashError, match="unknown model family 'mistral3' with a text model of type 'qwen9'"):
        mlx_flash.load(folder, backend="numpy")
