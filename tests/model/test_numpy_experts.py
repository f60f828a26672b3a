"""Mixtures of experts on the numpy backend: mlx-lm's tokens, and the same bits at every capacity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_flash.config import FlashConfig
from mlx_flash.experts import ExpertRun, decide_experts
from tests.tiny_experts import config_of, make_model, save

mx = pytest.importorskip("mlx.core", reason="the checkpoints and the tokens to compare with are mlx-lm's")
pytest.importorskip("mlx_lm", reason="the checkpoints and the tokens to compare with are mlx-lm's")

from mlx_lm.models.cache import make_prompt_cache  # noqa: E402

W = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
CONFIGS = {
    "mixtral": config_of("mixtral"),
    "qwen3_moe": config_of("qwen3_moe"),
    "olmoe": config_of("olmoe"),
    "olmoe-plain-weights": config_of("olmoe", norm_topk_prob=False, tie_word_embeddings=True),
    "qwen3_moe-every-second": config_of("qwen3_moe", decoder_sparse_step=2, num_hidden_layers=4, mlp_only_layers=[3]),
}
STEPS = 3


def load(path: Path, share: float | str = "auto", **fields: Any) -> Any:
    """Our model of a folder that has no tokenizer, with slots for `share` of each layer's experts."""
    plan = decide_experts(path, FlashConfig(backend="numpy", slots=share, **{"memory": "1GB"} | fields))
    run = ExpertRun(plan)
    model = plan.opened.start(run.make_selector, plan.context)
    model.flash = run
    return model


def prompt(tokens: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 300, tokens).tolist()


def logits(model: Any, tokens: int) -> list[np.ndarray]:
    return [each.copy() for each in model.flash.forced(model, prompt(tokens), prompt(STEPS, 1))]


def reference(model: Any, tokens: int) -> list[np.ndarray]:
    """mlx-lm's, with everything resident."""
    cache, found = make_prompt_cache(model), []
    for ids in [prompt(tokens), *([i] for i in prompt(STEPS, 1))]:
        found.append(np.array(model(mx.array([ids]), cache=cache)[0, -1].astype(mx.float32)))
    return found


@pytest.fixture(scope="module", params=CONFIGS)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    config = CONFIGS[request.param]
    resident = make_model(config)
    return save(resident, config, tmp_path_factory.mktemp("numpy") / request.param), resident


def test_mlx_lm_and_every_capacity(both: tuple[Path, Any]) -> None:
    path, resident = both
    for tokens in (1, 30, 300):
        wanted, first = reference(resident, tokens), None
        for share in (0.0, 0.25, 0.7, 1.0):
            model = load(path, share, prefill_chunk=64)
            found = logits(model, tokens)
            assert model.flash.plan.all_resident == (share == 1)
            for step, (one, other) in enumerate(zip(found, wanted, strict=True)):
                np.testing.assert_allclose(one, other, atol=1e-4 * np.abs(other).max(), err_msg=f"{tokens} {step}")
                assert one.argmax() == other.argmax()
            for one, other in zip(found, first or found, strict=True):
                np.testing.assert_array_equal(one, other, err_msg=f"{tokens} tokens, slots for {share}")
            first = found
            model.flash.close()
