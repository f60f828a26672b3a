"""Corrections of mlx-lm's mixtures of experts: what transformers' models of the same name compute and mlx-lm's do not.

`fit_mixture_modules` changes a model before it gets its weights, `fit_mixture_weights` what its `sanitize` returns, and
`fit_arithmetic` the loaded model. Needs mlx-lm.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_flash.errors import ConfigError
from mlx_flash.models.specs.attention_windows import text_config
from mlx_flash.models.specs.config_values import ConfigValues
from mlx_flash.models.specs.key_spellings import NESTED_TYPES, SAME_AS

QKV, OUT = ("q_proj", "k_proj", "v_proj"), ("o_proj",)
# Family -> the key that says whether attention has biases, what its absence means, and which products have them, where
# mlx-lm's modules always or never do.
ATTENTION_BIASES: Mapping[str, tuple[str, bool, tuple[str, ...]]] = {
    "dots1": ("attention_bias", False, QKV + OUT),
    "mellum": ("attention_bias", False, QKV + OUT),
    "qwen2_moe": ("qkv_bias", True, QKV),
    "qwen3_moe": ("attention_bias", False, QKV + OUT),
}
HALVES = ("deepseek_v3", "glm4_moe_lite")  # read "rope_interleave"
EXPERT = re.compile(r"(.+)\.experts\.(\d+)\.(gate_proj|up_proj|down_proj)\.(weight|scales|biases|bias)")
CORRECTION = ".mlp.moe_statics.e_score_correction_bias"  # ERNIE 4.5's


def fit_mixture_modules(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Give a model that has no weights yet the modules that a normalised config asks for. Raises ConfigError."""
    values, family = ConfigValues(text_config(config)), _family(config)
    if family in ATTENTION_BIASES:
        key, usual, names = ATTENTION_BIASES[family]
        for attention in _attentions(model):
            for name in names:
                _set_bias(attention[name], values.flag(key, usual))
    if family == "mixtral":
        _set_head_dim(model, values)
    if family == "qwen2_moe":
        _put_dense_layers(model, values)
    if family in HALVES and not values.flag("rope_interleave", True):
        for attention in _attentions(model):
            attention.rope.traditional = False
    if family == "gpt_oss":
        alpha, limit = values.number("swiglu_alpha", 1.702), values.number("swiglu_limit", 7.0)
        for layer in model.layers:
            layer.mlp.experts.activation = type(layer.mlp.experts.activation)(alpha, limit)


def fit_mixture_weights(
    model: nn.Module, config: Mapping[str, Any], weights: dict[str, mx.array]
) -> dict[str, mx.array]:
    """Weights as mlx-lm's `sanitize` returned them, as the model's modules take them; the modules of some families
    follow what is there."""
    family, found = str(config.get("model_type")), dict(weights)
    modules = dict(model.named_modules())
    if family == "phimoe":  # of which mlx-lm's own files have biases and a config that denies them
        for path, module in modules.items():
            if type(module) is nn.Linear and path.endswith((*QKV, *OUT, "lm_head")) and path + ".weight" in found:
                _set_bias(module, path + ".bias" in found)
    if family == "ernie4_5_moe" and "lm_head" in modules:
        _set_bias(modules["lm_head"], "lm_head.bias" in found)
    _stack_experts(modules, found)
    if family == "ernie4_5_moe":
        for path, module in modules.items():
            for name in ("gate_proj", "up_proj", "down_proj") if path.endswith(".switch_mlp") else ():
                if "bias" in module[name] and f"{path}.{name}.bias" not in found:
                    del module[name]["bias"]  # those of transformers 5 have none, whatever "use_bias" is
    return found


