"""Records the golden grid: tokens and logits of transformers in fp32 on PyTorch's CPU, with eager attention.

Holds every family with every feature of its config, one change at a time, in the spellings of transformers 5 and 4; one
prompt of 24 tokens each. Prompts beyond windows and beyond the length of the first training are in tests/positions,
vision-language models that run as text in tests/models/specs/config_forms.py.

Needs torch and transformers, so CI does not run it: `python -m tests.golden.make_grid [FAMILY ...]` from the project's
folder, e.g. after a change of cells.py. Each length is computed by a forward pass over all its tokens, without a KV
cache: where RoPE depends on the length (longrope, dynamic) that is what the config means.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import torch
import transformers
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from . import llama_reference, openelm_reference
from .cells import BASE, EARLY, ENDS, NEW_TOKENS, PROMPT_TOKENS, Config, GridFamily
from .families import FAMILIES
from .old_spelling import old_spelling
from .weights import GRID, difference, write_folder

LEAST_GAP, LEAST_WORDS, ATTEMPTS = 2e-3, 8, 40  # between the best two logits; different tokens of a reply; seeds
NOTICED = 1e-2  # of a changed key in the logits
PROMPT = np.random.RandomState(5).randint(3, 160, PROMPT_TOKENS).tolist()
Shapes = dict[str, Any]
# Where transformers has no code for a family.
REFERENCES: dict[str, Any] = {"openelm": openelm_reference} | dict.fromkeys(llama_reference.NAMES, llama_reference)


def whole_config(family: str, base: Config, changes: Config) -> Any:
    """transformers' config, a dict where it has no code for the family. A key that is None in `base` is not given."""
    if family in REFERENCES:
        return base | changes
    keys = {key: value for key, value in (BASE | base).items() if value is not None or base.get(key, 0) is not None}
    return AutoConfig.for_model(family, **(keys | changes))


def saved(config: Any, folder: Path) -> tuple[Config, Shapes]:
    """config.json as save_pretrained writes it, and the tensors that it writes."""
    if isinstance(config, dict):
        return config, REFERENCES[config["model_type"]].tensor_shapes(config)
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        shapes = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    written = json.loads((folder / "config.json").read_text())
    shutil.rmtree(folder)
    return written, dict(sorted(shapes.items()))


def loaded(folder: Path, extra: Shapes) -> Any:
    if reference := REFERENCES.get(json.loads((folder / "config.json").read_text())["model_type"]):
        return reference.Model(folder)
    model, told = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    strange = {key: names for key, names in told.items() if names and not set(names) <= set(extra)}
    if strange:
        raise SystemExit(f"{folder.name}: transformers loads other tensors: {strange}")
    return model.eval()


