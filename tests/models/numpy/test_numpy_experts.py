"""Mixtures of experts on the numpy backend: mlx-lm's tokens, and the same bits at every capacity."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_flash.config import FlashConfig
from mlx_flash.errors import BackendError, BudgetError, ConfigError, FlashError, FormatError
from mlx_flash.runtime.loading import load_model
from mlx_flash.runtime.planning.expert_plan import plan_experts
from tests.tiny_experts import config_of, make_model, per_expert, save, save_shards

mx = pytest.importorskip("mlx.core", reason="the checkpoints and the tokens to compare with are mlx-lm's")
pytest.importorskip("mlx_lm", reason="the checkpoints and the tokens to compare with are mlx-lm's")

from mlx.utils import tree_flatten  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402

W = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
CONFIGS = {
    "mixtral": config_of("mixtral"),
    "qwen3_moe": config_of("qwen3_moe"),
    "olmoe": config_of("olmoe"),
    "olmoe-plain-weights": config_of("olmoe", norm_topk_prob=False, tie_word_embeddings=True),
    "mixtral-4-bit": config_of("mixtral"),
    "qwen3_moe-4-bit": config_of("qwen3_moe", decoder_sparse_step=2, num_hidden_layers=4),
    "qwen3_moe-every-second": config_of("qwen3_moe", decoder_sparse_step=2, num_hidden_layers=4, mlp_only_layers=[3]),
}
STEPS = 3


def load(path: Path, share: float | str = "auto", **fields: Any) -> Any:
    """Our model of a folder that has no tokenizer, with slots for `share` of each layer's experts."""
    return load_model(plan_experts(path, FlashConfig(backend="numpy", slots=share, **{"memory": "1GB"} | fields)))


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
    config, group_size = CONFIGS[request.param], 32 if request.param.endswith("4-bit") else None
    resident = make_model(config, group_size)
    return save(resident, config, tmp_path_factory.mktemp("numpy") / request.param, group_size), resident


