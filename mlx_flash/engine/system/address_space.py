"""The limit on address space (`ulimit -v`): check that libraries, threads and a model fit before they are loaded.

Under a limit that is too low some libraries abort the process, hang, or print pages of errors, and no exception can be
caught. This runs before everything else, so it imports the standard library only. Without such a limit (macOS does not
enforce it, Windows has none) every check passes.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from importlib.util import find_spec

from mlx_flash.config import format_bytes
from mlx_flash.errors import BudgetError

MB = 10**6
# NumPy, this package and a conversion; NumPy's BLAS begins a thread per core when it is imported.
START_BYTES = 300 * MB + 24 * MB * (os.cpu_count() or 1)
# Address space that importing takes, more than memory: measured on Linux, Python 3.11.
LIBRARIES = {"numpy": 150 * MB, "numba": 200 * MB, "mlx": 40 * MB, "transformers": 200 * MB, "torch": 500 * MB}
OF_BACKEND = {"numpy": ("numpy", "numba"), "mlx": ("numpy", "mlx")}
TOKENIZERS = ("transformers", "torch")  # transformers imports PyTorch where it is installed
THREAD_BYTES = 72 * MB  # its stack, and an arena of the C library
THREADS = {"numpy": 8, "mlx": 11}  # besides one per core
SLACK_BYTES = 100 * MB


def limit_bytes() -> int | None:
    """The most address space that this process may use; None if it is not limited."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    soft = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if soft == resource.RLIM_INFINITY or used_bytes() is None else soft


def used_bytes() -> int | None:
    """The address space that this process uses; None if the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None


def needed_bytes(backend: str, model_bytes: int = 0) -> int:
    """The address space that the process will use once a model of `model_bytes` runs on a backend."""
    modules = OF_BACKEND.get(backend, OF_BACKEND["numpy"]) + TOKENIZERS
    libraries = sum(LIBRARIES[name] for name in modules if name not in sys.modules and find_spec(name) is not None)
    threads = THREADS.get(backend, THREADS["numpy"]) + (os.cpu_count() or 1)
    return (used_bytes() or 0) + libraries + threads * THREAD_BYTES + model_bytes * 21 // 20 + SLACK_BYTES


def check_room(backend: str, name: str | None = None, model_bytes: int = 0) -> None:
    """Raise BudgetError if a model would not fit under the limit.

    name, model_bytes: those of the model, once it is planned
    """
    limit = limit_bytes()
    if limit is None:
        return
    needed = needed_bytes(backend, model_bytes)
    if needed <= limit:
        return
    what = "a run" if name is None else f"{name} ({format_bytes(model_bytes)} of memory planned)"
    smaller = "" if name is None else ", or a smaller --memory"
    raise BudgetError(
        f"{what} on the {backend} backend takes about {format_bytes(needed)} of address space with its libraries and "
        f"threads, ulimit -v allows {format_bytes(limit)}; set ulimit -v {-(-needed // 1024)} or more{smaller}"
    )


def check_start() -> None:
    """Stop if not even the package can be imported under the limit: the command exits with a message, an import raises
    MemoryError."""
    limit = limit_bytes()
    if limit is None or limit >= START_BYTES:
        return
    text = (
        f"mlx_flash takes about {format_bytes(START_BYTES)} of address space before it loads anything, ulimit -v "
        f"allows {format_bytes(limit)}; set ulimit -v {-(-START_BYTES // 1024)} or more"
    )
    if os.path.basename(sys.argv[0] if sys.argv else "") not in ("mlx_flash", "-m"):
        raise MemoryError(text)
    if "--json" in sys.argv:
        print(json.dumps({"error": {"type": BudgetError.__name__, "message": text}}), flush=True)
    else:
        print(f"{BudgetError.__name__}: {text}", file=sys.stderr, flush=True)
    raise SystemExit(BudgetError.exit_status)


def explain(error: BaseException) -> str | None:
    """The message for an error that was probably caused by too little address space; None for any other error."""
    limit = limit_bytes()
    text = " ".join(str(error).split())[:200]
    of_threads = isinstance(error, RuntimeError) and "thread" in text
    of_memory = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    if limit is None:
        return f"out of memory{': ' + text if text else ''}" if of_memory else None
    # What libraries make of a failed allocation has no common type: Rust's panics are not even of Exception.
    missing = isinstance(error, ModuleNotFoundError)  # which is not there under any limit
    of_library = (isinstance(error, ImportError | SystemError) and not missing) or type(
        error
    ).__name__ == "PanicException"
    if not (of_memory or of_threads or of_library):
        return None
    return (
        f"out of memory under ulimit -v, which allows {format_bytes(limit)} of address space "
        f"({type(error).__name__}{': ' + text if text else ''}); raise it, or use a smaller --memory"
    )
