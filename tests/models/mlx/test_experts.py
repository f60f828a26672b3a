"""Mixtures of experts read in place: bit-equal to mlx-lm's resident model, whatever the architecture and capacity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tiny_experts import CONFIGS, UNSUPPORTED, config_of, make_model, save

mx = pytest.importorskip("mlx.core", reason="this is about the mlx backend")
pytest.importorskip("mlx_lm", reason="this is about the mlx backend")

from mlx_lm.models.cache import make_prompt_cache  # noqa: E402

from mlx_flash.config import FlashConfig  # noqa: E402
from mlx_flash.models.mlx.mixture_corrections import fit_arithmetic  # noqa: E402
from mlx_flash.runtime.loading import load_model  # noqa: E402
from mlx_flash.runtime.planning.expert_plan import plan_experts  # noqa: E402


def load(path: Path, share: float | str = "auto", **fields: Any) -> Any:
    """Our model of a folder that has no tokenizer, with slots for `share` of each layer's experts."""
    return load_model(plan_experts(path, FlashConfig(backend="mlx", slots=share, **{"memory": "1GB"} | fields)))


def prompt(tokens: int, seed: int = 0) -> Any:
    return mx.array(np.random.default_rng(seed).integers(0, 300, (1, tokens)))


def logits(model: Any, tokens: int, replies: int = 3) -> list[np.ndarray]:
    """After a prompt, then after each of `replies` tokens that are known beforehand, in fp32."""
    cache = make_prompt_cache(model)
    found = [model(prompt(tokens), cache=cache)]
    found += [model(prompt(1, seed), cache=cache) for seed in range(1, replies + 1)]  # nothing is evaluated in between
    mx.eval(found)
    return [np.array(each.astype(mx.float32)) for each in found]


def assert_same(one: list[np.ndarray], other: list[np.ndarray], what: str) -> None:
    for step, (a, b) in enumerate(zip(one, other, strict=True)):
        assert np.isfinite(a).all() and a.std() > 0, f"{what}: the model says nothing"
        np.testing.assert_array_equal(a, b, err_msg=f"{what}, step {step}")


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_is_bit_equal_to_the_resident_model(name: str, tmp_path: Path) -> None:
    config = config_of(name)
    for group_size, share, tokens in ((None, 0.25, 30), (32, 0.5, 3)):
        resident = make_model(config, group_size)
        path = save(resident, config, tmp_path / f"{group_size}", group_size)
        model = load(path, share)
        fit_arithmetic(resident, config)  # as transformers', which the golden grid compares with
        assert_same(logits(model, tokens), logits(resident, tokens), f"{name} {group_size} {share}")
        assert model.flash.stats.bytes_read > 0
        model.flash.close()


def test_no_architecture_is_forgotten() -> None:
    import mlx_lm

    if mlx_lm.__version__ != "0.32.2":
        pytest.skip("the lists are those of mlx-lm 0.32.2")
    models = Path(mlx_lm.__file__).parent / "models"
    users = {path.stem for path in models.glob("*.py") if "switch_layers import" in path.read_text()}
    assert users <= CONFIGS.keys() | UNSUPPORTED.keys()
    assert not CONFIGS.keys() & UNSUPPORTED.keys()


@pytest.fixture(
    scope="module", params=[("qwen3_moe", None), ("gpt_oss", None), ("qwen3_moe", 32), ("gpt_oss", 32)],
                ids=lambda each: f"{each[0]}-{each[1]}")  # fmt: skip
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    name, group_size = request.param
    config = config_of(name)
    resident = make_model(config, group_size)
    return save(resident, config, tmp_path_factory.mktemp("both") / name, group_size), resident


@pytest.mark.parametrize("share", [0.0, 0.13, 0.25, 0.7, 1.0])
def test_every_capacity_and_prompt(both: tuple[Path, Any], share: float) -> None:
    path, resident = both
    model = load(path, share)
    for tokens in (1, 30, 300):
        assert_same(logits(model, tokens), logits(resident, tokens), f"{path.name} {share} {tokens}")
    assert model.flash.plan.all_resident == (share == 1)
    if share == 1:
        before = model.flash.stats.bytes_read
        logits(model, 30)
        assert model.flash.stats.bytes_read == before
    model.flash.close()


def test_a_batch_reads_the_union_of_its_experts(both: tuple[Path, Any]) -> None:
    path, resident = both
    model, ids = load(path, 0.5), mx.array(np.random.default_rng(3).integers(0, 300, (3, 7)))
    for each in (ids, ids[:, :1]):
        np.testing.assert_array_equal(np.array(model(each)), np.array(resident(each)))
    counted = model.flash.stats.hits + model.flash.stats.misses
    assert 2 * 2 < counted <= 2 * 6  # two layers; three sequences of two experts each, some of them the same
    model.flash.close()
