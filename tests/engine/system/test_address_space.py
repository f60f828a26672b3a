"""`ulimit -v`: a run under it works, or ends at once with one line and a status."""

from __future__ import annotations

import errno
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_flash
from mlx_flash import address_space
from mlx_flash.cli import main
from mlx_flash.engine.system.address_space import START_BYTES, check_room, explain, needed_bytes, used_bytes
from mlx_flash.errors import BudgetError
from tests.tiny import make_tiny

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux keeps such a limit")
BACKENDS = ("numpy", "mlx")


@pytest.fixture(scope="module")
def flash(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("limits")
    return mlx_flash.convert(make_tiny("openelm-relu", folder), folder / "flash")


def run(flash: Path, kilobytes: int, backend: str, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mlx_flash", "generate", "--model", str(flash), "--backend", backend]
    command += ["--prompt", "Once", "--max-tokens", "3", *more]
    limited = ["bash", "-c", f'ulimit -v {kilobytes}; exec "$@"', "-", *command]
    return subprocess.run(limited, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("megabytes", [100, 200, 400, 800])
def test_a_limit_that_is_too_low_is_named_at_once(flash: Path, backend: str, megabytes: int) -> None:
    done = run(flash, megabytes * 1000, backend)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and done.stdout == ""
    assert re.match(r"BudgetError: .*ulimit -v allows [\d.]+ .B; set ulimit -v \d+ or more", done.stderr)


def test_json_gets_an_object_even_where_nothing_can_be_imported(flash: Path) -> None:
    done = run(flash, 100_000, "numpy", "--json")
    assert done.returncode == 2 and done.stderr == ""
    assert json.loads(done.stdout)["error"]["type"] == "BudgetError"


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_limit_that_is_advised_is_enough(flash: Path, backend: str) -> None:
    if backend == "mlx":
        pytest.importorskip("mlx_lm", reason="the mlx backend is not installed")
    advised, done = 400_000, None
    for _ in range(3):  # a model's own memory is known only after the libraries are imported
        done = run(flash, advised, backend)
        if done.returncode == 0:
            break
        found = re.search(r"set ulimit -v (\d+)", done.stderr)
        assert found is not None and int(found[1]) > advised, done.stderr
        advised = int(found[1])
    assert done is not None and done.returncode == 0, done.stderr


def test_importing_the_package_under_a_low_limit_is_a_memory_error() -> None:
    command = f'ulimit -v 100000; exec {sys.executable} -c "import mlx_flash"'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "MemoryError: mlx_flash takes about" in done.stderr


def test_a_model_is_measured_against_the_limit_before_it_is_loaded(
    flash: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert used_bytes() is not None
    room = needed_bytes("numpy") + 40 * 10**6
    monkeypatch.setattr(address_space, "limit_bytes", lambda: room)
    check_room("numpy")
    check_room("numpy", "small", 10**6)
    with pytest.raises(BudgetError, match=r"large \(10.0 GB of memory planned\) on the numpy backend takes about 1"):
        check_room("numpy", "large", 10**10)
    monkeypatch.setattr(address_space, "limit_bytes", lambda: START_BYTES)
    monkeypatch.setattr(sys.modules["mlx_flash.runtime.loading"], "start_run", None)  # nothing is begun
    with pytest.raises(BudgetError, match="ulimit -v"):
        mlx_flash.load(flash, backend="numpy")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(BudgetError, match="ulimit -v"):
        mlx_flash.load(flash.parent / "openelm-relu", backend="numpy")
    assert "converting" not in capsys.readouterr().err


class PanicException(BaseException):
    """As Rust's bindings raise."""


ERRORS = [
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    RuntimeError("can't start new thread"),
    ImportError("libx.so: failed to map segment from shared object"),
    SystemError("returned NULL without setting an exception"),
    PanicException("ThreadPoolBuildError"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_what_libraries_make_of_it(
    error: BaseException, flash: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(address_space, "limit_bytes", lambda: 10**12)
    monkeypatch.setattr(sys.modules["mlx_flash.runtime.loading"], "plan_model", fail)
    for more in ([], ["--json"]):
        assert main(["generate", "--model", str(flash), "--prompt", "x", *more]) == 1
        said = capsys.readouterr()
        assert "out of memory under ulimit -v, which allows 1000 GB" in said.out + said.err
        assert (said.out + said.err).count("\n") == 1 and "interrupted" not in said.out + said.err


def test_a_bug_is_no_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in (None, 10**12):
        monkeypatch.setattr(address_space, "limit_bytes", lambda limit=limit: limit)
        assert explain(ValueError("x")) is None and explain(RuntimeError("x")) is None
        assert explain(OSError(errno.ENOENT, "x")) is None and explain(ModuleNotFoundError("x")) is None
        assert explain(MemoryError()) is not None
    monkeypatch.setattr(address_space, "limit_bytes", lambda: None)
    assert explain(ImportError("x")) is None and explain(MemoryError("no room")) == "out of memory: no room"
