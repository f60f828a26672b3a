"""Everything but the mlx backend works where neither mlx nor numba is installed, and gives the same tokens."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import mlx_flash
from mlx_flash.models.text.sampling import Sampling
from tests.tiny import make_tiny

PROGRAM = """
import sys

sys.modules.update(dict.fromkeys(["mlx", "mlx_lm", "numba", "llvmlite", "torch"]))  # None: not to be found
import json
import mlx_flash
from mlx_flash.models.text.sampling import Sampling

model, tokenizer = mlx_flash.load(sys.argv[1], memory="30MB")
print(json.dumps(list(model.flash.steps(model, [1, 2, 3], 30, Sampling()))))
try:
    mlx_flash.load(sys.argv[1], backend="mlx")
except mlx_flash.BackendError as error:
    assert "pip install" in str(error), error
else:
    raise SystemExit("the mlx backend loaded without mlx")
from mlx_flash import cli
assert cli.main(["server", "--model", sys.argv[1]]) == 2
"""


def test_generation_without_them(tmp_path: Path) -> None:
    flash = mlx_flash.convert(make_tiny("openelm-relu", tmp_path), tmp_path / "flash")
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(flash)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    model, _ = mlx_flash.load(flash, backend="numpy")
    assert "BackendError: the mlx backend needs mlx and mlx-lm" in done.stderr
    assert json.loads(done.stdout) == list(model.flash.steps(model, [1, 2, 3], 30, Sampling()))
    model.flash.close()
