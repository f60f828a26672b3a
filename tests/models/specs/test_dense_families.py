"""The dense table against mlx-lm: every architecture gives its tokens, whatever is resident, and others are refused."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mlx_flash
from mlx_flash.errors import BackendError, ConfigError, FormatError, UsageError
from mlx_flash.models.specs.dense_families import DENSE
from mlx_flash.models.text.sampling import Sampling
from mlx_flash.tools.calibration.calibrator import calibrate
from mlx_flash.tools.random_model import make_random

mx = pytest.importorskip("mlx.core", reason="mlx-lm alone runs these")
pytest.importorskip("mlx_lm", reason="mlx-lm alone runs these")

import mlx.nn as nn  # noqa: E402
from mlx.utils import tree_flatten, tree_map_with_path  # noqa: E402
from mlx_lm.generate import generate_step  # noqa: E402
from mlx_lm.utils import load_model  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

VOCAB = 80
_HF = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 300,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
_GPT = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "n_ctx": 64,
    "layer_norm_epsilon": 1e-5,
    "activation_function": "gelu_new",
}
_GEMMA = {"hidden_act": "gelu_pytorch_tanh"}  # what mlx-lm computes is spelt out below where it is another form
_SLIDING = ["sliding_attention", "full_attention"]
_MINISTRAL = {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 32}
EXTRA: dict[str, dict[str, Any]] = {
    "cohere2": {"sliding_window": 16, "sliding_window_pattern": 2},
    "ernie4_5": {"use_bias": False},
    "exaone": {"num_layers": 2, "layer_norm_epsilon": 1e-5},
    "exaone4": {
        "sliding_window": 16,
        "sliding_window_pattern": "LG",
        "rope_scaling": {"rope_type": "default"},
        "layer_types": _SLIDING,
    },
    "gemma": {"hidden_act": "gelu"},
    "gemma2": _GEMMA | {"query_pre_attn_scalar": 256},  # mlx-lm takes another number where there is none
    "gemma3_text": {"hidden_activation": "gelu_pytorch_tanh", "sliding_window": 16, "sliding_window_pattern": 2},
    "glm": {"partial_rotary_factor": 1.0},  # mlx-lm turns whole heads, whatever this says
    "glm4": {"partial_rotary_factor": 0.5},
    # Where mlx-lm computes another GELU than the config may name (tests/positions), the one that it computes.
    "gpt_bigcode": {"n_inner": 300, "activation_function": "gelu"},
    "gpt_neox": {
        **{"hidden_act": "gelu_new", "layer_norm_eps": 1e-5, "rotary_emb_base": 10000, "rotary_pct": 0.25},
        "intermediate_size": 128,
    },
    "gptj": {"rotary_dim": 4},
    "granite": {
        "logits_scaling": 2.0,
        "attention_multiplier": 0.3,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.7,
        "mlp_bias": False,
    },
    "helium": {"mlp_bias": False},
    "internlm2": {"bias": False},
    "minicpm": {"dim_model_base": 16, "scale_depth": 1.4, "scale_emb": 2.0},
    "ministral3": {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default", **_MINISTRAL}},
    "nanochat": {"hidden_act": "relu2"},
    "nemotron": {"hidden_act": "relu2", "norm_eps": 1e-5},
    "olmo3": {"sliding_window": 16, "layer_types": _SLIDING},
    "phi": {"hidden_act": "gelu_new", "partial_rotary_factor": 0.5},
    "plamo": {"n_shared_head": 2},
    "qwen": {"kv_channels": 8, "layer_norm_epsilon": 1e-6, "intermediate_size": 600, "no_bias": True},
    "stablelm": {"use_qkv_bias": True, "partial_rotary_factor": 0.5, "layer_norm_eps": 1e-5},
    "starcoder2": {"hidden_act": "gelu", "norm_epsilon": 1e-5},
}
GPTS = ("gpt2", "gpt_bigcode", "gptj")


def config_of(name: str) -> dict[str, Any]:
    """A tiny config, tokens 1 and 79 its ends."""
    base = {key: value for key, value in _HF.items() if key != "hidden_act" or DENSE[name].activation == "silu"}
    plain = {"model_type": name, "bos_token_id": 1, "eos_token_id": VOCAB - 1}
    config = plain | (_GPT if name in GPTS else base) | EXTRA.get(name, {})
    if name in ("gpt_neox", "qwen"):  # keys and values for every head
        del config["num_key_value_heads"]
    return config


def hugging_face_name(name: str, family: str) -> str:
    """As the original checkpoints spell what mlx-lm renames."""
    if family == "gpt_neox" and name.startswith("model.embed_out"):
        return name.removeprefix("model.")
    old, new = {
        "gpt2": ("model.", ""),
        "gptj": ("model.", "transformer."),
        "gpt_neox": ("model.h." if ".h." in name else "model.", "gpt_neox.layers." if ".h." in name else "gpt_neox."),
    }.get(family, ("", ""))
    return new + name.removeprefix(old) if name.startswith(old) else name


def make(name: str, folder: Path, dtype: str = "float32", original_names: bool = True, **changes: Any) -> Path:
    """A checkpoint of random weights, large enough that a wrong FFN changes the tokens."""
    config = config_of(name) | changes
    module = importlib.import_module(f"mlx_lm.models.{name}")
    mx.random.seed(11)
    model = module.Model(module.ModelArgs.from_dict(config))

    def scaled(path: str, weight: Any) -> Any:
        if weight.ndim < 2:
            noise = mx.random.normal(weight.shape)
            return noise * 0.5 if path.endswith("bias") else 1 + 0.2 * noise
        return mx.random.normal(weight.shape) * (
            1.0 if "emb" in path or "wte" in path else 1.7 * weight.shape[-1] ** -0.5
        )

    weights = dict(tree_flatten(tree_map_with_path(scaled, model.parameters())))
    if name == "gpt2":  # the original's linear layers are transposed
        turned = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
        weights = {key: mx.contiguous(value.T) if key.endswith(turned) else value for key, value in weights.items()}
        weights["model.h.0.attn.bias"] = mx.ones((1, 1, 64, 64))  # its mask
    rename = hugging_face_name if original_names else lambda key, family: key
    weights = {rename(key, name): value.astype(getattr(mx, dtype)) for key, value in weights.items()}
    source = folder / name
    source.mkdir(parents=True)
    mx.save_safetensors(str(source / "model.safetensors"), weights, metadata={"format": "pt"})
    (source / "config.json").write_text(json.dumps(config))
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token=f"w{VOCAB - 1}").save_pretrained(source)
    return source


PROMPTS = ([7], np.random.default_rng(4).integers(2, VOCAB - 1, 30).tolist())


@pytest.mark.parametrize("name", DENSE)
def test_tokens_are_those_of_mlx_lm(name: str, tmp_path: Path) -> None:
    source = make(name, tmp_path)
    plain, _ = load_model(source)
    wanted = [[int(t) for t, _ in generate_step(mx.array(p), plain, max_tokens=6)] for p in PROMPTS]
    path = mlx_flash.convert(source, tmp_path / "flash")
    for slots in (0, 1):
        model, _ = mlx_flash.load(path, backend="mlx", slots=slots)
        assert model.flash.plan.exact and model.flash.plan.all_resident == bool(slots)
        for prompt, tokens in zip(PROMPTS, wanted, strict=True):
            assert list(model.flash.steps(model, prompt, 6, Sampling())) == tokens
        logits = [np.array(m(mx.array([PROMPTS[1]])).astype(mx.float32)) for m in (plain, model)]
        tolerance = 3e-3 if name == "gemma" else 1e-4  # Gemma's GELU is the one by tanh, mlx-lm's is not
        assert np.abs(logits[0] - logits[1]).max() <= tolerance * np.abs(logits[0]).max()
        model.flash.close()
    with pytest.raises(BackendError, match="runs on mlx only, not on numpy"):
        mlx_flash.load(path, backend="numpy")


def loaded(path: Path, **fields: Any) -> Any:
    model, _ = mlx_flash.load(path, backend="mlx", **fields)
    return model


def test_names_as_mlx_lm_saves_them(tmp_path: Path) -> None:
    source = make("gpt_neox", tmp_path, original_names=False)
    plain, _ = load_model(source)
    model, _ = mlx_flash.load(mlx_flash.convert(source, tmp_path / "flash"), slots=0)  # auto: mlx, without a GPU too
    wanted = [int(t) for t, _ in generate_step(mx.array(PROMPTS[1]), plain, max_tokens=6)]
    assert list(model.flash.steps(model, PROMPTS[1], 6, Sampling())) == wanted
    model.flash.close()


@pytest.mark.parametrize("name", ["gemma2", "starcoder2"])
def test_sixteen_bits_and_a_lossy_selector(name: str, tmp_path: Path) -> None:
    source = make(name, tmp_path, "bfloat16")
    path = mlx_flash.convert(source, tmp_path / "flash")
    plain, _ = load_model(source)
    model = loaded(path, slots=0)
    got, wanted = (np.array(m(mx.array([PROMPTS[1]])).astype(mx.float32)) for m in (model, plain))
    assert np.abs(got - wanted).max() <= 0.05 * np.abs(wanted).max()
    model.flash.close()
    lossy = loaded(path, select="prompt:0.5")
    assert len(list(lossy.flash.steps(lossy, PROMPTS[1], 3, Sampling()))) == 3
    lossy.flash.close()


def test_another_architecture_is_refused_with_what_is_known(tmp_path: Path) -> None:
    source = make("olmo2", tmp_path)
    config = config_of("olmo2")
    for other in ("olmo", "apertus", "bitnet", "mamba", "gemma3"):
        (source / "config.json").write_text(json.dumps(config | {"model_type": other}))
        with pytest.raises(ConfigError, match=f"unknown model family '{other}'.*llama.*on mlx only.*gemma2.*olmo2"):
            mlx_flash.convert(source, tmp_path / "flash")
    with pytest.raises(ConfigError, match="OLMo 2 .* runs through mlx-lm only"):
        card = tmp_path / "card"
        card.mkdir()
        (card / "config.json").write_text(json.dumps(config))
        make_random(card, tmp_path / "random")


def test_an_activation_that_is_not_known_is_refused(tmp_path: Path) -> None:
    for name, key in (("cohere", "hidden_act"), ("gemma2", "hidden_activation"), ("gpt2", "activation_function")):
        source = make(name, tmp_path / "other", **{key: "quick_gelu"})
        with pytest.raises(ConfigError, match=f"unknown activation 'quick_gelu' \\({key}\\); known: silu, .*relu2"):
            mlx_flash.convert(source, tmp_path / "flash")


@pytest.mark.parametrize("name", ["cohere", "glm", "phi", "nemotron"])
def test_a_module_that_computes_something_else_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another release of mlx-lm might."""
    path = mlx_flash.convert(make(name, tmp_path), tmp_path / "flash")
    patches = {
        "cohere": ("cohere.swiglu", lambda gate, x: nn.gelu(gate) * x),
        "glm": ("glm.swiglu", lambda gate, x: nn.silu(x) * gate),
        "phi": ("phi.nn.gelu_approx", nn.relu),
        "nemotron": ("nemotron.relu_squared", nn.relu),
    }
    target, other = patches[name]
    monkeypatch.setattr(f"mlx_lm.models.{target}", other)
    with pytest.raises(ConfigError, match="is not the .* one that is known here"):
        loaded(path)


