"""`mlx_flash inspect`: shows what would be resident and read, before anything is loaded."""

from __future__ import annotations

import argparse
from typing import Any

from mlx_flash.apps.options import add_run_options, check_address_space, run_config

DESCRIPTION = "Show what would be resident and read, before anything is loaded."
add_arguments = add_run_options


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.backend == "mlx":  # whose libraries planning imports; numpy's are imported only when a model is loaded
        check_address_space(args.backend)
    from mlx_flash.tools.inspection import inspect_model, print_inspection

    report = inspect_model(args.model, run_config(args))
    if not args.json:
        print_inspection(report)
    return report
