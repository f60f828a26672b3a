"""mlx-lm's own expert layers (SwitchGLU, SwitchMLP), computed from slots that hold some of the experts.

Knows mlx-lm's modules and slabs; which expert is in which slot the selector says. Needs mlx-lm. Every activation, bias
and product is mlx-lm's, on slot numbers in place of expert ids.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_flash.engine.backends.mlx.slab import MlxExpertSlab
from mlx_flash.engine.residency.expert_staging import ExpertGroup
from mlx_flash.engine.selection.router import RouterSelector

from .compat import QuantizedSwitchLinear, SwitchGLU, SwitchLinear, SwitchMLP
from .joined_experts import JoinedGLU
from .routers import Router

SWITCHES = (SwitchGLU, SwitchMLP, JoinedGLU)
LINEARS = (SwitchLinear, QuantizedSwitchLinear)
SORTED = 64  # pairs from which on mlx-lm sorts them, and a GPU takes other kernels


def expert_arrays(switch: nn.Module) -> dict[str, mx.array]:
    """The stacked tensors of a switch layer, (count, ...) each, by part: "gate_proj.weight", ..."""
    return {
        f"{name}.{key}": value
        for name, linear in switch.items()
        if isinstance(linear, LINEARS)
        for key, value in linear.items()
        if isinstance(value, mx.array)
    }


def on_slots(switch: nn.Module, arrays: Mapping[str, mx.array]) -> nn.Module:
    """The same switch layer with `arrays` for its stacked tensors; all else is shared."""
    twin = copy.copy(switch)
    for name, linear in switch.items():
        if isinstance(linear, LINEARS):
            twin[name] = copy.copy(linear)
    for part, array in arrays.items():
        name, key = part.split(".")
        twin[name][key] = array
    return twin


class ExpertModule(nn.Module):
    """Replaces a switch layer: no parameters, calls `run` on x (..., d), indices (..., k) -> (..., k, d)."""

    def __init__(self, run: SlotExperts | Survey):
        super().__init__()
        self._run = run

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        return self._run(x, indices)


class Survey:
    """In place of experts, where only shapes are asked for: notes how many are chosen per token and how wide their
    input is, computes nothing."""

    def __init__(self) -> None:
        self.top_k = self.width = 0

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        self.width = x.shape[-1]
        self.top_k = max(self.top_k, indices.shape[-1])
        return mx.zeros((*indices.shape, x.shape[-1]), x.dtype)


class SlotExperts:
    """One layer's experts: `selector` brings those that are chosen into slots, `switch` is mlx-lm's module.

    following: the next layer's router, where one is known.
    """

    def __init__(self, switch: nn.Module, selector: RouterSelector, following: Router | None = None):
        self.selector, self._following = selector, following
        self._switches: dict[int, nn.Module] = {}  # by slab
        self._switch = switch
        self._slots: mx.array | None = None  # of every expert, when all are there for good
        staging = [selector.staging.slab] if selector.staging is not None else []
        for slab in [*([selector.slab] if selector.slab is not None else []), *staging]:
            assert isinstance(slab, MlxExpertSlab)
            self._switches[id(slab)] = on_slots(switch, slab.parts)

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        """x (..., d), indices (..., k) -> (..., k, d), the bits of mlx-lm's module."""
        if self.selector.complete:
            return self._resident(x, indices)
        # The one wait for the device per layer; in mlx-lm's loops it also means that the last token has been computed.
        ahead = self._ahead(x, indices)
        if ahead is not None:
            mx.eval(indices, ahead)
        chosen = np.array(indices)
        pairs = chosen.reshape(-1)
        decoding = x.ndim < 2 or x.shape[-2] == 1
        orders: list[np.ndarray] = []
        results: list[mx.array] = []
        for group in self.selector.groups(chosen.reshape(-1, chosen.shape[-1]), decoding, ahead):
            slot_of = np.full(self.selector.residency.count, -1, np.int64)
            slot_of[group.ids] = group.rows
            slots = slot_of[pairs]
            if not results and (slots >= 0).all():
                result = self._switches[id(group.slab)](x, mx.array(slots.astype(np.uint32)).reshape(indices.shape))
            else:
                here = np.flatnonzero(slots >= 0)
                here = here[np.argsort(slots[here], kind="stable")]
                result = self._some(x, group, here // chosen.shape[-1], slots[here], len(pairs) >= SORTED)
                orders.append(here)
            group.settle = partial(mx.eval, result)
            results.append(result)
        if not orders:
            return results[0]
        back = np.argsort(np.concatenate(orders))
        return mx.concatenate(results)[mx.array(back.astype(np.uint32))].reshape(*indices.shape, -1)

    def _ahead(self, x: mx.array, indices: mx.array) -> mx.array | None:
        """What the next layer's router says of x, (count,) fp32 lazily, where that is asked for."""
        look_ahead = self.selector.look_ahead
        if look_ahead is None or self._following is None or indices.size != indices.shape[-1]:
            return None
        if look_ahead.target(self.selector.layer + 1) is None:
            return None
        return self._following(x).reshape(-1).astype(mx.float32)

    def _resident(self, x: mx.array, indices: mx.array) -> mx.array:
        """Every expert has its slot: nothing need be known of the choice here, so nothing waits for it."""
        selector = self.selector
        if self._slots is None:
            self._slots = mx.array(selector.residency.slot_of.astype(np.uint32))
        if x.ndim < 2 or x.shape[-2] == 1:
            selector.shared.stats.hits += indices.size
        return self._switches[id(selector.slab)](x, mx.take(self._slots, indices))

    def _some(self, x: mx.array, group: ExpertGroup, tokens: np.ndarray, slots: np.ndarray, as_many: bool) -> mx.array:
        """Pairs of tokens (n,) and slots (n,) -> (n, d), begun. as_many: by mlx-lm's code for SORTED pairs or more,
        which the whole call would take."""
        count = len(slots)
        if as_many and count < SORTED:
            more = np.zeros(SORTED - count, np.int64)
            tokens, slots = np.concatenate([tokens, tokens[more]]), np.concatenate([slots, slots[more]])
        rows = x.reshape(-1, x.shape[-1])[mx.array(tokens.astype(np.uint32))]
        index = mx.array(slots.astype(np.uint32)).reshape(-1, 1)
        result = self._switches[id(group.slab)](rows, index)[:count, 0]
        mx.async_eval(result)  # runs while the caller waits for the next group's reads
        return result
