"""Checkpoints whose config says that the head is the embedding, and that hold a head all the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mlx_flash
from mlx_flash.errors import FlashError, FormatError
from mlx_flash.models.text.sampling import Sampling

mx = pytest.importorskip("mlx.core", reason="mlx-lm alone runs most of these")
pytest.importorskip("mlx_lm", reason="mlx-lm alone runs most of these")

from mlx.utils import tree_flatten  # noqa: E402
from mlx_lm.utils import load_model  # noqa: E402

from mlx_flash.models.specs.head_tensors import embedding_of, head_of  # noqa: E402
from tests.models.specs.test_dense_families import PROMPTS, make  # noqa: E402
from tests.tiny_experts import config_of, make_model, save  # noqa: E402

# Always tied in mlx-lm, tied by the config, never tied there.
ALWAYS, BY_CONFIG, NEVER = ("cohere", "gemma2"), ("olmo2", "phi3", "starcoder2", "ernie4_5", "nemotron", "minicpm"), (
    "stablelm", "glm4", "gpt_neox")  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mlx_flash"


def tensors_of(folder: Path) -> dict[str, Any]:
    found: Any = mx.load(str(folder / "model.safetensors"))
    mx.eval(found)
    return dict(found)


def rewrite(source: Path, folder: Path, tied: bool | None, head: Any, name: str = "lm_head.weight") -> Path:
    """A copy with another head (None: without) and another word on it."""
    shutil.copytree(source, folder)
    tensors = {key: value for key, value in tensors_of(source).items() if key != name}
    mx.save_safetensors(str(folder / "model.safetensors"), tensors | ({} if head is None else {name: head}))
    config = json.loads((folder / "config.json").read_text())
    config.pop("tie_word_embeddings", None)
    (folder / "config.json").write_text(json.dumps(config | ({} if tied is None else {"tie_word_embeddings": tied})))
    return folder


def logits(path: Path, **fields: Any) -> np.ndarray:
    model, _ = mlx_flash.load(path, backend="mlx", **fields)
    found = np.array(model(mx.array([PROMPTS[1]])).astype(mx.float32))[0]
    model.flash.close()
    return found


def close(one: np.ndarray, other: np.ndarray) -> bool:
    return bool(np.abs(one - other).max() <= 1e-4 * np.abs(other).max())


def names(source: Path) -> tuple[str, str]:
    tensors = tensors_of(source)
    embedding = embedding_of(tensors)
    assert embedding is not None
    return head_of(tensors) or "lm_head.weight", embedding


@pytest.mark.parametrize("name", BY_CONFIG + NEVER)
def test_a_tied_head_is_the_embedding_and_another_one_is_itself(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against the same model with both matrices and a config that says so, which mlx-lm runs as it is."""
    untied = make(name, tmp_path / "untied")
    head, embedding = names(untied)
    shared = tensors_of(untied)[embedding]
    wanted = {
        "another": logits(rewrite(untied, tmp_path / "a", False, tensors_of(untied)[head], head)),
        "equal": logits(rewrite(untied, tmp_path / "b", False, shared, head)),
    }
    assert not close(wanted["another"], wanted["equal"])
    capsys.readouterr()
    for tied in (True, None):
        assert close(logits(rewrite(untied, tmp_path / f"equal-{tied}", tied, shared, head)), wanted["equal"])
        assert close(logits(rewrite(untied, tmp_path / f"absent-{tied}", tied, None, head)), wanted["equal"])
        assert "ties the head" not in capsys.readouterr().err
        other = rewrite(untied, tmp_path / f"other-{tied}", tied, tensors_of(untied)[head], head)
        assert close(logits(other), wanted["another"])
        assert capsys.readouterr().err.count("ties the head") == (1 if tied else 0)
    if name != "minicpm":  # for which mlx-lm takes the embedding
        with pytest.raises(FormatError, match="Missing 1 parameters.*set tie_word_embeddings to true"):
            logits(rewrite(untied, tmp_path / "nowhere", False, None, head))


@pytest.mark.parametrize("name", ALWAYS)
def test_an_architecture_that_always_ties_takes_a_head_of_its_own(name: str, tmp_path: Path) -> None:
    source = make(name, tmp_path)
    _, embedding = names(source)
    shared = tensors_of(source)[embedding]
    plain, _ = load_model(source)
    tied = np.array(plain(mx.array([PROMPTS[1]])))[0]
    assert close(logits(rewrite(source, tmp_path / "equal", True, shared)), tied)
    # Twice the matrix: twice the logits, within a cap if there is one.
    twice = logits(rewrite(source, tmp_path / "twice", True, 2 * shared))
    cap = getattr(plain, "final_logit_softcapping", None)
    wanted = cap * np.tanh(2 * np.arctanh(tied / cap)) if cap else 2 * tied
    assert np.abs(twice - wanted).max() <= 1e-3 * np.abs(wanted).max() and not close(twice, tied)


