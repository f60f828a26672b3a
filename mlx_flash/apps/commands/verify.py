"""`mlx_flash verify`: checks every byte of a flash checkpoint against its hashes."""

from __future__ import annotations

import argparse
from typing import Any

from mlx_flash.config import format_bytes
from mlx_flash.runtime.notices import announce

DESCRIPTION = "Check every byte of a flash checkpoint against its hashes."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="flash checkpoint; default: the default model's converted copy")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from mlx_flash.engine.storage.checkpoint import verify
    from mlx_flash.runtime.model_path import model_name, resolve_model

    path = resolve_model(args.model, announce=announce)
    checked = verify(path)
    if not args.json:
        name = model_name(args.model)
        where = str(path) if name == str(path) else f"{name} ({path})"
        print(f"{where}: {format_bytes(checked)} checked, every file is as it was written")
    return {"path": str(path), "bytes": checked, "ok": True}
