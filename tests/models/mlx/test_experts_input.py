"""Mixtures of experts as people have them: other layouts, damaged or unfit folders, reads that fail, the command."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import mlx_flash
from mlx_flash.cli import main
from mlx_flash.runtime.model_path import resolve_model
from tests.conftest import shared_path
from tests.models.mlx.test_experts import assert_same, load, logits, make_prompt_cache
from tests.tiny_experts import config_of, make_model, per_expert, save, save_shards

mx = pytest.importorskip("mlx.core", reason="this is about the mlx backend")

from mlx.utils import tree_flatten  # noqa: E402

from mlx_flash.engine.storage.readers import FaultyReader  # noqa: E402
from mlx_flash.runtime.planning.expert_plan import plan_experts  # noqa: E402

W = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
CONFIG = config_of("qwen3_moe")
EXPERT = "model.layers.1.mlp.switch_mlp.down_proj.weight"


@pytest.fixture(scope="module")
def resident() -> Any:
    return make_model(CONFIG)


@pytest.fixture(scope="module")
def weights(resident: Any) -> dict[str, Any]:
    return dict(tree_flatten(resident.parameters()))


@pytest.fixture(scope="module")
def folder(resident: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(resident, CONFIG, tmp_path_factory.mktemp("experts") / "model")


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "olmoe"])
def test_a_tensor_per_expert_as_hugging_face_has_them(name: str, shards: int, tmp_path: Path) -> None:
    config = config_of(name)
    resident = make_model(config)
    weights = dict(tree_flatten(resident.parameters()))
    apart = per_expert(weights, W if name == "mixtral" else {}, "switch_mlp", "experts")
    assert len(apart) > len(weights)
    path = save_shards(apart, config, tmp_path / "apart", shards)
    model = load(path, 0.3)
    assert_same(logits(model, 30), logits(resident, 30), name)
    model.flash.close()


def test_experts_are_never_held_beside_the_slots(tmp_path: Path) -> None:
    """What loading and running takes, at most, is the dense part, the slots and what a step computes."""
    config = config_of("qwen3_moe", moe_intermediate_size=1024, num_experts=32, vocab_size=100)
    path = save(make_model(config), config, tmp_path / "model")
    experts = sum(32 * 3 * 1024 * 64 * 4 for _ in range(2))
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    model = load(path, 0.1)
    mx.eval(model(mx.zeros((1, 1), mx.int32), cache=make_prompt_cache(model)))
    taken = mx.get_peak_memory() - before
    plan = model.flash.plan
    assert taken < plan.costs.fixed["dense part"] + plan.memory.parts["slots"] + plan.memory.parts["staging"] + 2**20
    assert taken < experts / 2 < mx.get_active_memory() + experts
    model.flash.close()


@pytest.mark.parametrize("tokens", [1, 30])
def test_fail_the_first_second_third_read_until_a_run_passes(folder: Path, resident: Any, tokens: int) -> None:
    wanted = logits(resident, tokens)
    for fail_at in range(1, 200):
        model = load(folder, 0.3)
        reader = model.flash.shared.reader
        model.flash.shared.reader = FaultyReader(reader, fail_at)
        try:
            assert_same(logits(model, tokens), wanted, "a run without a failure")
            break
        except mlx_flash.ReadError:
            model.flash.shared.reader = reader
            assert_same(logits(model, tokens), wanted, f"after read {fail_at} failed")
        finally:
            model.flash.close()
    assert fail_at > 3, "the run made almost no reads: this tested nothing"


def test_an_interrupt_in_any_read_leaves_a_working_model(folder: Path, resident: Any) -> None:
    class Interrupting(FaultyReader):
        def submit(self, layer: int, *rest: Any) -> Any:
            self.submits += 1
            pending = self.inner.submit(layer, *rest)
            if self.submits == self.fail_at:
                raise KeyboardInterrupt
            return pending

    wanted = logits(resident, 30)
    model = load(folder, 0.3)
    reader = model.flash.shared.reader
    for at in range(1, 8):
        model.flash.shared.reader = Interrupting(reader, at)
        with pytest.raises(KeyboardInterrupt):
            logits(model, 30)
        model.flash.shared.reader = reader
        assert_same(logits(model, 30), wanted, f"after an interrupt in read {at}")
    model.flash.close()


def test_a_budget_below_the_top_experts_of_a_layer_says_which_would_do(folder: Path, resident: Any) -> None:
    smallest = plan_experts(folder, mlx_flash.FlashConfig(backend="mlx")).costs.smallest
    with pytest.raises(
        mlx_flash.BudgetError, match=r"needs at least .*top 2 experts .*use --memory ([\d.]+MB)"
    ) as found:
        load(folder, memory=smallest - 1)
    advised = str(found.value).split("use --memory ")[1].split(" ")[0]
    for memory in (smallest, advised):
        model = load(folder, memory=memory)
        assert model.flash.plan.memory.total_bytes <= model.flash.plan.budget_bytes
        assert_same(logits(model, 30), logits(resident, 30), f"with {memory}")
        model.flash.close()


def refused(path: Path, error: type[Exception], match: str, **fields: Any) -> None:
    with pytest.raises(error, match=match):
        plan_experts(path, mlx_flash.FlashConfig(**{"backend": "mlx"} | fields))


def test_damaged_and_unfit_tensors_are_refused_by_name(folder: Path, weights: dict[str, Any], tmp_path: Path) -> None:
    cut = shutil.copytree(folder, tmp_path / "cut")
    os.truncate(cut / "model.safetensors", (cut / "model.safetensors").stat().st_size - 1000)
    refused(cut, mlx_flash.FormatError, "is truncated")

    def changed(name: str, **changes: Any) -> Path:
        return save_shards({k: v for k, v in (weights | changes).items() if v is not None}, CONFIG, tmp_path / name)

    short = changed("short", **{EXPERT: weights[EXPERT][:7]})
    refused(short, mlx_flash.FormatError, r"Expected shape \(8, 64, 32\) but received shape \(7, 64, 32\)")
    turned = changed("turned", **{EXPERT: mx.contiguous(weights[EXPERT].swapaxes(1, 2))})
    refused(turned, mlx_flash.FormatError, r"down_proj")
    missing = changed("missing", **{EXPERT: None})
    refused(missing, mlx_flash.FormatError, rf"Missing 1 parameters: {EXPERT}")
    mixed = changed("mixed", **{EXPERT: weights[EXPERT].astype(mx.float16)})
    refused(mixed, mlx_flash.FormatError, "layers.1.mlp.switch_mlp mixes precisions .*down_proj.weight float16")
    apart = per_expert(weights, {}, "switch_mlp", "experts")
    odd = "model.layers.0.mlp.experts.5.up_proj.weight"
    one = save_shards(apart | {odd: apart[odd].astype(mx.float16)}, CONFIG, tmp_path / "one")
    refused(one, mlx_flash.FormatError, rf"tensor '{odd}' .* is F16 .*several precisions")
    lacking = save_shards({k: v for k, v in apart.items() if k != odd}, CONFIG, tmp_path / "lacking")
    refused(lacking, mlx_flash.ConfigError, odd)


def test_folders_that_are_no_model_of_ours_are_refused(folder: Path, tmp_path: Path) -> None:
    def copy(name: str, **changes: Any) -> Path:
        path = shutil.copytree(folder, tmp_path / name)
        (path / "config.json").write_text(json.dumps(CONFIG | changes))
        return path

    refused(
        copy("program", model_file="evil.py"), mlx_flash.FormatError, r"names a program to run \('evil.py'\); none is"
    )
    refused(copy("unknown", model_type="no_such_moe"), mlx_flash.ConfigError, "no_such_moe not supported")
    refused(copy("narrow", num_experts="eight"), mlx_flash.ConfigError, "cannot build")
    refused(folder, mlx_flash.UsageError, "names neurons", select="gate")
    refused(folder, mlx_flash.UsageError, "beyond the model's 512 tokens", max_context=513)
    stray = copy("stray")
    shutil.copy(folder / "model.safetensors", stray / "model-extra.safetensors")
    refused(stray, mlx_flash.FormatError, "model-extra.safetensors; move")
    with pytest.raises(mlx_flash.UsageError, match="mixture of experts, which are read in place"):
        resolve_model(folder)
    with pytest.raises(mlx_flash.UsageError, match="mixture of experts, which is read in place"):
        mlx_flash.convert(folder, tmp_path / "flash")


def test_experts_that_are_no_switch_layers_are_refused(tmp_path: Path) -> None:
    ffn = {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2}
    attention = {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0}
    config = {"model_type": "dbrx", "vocab_size": 300, "d_model": 64, "n_layers": 1, "n_heads": 4}
    config |= {"ffn_config": ffn, "attn_config": attention}
    path = save(make_model(config), config, tmp_path / "dbrx")
    refused(path, mlx_flash.ConfigError, "mlx-lm's 'dbrx' keeps its experts in no SwitchGLU or SwitchMLP")


def test_experts_that_mlx_lm_computes_from_the_files_are_refused(tmp_path: Path) -> None:
    """DeepSeek-V3 in FP8, as published, which mlx-lm decodes in memory."""
    config = config_of("deepseek_v3")
    weights = per_expert(dict(tree_flatten(make_model(config).parameters())), {}, "switch_mlp", "experts")
    for name in [each for each in weights if ".experts." in each]:
        weights[name] = mx.to_fp8(weights[name])
        weights[f"{name}_scale_inv"] = mx.ones((1, 1))
    path = save_shards(weights, config, tmp_path / "published")
    refused(path, mlx_flash.FormatError, "is computed from what is in the files .*mlx_lm.convert first")


def test_what_mlx_cannot_multiply_here_is_said_before_loading(tmp_path: Path) -> None:
    from mlx_flash.engine.backends.mlx.backend import available

    config = config_of("qwen3_moe")
    model = make_model(config)
    model.set_dtype(mx.bfloat16)
    path = save(model, config, tmp_path / "bf16")
    if available():
        pytest.skip("this machine's MLX multiplies experts in bfloat16")
    refused(path, mlx_flash.BackendError, "bfloat16; without a GPU")


def test_the_command_and_mlx_lm_say_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import mlx_lm

    stories = shared_path("data/models/stories260K")
    config = config_of("qwen3_moe", vocab_size=512, eos_token_id=2)
    path = save(make_model(config), config, tmp_path / "model")
    for file in stories.glob("tokenizer*"):
        shutil.copy(file, path)
    plain = mlx_lm.generate(*mlx_lm.load(str(path)), "Once upon a time", max_tokens=12)
    model, tokenizer = mlx_flash.load(path, backend="mlx", slots=0.3)
    assert mlx_lm.generate(model, tokenizer, "Once upon a time", max_tokens=12) == plain
    model.flash.close()
    options = ["--model", str(path), "--backend", "mlx", "--json", "--slots", "0.3"]
    assert main(["inspect", *options]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["selector"] == "router" and report["exact"] and report["fits"]
    assert report["bundles"] == [8, 8] and report["capacities"] == [2, 2]
    assert report["ffn_bytes"] == 2 * 8 * 3 * 64 * 32 * 4 and report["worst_bytes_per_token"] == 2 * 2 * 3 * 64 * 32 * 4
    assert main(["generate", *options, "--prompt", "Once upon a time", "--max-tokens", "12"]) == 0
    reply = json.loads(capsys.readouterr().out)
    assert reply["text"] == plain and reply["selector"] == "router" and 0 < reply["hit_rate"] < 1
    assert 0 < reply["bytes_read_per_token"] <= 1.1 * report["worst_bytes_per_token"]
    assert main(["inspect", "--model", str(path), "--backend", "mlx", "--json", "--memory", "1MB"]) == 0
    assert "use --memory" in json.loads(capsys.readouterr().out)["problem"]
    assert main(["generate", *options[:-2], "--prompt", "x", "--memory", "1MB"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["type"] == "BudgetError"
    assert main(["verify", "--model", str(path), "--json"]) == 2


def test_a_dropped_bias_of_the_choice_is_said(tmp_path: Path) -> None:
    config = config_of("ernie4_5_moe")
    weights = dict(tree_flatten(make_model(config).parameters()))
    options = mlx_flash.FlashConfig(backend="mlx")
    note = plan_experts(save_shards(weights, config, tmp_path / "without"), options).note
    assert note is not None and "'e_score_correction_bias') are not in the files" in note
    weights["model.layers.1.mlp.moe_statics.e_score_correction_bias"] = mx.zeros((1, 8))
    assert plan_experts(save_shards(weights, config, tmp_path / "with"), options).note is None
