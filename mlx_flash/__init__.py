"""Run language models larger than memory: the dense part stays resident, the FFN is read from SSD as bundles.

model, tokenizer = mlx_flash.load("folder or repo", memory="2GB")
for response in mlx_flash.stream_generate(model, tokenizer, "Once upon a time"):
    print(response.text, end="", flush=True)
"""

from importlib.metadata import PackageNotFoundError, version

from .engine.system import address_space

address_space.check_start()  # before the libraries below, which end the process where they get no memory

from mlx_flash.models.conversion.converter import convert  # noqa: E402
from mlx_flash.runtime.generation import generate, stream_generate  # noqa: E402
from mlx_flash.runtime.loading import load  # noqa: E402

from .config import FlashConfig  # noqa: E402
from .errors import (  # noqa: E402
    BackendError,
    BudgetError,
    ConfigError,
    FlashError,
    FormatError,
    IntegrityError,
    ReadError,
    SpaceError,
    UsageError,
)

try:
    __version__ = version("mlx-flash-runtime")
except PackageNotFoundError:  # run from a folder that was never installed
    __version__ = "0.0.0"

__all__ = [
    "BackendError",
    "BudgetError",
    "ConfigError",
    "FlashConfig",
    "FlashError",
    "FormatError",
    "IntegrityError",
    "ReadError",
    "SpaceError",
    "UsageError",
    "convert",
    "generate",
    "load",
    "stream_generate",
]
