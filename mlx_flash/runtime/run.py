"""A loaded model's run: its selectors, its reader, its counters and the token loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from mlx_flash.engine.backends.base import FFNSpec, block_of
from mlx_flash.engine.residency.expert_staging import ExpertStaging
from mlx_flash.engine.residency.slots import Residency
from mlx_flash.engine.residency.staging import BlockStream
from mlx_flash.engine.selection.context import Selector, SharedContext
from mlx_flash.engine.selection.factory import SelectorFactory
from mlx_flash.engine.selection.look_ahead import ExpertLookAhead
from mlx_flash.engine.selection.router import RouterSelector
from mlx_flash.engine.storage.bundle import bundle_kinds
from mlx_flash.engine.storage.reader import Reader
from mlx_flash.engine.storage.readers import open_reader
from mlx_flash.models.prompt_cache import PromptCache
from mlx_flash.models.text.sampling import Sampling
from mlx_flash.stats import Stats

from .planning.expert_plan import ExpertPlan
from .planning.neuron_plan import NeuronPlan
from .planning.run_plan import RunPlan

OpenReader = Callable[..., Reader]  # see `open_reader`


class Run:
    """A loaded model's plan, counters, reader and selectors (of the layers that have one, in order); `model.flash` is
    one. `close` ends its threads."""

    def __init__(self, plan: RunPlan, shared: SharedContext):
        self.plan, self.shared, self.stats = plan, shared, shared.stats
        self.selectors: list[Any] = []

    def build(self) -> Any:
        """The model, which reads through this run. Raises ConfigError, FormatError, ReadError."""
        raise NotImplementedError

    def forced(self, model: Any, prompt_ids: Sequence[int], next_ids: Sequence[int]) -> Iterator[np.ndarray]:
        """Logits (vocab,) fp32 after the prompt, then after each of `next_ids`, which pass one by one as if they had
        been sampled."""
        return self.plan.models.forced(model, prompt_ids, next_ids, self.plan.config.prefill_chunk)

    def steps(
        self,
        model: Any,
        prompt_ids: Sequence[int],
        max_tokens: int,
        sampling: Sampling,
        prompt_cache: PromptCache | None = None,
    ) -> Iterator[int]:
        """Sampled ids after the prompt, `max_tokens` at most. A selector that is not exact learns from the whole
        prompt, so no cache is used with one."""
        cache, chunk = prompt_cache if self.plan.exact else None, self.plan.config.prefill_chunk
        return self.plan.models.steps(model, prompt_ids, max_tokens, sampling, chunk, cache)

    def close(self) -> None:
        self.shared.stream.stop()
        self.shared.reader.close()


class NeuronRun(Run):
    """A model of neuron bundles: its selectors, and the ring of staging slabs that they share."""

    plan: NeuronPlan

    def __init__(self, plan: NeuronPlan, reader: OpenReader = open_reader):
        kinds, firsts = bundle_kinds(plan.checkpoint.layouts)
        blocks = [(layout, block_of(layout), [part.name for part in layout.parts]) for layout in firsts]
        rings = [[plan.backend.slab(*block) for _ in range(plan.memory.staging_blocks)] for block in blocks]
        opened = reader(plan.checkpoint.layer_files, executor=plan.backend.executor, **plan.tuning.reader_options)
        super().__init__(plan, SharedContext(plan.backend, opened, BlockStream(rings[0], rings[1:], kinds), Stats()))
        self.factory = SelectorFactory(
            plan.selection,
            self.shared,
            plan.checkpoint.layouts,
            plan.memory.capacities,
            plan.calibration,
            plan.config.reselect,
            plan.look_ahead,
        )

    def make_ffn(self, layer: int, up_bias: Any = None, down_bias: Any = None, gate_bias: Any = None) -> Selector:
        """The FFN of one layer: a callable from the normed hidden state to the FFN's output."""
        spec, layout = self.plan.spec, self.plan.checkpoint.layouts[layer]
        cutoff = spec.layers[layer].cutoff
        ffn = FFNSpec(layout, spec.kernel_activation, spec.gated, up_bias, down_bias, cutoff, gate_bias=gate_bias)
        selector = self.factory.make(layer, ffn)
        self.selectors.append(selector)
        return selector

    def build(self) -> Any:
        plan = self.plan
        return plan.models.build(plan.checkpoint, plan.spec, plan.backend, self.make_ffn, plan.dtype, plan.context)


class ExpertRun(Run):
    """A mixture of experts, read in place."""

    plan: ExpertPlan

    def __init__(self, plan: ExpertPlan, reader: OpenReader = open_reader):
        costs, self._experts = plan.costs, plan.checkpoint.take()
        rows = costs.staging_rows(plan.memory.staging_blocks)
        self._staging = {
            kind: ExpertStaging(self._experts.slab(costs.kinds.index(kind), n), n) for kind, n in rows.items()
        }
        opened = reader(self._experts.extents, **plan.tuning.reader_options)
        super().__init__(plan, SharedContext(plan.backend, opened, BlockStream([]), Stats()))
        mode = plan.look_ahead
        self.look_ahead = None if mode == "off" else ExpertLookAhead(self.shared, costs.top_k, mode)

    def make_selector(self, layer: int) -> RouterSelector:
        """The selector of one layer's experts, and memory for its slots."""
        plan = self.plan
        capacity, count = plan.memory.capacities[layer], plan.costs.counts[layer]
        slab, staging = self._experts.slab(layer, capacity), self._staging.get(plan.costs.kinds[layer])
        look_ahead = self.look_ahead if capacity < count else None
        selector = RouterSelector(layer, self.shared, Residency(count, capacity), slab, staging, look_ahead)
        self.selectors.append(selector)
        return selector

    def build(self) -> Any:
        return self._experts.start(self.make_selector, self.plan.context)
