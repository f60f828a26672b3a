"""The normal form of config.json: keys at the top level, under the names that mlx-lm and this package read.

transformers 5 writes some keys elsewhere or under other names than earlier releases (RoPE's base inside
"rope_parameters", for one). A missing key gets the default of transformers' class. Reads and changes no files.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from mlx_flash.errors import ConfigError

from .attention_windows import RULES
from .config_values import short
from .key_spellings import (
    DEFAULTS,
    FULL_ATTENTION_KEYS,
    NEED_FIRST_SPARSE,
    NEED_HEAD_DIM,
    NESTED_TYPES,
    PERIODS,
    READ_PARAMETERS,
    READ_PER_LAYER_TYPE,
    RENAMES,
    SAME_AS,
    SLIDING_BASE,
)
from .wrappers import unwrap

LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention", "linear_attention")
# Positions of text count alike on all three axes, so that "mrope" is plain RoPE for it.
ROPE_SYNONYMS = {"su": "longrope", "mrope": "default"}
SCALED_FROM_LENGTH = ("llama3", "yarn", "longrope")
Values = dict[str, Any]


def normalise(config: Mapping[str, Any]) -> Values:
    """The config in its normal form: `rope_theta`, `rope_scaling` (None, or an object with both `rope_type`
    and `type`), `partial_rotary_factor` and every renamed key at the top level; RoPE that differs by layer type stays
    under `rope_parameters` besides. A vision-language model that is run as text becomes its text model.

    Applied twice it changes nothing more. Keys that are not understood stay as they are. Raises ConfigError where two
    keys contradict each other, or where layers differ in a way that no backend can be told.
    """
    values = unwrap(deepcopy(dict(config)))
    nested = values.get("text_config")
    if isinstance(nested, dict):
        kind = nested.get("model_type") or NESTED_TYPES.get(str(values.get("model_type")))
        # The whole model's word about its head is what transformers goes by.
        if str(values.get("model_type")) in NESTED_TYPES and values.get("tie_word_embeddings") is not None:
            nested["tie_word_embeddings"] = values["tie_word_embeddings"]
        values["text_config"] = _place(nested, str(kind))
    return _place(values, str(values.get("model_type")))


def _place(values: Values, kind: str) -> Values:
    """One object of the config, of a model type."""
    kind = SAME_AS.get(kind, kind)
    defaults = DEFAULTS.get(kind, {})
    if values.get("max_position_embeddings") is None and "max_position_embeddings" in defaults:
        values["max_position_embeddings"] = defaults["max_position_embeddings"]  # from which RoPE may be scaled
    _rope(values, kind)
    # What another name says is no missing key: the renamed ones come first, and those of defaults after them.
    for _ in range(2):
        for source, target in RENAMES.get(kind, ()):
            _copy(values, source, target)
            if kind == "gpt_neox":  # older files have mlx-lm's spelling only
                _copy(values, target, source)
        for key, default in defaults.items():
            if values.get(key) is None:
                values[key] = default
    if kind == "gemma" and values.get("hidden_act") in (None, "gelu"):  # by which the first releases meant the other
        values["hidden_act"] = "gelu_pytorch_tanh"
    if kind == "gpt_bigcode" and values.get("n_inner") is None and type(values.get("n_embd")) is int:
        values["n_inner"] = 4 * values["n_embd"]
    _head_dim(values, kind)
    _period(values, kind)
    _pattern(values, kind)
    _sparse_layers(values, kind)
    if kind == "gemma4_text":
        _full_attention_layers(values)
    if kind == "granitemoehybrid":
        _granite_hybrid(values)
    if kind == "mimo_v2_flash":
        _mimo(values)
    _parameters(values, kind)
    return values


def _copy(values: Values, source: str, target: str) -> None:
    value, there = values.get(source), values.get(target)
    if value is None:
        return
    if there is not None and there != value:
        raise _contradiction(source, value, target, there)
    values[target] = value


def _contradiction(first: str, value: Any, second: str, other: Any) -> ConfigError:
    return ConfigError(
        f"config.json: {first!r} is {short(value)}, but {second!r} is {short(other)}; they mean the same, so one of "
        "them is wrong"
    )


def _object(values: Values, key: str) -> Values:
    value = values.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"config.json: {key!r} is {short(value)}, which is not an object")
    return value


def _per_layer_type(parameters: Values) -> dict[str, Values]:
    return {key: value for key, value in parameters.items() if key in LAYER_TYPES and isinstance(value, dict)}


def _rope(values: Values, kind: str) -> None:
    """Move `rope_theta`, `rope_scaling` and `partial_rotary_factor` to the top level."""
    parameters = _object(values, "rope_parameters")
    nested = _per_layer_type(parameters)
    if kind in READ_PER_LAYER_TYPE and nested:
        return
    if nested:
        parameters = _of_layer_types(values, kind, nested)
    where = "rope_parameters" + (".full_attention" if nested else "")
    scaling = _object(values, "rope_scaling")
    for place, found in ((where, parameters), ("rope_scaling", scaling)):
        for key in ("rope_theta", "partial_rotary_factor"):
            said, value = values.get(key), found.get(key)
            if value is None:
                continue
            if said is not None and said != value:
                raise _contradiction(key, said, f"{place}.{key}", value)
            values[key] = value
    _check_same(where, parameters, scaling)
    if parameters or "rope_scaling" in values:
        values["rope_scaling"] = _scaling(scaling or parameters, values)


def rope_type(scaling: Mapping[str, Any]) -> str:
    """The kind of RoPE that an object names, in one spelling."""
    said = [scaling[key] for key in ("rope_type", "type") if scaling.get(key) is not None]
    names = [ROPE_SYNONYMS.get(name, name) if isinstance(name, str) else name for name in said]
    if len(names) > 1 and names[0] != names[1]:
        raise _contradiction("rope_type", said[0], "type", said[1])
    name = names[0] if names else "default"
    if not isinstance(name, str):
        raise ConfigError(f"config.json: the RoPE type is {short(name)}, which is not a name")
    return name


def _check_same(where: str, parameters: Values, scaling: Values) -> None:
    """Raise ConfigError where a file has both objects, and they differ."""
    if not parameters or not scaling:
        return
    one, other = rope_type(parameters), rope_type(scaling)
    if one != other:
        raise _contradiction("rope_scaling.rope_type", other, f"{where}.rope_type", one)
    for key in parameters.keys() & scaling.keys() - {"rope_type", "type"}:
        if parameters[key] != scaling[key]:
            raise _contradiction(f"rope_scaling.{key}", scaling[key], f"{where}.{key}", parameters[key])


def _scaling(found: Values, values: Values) -> Values | None:
    """A RoPE object as `rope_scaling`; None for plain RoPE."""
    name = rope_type(found)
    if name == "default":
        return None
    left = {key: value for key, value in found.items() if key not in ("rope_theta", "partial_rotary_factor")}
    scaling = left | {"rope_type": name, "type": name}
    if name in SCALED_FROM_LENGTH and scaling.get("original_max_position_embeddings") is None:
        length = values.get("original_max_position_embeddings") or values.get("max_position_embeddings")
        if length is not None:
            scaling["original_max_position_embeddings"] = length
    return scaling


def _of_layer_types(values: Values, kind: str, nested: dict[str, Values]) -> Values:
    """The one RoPE object of layers of several types; a second base goes to the key that mlx-lm has for it."""
    full = nested.get("full_attention", next(iter(nested.values())))
    others = {name: each for name, each in nested.items() if each is not full}
    for name, each in others.items():
        if kind in SLIDING_BASE and name == "sliding_attention":
            _sliding(values, kind, full, each)
        elif _one_spelling(each) != _one_spelling(full):
            raise ConfigError(
                f"config.json: 'rope_parameters' of {name} is {short(each)}, of full_attention {short(full)}; a "
                f"model of type {kind[:40]!r} is run with one RoPE for all layers"
            )
    return full


def _one_spelling(parameters: Values) -> Values:
    return {key: value for key, value in parameters.items() if key not in ("type", "rope_type")} | {
        "rope_type": rope_type(parameters)
    }


def _sliding(values: Values, kind: str, full: Values, sliding: Values) -> None:
    """The RoPE of sliding layers, which mlx-lm never scales."""
    what = "rope_parameters.sliding_attention"
    if rope_type(sliding) != "default":
        raise ConfigError(
            f"config.json: {what}.rope_type is {short(rope_type(sliding))}; sliding layers run with plain RoPE only"
        )
    for key in ("rope_theta", "partial_rotary_factor"):
        base_key = SLIDING_BASE[kind] if key == "rope_theta" else None
        value = sliding.get(key)
        if base_key is None and key == "rope_theta":
            continue  # read from where it is
        if base_key is None:
            if value is not None and full.get(key) is not None and value != full[key]:
                raise _contradiction(f"{what}.{key}", value, f"rope_parameters.full_attention.{key}", full[key])
            continue
        said = values.get(base_key)
        if value is not None and said is not None and said != value:
            raise _contradiction(base_key, said, f"{what}.{key}", value)
        if value is not None:
            values[base_key] = value


def _parameters(values: Values, kind: str) -> None:
    """`rope_parameters` for architectures of mlx-lm that read nothing else."""
    if kind not in READ_PARAMETERS or values.get("rope_theta") is None:
        return
    parameters = _object(values, "rope_parameters")
    if not _per_layer_type(parameters):
        values.setdefault("rope_scaling", None)
        kept = {key: values[key] for key in ("rope_theta", "partial_rotary_factor") if values.get(key) is not None}
        values["rope_parameters"] = {"rope_type": "default"} | (values.get("rope_scaling") or {}) | parameters | kept


def _head_dim(values: Values, kind: str) -> None:
    width, heads = values.get("hidden_size"), values.get("num_attention_heads")
    countable = type(width) is int and type(heads) is int and heads > 0
    if kind in NEED_HEAD_DIM and values.get("head_dim") is None and countable:
        values["head_dim"] = width // heads  # type: ignore[operator]
    if kind == "minimax_m2" and values.get("rotary_dim") is None:
        dim = values.get("head_dim") or (width // heads if countable else None)  # type: ignore[operator]
        if type(dim) is int:
            values["rotary_dim"] = int(dim * (values.get("partial_rotary_factor") or 1.0))


def _layer_types(values: Values) -> list[Any] | None:
    types = values.get("layer_types")
    return types if isinstance(types, list) and types else None


def _period(values: Values, kind: str) -> None:
    """The period of the layers of the other type, from the list of types."""
    types = _layer_types(values)
    if kind not in PERIODS:
        return
    key, other, default = PERIODS[kind]
    said = values.get(key)
    stated = said if said is not None else values.get(f"_{key}")
    if types is None:
        if said is None and type(stated) is int:
            values[key] = stated
        return
    wanted = [name == other for name in types]

    def fits(period: Any) -> bool:
        return type(period) is int and period > 0 and wanted == _every(period, len(wanted))

    if said is not None and not fits(said) and kind not in RULES:
        raise _contradiction(key, said, "layer_types", types)
    known = [stated, default, *range(1, len(wanted) + 2)]
    found = next((period for period in known if fits(period)), None)
    if found is not None:
        values[key] = found
    elif kind not in RULES:  # those of the others are set layer by layer, by the list
        raise ConfigError(
            f"config.json: 'layer_types' {short(types)} does not repeat; {kind} runs with {other} in every n-th layer"
        )


def _every(period: int, count: int) -> list[bool]:
    return [(i + 1) % period == 0 for i in range(count)]


def _pattern(values: Values, kind: str) -> None:
    """EXAONE 4's pattern of local and global layers, a letter each."""
    if kind != "exaone4":
        return
    types, said = _layer_types(values), values.get("sliding_window_pattern")
    if isinstance(said, int):
        said = "L" * (said - 1) + "G"
    count = values.get("num_hidden_layers")
    if types is not None:
        letters = "".join("L" if name == "sliding_attention" else "G" for name in types)
        if isinstance(said, str) and said and not _repeats(said, letters):
            said = letters
        values["sliding_window_pattern"] = said or letters
        if values.get("sliding_window") is None and set(letters) == {"G"}:
            values["sliding_window"] = None
    elif said is not None and type(count) is int:
        values["sliding_window_pattern"] = said
    values.setdefault("sliding_window", None)
    values.setdefault("sliding_window_pattern", None)