def kept_weights(config: Mapping[str, Any], weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """The weights without those that are never used."""
    if config.get("model_type") not in ("longcat_flash", "longcat_flash_ngram"):
        return dict(weights)
    count = ConfigValues(config).need("n_routed_experts")
    numbers = {name: EXPERT.fullmatch(name) for name in weights}  # transformers saves halves of experts that do nothing
    return {name: weights[name] for name, found in numbers.items() if found is None or int(found[2]) < count}


def add_correction(model: nn.Module, weights: Mapping[str, mx.array], found: dict[str, mx.array]) -> None:
    """The bias of ERNIE 4.5's choice of experts, which mlx-lm drops: `weights` are those before, `found` after."""
    for name, array in weights.items():
        if not name.endswith(CORRECTION):
            continue
        block: Any = dict(model.named_modules()).get(name.removesuffix(CORRECTION) + ".mlp")
        if block is not None and "switch_mlp" in block:
            block.moe_statics = nn.Module()
            block.moe_statics.e_score_correction_bias = mx.zeros(array.shape, array.dtype)
            found[name] = array


def note_of(config: Mapping[str, Any], names: Collection[str]) -> str | None:
    """A note for the user if tensors are missing that mlx_lm.convert drops; else None."""
    if config.get("model_type") != "ernie4_5_moe" or any(name.endswith(CORRECTION) for name in names):
        return None
    return (
        "the tensors of the bias by which ERNIE 4.5 chooses experts ('e_score_correction_bias') are not in the files, "
        "as mlx_lm.convert drops them; experts are chosen without it: if the original checkpoint has it, use that one"
    )


def fit_arithmetic(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Change the modules of a loaded model to compute what a normalised config asks for. Raises ConfigError."""
    values, family = ConfigValues(config), str(config.get("model_type"))
    if family == "olmoe" and values.get("clip_qkv") is not None:
        limit = values.number("clip_qkv")
        for attention in _attentions(model):
            for name in ("q_norm", "k_norm", "v_proj"):
                _set_class(attention[name], lambda called, x: mx.clip(called(x), -limit, limit))
    for _, module in model.named_modules():
        if type(module).__module__.startswith("mlx_lm.") and "switch_mlp" in module:
            if family == "qwen2_moe" and values.flag("norm_topk_prob", False):
                module.__class__ = _with_call(type(module), _qwen2_normalised)
            elif family == "jamba":
                module.__class__ = _with_call(type(module), _jamba)
            elif family == "ernie4_5_moe" and "moe_statics" in module:
                module.__class__ = _with_call(type(module), _ernie)


def _family(config: Mapping[str, Any]) -> str:
    """The type of a config's text model, by the name that its code has here."""
    kind = str(text_config(config).get("model_type") or NESTED_TYPES.get(str(config.get("model_type"))))
    return SAME_AS.get(kind, kind)


def _attentions(model: nn.Module) -> Iterator[Any]:
    for layer in model.layers:
        yield layer.self_attn


def _set_bias(linear: Any, wanted: bool) -> None:
    if wanted and "bias" not in linear:
        linear.bias = mx.zeros((linear.weight.shape[0],))
    if not wanted and "bias" in linear:
        del linear["bias"]


def _set_head_dim(model: nn.Module, values: ConfigValues) -> None:
    """Mixtral's heads of another width than an even share of the model's."""
    dim, heads = values.need("hidden_size"), values.need("num_attention_heads")
    size, groups = values.positive("head_dim", dim // heads), values.positive("num_key_value_heads", heads)
    if size == dim // heads:
        return
    for attention in _attentions(model):
        attention.head_dim, attention.scale = size, size**-0.5
        attention.q_proj = nn.Linear(dim, heads * size, bias=False)
        attention.k_proj, attention.v_proj = (nn.Linear(dim, groups * size, bias=False) for _ in range(2))
        attention.o_proj = nn.Linear(heads * size, dim, bias=False)
        attention.rope = nn.RoPE(size, base=attention.rope.base)


def _put_dense_layers(model: nn.Module, values: ConfigValues) -> None:
    """Qwen2-MoE's layers with an FFN of their own."""
    step, dense = values.positive("decoder_sparse_step", 1), values.get("mlp_only_layers", [])
    if not isinstance(dense, list) or any(type(i) is not int for i in dense):
        raise ConfigError(f"config.json: 'mlp_only_layers' is {str(dense)[:80]}, which is not a list of layers")
    for index, layer in enumerate(model.layers):
        if index in dense or (index + 1) % step:
            layer.mlp = type(layer.mlp.shared_expert)(values.need("hidden_size"), values.need("intermediate_size"))


def _stack_experts(modules: Mapping[str, nn.Module], weights: dict[str, mx.array]) -> None:
    """Experts that mlx-lm has left one by one, because it looks for them in the first layer only."""
    single: dict[str, dict[int, str]] = {}
    for name in weights:
        if found := EXPERT.fullmatch(name):
            block, number, projection, kind = found.groups()
            if f"{block}.switch_mlp" in modules:
                single.setdefault(f"{block}.switch_mlp.{projection}.{kind}", {})[int(number)] = name
    for stacked, names in single.items():
        if sorted(names) == list(range(len(names))):
            weights[stacked] = mx.stack([weights.pop(names[number]) for number in range(len(names))])


def _with_call(module: type, call: Callable[[Any, mx.array], mx.array]) -> type:
    """The module's class with another `__call__`; weights and names stay as they are."""
    return type(module.__name__, (module,), {"__call__": call})


def _set_class(module: nn.Module, after: Callable[[Callable[[mx.array], mx.array], mx.array], mx.array]) -> None:
    usual: Any = type(module)
    module.__class__ = _with_call(usual, lambda self, x: after(lambda y: usual.__call__(self, y), x))


def _chosen(scores: mx.array, k: int) -> mx.array:
    return mx.stop_gradient(mx.argpartition(-scores, kth=k - 1, axis=-1)[..., :k])


def _qwen2_normalised(self: Any, x: mx.array) -> mx.array:
    """The weights of those chosen add up to 1."""
    scores = mx.softmax(self.gate(x), axis=-1, precise=True)
    chosen = _chosen(scores, self.top_k)
    weights = mx.take_along_axis(scores, chosen, axis=-1)
    weights = weights / weights.sum(axis=-1, keepdims=True)
    y: mx.array = (self.switch_mlp(x, chosen) * weights[..., None]).sum(axis=-2)
    return y + mx.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)


def _jamba(self: Any, x: mx.array) -> mx.array:
    """The weights of those chosen are their share of all."""
    scores = mx.softmax(self.router(x), axis=-1, precise=True)
    chosen = _chosen(scores, self.num_experts_per_tok)
    weights = mx.take_along_axis(scores, chosen, axis=-1)
    return (self.switch_mlp(x, chosen) * weights[..., None]).sum(axis=-2)


def _ernie(self: Any, x: mx.array) -> mx.array:
    """A bias takes part in the choice, not in the weights."""
    scores = self.gate_act(self.gate(x).astype(mx.float32))
    chosen = _chosen(scores + self.moe_statics.e_score_correction_bias.reshape(-1), self.k)
    weights = mx.take_along_axis(scores, chosen, axis=-1)
    weights = weights / mx.maximum(weights.sum(axis=-1, keepdims=True), 1e-12)
    y = self.switch_mlp(x, chosen)
    y = (y * weights[..., None]).sum(axis=-2).astype(y.dtype)
    return y if self.shared_experts is None else y + self.shared_experts(x)
