"""Mixtures of experts: which configs are such, and one table, MIXTURES, of those that our own decoder runs.

Reads configs only: neither files nor weights. mlx-lm runs many more, which need no row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlx_flash.engine.storage.bundle import BITS
from mlx_flash.errors import ConfigError

from .config_normal_form import normalise
from .config_reader import spec_of
from .config_values import ConfigValues
from .families import FAMILIES, Family
from .model_spec import ModelSpec

# Where the architectures that mlx-lm knows say how many experts there are; a list has a number per layer.
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
NESTED = ("text_config", "ffn_config")


@dataclass(frozen=True)
class MixtureFamily(Family):
    """A row of the table of mixtures.

    names: as of a dense family, and "router"
    stacked: the tensor of a {part} of all experts, as mlx-lm has it
    single: that of one expert {e}, as Hugging Face has it, where the parts are spelled as in `parts`
    experts_key, width_key: keys of the config: how many experts there are, and how many neurons one has
    wide_norms: queries and keys are normalised over all heads at once
    """

    stacked: str = ""
    single: str = ""
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")  # of `single`: gate, up, down
    experts_key: str = "num_experts"
    width_key: str = "moe_intermediate_size"
    wide_norms: bool = False


_MLP = "model.layers.{i}.mlp."
_MOE = "model.layers.{i}.block_sparse_moe."
_NUMPY = ("mlx", "numpy")

MIXTURES: dict[str, MixtureFamily] = {
    "mixtral": MixtureFamily(
        dict(FAMILIES["mistral"].names) | {"router": _MOE + "gate"},
        _NUMPY,
        "hidden_act",
        title="Mixtral",
        stacked=_MOE + "switch_mlp.{part}.weight",
        single=_MOE + "experts.{e}.{part}.weight",
        parts=("w1", "w3", "w2"),
        experts_key="num_local_experts",
        width_key="intermediate_size",
    ),
    "qwen3_moe": MixtureFamily(
        dict(FAMILIES["qwen3"].names) | {"router": _MLP + "gate"},
        _NUMPY,
        "hidden_act",
        title="Qwen3-MoE",
        stacked=_MLP + "switch_mlp.{part}.weight",
        single=_MLP + "experts.{e}.{part}.weight",
    ),
    "olmoe": MixtureFamily(
        dict(FAMILIES["qwen3"].names) | {"router": _MLP + "gate"},
        _NUMPY,
        "hidden_act",
        title="OLMoE",
        stacked=_MLP + "switch_mlp.{part}.weight",
        single=_MLP + "experts.{e}.{part}.weight",
        width_key="intermediate_size",
        wide_norms=True,
    ),
}


def is_mixture(config: Mapping[str, Any]) -> bool:
    """Whether a Hugging Face config is that of a mixture of experts."""
    if config.get("model_type") in FAMILIES:
        return False
    places = [config, *(config[key] for key in NESTED if isinstance(config.get(key), Mapping))]
    return any(_several(place.get(key)) for place in places for key in COUNTS)


def _several(value: Any) -> bool:
    return any(map(_several, value)) if isinstance(value, list) else type(value) is int and value > 1


def mixture_backends(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The backends that run this mixture of experts."""
    ours = config.get("model_type") in MIXTURES and _is_affine(config) and not config.get("rope_traditional")
    return _NUMPY if ours else ("mlx",)


def _is_affine(config: Mapping[str, Any]) -> bool:
    """Whether a config's weights are plain numbers or MLX's affine codes of 4 or 8 bits."""
    if not config.get("quantization"):
        return not config.get("quantization_config")
    value = config["quantization"]
    if not isinstance(value, Mapping):
        return False
    each = [value, *(other for other in value.values() if isinstance(other, Mapping))]
    return all(one.get("mode", "affine") == "affine" and one.get("bits", 4) in BITS for one in each)