@pytest.mark.parametrize("backend", ["mlx", "numpy"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "opt"])
def test_families_of_both_backends(name: str, backend: str, tmp_path: Path) -> None:
    from tests.tiny import make_tiny

    if name == "opt" and backend == "mlx":
        pytest.skip("mlx-lm has no OPT")
    source = make_tiny(name, tmp_path)
    tensors = tensors_of(source)
    embedding = embedding_of(tensors)
    assert embedding is not None
    other = mx.random.normal(tensors[embedding].shape)

    def tokens(path: Path) -> list[int]:
        model, _ = mlx_flash.load(path, backend=backend)
        found = list(model.flash.steps(model, [3, 4, 5, 6], 12, Sampling()))
        model.flash.close()
        return found

    wanted = tokens(rewrite(source, tmp_path / "untied", False, other))
    assert tokens(rewrite(source, tmp_path / "other", True, other)) == wanted
    tied = tokens(rewrite(source, tmp_path / "absent", True, None))
    assert tokens(rewrite(source, tmp_path / "equal", True, tensors[embedding])) == tied != wanted
    with pytest.raises(FlashError, match="no lm_head.weight"):
        tokens(rewrite(source, tmp_path / "nowhere", False, None))


@pytest.mark.parametrize("backend", ["mlx", "numpy"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "olmoe", "dots1"])
def test_mixtures_in_place(name: str, backend: str, tmp_path: Path) -> None:
    from mlx_flash.config import FlashConfig
    from mlx_flash.runtime.loading import load_model
    from mlx_flash.runtime.planning.expert_plan import plan_experts

    if name == "dots1" and backend == "numpy":
        pytest.skip("our decoder does not have it")
    config = config_of(name)
    source = save(make_model(config), config, tmp_path / name)
    tensors = tensors_of(source)
    shared, own = tensors["model.embed_tokens.weight"], tensors["lm_head.weight"]

    def run(path: Path) -> tuple[np.ndarray, str | None]:
        model = load_model(plan_experts(path, FlashConfig(backend=backend, memory="1GB")))
        found = next(model.flash.forced(model, PROMPTS[1], [3])).copy()
        model.flash.close()
        return found, model.flash.plan.note

    wanted, _ = run(rewrite(source, tmp_path / "untied", False, own))
    other, note = run(rewrite(source, tmp_path / "other", True, own))
    assert close(other, wanted) and note is not None and "ties the head" in note
    silent, note = run(rewrite(source, tmp_path / "silent", None, own))
    assert close(silent, wanted) and note is None
    wanted, _ = run(rewrite(source, tmp_path / "both", False, shared))
    for head in (shared, None):
        tied, note = run(rewrite(source, tmp_path / f"tied-{head is None}", True, head))
        assert close(tied, wanted) and note is None
    with pytest.raises(FlashError, match="lm_head"):
        run(rewrite(source, tmp_path / "nowhere", False, None))


def test_a_quantised_head_counts_with_its_scales(tmp_path: Path) -> None:
    """Codes alone may be equal where the numbers are not."""
    config = config_of("qwen3_moe")
    source = save(make_model(config, 32), config, tmp_path / "model", 32)
    tensors = tensors_of(source)
    for field in ("weight", "scales", "biases"):
        tensors[f"lm_head.{field}"] = tensors[f"model.embed_tokens.{field}"]
    for change, kept in ((0.0, False), (0.5, True)):
        tensors["lm_head.scales"] = tensors["model.embed_tokens.scales"] + change
        folder = shutil.copytree(source, tmp_path / f"{kept}")
        mx.save_safetensors(str(folder / "model.safetensors"), tensors)
        (folder / "config.json").write_text(
            json.dumps(json.loads((source / "config.json").read_text()) | {"tie_word_embeddings": True})
        )
        from mlx_flash.config import FlashConfig
        from mlx_flash.runtime.planning.expert_plan import plan_experts

        opened = plan_experts(folder, FlashConfig(backend="mlx")).checkpoint.experts
        held = [name for name, _ in tree_flatten(opened.model.parameters())]
        assert ("lm_head.scales" in held) == kept
