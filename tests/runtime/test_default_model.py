"""The default model: logits recorded from its PyTorch trainer, mlx-lm with its activation patched, and its zeros."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import mlx_flash
from mlx_flash.models.text.sampling import Sampling
from mlx_flash.runtime.model_path import DEFAULT_MODEL, models_folder
from tests.conftest import shared_path
from tests.models.numpy.test_golden_tokens import assert_equal_tokens, reference, relu_in_mlx_lm  # noqa: F401
from tests.tiny import three_budgets

SOURCE = models_folder() / DEFAULT_MODEL
GOLDEN = np.load(Path(__file__).parent / "default_model_golden.npz")
LENGTHS = (1, 17, 300)


@pytest.fixture(scope="module")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mlx_flash.convert(SOURCE, tmp_path_factory.mktemp("default") / "flash", dtype="float32")


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mlx_flash.convert(SOURCE, tmp_path_factory.mktemp("default") / "flash")


def check_against_trainer(path: Path, backend: str, select: str, most: tuple[int, int, int]) -> None:
    """most: tokens of a reply at each of the three budgets."""
    for memory, tokens in zip(three_budgets(path, backend, select), most, strict=True):
        model, _ = mlx_flash.load(path, backend=backend, select=select, memory=memory)
        for length in LENGTHS:
            if backend == "mlx" and length > 256 and tokens < max(most):
                continue  # MLX's CPU kernels are slow: one budget in the middle is enough
            prompt, reply = GOLDEN[f"prompt_{length}"].tolist(), GOLDEN[f"reply_{length}"].tolist()[:tokens]
            got = list(model.flash.steps(model, prompt, len(reply), Sampling()))
            wanted = list(zip(reply, GOLDEN[f"margins_{length}"].tolist()[:tokens], strict=True))
            assert_equal_tokens(got, wanted, f"{backend} {select} {memory} prompt {length}")
        model.flash.close()


@pytest.mark.parametrize("select", ["all", "gate"])
def test_numpy_tokens_equal_the_trainers(fp32: Path, bf16: Path, select: str) -> None:
    check_against_trainer(fp32, "numpy", select, (12, 40, 12))
    model, _ = mlx_flash.load(fp32, backend="numpy", select=select)
    for length in LENGTHS:
        logits = model(GOLDEN[f"prompt_{length}"].tolist(), model.make_cache())
        np.testing.assert_allclose(logits, GOLDEN[f"logits_{length}"], rtol=0, atol=1e-3)
    model.flash.close()


@pytest.mark.parametrize("select", ["all", "gate"])
def test_mlx_tokens_equal_the_trainers(fp32: Path, select: str) -> None:
    pytest.importorskip("mlx_lm", reason="the mlx backend")
    check_against_trainer(fp32, "mlx", select, (6, 12, 6))  # MLX's CPU kernels are slow


def test_the_trainers_tokens_are_mlx_lms(tmp_path: Path, relu_in_mlx_lm: None) -> None:  # noqa: F811
    """mlx-lm on the fp32 weights, fully in memory, its MLP's activation patched to ReLU."""
    from safetensors.numpy import save_file

    from mlx_flash.engine.numerics.casting import to_float32
    from mlx_flash.engine.storage.header import read_header

    file = SOURCE / "model.safetensors"
    data = file.read_bytes()
    tensors = {}
    for name, info in read_header(file).items():
        raw = np.frombuffer(data, np.uint16, info.nbytes // 2, info.offset)
        tensors[name] = to_float32(raw, "bfloat16").reshape(info.shape)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((SOURCE / "config.json").read_text())
    for length in LENGTHS:
        reply = GOLDEN[f"reply_{length}"].tolist()
        wanted = list(reference(tmp_path, GOLDEN[f"prompt_{length}"].tolist(), len(reply)))
        assert_equal_tokens(reply, wanted, f"trainer against mlx-lm, prompt {length}")


def test_bf16_gives_one_reply_at_every_budget(bf16: Path) -> None:
    replies = set()
    for select in ("all", "gate"):
        for memory in three_budgets(bf16, "numpy", select):
            model, _ = mlx_flash.load(bf16, backend="numpy", select=select, memory=memory)
            replies.add(tuple(model.flash.steps(model, GOLDEN["prompt_17"].tolist(), 60, Sampling())))
            model.flash.close()
    assert len(replies) == 1


def test_most_neurons_are_zero_on_held_out_text(bf16: Path) -> None:
    text = next(shared_path("data/stories/held").glob("*.txt")).read_text()[2000:6000]
    model, tokenizer = mlx_flash.load(bf16, backend="numpy", select="gate")
    ids, cache = tokenizer.encode(text)[:400], model.make_cache()
    model(ids[:100], cache)
    model.flash.stats.reset()
    for token in ids[100:]:
        model([token], cache)
    stats = model.flash.stats
    neurons = sum(layout.count for layout in model.flash.plan.checkpoint.layouts)
    zeros = 1 - (stats.hits + stats.misses) / neurons / 300
    model.flash.close()
    assert zeros >= 0.88, f"{zeros:.3f} of the activations are zero, the model card says at least 0.88"


def test_the_folder_is_a_hugging_face_model() -> None:
    config = json.loads((SOURCE / "config.json").read_text())
    assert config["model_type"] == "openelm" and config["activation_fn_name"] == "relu"
    assert config["max_context_length"] >= 512
    assert {"model.safetensors", "tokenizer.json", "README.md", "train.py", "log.csv"} <= {
        p.name for p in SOURCE.iterdir()
    }
