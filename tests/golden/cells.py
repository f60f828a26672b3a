"""What the golden grid consists of: tiny configs by family, and the features that each family's config can have.

Plain dicts, in the spelling of transformers 5: `make_grid.py` gives them to transformers, whose `save_pretrained`
writes the config.json that the tests read. A cell named `X old` is cell X in the spelling of transformers 4.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Config = dict[str, Any]
PROMPT_TOKENS, NEW_TOKENS, EARLY = 24, 30, 8
ENDS = "ends"  # the cell whose reply ends at one of several ids of generation_config.json

BASE: Config = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
FACTORS = {"short_factor": [1.0, 1.1, 1.3, 1.4, 1.6, 1.7, 2.0, 2.2], "long_factor": [1.0, 2, 3, 4, 6, 7, 8, 9]}
ROPES: dict[str, Config] = {
    "linear": {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0},
    "llama3": {
        **{"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        **{"original_max_position_embeddings": 32, "rope_theta": 10000.0},
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0},
    "yarn attention_factor": {
        **{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0},
        **{"attention_factor": 0.7, "beta_fast": 4.0, "beta_slow": 0.5},
    },
    "yarn mscale": {
        **{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0},
        **{"mscale": 1.5, "mscale_all_dim": 0.5},
    },
    "yarn equal": {
        **{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0},
        **{"mscale": 1.0, "mscale_all_dim": 1.0},
    },
    "yarn truncate": {
        **{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0},
        **{"truncate": False},
    },
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    "longrope short": {"rope_type": "longrope", "original_max_position_embeddings": 64, "rope_theta": 10000.0},
    "longrope crossing": {"rope_type": "longrope", "original_max_position_embeddings": 32, "rope_theta": 10000.0},
    "longrope long": {"rope_type": "longrope", "original_max_position_embeddings": 4, "rope_theta": 10000.0},
}
MAIN = "linear,yarn"
SOME = "linear,llama3,yarn,dynamic,longrope crossing"
ALL = (
    "linear*,llama3*,yarn*,yarn attention_factor,yarn mscale,yarn truncate,dynamic,longrope short,"
    "longrope crossing*,longrope long"
)
THETA = 300.0  # no family's own: a base that is not read is seen in every cell


@dataclass(frozen=True)
class Cell:
    """One config. changes: over the family's; extra: tensors beside those that save_pretrained writes, name -> the
    tensor that they are copies of, or a shape; old: whether it is tried in transformers 4's spelling too."""

    changes: Config = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    old: bool = False


@dataclass(frozen=True)
class GridFamily:
    """base: config over BASE; old: keys that transformers 4 wrote for this family besides, None: did not write."""

    base: Config
    cells: dict[str, Cell]
    old: Config = field(default_factory=dict)


def family(
    base: Config | None = None,
    ropes: str | None = MAIN,
    partial: float | None = None,
    old: Config | None = None,
    cells: dict[str, Cell] | None = None,
    /,
    **changes: Config,
) -> GridFamily:
    """ropes: names in ROPES, with a star those that are tried in the old spelling too, None: the family has no RoPE, or
    one per kind of layer; partial: the share of a head that is rotated; changes: cells by feature."""
    base = dict(base or {})
    share = {} if partial is None else {"partial_rotary_factor": partial}
    if ropes is not None:
        base["rope_parameters"] = {"rope_type": "default", "rope_theta": THETA} | share
    found = {"default": Cell(old=ropes is not None or bool(old))}
    for each in (ropes or "").split(",") if ropes else ():
        kind = each.strip("*")
        rope, top = ROPES[kind] | share, {}
        if "longrope" in kind:
            rope |= {name: values[: int(8 * (partial or 1))] for name, values in FACTORS.items()}
        if "original_max_position_embeddings" in base:  # as Phi-3 has it: beside the RoPE
            top = {"original_max_position_embeddings": rope["original_max_position_embeddings"]}
        found[kind] = Cell({"rope_parameters": rope} | top, old=each.endswith("*"))
    found |= {name.replace("_", " "): Cell(change) for name, change in changes.items()}
    return GridFamily(base, found | (cells or {}), old or {})


def rotated(share: float) -> Config:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": THETA, "partial_rotary_factor": share}}


def by_kind(kind: str | None, theta: float = 5e5, inner: float = THETA) -> Config:
    """RoPE of its own for layers with a window and for those without."""
    whole = {"rope_type": "default", "rope_theta": theta} if kind is None else ROPES[kind] | {"rope_theta": theta}
    return {"rope_parameters": {S: {"rope_type": "default", "rope_theta": inner}, F: whole}}


S, F = "sliding_attention", "full_attention"
ENDING = {ENDS: Cell()}
HEADS = {
    "tied head equal": Cell({"tie_word_embeddings": True}, {"lm_head.weight": "model.embed_tokens.weight"}),
    "tied head other": Cell({"tie_word_embeddings": True}, {"lm_head.weight": [160, 64]}),
}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
MHA, MQA = {"num_key_value_heads": 4}, {"num_key_value_heads": 1}
WIDE = {"head_dim": 24}
WINDOW, NO_WINDOW = {"sliding_window": 8}, {"sliding_window": 100}
BIAS, NO_BIAS, MLP_BIAS = {"attention_bias": True}, {"attention_bias": False}, {"mlp_bias": True}
SOFTCAP = {"final_logit_softcapping": 2.0}
