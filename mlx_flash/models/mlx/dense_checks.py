"""Checks of mlx-lm's modules against the table of dense families, before their FFNs are replaced. Needs mlx.

A row of the table says what an FFN computes. mlx-lm's module is run on small weights and compared with it, so that an
architecture that computes something else, in this release or with this config, is refused and not run wrongly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_flash.engine.backends.mlx.terms import ACTIVATIONS
from mlx_flash.errors import ConfigError
from mlx_flash.models.specs.dense_families import DenseFamily, DenseSpec

DIM, COUNT = 6, 5  # of the weights that are tried
TOLERANCE = 1e-4


def check_module(module: nn.Module, spec: DenseSpec, layer: int) -> None:
    """Raise ConfigError unless a layer's FFN module has the tensors and computes the function of its row. Its weights,
    which were never made, are replaced by small ones."""
    table = spec.table
    assert isinstance(table, DenseFamily)
    found: Any = tree_flatten(module.parameters())
    shapes = {name: value.shape for name, value in found}
    width = 4 * spec.dim if table.fourfold else spec.layers[layer].intermediate
    biased = any(name.endswith(".bias") for name in shapes) if spec.bias_said else spec.ffn_bias
    wanted = _shapes(table, spec.dim, width, biased)
    if shapes != wanted:
        raise ConfigError(
            f"mlx-lm builds the FFN of {table.title}, layer {layer}, from {_text(shapes)}; known is {_text(wanted)}"
        )
    rng = np.random.default_rng(layer)
    small = {
        name: mx.array(rng.standard_normal(shape).astype(np.float32))
        for name, shape in _shapes(table, DIM, COUNT, biased).items()
    }
    x = mx.array(rng.standard_normal((1, 2, DIM)).astype(np.float32))
    module.update(tree_unflatten(list(small.items())))
    try:
        got = np.array(module(x))
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise ConfigError(f"mlx-lm's FFN of {table.title} cannot be checked: {error}") from error
    right = np.array(_expected(table, small, x))
    if got.shape != right.shape or not np.allclose(got, right, rtol=TOLERANCE, atol=TOLERANCE):
        raise ConfigError(
            f"mlx-lm's FFN of {table.title}, layer {layer}, is not the {table.activation} one that is known here, "
            "so it cannot be read from flash"
        )


def _shapes(table: DenseFamily, dim: int, count: int, biased: bool) -> dict[str, tuple[int, ...]]:
    """Name within the module and shape of an FFN's tensors, as mlx-lm has them: neurons are rows but for down's."""
    shapes: dict[str, tuple[int, ...]] = {}
    for role, name in table.names.items():
        rows = {"gate+up": 2 * count, "down": dim}.get(role, count)
        shapes[f"{name}.weight"] = (rows, count if role == "down" else dim)
        if biased:
            shapes[f"{name}.bias"] = (rows,)
    return shapes


def _text(shapes: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items()))[:400] or "nothing"


def _expected(table: DenseFamily, weights: dict[str, mx.array], x: mx.array) -> mx.array:
    """What the row says that the module gives for x (1, T, DIM)."""
    activation = ACTIVATIONS[table.activation]

    def product(role: str, x: mx.array) -> mx.array:
        name = table.names[role]
        y = x @ weights[f"{name}.weight"].T
        return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y

    if "gate+up" in table.names:
        gate, up = mx.split(product("gate+up", x), 2, axis=-1)
        h = activation.times(gate, up)
    elif table.gated:
        h = activation.times(product("gate", x), product("up", x))
    else:
        h = activation.alone(product("up", x))
    return product("down", h)


def check_kv_cache(model: nn.Module, cache: Sequence[Any], spec: DenseSpec) -> None:
    """Raise ConfigError where a token takes more of the KV cache than the plan has for it. Runs one token through the
    model, with FFNs that compute nothing, and evaluates none of it."""
    model(mx.array([[0]]), cache=cache)
    states = [array for layer in cache for array in (layer.keys, layer.values)]
    items = sum(array.shape[0] * array.shape[1] * array.shape[3] for array in states)
    if items > spec.kv_items_per_token:
        raise ConfigError(
            f"mlx-lm's KV cache of {spec.table.title} takes {items} items a token, config.json gives "
            f"{spec.kv_items_per_token}: heads or their size are read wrongly"
        )
