"""All names of mlx-lm that this package uses, in one place; many are not documented. Needs mlx-lm.

Checked with mlx-lm 0.32.0, 0.32.1 and 0.32.2; pyproject.toml bounds the releases that are installed above and below.
What its server is made of is checked by name before a server starts, see `check_server`.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

from mlx_flash.errors import BackendError
from mlx_flash.models.text.tokenizer import quiet_transformers

with quiet_transformers():  # which mlx-lm imports
    from mlx_lm import server as server
    from mlx_lm.generate import generation_stream as generation_stream
    from mlx_lm.generate import wired_limit as wired_limit
    from mlx_lm.models.base import create_attention_mask as create_attention_mask
    from mlx_lm.models.cache import ArraysCache as ArraysCache
    from mlx_lm.models.cache import CacheList as CacheList
    from mlx_lm.models.cache import KVCache as KVCache
    from mlx_lm.models.cache import LRUPromptCache as LRUPromptCache
    from mlx_lm.models.cache import RotatingKVCache as RotatingKVCache
    from mlx_lm.models.cache import can_trim_prompt_cache as can_trim_prompt_cache
    from mlx_lm.models.cache import make_prompt_cache as make_prompt_cache
    from mlx_lm.models.cache import trim_prompt_cache as trim_prompt_cache
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear as QuantizedSwitchLinear
    from mlx_lm.models.switch_layers import SwitchGLU as SwitchGLU
    from mlx_lm.models.switch_layers import SwitchLinear as SwitchLinear
    from mlx_lm.models.switch_layers import SwitchMLP as SwitchMLP
    from mlx_lm.sample_utils import make_sampler as make_sampler
    from mlx_lm.utils import MODEL_REMAPPING as MODEL_REMAPPING
    from mlx_lm.utils import load_model as load_model
    from mlx_lm.utils import load_tokenizer as load_tokenizer

# What the server here overrides or calls: mlx-lm's class or function, and its methods.
SERVER = {
    "ResponseGenerator": ("_run_generate", "_generate", "_next_request", "_tokenize", "generate", "stop_and_join"),
    "APIHandler": (
        *("validate_model_parameters", "handle_completion", "handle_models_request", "generate_response"),
        "completion_usage_response",
    ),
    "TextStateMachine": ("make_state", "split", "flush"),
    "ModelProvider": ("load", "load_default"),
    "ModelDescription": (),
    "SamplingArguments": (),
    "LogitsProcessorArguments": (),
    "GenerationArguments": (),
    "ToolCallFormatter": (),
    "_format_top_logprobs": (),
    "get_system_fingerprint": (),
}


def check_server() -> None:
    """Raise BackendError if mlx-lm's server lacks one of the pieces that are used here."""
    for name, methods in SERVER.items():
        piece = getattr(server, name, None)
        missing = [method for method in methods if not hasattr(piece, method)]
        if piece is None or missing:
            what = name if piece is None else f"{name}.{missing[0]}"
            raise BackendError(
                f"mlx_flash server needs mlx-lm 0.32, whose server has {what}; pip install 'mlx-lm>=0.32,<0.33'"
            )


def own_copy(name: str) -> Any:
    """A copy of an architecture's module that may be changed. Raises ImportError."""
    spec = importlib.util.find_spec(f"mlx_lm.models.{name}")
    if spec is None or spec.loader is None:
        raise ImportError(f"mlx_lm has no models.{name}")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def architecture(name: str) -> Any:
    """mlx-lm's module of an architecture: `Model`, `ModelArgs`. Raises ImportError."""
    return importlib.import_module(f"mlx_lm.models.{name}")


def brief(error: Exception) -> str:
    """A library's message on one line."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 500 else text[:497] + "..."
    if "Missing" in text and ("lm_head.weight" in text or "embed_out.weight" in text):
        text += " Where the head is the embedding, set tie_word_embeddings to true in config.json."
    return text
