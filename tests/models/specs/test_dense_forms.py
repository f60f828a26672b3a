"""What a config or its tensors can say wrongly of modules that are made to fit them; right ones: the golden grid."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mlx_flash
from mlx_flash.errors import ConfigError, FormatError
from mlx_flash.models.specs.wrappers import text_names
from tests.models.specs.test_dense_families import loaded, make

mx = pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")

Change = Callable[[dict[str, Any]], None]


def changed(source: Path, change: Change, **config: Any) -> Path:
    """The folder with other tensors and keys."""
    tensors = dict(mx.load(str(source / "model.safetensors")))
    mx.eval(tensors)
    change(tensors)
    mx.save_safetensors(str(source / "model.safetensors"), tensors, metadata={"format": "pt"})
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return source


def same(tensors: dict[str, Any]) -> None:
    pass


def with_biases(*layers: int) -> Change:
    def change(tensors: dict[str, Any]) -> None:
        for layer in layers:
            name = f"model.layers.{layer}.self_attn.q_proj"
            tensors[f"{name}.bias"] = mx.ones((tensors[f"{name}.weight"].shape[0],))

    return change


def test_a_bias_is_taken_where_the_config_speaks_of_biases_and_all_layers_have_it(tmp_path: Path) -> None:
    plain = mlx_flash.convert(make("gemma", tmp_path / "plain"), tmp_path / "flash-plain")
    source = changed(make("gemma", tmp_path / "all"), with_biases(0, 1), attention_bias=True)
    models = [loaded(plain), loaded(mlx_flash.convert(source, tmp_path / "flash"))]
    logits = [model(mx.array([[3, 4, 5]])) for model in models]
    assert not mx.allclose(*logits)
    for name, layers, said in (("one", (0,), True), ("unsaid", (0, 1), False)):
        source = changed(make("gemma", tmp_path / name), with_biases(*layers), attention_bias=said)
        with pytest.raises(FormatError, match="Received . parameters not in model.*q_proj.bias"):
            loaded(mlx_flash.convert(source, tmp_path / f"flash-{name}"))


def test_a_bias_that_is_missing_is_not_left_out_unless_the_config_says_so(tmp_path: Path) -> None:
    def drop(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if ".attention." in name and name.endswith(".bias")]:
            del tensors[name]

    source = changed(make("gpt_neox", tmp_path / "silent"), drop, attention_bias=None)
    with pytest.raises(FormatError, match="Missing 4 parameters.*query_key_value.bias"):
        loaded(mlx_flash.convert(source, tmp_path / "silent-flash"))
    loaded(mlx_flash.convert(changed(source, same, attention_bias=False), tmp_path / "flash"))


@pytest.mark.parametrize(
    ("name", "config", "words"),
    [
        ("gpt2", {"n_inner": 96}, "'n_inner' is 96, but there are FFNs of 128 neurons"),
        ("gpt_neox", {"intermediate_size": None, "n_inner": None, "hidden_size": 32}, ""),
        ("gpt2", {"scale_attn_weights": "no"}, "'scale_attn_weights'.*true or false"),
        ("gemma2", {"final_logit_softcapping": "30"}, "'final_logit_softcapping'.*right type"),
        ("gemma2", {"attn_logit_softcapping": -1.0}, "'attn_logit_softcapping'.*positive"),
        ("cohere2", {"head_dim": "8"}, "'head_dim'.*right type"),
        ("starcoder2", {"use_bias": False}, "'use_bias' is false, but .* have c_fc, c_proj biases"),
        ("gpt_bigcode", {"multi_query": 1}, "'multi_query'.*true or false"),
    ],
)
def test_what_cannot_be_is_refused_before_a_conversion(
    name: str, config: dict[str, Any], words: str, tmp_path: Path
) -> None:
    source = changed(make(name, tmp_path), same, **config)
    if not words:
        mlx_flash.convert(source, tmp_path / "flash")
        return
    with pytest.raises(ConfigError, match=words):
        mlx_flash.convert(source, tmp_path / "flash")
    assert not (tmp_path / "flash").exists()


def test_a_bias_of_one_matrix_alone(tmp_path: Path) -> None:
    def change(tensors: dict[str, Any]) -> None:
        for layer in (0, 1):
            tensors[f"model.layers.{layer}.mlp.down_proj.bias"] = mx.ones((32,))

    with pytest.raises(ConfigError, match="biases of down_proj; known are those of all of gate_proj, up_proj"):
        mlx_flash.convert(changed(make("cohere", tmp_path), change), tmp_path / "flash")


def test_nanochat_under_the_names_of_transformers() -> None:
    names = ["model.layers.3.self_attn.o_proj.weight", "model.layers.3.mlp.fc2.weight", "model.embed_tokens.weight"]
    inner = ["transformer.h.3.attn.c_proj.weight", "transformer.h.3.mlp.c_proj.weight", "transformer.wte.weight"]
    found = text_names({"model_type": "nanochat"}, [*names, "lm_head.weight"])
    assert found == dict(zip(inner, names, strict=True)) | {"lm_head.weight": "lm_head.weight"}
    assert text_names({"model_type": "nanochat"}, inner) == {name: name for name in inner}


def test_the_number_in_nanochats_norms_is_changed_in_a_copy(tmp_path: Path) -> None:
    from mlx_lm.models import nanochat

    before = nanochat.rms_norm
    source = changed(make("nanochat", tmp_path), same, rms_norm_eps=0.5)
    other, usual = (
        loaded(mlx_flash.convert(each, tmp_path / f"flash-{i}"))(mx.array([[3, 4]]))
        for i, each in enumerate((source, make("nanochat", tmp_path / "usual")))
    )
    assert nanochat.rms_norm is before and not mx.allclose(other, usual)
