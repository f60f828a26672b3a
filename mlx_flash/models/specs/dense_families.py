"""The families of dense models that mlx-lm alone runs: one table, DENSE, says where each keeps its FFN and what that
computes.

Of config.json only the keys that conversion and the budget need are read here; mlx-lm reads the rest itself. The rows
are checked against mlx-lm's modules when a model is built (models/mlx/dense_checks.py).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from mlx_flash.engine.storage.bundle import Layout
from mlx_flash.errors import ConfigError

from .families import Family
from .model_spec import LayerSpec, ModelSpec, TensorRef

Shape = tuple[int, ...]
GATED = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
FUSED = {"gate+up": "gate_up_proj", "down": "down_proj"}
ACTIVATION_KEYS = ("hidden_act", "hidden_activation", "activation_function")
SPELLINGS = {
    "silu": ("silu", "swish"),
    "gelu": ("gelu",),
    "gelu_tanh": ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_approx", "gelu_tanh"),
    "relu": ("relu",),
    "relu2": ("relu2", "relu_squared"),
}
# What config.json says of the FFNs' biases, where it says it, and of their width.
BIAS_KEYS = ("mlp_bias", "use_bias")
# By family, where they are others: InternLM2's "bias" is attention's, and these always have biases.
BIAS_KEYS_OF = {"internlm3": (*BIAS_KEYS, "bias"), "starcoder2": ("use_bias",)} | dict.fromkeys(
    ("gpt2", "gpt_bigcode", "gpt_neox", "gptj", "phi"), ()
)
WIDTH_KEYS = ("n_inner", "intermediate_size")
# Read in models/mlx/dense_corrections.py.
FITTED_NUMBERS = ("final_logit_softcapping", "attn_logit_softcapping", "head_dim", "rms_norm_eps")
FITTED_FLAGS = (
    *BIAS_KEYS,
    *("attention_bias", "qk_layernorm", "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "multi_query"),
)
# Tensors that are computed, not learned: masks and rotary tables that old checkpoints carry.
HARMLESS = ("*rotary_emb.inv_freq", "*rope.inv_freq", "*.attn.bias", "*.attn.masked_bias", "*.attention.bias",
            "*.attention.masked_bias")  # fmt: skip


@dataclass(frozen=True)
class DenseFamily(Family):
    """A row: `names` are those of the FFN's tensors within its module.

    modules: names of the module of layer {i} in checkpoints, as Hugging Face and as mlx-lm write them
    activation: that of mlx-lm's module, which also counts where config.json names none
    columns: the part whose tensor has neurons as columns
    keys: names in config.json of `heads`, `kv_heads`, `head_dim`, `context`, where they are not the usual ones
    fourfold: mlx-lm's module has four neurons per item of the width, whatever config.json says
    """

    modules: tuple[str, ...] = ("model.layers.{i}.mlp",)
    activation: str = "silu"
    columns: str = "down"
    keys: Mapping[str, str] = field(default_factory=dict)
    fourfold: bool = False


def _row(title: str, names: Mapping[str, str] = GATED, **fields: Any) -> DenseFamily:
    gated = "gate" in names or "gate+up" in names
    return DenseFamily(names, ("mlx",), "", gated, title=title, **fields)


DENSE: dict[str, DenseFamily] = {
    "cohere": _row("Cohere"),
    "cohere2": _row("Cohere 2"),
    "ernie4_5": _row("ERNIE 4.5 (dense)"),
    "exaone": _row(
        "EXAONE",
        {"gate": "c_fc_0", "up": "c_fc_1", "down": "c_proj"},
        modules=("transformer.h.{i}.mlp",),
    ),
    "exaone4": _row("EXAONE 4"),
    "gemma": _row("Gemma", activation="gelu"),
    "gemma2": _row("Gemma 2", activation="gelu_tanh"),
    "gemma3_text": _row("Gemma 3 (text)", activation="gelu_tanh"),
    "glm": _row("GLM", FUSED),
    "glm4": _row("GLM-4", FUSED),
    "gpt2": _row(
        "GPT-2",
        {"up": "c_fc", "down": "c_proj"},
        modules=("h.{i}.mlp",),
        activation="gelu_tanh",
        columns="up",
        fourfold=True,
    ),
    "gpt_bigcode": _row(
        "GPT-BigCode",
        {"up": "c_fc", "down": "c_proj"},
        modules=("transformer.h.{i}.mlp",),
        activation="gelu",
    ),
    "gpt_neox": _row(
        "GPT-NeoX",
        {"up": "dense_h_to_4h", "down": "dense_4h_to_h"},
        modules=("gpt_neox.layers.{i}.mlp", "model.h.{i}.mlp"),
        activation="gelu_tanh",
        fourfold=True,
    ),
    "gptj": _row(
        "GPT-J",
        {"up": "fc_in", "down": "fc_out"},
        modules=("transformer.h.{i}.mlp", "model.h.{i}.mlp"),
        activation="gelu_tanh",
        fourfold=True,
    ),
    "granite": _row("Granite"),
    "helium": _row("Helium"),
    "hunyuan_v1_dense": _row("Hunyuan (dense)"),
    "internlm2": _row(
        "InternLM2",
        {"gate": "w1", "up": "w3", "down": "w2"},
        modules=("model.layers.{i}.feed_forward",),
        attribute="feed_forward",
    ),
    "internlm3": _row("InternLM3"),
    "mimo": _row("MiMo"),
    "minicpm": _row("MiniCPM"),
    "ministral3": _row("Ministral 3"),
    "nanochat": _row(
        "nanochat",
        {"up": "c_fc", "down": "c_proj"},
        modules=("transformer.h.{i}.mlp",),
        activation="relu2",
    ),
    "nemotron": _row("Nemotron", {"up": "up_proj", "down": "down_proj"}, activation="relu2"),
    "olmo2": _row("OLMo 2"),
    "olmo3": _row("OLMo 3"),
    "phi": _row("Phi", {"up": "fc1", "down": "fc2"}, activation="gelu_tanh"),
    "phi3": _row("Phi-3", FUSED),
    "plamo": _row("PLaMo", modules=("model.layers.layers.{i}.mlp",)),
    "qwen": _row(
        "Qwen (first)",
        {"gate": "w2", "up": "w1", "down": "c_proj"},
        modules=("transformer.h.{i}.mlp",),
        keys={"head_dim": "kv_channels"},
    ),
    "seed_oss": _row("Seed-OSS"),
    "smollm3": _row("SmolLM3"),
    "stablelm": _row("StableLM"),
    "starcoder2": _row("StarCoder2", {"up": "c_fc", "down": "c_proj"}, activation="gelu"),
    "telechat3": _row("TeleChat3"),
}
KEYS = {
    "heads": ("num_attention_heads", "n_head"),
    "kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "context": ("max_position_embeddings", "n_positions", "n_ctx"),
}


@dataclass(frozen=True)
class DenseSpec(ModelSpec):
    """What conversion, budget and KV cache need to know of a model that mlx-lm builds from its config.

    module: pattern of the FFN modules' names in this checkpoint; resident: shapes of the tensors that stay resident
    bias_said: whether the config says if FFNs have biases
    """

    module: str = ""
    bias_said: bool = False
    resident: Mapping[str, Shape] = field(default_factory=dict)

    def name(self, role: str, layer: int = 0) -> str:
        return f"{self.module.format(i=layer)}.{self.table.names[role]}"

    def resident_shapes(self) -> dict[str, Shape]:
        return dict(self.resident)

    def ffn_sources(self, layer: int) -> dict[str, TensorRef]:
        assert isinstance(self.table, DenseFamily)
        columns, names = self.table.columns, self.table.names
        parts: dict[str, TensorRef] = {}
        if "gate+up" in names:
            fused = self.name("gate+up", layer) + ".weight"
            parts = {"gate": TensorRef(fused), "up": TensorRef(fused, self.layers[layer].intermediate)}
        order = [role for role in ("gate", "up", "down") if role in names]
        return parts | {role: TensorRef(self.name(role, layer) + ".weight", 0, role == columns) for role in order}


def read_dense(
    config: Mapping[str, Any],
    values: Any,
    shapes: Mapping[str, Shape] | None,
    eos_ids: tuple[int, ...],
    bos_id: int | None,
) -> DenseSpec:
    """The spec of a config whose family is a row of DENSE. values: the config's checked reader; shapes: of the tensors
    of a checkpoint, with those of FFNs or, where the config has a "flash" object, without.

    Raises ConfigError for an activation that mlx-lm would not run, missing FFN tensors, and keys that are no numbers.
    """
    family = str(config["model_type"])
    table = DENSE[family]
    activation = _activation(config, table)
    if shapes is None:
        raise ConfigError(f"{table.title} ({family}) runs through mlx-lm only, with the tensors of a checkpoint")
    _check_fitted(config, values)
    flash = config.get("flash")
    found = _from_flash(flash, table, shapes) if isinstance(flash, Mapping) else _from_tensors(shapes, table)
    module, dim, widths = found
    for key in ("num_hidden_layers", "n_layer", "num_layers"):
        if config.get(key) not in (None, len(widths)):
            raise ConfigError(f"config.json: {key!r} is {str(config[key])[:40]}, the checkpoint has {len(widths)} FFNs")
    resident = _resident(shapes, _ffn_names(module, table, len(widths)))
    _check_widths(config, table, dim, widths)
    said, biased = _biases(config, table, module, resident)

    def number(role: str, default: int) -> int:
        names = (table.keys[role],) if role in table.keys else KEYS[role]
        found = next((name for name in names if config.get(name) is not None), None)
        return default if found is None else int(values.need(found))

    heads = number("heads", 0)
    if not heads:
        raise ConfigError(f"config.json lacks {KEYS['heads'][0]!r}, which family {family!r} needs")
    kv_heads = number("kv_heads", _kv_heads(config, values, heads))
    return DenseSpec(
        family=family,
        dim=dim,
        vocab=values.need("vocab_size"),
        head_dim=number("head_dim", dim // heads),
        layers=tuple(LayerSpec(heads, kv_heads, width) for width in widths),
        activation=activation,
        eps=0.0,
        tied=values.flag("tie_word_embeddings", False),
        max_context=number("context", 2048),
        eos_ids=eos_ids,
        bos_id=bos_id,
        rope=None,
        qk_norm=False,
        qkv_bias=False,
        out_bias=False,
        ffn_bias=biased,
        bias_said=said,
        table=table,
        module=module,
        resident=resident,
    )


def _kv_heads(config: Mapping[str, Any], values: Any, heads: int) -> int:
    """How many heads have keys of their own where the config does not say it by its usual name."""
    if config.get("n_shared_head"):  # PLaMo: so many heads share their keys
        return -(-heads // int(values.need("n_shared_head")))
    return 1 if config["model_type"] == "gpt_bigcode" and values.flag("multi_query", True) else heads


def _resident(shapes: Mapping[str, Shape], of_ffn: Collection[str]) -> dict[str, Shape]:
    """The tensors that are neither an FFN's nor harmless."""
    return {
        name: tuple(shape)
        for name, shape in shapes.items()
        if name not in of_ffn and not any(fnmatch.fnmatchcase(name, pattern) for pattern in HARMLESS)
    }