def _repeats(pattern: str, letters: str) -> bool:
    return all(pattern[i % len(pattern)] == letter for i, letter in enumerate(letters))


def _sparse_layers(values: Values, kind: str) -> None:
    """Which layers have experts, from the list of kinds of FFN."""
    types = values.get("mlp_layer_types")
    if not isinstance(types, list):
        return
    sparse = [name == "sparse" for name in types]
    if kind == "exaone_moe":
        _agree(values, "is_moe_layer", sparse)
    if kind in NEED_FIRST_SPARSE:
        first = sparse.index(True) if True in sparse else len(sparse)
        if not all(sparse[first:]):
            raise ConfigError(
                f"config.json: 'mlp_layer_types' {short(types)} has dense layers after sparse ones; {kind} runs "
                "with the first layers dense and all others sparse"
            )
        values["first_k_dense_replace"] = first  # transformers writes a number of its class's beside the list


def _granite_hybrid(values: Values) -> None:
    """mlx-lm's names of its two kinds of layers, and numbers that JSON has no spelling for."""
    types, limit = _layer_types(values), values.get("time_step_limit")
    if types is not None:
        names = {"full_attention": "attention", "linear_attention": "mamba"}
        values["layer_types"] = [names.get(name, name) if isinstance(name, str) else name for name in types]
    if isinstance(limit, list):
        values["time_step_limit"] = [
            float(each["__float__"]) if isinstance(each, dict) and each.get("__float__") == "Infinity" else each
            for each in limit
        ]