@dataclass(frozen=True)
class MixtureSpec(ModelSpec):
    """A mixture of experts. experts: per layer how many there are, 0 for a layer with an FFN of its own.

    width: an expert's neurons. top_k: experts per token. normalise: whether the weights of those chosen add up to 1.
    """

    experts: tuple[int, ...]
    width: int
    top_k: int
    normalise: bool

    @property
    def mixture(self) -> MixtureFamily:
        assert isinstance(self.table, MixtureFamily)
        return self.table

    @property
    def sparse(self) -> list[int]:
        """The layers that have experts."""
        return [i for i, count in enumerate(self.experts) if count]

    def part_shapes(self) -> dict[str, tuple[int, int]]:
        """An expert's parts."""
        return {"gate": (self.width, self.dim), "up": (self.width, self.dim), "down": (self.dim, self.width)}

    def stacked_name(self, layer: int, part: str) -> str:
        """The tensor of all experts of a layer, as mlx-lm has it."""
        return self.mixture.stacked.format(i=layer, part=f"{part}_proj")

    def single_name(self, layer: int, part: str, expert: int) -> str:
        """One expert's tensor, as Hugging Face has it."""
        spelt = dict(zip(("gate", "up", "down"), self.mixture.parts, strict=True))
        return self.mixture.single.format(i=layer, e=expert, part=spelt[part])

    def ffn_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of the experts' tensors, stacked."""
        shapes = self.part_shapes().items()
        return {self.stacked_name(i, part): (self.experts[i], *shape) for i in self.sparse for part, shape in shapes}

    def resident_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that stays resident: all but the experts."""
        shapes = super().resident_shapes()
        for i, layer in enumerate(self.layers):
            if self.mixture.wide_norms:
                shapes[self.name("q_norm", i) + ".weight"] = (layer.heads * self.head_dim,)
                shapes[self.name("k_norm", i) + ".weight"] = (layer.kv_heads * self.head_dim,)
            if self.experts[i]:
                shapes[self.name("router", i) + ".weight"] = (self.experts[i], self.dim)
                continue
            for role in ("gate", "up"):
                shapes[self.name(role, i) + ".weight"] = (layer.intermediate, self.dim)
            shapes[self.name("down", i) + ".weight"] = (self.dim, layer.intermediate)
        return shapes


def read_mixture(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]] | None = None) -> MixtureSpec:
    """The spec of a mixture's Hugging Face config; shapes: as in `read_spec`. Raises ConfigError."""
    config = {"hidden_act": "silu"} | normalise(config)
    family, values = config["model_type"], ConfigValues(config)
    if family not in MIXTURES:
        known = ", ".join(sorted(MIXTURES))
        raise ConfigError(f"the mixture of experts {str(family)[:80]!r} has no decoder of ours; known: {known}")
    table = MIXTURES[family]
    spec = spec_of(values, family, table, shapes)
    count, top_k, width = (
        values.need(table.experts_key),
        values.need("num_experts_per_tok"),
        values.need(table.width_key),
    )
    if top_k > count:
        raise ConfigError(f"config.json: a token uses {top_k} experts ('num_experts_per_tok') of {count}")
    clip = None
    if config.get("clip_qkv") is not None:
        if family != "olmoe":
            raise ConfigError(f"config.json: 'clip_qkv' is {str(config['clip_qkv'])[:40]}; only null is known")
        clip = values.number("clip_qkv")
    experts = [count] * len(spec.layers)
    if spec.family == "qwen3_moe":
        step, dense = values.positive("decoder_sparse_step", 1), values.get("mlp_only_layers", [])
        if not isinstance(dense, list) or any(type(i) is not int for i in dense):
            raise ConfigError(f"config.json: 'mlp_only_layers' is {str(dense)[:80]}, which is not a list of layers")
        experts = [0 if i in dense or (i + 1) % step else count for i in range(len(experts))]
    if spec.activation != "silu":
        raise ConfigError(f"config.json: 'hidden_act' is {spec.activation}; experts are known with silu only")
    if spec.ffn_bias:
        raise ConfigError("config.json: 'mlp_bias' is true, which is not known of experts")
    if not any(experts):
        raise ConfigError("config.json: by 'decoder_sparse_step' and 'mlp_only_layers' no layer has experts")
    adds_to_one = spec.family == "mixtral" or values.flag("norm_topk_prob", False)
    fields = vars(spec) | {"clip": clip}
    return MixtureSpec(**fields, experts=tuple(experts), width=width, top_k=top_k, normalise=adds_to_one)