def _check_fitted(config: Mapping[str, Any], values: Any) -> None:
    """Raise ConfigError for a value of a wrong type where mlx-lm's modules are made those of the config."""
    for key in FITTED_NUMBERS:
        if config.get(key) is not None:
            values.number(key)
    for key in FITTED_FLAGS:
        values.flag(key, False)


def _check_widths(config: Mapping[str, Any], table: DenseFamily, dim: int, widths: Collection[int]) -> None:
    """Raise ConfigError where mlx-lm does not look at the width that config.json says, and the tensors have another."""
    if not table.fourfold:
        return
    key = next((key for key in WIDTH_KEYS if config.get(key) is not None), None)
    said = 4 * dim if key is None else config[key]
    other = next((width for width in widths if width != said), None)
    if other is not None:
        what = "is missing, which means" if key is None else "is"
        raise ConfigError(
            f"config.json: {key or WIDTH_KEYS[0]!r} {what} {str(said)[:40]}, but there are FFNs of {other} neurons"
        )


def _biases(config: Mapping[str, Any], table: DenseFamily, module: str, resident: Collection[str]) -> tuple[bool, bool]:
    """Whether the config says if FFNs have biases, and whether they have: all of an FFN's matrices, or none."""
    names = list(table.names.values())
    biased = [name for name in names if f"{module.format(i=0)}.{name}.bias" in resident]
    if biased and (len(biased) < len(names) or "gate+up" in table.names):
        raise ConfigError(
            f"the FFNs of this {table.title} have biases of {', '.join(biased)}; known are those of all of "
            f"{', '.join(names)}{', each in a tensor of its own' if 'gate+up' in table.names else ''}"
        )
    keys = BIAS_KEYS_OF.get(str(config["model_type"]), BIAS_KEYS)
    said = {key: config[key] for key in keys if isinstance(config.get(key), bool)}
    for key, value in said.items():
        if value != bool(biased):
            raise ConfigError(
                f"config.json: {key!r} is {str(value).lower()}, but the FFNs of this {table.title} have "
                f"{', '.join(biased) or 'no'} biases"
            )
    return bool(said), bool(biased)