def test_mlx_lm_and_every_capacity(both: tuple[Path, Any]) -> None:
    path, resident = both
    for tokens, shares in ((1, (0.0, 0.25, 1.0)), (30, (0.13, 0.7, 1.0)), (300, (0.25, 1.0))):
        wanted, first = reference(resident, tokens), None
        for share in shares:
            model = load(path, share, prefill_chunk=128)
            found = logits(model, tokens)
            assert model.flash.plan.all_resident == (share == 1)
            for step, (one, other) in enumerate(zip(found, wanted, strict=True)):
                np.testing.assert_allclose(one, other, atol=1e-4 * np.abs(other).max(), err_msg=f"{tokens} {step}")
                assert one.argmax() == other.argmax()
            for one, other in zip(found, first or found, strict=True):
                np.testing.assert_array_equal(one, other, err_msg=f"{tokens} tokens, slots for {share}")
            first = found
            model.flash.close()


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe"])
def one(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    config = CONFIGS[request.param]
    resident = make_model(config)
    return save(resident, config, tmp_path_factory.mktemp("one") / request.param), resident


def weights_of(model: Any) -> dict[str, Any]:
    return dict(tree_flatten(model.parameters()))


def as_hugging_face(weights: dict[str, Any], family: str) -> dict[str, Any]:
    mixtral = family == "mixtral"
    return per_expert(weights, W if mixtral else {}, "switch_mlp", "experts")


def test_a_tensor_per_expert_and_several_files(one: tuple[Path, Any], tmp_path: Path) -> None:
    path, resident = one
    config = json.loads((path / "config.json").read_text())
    single = save_shards(as_hugging_face(weights_of(resident), path.name), config, tmp_path / "hf", 3)
    for folder in (path, single):
        model = load(folder, 0.25)
        if folder is path:
            wanted = logits(model, 30)
        else:
            np.testing.assert_array_equal(logits(model, 30), wanted)
        model.flash.close()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits(dtype: str, one: tuple[Path, Any], tmp_path: Path) -> None:
    path, resident = one
    config = json.loads((path / "config.json").read_text())
    rounded = {name: array.astype(getattr(mx, dtype)) for name, array in weights_of(resident).items()}
    wide = {name: array.astype(mx.float32) for name, array in rounded.items()}
    found = []
    for name, weights, share in (("16", rounded, 0.0), ("16-resident", rounded, 1.0), ("32", wide, 0.25)):
        model = load(save_shards(weights, config, tmp_path / name, 1), share)
        found.append(np.stack(logits(model, 30)))
        model.flash.close()
    np.testing.assert_array_equal(found[0], found[1])
    scale = np.abs(found[2]).max()  # keys and values are kept in the experts' precision
    assert 0 < np.abs(found[0] - found[2]).max() < (3e-2 if dtype == "bfloat16" else 4e-3) * scale


def test_matrices_quantised_each_in_its_way(tmp_path: Path) -> None:
    """As mlx-lm's mixed recipes do: the router and `down` finer than the rest."""
    import mlx.nn as nn

    config = CONFIGS["qwen3_moe"]
    resident = make_model(config)

    def form(name: str, module: Any) -> Any:
        if not hasattr(module, "to_quantized"):
            return False
        return {"group_size": 32, "bits": 8} if name.endswith((".gate", "down_proj")) else True

    nn.quantize(resident, 32, 4, class_predicate=form)
    names = [name for name, module in resident.named_modules() if getattr(module, "bits", 4) == 8]
    config = config | {
        "quantization": {"group_size": 32, "bits": 4} | dict.fromkeys(names, {"group_size": 32, "bits": 8})
    }
    path = save(resident, config, tmp_path / "mixed")
    for tokens in (1, 30):
        wanted = reference(resident, tokens)
        for share in (0.25, 1.0):
            model = load(path, share)
            for one, other in zip(logits(model, tokens), wanted, strict=True):
                np.testing.assert_allclose(one, other, atol=1e-4 * np.abs(other).max())
            model.flash.close()


def test_threads_and_kernels(one: tuple[Path, Any]) -> None:
    path, found = one[0], []
    for threads in (1, 3):
        model = load(path, 0.25)
        model.backend.threads = threads
        found.append(logits(model, 30))
        model.flash.close()
    np.testing.assert_array_equal(found[0], found[1])


def test_look_ahead_changes_no_bit(one: tuple[Path, Any]) -> None:
    path, _ = one
    model = load(path, 1.0)
    wanted = logits(model, 5)
    for share in (0.5, 0.7):
        model = load(path, share, look_ahead="on")
        for got, expected in zip(logits(model, 5), wanted, strict=True):
            np.testing.assert_array_equal(got, expected)
        assert model.flash.stats.guessed > 0
        model.flash.close()


def test_each_needed_expert_is_read_once_per_layer_and_chunk(one: tuple[Path, Any]) -> None:
    path, _ = one
    model = load(path, 0.0, prefill_chunk=32)
    list(model.flash.forced(model, prompt(64), []))
    plan = model.flash.plan
    layers = zip(plan.costs.counts, plan.checkpoint.layouts, strict=True)
    once = sum(count * layout.bundle_bytes for count, layout in layers)
    assert once < model.flash.stats.bytes_read < 2 * once * 1.5  # two chunks; reads begin and end at whole sectors
    assert model.flash.stats.misses == 0
    list(model.flash.forced(model, prompt(1), prompt(STEPS, 1)))
    assert model.flash.stats.misses == STEPS * len(plan.costs.counts) * 2
    model.flash.close()


def changed(one: tuple[Path, Any], folder: Path, **changes: Any) -> Path:
    """The first model again, with other tensors (a name, dots as `__`) or other config keys."""
    config = json.loads((one[0] / "config.json").read_text())
    weights = weights_of(one[1])
    for name, value in changes.items():
        if "__" not in name:
            config[name] = value
        elif value is None:
            del weights[name.replace("__", ".")]
        else:
            weights[name.replace("__", ".")] = value
    return save_shards(weights, config, folder, 1)


UP = "model__layers__1__mlp__switch_mlp__up_proj__weight"


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({UP: None}, FormatError, "experts.0.up_proj"),
        ({UP: mx.zeros((8, 31, 64))}, FormatError, r"\[8, 31, 64\]"),
        ({UP: mx.zeros((8, 32, 64), mx.bfloat16)}, FormatError, "different precisions"),
        ({UP: mx.zeros((8, 32, 64), mx.uint32)}, FormatError, "U32"),
        ({"model__layers__1__mlp__gate__weight": mx.zeros((7, 64))}, FormatError, "mlp.gate"),
        ({"model__layers__0__mlp__shared__weight": mx.zeros((7, 64))}, FormatError, "mlp.shared"),
        ({"num_experts_per_tok": 9}, ConfigError, "9 experts"),
        ({"hidden_act": "relu"}, ConfigError, "silu"),
        ({"mlp_only_layers": [0, 1]}, ConfigError, "no layer has experts"),
        ({"mlp_only_layers": "all"}, ConfigError, "mlp_only_layers"),
        ({"clip_qkv": 8.0}, ConfigError, "clip_qkv"),
        ({"sliding_window": 0, "use_sliding_window": True}, ConfigError, "sliding_window"),
        ({"rope_scaling": {"type": "spiral", "factor": 2.0}}, ConfigError, "spiral"),
        ({"model_type": "qwen2_moe"}, BackendError, "mlx only"),
    ],
    ids=lambda each: str(each)[:40],
)
def test_unfit_folders(
    changes: dict[str, Any], error: type[FlashError], words: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = make_model(CONFIGS["qwen3_moe"])
    folder = changed((save(model, CONFIGS["qwen3_moe"], tmp_path / "a"), model), tmp_path / "b", **changes)
    with pytest.raises(error, match=words):
        plan_experts(folder, FlashConfig(backend="numpy", memory="1GB"))


def test_a_budget_below_the_experts_of_one_layer(one: tuple[Path, Any]) -> None:
    plan = plan_experts(one[0], FlashConfig(backend="numpy", memory="1MB"))
    with pytest.raises(BudgetError, match="the top 2 experts of a layer must fit"):
        _ = plan.memory
    assert load(one[0], "auto", memory=str(plan.costs.smallest)).flash.plan.memory.capacities == (0, 0)