def test_a_module_made_of_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_lm.models import cohere

    path = mlx_flash.convert(make("cohere", tmp_path), tmp_path / "flash")
    made = cohere.MLP.__init__

    def with_norm(self: Any, dim: int, hidden_dim: int) -> None:
        made(self, dim, hidden_dim)
        self.norm = nn.RMSNorm(dim)

    monkeypatch.setattr(cohere.MLP, "__init__", with_norm)
    with pytest.raises(
        ConfigError, match=r"layer 0, from .*norm.weight \[32\].*; known is down_proj.weight \[32, 300\]"
    ):
        loaded(path)


def test_a_checkpoint_that_is_not_its_config_is_refused(tmp_path: Path) -> None:
    source = make("stablelm", tmp_path)
    whole = mx.load(str(source / "model.safetensors"))
    mx.eval(whole)
    config = json.loads((source / "config.json").read_text())

    def refused(tensors: Any, words: str, **changes: Any) -> None:
        mx.save_safetensors(str(source / "model.safetensors"), tensors, metadata={"format": "pt"})
        (source / "config.json").write_text(json.dumps({k: v for k, v in (config | changes).items() if v is not None}))
        with pytest.raises((ConfigError, FormatError), match=words):
            loaded(mlx_flash.convert(source, tmp_path / f"flash-{len(list(tmp_path.iterdir()))}"))

    mlp = "model.layers.1.mlp"
    refused({k: v for k, v in whole.items() if ".mlp." not in k}, "'model.layers.0.mlp.down_proj.weight' is not there")
    refused({k: v for k, v in whole.items() if k != f"{mlp}.up_proj.weight"}, "lacks 1 of .*layers.1.mlp.up_proj")
    refused(whole | {f"{mlp}.gate_proj.weight": mx.zeros((299, 32))}, r"gate_proj.weight is \[299, 32\]")
    refused({k: v for k, v in whole.items() if not k.startswith(mlp)}, "'num_hidden_layers' is 2.* 1 FFNs")
    refused({k: v for k, v in whole.items() if "layers.1.self_attn.q" not in k}, "layers.1.self_attn.q_proj")
    refused(whole, r"up_proj.weight \[301, 32\]", intermediate_size=301)
    refused(whole, "layer_norm_eps", layer_norm_eps=None)
    refused(whole, "'num_attention_heads', which family", num_attention_heads=None)
    refused(whole, "takes 64 items a token, config.json gives 32", head_dim=4)


def test_a_calibration_knows_no_such_activation(tmp_path: Path) -> None:
    path = mlx_flash.convert(make("phi", tmp_path), tmp_path / "flash")
    text = tmp_path / "text"
    text.write_text("w5 w6 w7 " * 200)
    with pytest.raises(UsageError, match="gelu_tanh"):
        calibrate(path, [str(text)], backend="mlx")