def logits_of(model: Any, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        found = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
    return np.asarray(found.float().numpy())


def greedy(model: Any) -> tuple[list[int], dict[int, np.ndarray], float]:
    """The reply, the logits by the number of tokens before them, and the least gap between the best two."""
    ids, found = list(PROMPT), {EARLY: logits_of(model, PROMPT[:EARLY])}
    for _ in range(NEW_TOKENS):
        found[len(ids)] = logits_of(model, ids)
        ids.append(int(found[len(ids)].argmax()))
    best = [np.sort(each)[-2:] for each in found.values()]
    return ids[len(PROMPT) :], found, float(min(high - low for low, high in best))


def record(config: Config, shapes: Shapes, extra: Shapes, folder: Path) -> dict[str, Any]:
    """A cell: the first seed whose reply is neither monotonous nor a near tie."""
    best: tuple[int, float] = (0, 0.0)
    for seed in range(ATTEMPTS):
        model = loaded(write_folder(folder, config, shapes, seed), extra)
        tokens, logits, gap = greedy(model)
        best = max(best, (len(set(tokens)), gap))
        if gap >= LEAST_GAP and len(set(tokens)) >= LEAST_WORDS:
            break
    else:
        raise SystemExit(f"{folder.name}: every reply is monotonous or a near tie, the best is {best}")
    some = sorted(np.random.RandomState(7).choice(len(logits[EARLY]), 16, replace=False).tolist())
    kept = (EARLY, len(PROMPT), len(PROMPT) + 9, len(PROMPT) + NEW_TOKENS - 1)
    values = {str(n): [round(float(logits[n][i]), 6) for i in [*some, int(logits[n].argmax())]] for n in kept}
    return {"seed": seed, "tokens": tokens, "gap": round(gap, 6), "ids": some, "logits": values}


def check_noticed(name: str, cell: dict[str, Any], config: Config, shapes: Shapes, folder: Path) -> None:
    """Say so where another config gives a cell's logits too: then its test would not see that a key is ignored."""
    model = loaded(write_folder(folder, config, shapes, cell["seed"]), {})
    worst = 0.0
    for n, values in cell["logits"].items():
        found = logits_of(model, (PROMPT + cell["tokens"])[: int(n)])
        worst = max(worst, float(np.abs(found[cell["ids"]] - values[:-1]).max()))
    if worst < NOTICED:
        print(f"  {name}: its keys change the logits by {worst:.1e} only", flush=True)


def check_old(name: str, cell: dict[str, Any], config: Config, shapes: Shapes, folder: Path) -> bool:
    """Whether transformers reads the old spelling as the new one."""
    model = loaded(write_folder(folder, config, shapes, cell["seed"]), {})
    for n, values in cell["logits"].items():
        found = logits_of(model, (PROMPT + cell["tokens"])[: int(n)])
        if np.abs(found[cell["ids"]] - values[:-1]).max() > 1e-5:
            print(f"  {name}: transformers reads the old spelling otherwise: left out", flush=True)
            return False
    return True


def make_family(name: str, family: GridFamily, folder: Path, problems: list[str]) -> dict[str, Any]:
    base, tensors = saved(whole_config(name, family.base, {}), folder / "base")
    cells: dict[str, Any] = {}
    for feature, cell in family.cells.items():
        try:
            config, shapes = saved(whole_config(name, family.base, cell.changes), folder / "new")
            whole = shapes | cell.extra
            made = record(config, whole, cell.extra, folder / feature.replace(" ", "-"))
            if feature not in ("default", ENDS) and whole == tensors:
                check_noticed(f"{name} {feature}", made, base, whole, folder / "plain")
            if feature == ENDS:
                made["ends"] = [2, first_of_its_kind(made["tokens"])]
            kept = {"config": difference(base, config), "tensors": difference(tensors, whole)}
            cells[feature] = kept | made
            old = old_spelling(config, family.old)
            if cell.old and old != config and check_old(f"{name} {feature}", made, old, shapes, folder / "old"):
                cells[f"{feature} old"] = {"like": feature, "config": difference(base, old)}
        except (SystemExit, Exception) as error:
            problems.append(f"{name} {feature}: {error!r}"[:500])
            print(f"  FAILED {problems[-1]}", flush=True)
    return {
        "family": name,
        "made_with": made_with(name),
        "prompt": PROMPT,
        "config": base,
        "tensors": tensors,
        "cells": cells,
    }


def made_with(family: str) -> str:
    program = f"transformers {transformers.__version__}, eager attention"
    if family in REFERENCES:
        program = f"tests/golden/{REFERENCES[family].__name__.rpartition('.')[2]}.py"
    return f"{program}, torch {torch.__version__}, fp32, CPU"


def first_of_its_kind(tokens: list[int]) -> int:
    """A token that the reply has not had before, some way into it."""
    return next(token for i, token in enumerate(tokens) if i > 3 and token not in tokens[:i])


def as_text(value: Any, depth: int = 0) -> str:
    """JSON with a line per entry of the first three levels, so that a changed cell is a small diff."""
    if not isinstance(value, dict) or depth == 3 or not value:
        return json.dumps(value)
    blank = "  " * (depth + 1)
    return (
        "{\n"
        + ",\n".join(f"{blank}{json.dumps(k)}: {as_text(v, depth + 1)}" for k, v in value.items())
        + f"\n{blank[2:]}}}"
    )


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    GRID.mkdir(exist_ok=True)
    problems: list[str] = []
    for name in names or list(FAMILIES):
        print(name, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            made = make_family(name, FAMILIES[name], Path(folder), problems)
        (GRID / f"{name}.json").write_text(as_text(made) + "\n")
    if problems:
        raise SystemExit(f"{len(problems)} cells were not made: " + "; ".join(problems))


if __name__ == "__main__":
    main(sys.argv[1:])