def _mimo(values: Values) -> None:
    """What mlx-lm reads of MiMo-V2-Flash, from the keys of transformers 5, which has these numbers in its code."""
    types, sparse = _layer_types(values), values.get("mlp_layer_types")
    if types is None or values.get("hybrid_layer_pattern") is not None:
        return
    values["hybrid_layer_pattern"] = [int(name == "sliding_attention") for name in types]
    if isinstance(sparse, list):
        values["moe_layer_freq"] = [int(name == "sparse") for name in sparse]
    window, groups = values.get("sliding_window"), values.get("num_key_value_heads")
    derived: Values = {
        "sliding_window_size": window - 1 if type(window) is int else None,
        "swa_num_attention_heads": values.get("num_attention_heads"),
        "swa_num_key_value_heads": 2 * groups if type(groups) is int else None,
        "swa_head_dim": values.get("head_dim"),
        "swa_v_head_dim": values.get("v_head_dim"),
    } | {"add_swa_attention_sink_bias": True, "add_full_attention_sink_bias": False}
    derived |= {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "partial_rotary_factor": 0.334}
    for key, value in derived.items():
        if values.get(key) is None:
            values[key] = value
    values["n_shared_experts"] = None  # written, and no part of the model


def _full_attention_layers(values: Values) -> None:
    """Gemma 4's keys of layers with full attention, from an object per such layer."""
    layers, types = _object(values, "per_layer_config"), _layer_types(values)
    if not layers or types is None:
        return
    full = {i for i, name in enumerate(types) if name == "full_attention"}
    alike = [each for each in layers.values() if each == next(iter(layers.values()))]
    same = len(alike) == len(layers) and isinstance(alike[0], dict) and alike[0].keys() <= FULL_ATTENTION_KEYS.keys()
    if not same or any(not str(i).isdigit() for i in layers) or {int(i) for i in layers} != full:
        raise ConfigError(
            f"config.json: 'per_layer_config' {short(layers)} is not one object of "
            f"{' and '.join(FULL_ATTENTION_KEYS)} for all layers of full attention"
        )
    for source, target in FULL_ATTENTION_KEYS.items():
        if source in alike[0]:
            _agree(values, target, alike[0][source], "per_layer_config")


def _agree(values: Values, key: str, derived: Any, where: str = "mlp_layer_types") -> None:
    said = values.get(key)
    if said is not None and said != derived:
        raise _contradiction(key, said, where, values[where])
    values[key] = derived
