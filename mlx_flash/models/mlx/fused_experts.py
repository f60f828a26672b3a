"""Experts whose gate and up projections are one tensor in the files, each a run of bytes per expert.

Cuts such tensors under the names that mlx-lm gives the halves, so that their places in the files are known. Tensors
that mlx-lm cuts in other ways, or transposes, are left to it. Needs mlx.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

# Model type -> the ends of the fused tensor's name and of the down projection's, and what stands there instead. The
# fused one is (count, 2 f, d), rows of the gate before those of up.
_GRANITE = (".block_sparse_moe.input_linear.weight", ".block_sparse_moe.output_linear.weight")
_BARE = (".experts.gate_up_proj", ".experts.down_proj")
FUSED: Mapping[str, tuple[tuple[str, str], str]] = {
    "gemma4": (_BARE, ".experts.switch_glu."),
    "gemma4_text": (_BARE, ".experts.switch_glu."),
    "granitemoe": (_GRANITE, ".block_sparse_moe.switch_mlp."),
    "granitemoehybrid": (_GRANITE, ".block_sparse_moe.switch_mlp."),
    "mistral4": (_BARE, ".switch_mlp."),
    "qwen3_5_moe": (_BARE, ".switch_mlp."),
}


@dataclass(frozen=True)
class Piece:
    """What a stack of experts' parts is of a tensor: of each expert the run number `which` of `pieces` equal ones.

    shape: the tensor's."""

    source: str
    shape: tuple[int, ...]
    pieces: int
    which: int


def unfuse(weights: Mapping[str, mx.array], config: Mapping[str, Any]) -> tuple[dict[str, mx.array], dict[str, Piece]]:
    """Weights with a tensor per projection, and by the new names where they come from. Tensors that are not of the
    known form stay."""
    found: dict[str, mx.array] = {}
    pieces: dict[str, Piece] = {}
    (fused, down), instead = FUSED.get(str(config.get("model_type")), (("", ""), ""))
    for name, array in weights.items():
        if not instead or array.ndim != 3 or not name.endswith((fused, down)):
            found[name] = array
        elif name.endswith(down):
            found[name.removesuffix(down) + instead + "down_proj.weight"] = array
            pieces[name.removesuffix(down) + instead + "down_proj.weight"] = Piece(name, tuple(array.shape), 1, 0)
        else:
            rows = array.shape[1] // 2
            for which, projection in enumerate(("gate_proj", "up_proj")):
                new = name.removesuffix(fused) + instead + projection + ".weight"
                found[new] = array[:, which * rows : (which + 1) * rows]
                pieces[new] = Piece(name, tuple(array.shape), 2, which)
    return found, pieces
