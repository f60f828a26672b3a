"""The tables of memory in README and docs/memory.md are what the plan says of those models."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from mlx_flash.config import FlashConfig
from mlx_flash.errors import BudgetError
from mlx_flash.models.conversion.plan import Settings, make_plan
from mlx_flash.models.specs.config_reader import read_spec
from mlx_flash.models.specs.source import Source, safetensors_header
from mlx_flash.runtime.planning.neuron_plan import NeuronPlan, plan_neurons
from mlx_flash.runtime.planning.neuron_setup import make_setup
from mlx_flash.runtime.planning.planner import plan_model
from mlx_flash.runtime.preflight import PlannedCheckpoint

from .pages import ROOT, rows

pytest.importorskip("mlx.core")

GB = 10**9


def dense(kind: str, dim: int, layers: int, heads: int, neurons: int, vocab: int, tied: bool = False) -> dict[str, Any]:
    """The config of a published model; all of these have 8 key/value heads of 128."""
    return {
        "model_type": kind,
        "hidden_size": dim,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": neurons,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "torch_dtype": "bfloat16",
    }


CONFIGS = {
    "OpenELM-3B": json.loads((ROOT / "models" / "openelm-3b" / "config.json").read_text()),
    "Llama-3.2-3B": dense("llama", 3072, 28, 24, 8192, 128256, tied=True),
    "Qwen3-4B": dense("qwen3", 2560, 36, 32, 9728, 151936, tied=True),
    "Mistral-7B": dense("mistral", 4096, 32, 32, 14336, 32768),
    "Llama-3.1-8B": dense("llama", 4096, 32, 32, 14336, 128256),
    "Qwen3-8B": dense("qwen3", 4096, 36, 32, 12288, 151936),
    "Qwen2.5-14B": dense("qwen2", 5120, 48, 40, 13824, 152064),
}

Planner = Callable[[str, int | None, int], NeuronPlan]


@pytest.fixture
def plan(tmp_path: Path) -> Planner:
    """The plan of a model in so many bits (None: 16) and bytes, from a file whose weights are a hole."""

    @cache
    def planned(name: str, bits: int | None) -> PlannedCheckpoint:
        config, folder = CONFIGS[name], tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        spec = read_spec(config)
        shapes = spec.ffn_shapes() | spec.resident_shapes()
        with open(folder / "model.safetensors", "wb") as file:
            header = safetensors_header(shapes, "bfloat16", shapes)
            file.write(header)
            file.truncate(len(header) + sum(2 * math.prod(shape) for shape in shapes.values()))
        with Source(folder) as source:
            found = make_plan(source, Settings(quantise=None if bits is None else (bits, 64, None)), None)
        return PlannedCheckpoint(folder, found.config, list(found.layouts), {}, found.stored)

    def make(name: str, bits: int | None, memory: int) -> NeuronPlan:
        config = FlashConfig(memory=memory, select="all", backend="mlx")
        return plan_neurons(make_setup(planned(name, bits), config, None, name))

    return make


def on_disk(plan: NeuronPlan) -> int:
    bundles = sum(layout.count * layout.stride for layout in plan.checkpoint.layouts)
    return bundles + sum(info.nbytes for _, info in plan.checkpoint.resident_tensors().values())


def gigabytes(count: int) -> str:
    return f"{count / GB:.1f} GB"


def test_readme_says_what_fits(plan: Planner) -> None:
    table = rows((ROOT / "README.md").read_text(encoding="utf-8"), "| model | size |")
    assert [row[0] for row in table] == list(CONFIGS)
    for name, size, smallest, *reads in table:
        found = plan(name, None, 64 * GB)
        assert [size, smallest] == [gigabytes(on_disk(found)), gigabytes(found.costs.smallest)], name
        for machine, said in zip((8, 16, 32), reads, strict=True):
            half = plan(name, None, machine * GB // 2)
            try:
                count = half.worst_bytes_per_token
            except BudgetError:
                assert said == "does not fit", name
            else:
                assert said == (gigabytes(count) if count else "nothing"), name


def test_the_page_on_memory_says_what_fewer_bits_need(plan: Planner) -> None:
    table = rows((ROOT / "docs" / "memory.md").read_text(encoding="utf-8"), "| model | on disk |")
    assert table
    for title, *said in table:
        name, bits = title.removesuffix(" bits").split(", ")
        found = plan(name, None if bits == "16" else int(bits), 64 * GB)
        assert said == [gigabytes(size) for size in (on_disk(found), found.costs.smallest, found.costs.largest)], title


@pytest.mark.parametrize("backend", ["numpy", "mlx"])
def test_the_story_fits_its_budget_on_both_backends(backend: str) -> None:
    budget = re.search(r"^python3 .*-m venv \.venv-story .* --memory (\S+)", (ROOT / "README.md").read_text(), re.M)
    assert budget is not None and plan_model(None, FlashConfig(backend=backend, memory=budget[1])).memory.capacities
