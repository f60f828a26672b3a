"""Records tests/positions/golden: tokens and logits of transformers (fp32, CPU, eager attention) for every kind of
rotary positions and attention window that a family's config can name.

Holds what the golden grid (tests/golden) has not: prompts of 20 and of 100 tokens, the second longer than the windows
and than the length of the first training, on the same tensors for all cases of a family. Needs torch; tests read the
files only.

    python tests/positions/make_golden.py [FAMILY ...]
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
from safetensors import safe_open  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from tests.positions.configs import BASES, cases_of, families  # noqa: E402
from tests.positions.weights import prompt_ids, write_checkpoint  # noqa: E402

torch.set_num_threads(1)  # the models are tiny
TOKENS = 6  # of a reply
MARGIN = 1e-2  # between logits of the best and the next best token: others round otherwise
OUT = Path(__file__).parent / "golden"


def shapes_of(config: dict[str, Any], folder: Path) -> dict[str, list[int]]:
    """Name and shape of a checkpoint's tensors, as transformers saves them."""
    (folder / "config.json").write_text(json.dumps(config))
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    with safe_open(str(folder / "model.safetensors"), "np") as file:
        return {name: list(file.get_slice(name).get_shape()) for name in sorted(file.keys())}


def reply(model: Any, ids: list[int]) -> tuple[list[int], torch.Tensor, float]:
    """The reply, each token from the whole sequence anew; the logits after the prompt; the least distance of a token
    from the next best one."""
    first, least, out = None, float("inf"), list(ids)
    with torch.no_grad():
        for _ in range(TOKENS):
            logits = model(torch.tensor([out]), use_cache=False).logits[0, -1]
            first = logits if first is None else first
            best = logits.topk(2).values
            least = min(least, float(best[0] - best[1]))
            out.append(int(logits.argmax()))
    return out[len(ids) :], first, least


def make(family: str) -> None:
    record: dict[str, Any] = {"base": BASES[family], "shapes": {}, "cases": []}
    for name, changes, lengths in cases_of(family):
        config = BASES[family] | changes
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder)
            shapes = shapes_of(config, path)
            known = record["shapes"].setdefault("all", shapes)
            assert known == shapes, f"{family} {name}: other tensors"
            write_checkpoint(path, config, shapes)
            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
        for least_length in lengths:
            for length in range(least_length, least_length + 9):  # another prompt where two tokens are about as likely
                tokens, logits, least = reply(model, prompt_ids(length, config["vocab_size"]))
                if least > MARGIN:
                    break
            assert least > MARGIN, f"{family} {name}: tokens only {least} apart"
            record["cases"].append({
                "name": name, "changes": changes, "prompt": length, "tokens": tokens,
                "logits": [round(float(value), 6) for value in logits[::6]],
            })  # fmt: skip
    OUT.mkdir(exist_ok=True)
    lines = json.dumps({key: record[key] for key in ("base", "shapes")})[:-1]
    cases = ",\n".join(json.dumps(case) for case in record["cases"])
    (OUT / f"{family}.json").write_text(f'{lines}, "cases": [\n{cases}\n]}}\n')
    print(family, len(record["cases"]), flush=True)


if __name__ == "__main__":
    for family in sys.argv[1:] or families():
        try:
            make(family)
        except Exception as error:  # noqa: BLE001
            if sys.argv[1:]:
                raise
            print(family, f"{type(error).__name__}: {str(error)[:300]}", flush=True)
