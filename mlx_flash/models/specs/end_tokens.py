"""The tokens that end a reply: all that a model's folder names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_flash.engine.storage.json_file import read_json
from mlx_flash.errors import ConfigError, FormatError

from .folder import safe_file

GENERATION = "generation_config.json"


def end_ids(folder: Path, config: Mapping[str, Any], vocab: int) -> tuple[int, ...]:
    """Ids of config.json, of its text model and of generation_config.json, each once.

    vocab: how many tokens the model has. Raises FormatError for a generation_config.json that is not JSON or
    names no such tokens, ConfigError for a config whose ids are none.
    """
    places: list[tuple[str, Any]] = [("config.json", config)]
    if isinstance(config.get("text_config"), Mapping):
        places.append(("config.json's 'text_config'", config["text_config"]))
    if (folder / GENERATION).exists():
        places.append((GENERATION, read_json(safe_file(folder, GENERATION))))
    found: dict[int, None] = {}
    for where, place in places:
        value = place.get("eos_token_id")
        for each in value if isinstance(value, list) else [] if value is None else [value]:
            if type(each) is not int or each < 0:
                kind = FormatError if where == GENERATION else ConfigError
                raise kind(f"{folder}: 'eos_token_id' of {where} has {str(each)[:40]!r}, which is no id; correct it")
            if each < vocab:
                found[each] = None
            elif where == GENERATION:  # a config's can be its class's default, which ends nothing
                raise FormatError(
                    f"{folder}: 'eos_token_id' of {where} has {each}, but the model has {vocab} tokens; correct or "
                    "remove it"
                )
    return tuple(found)
