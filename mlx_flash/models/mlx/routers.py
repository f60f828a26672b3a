"""The routers of mlx-lm's mixtures, as plain products: they guess the next layer's choice of experts.

Groups, a bias of the choice and the router's own norms are left out: a guess may be inexact. Needs mlx-lm.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import mlx.core as mx
import mlx.nn as nn

NAMES = ("gate", "router")
Router = Callable[[mx.array], mx.array]  # x (..., d) -> (..., count)


def find_router(model: nn.Module, path: str, count: int, width: int) -> Router | None:
    """The router beside the switch layer `path` of `count` experts whose input is `width` wide, or None.

    It is the one module with so many outputs and inputs in what the same block calls its gate or router.
    """
    block: nn.Module = model
    for name in path.split(".")[:-1]:
        block = block[int(name)] if isinstance(block, list) else block[name]
    parts = [block[name] for name in NAMES if isinstance(block.get(name), nn.Module)] if isinstance(block, dict) else []
    modules = [module for part in parts for _, module in part.named_modules()]
    found = [router for module in modules if (router := _product(module, count, width)) is not None]
    return found[0] if len(found) == 1 else None


def _product(module: nn.Module, count: int, width: int) -> Router | None:
    """x . W^T of a module that has such a W of (count, width)."""
    weight = module.get("weight")
    if not isinstance(weight, mx.array) or weight.ndim != 2 or weight.shape[0] != count:
        return None
    if isinstance(module, nn.QuantizedLinear):
        return module if weight.shape[1] * 32 == width * module.bits else None
    if weight.shape[1] != width or not mx.issubdtype(weight.dtype, mx.floating):
        return None
    return module if type(module) is nn.Linear else partial(_times, module)


def _times(module: nn.Module, x: mx.array) -> mx.array:
    return x @ module["weight"].T