def _activation(config: Mapping[str, Any], table: DenseFamily) -> str:
    """What the config names; the FFN is not mlx-lm's, which computes one activation whatever the config says."""
    found = table.activation
    for key in ACTIVATION_KEYS:
        name = config.get(key)
        if name is None:
            continue
        known = [kind for kind, spellings in SPELLINGS.items() if name in spellings]
        if not known:
            spellings = ", ".join(each for every in SPELLINGS.values() for each in every)
            raise ConfigError(f"config.json: unknown activation {str(name)[:80]!r} ({key}); known: {spellings}")
        found = known[0]
    return found


def _ffn_names(module: str, table: DenseFamily, layers: int) -> set[str]:
    return {f"{module.format(i=i)}.{name}.weight" for i in range(layers) for name in table.names.values()}


def _from_flash(
    flash: Mapping[str, Any], table: DenseFamily, shapes: Mapping[str, Shape]
) -> tuple[str, int, list[int]]:
    """Module pattern, width and neurons per layer, as the conversion wrote them; opening a checkpoint checks them."""
    bias = f".{table.names['down']}.bias"
    module = next((m for m in table.modules if m.format(i=0) + bias in shapes), table.modules[0])
    layouts = [Layout.from_json(layer) for layer in flash["layers"]]
    return module, layouts[0].dim, [layout.count * layout.neurons for layout in layouts]


def _from_tensors(shapes: Mapping[str, Shape], table: DenseFamily) -> tuple[str, int, list[int]]:
    down = table.names["down"]
    for module in table.modules:
        name = f"{module.format(i=0)}.{down}.weight"
        if name in shapes:
            break
    else:
        raise ConfigError(f"{table.title}: the FFN tensor {name!r} is not there, so config.json says what it is not")
    widths: list[int] = []
    while (name := f"{module.format(i=len(widths))}.{down}.weight") in shapes:
        shape = shapes[name]
        if len(shape) != 2:
            raise ConfigError(f"tensor {name!r} is {list(shape)}; an FFN's has two dimensions")
        widths.append(shape[1] if table.columns == "down" else shape[0])
        dim = shape[0] if table.columns == "down" else shape[1]
    return module, dim, widths
