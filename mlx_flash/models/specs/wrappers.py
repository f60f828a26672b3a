"""Vision-language checkpoints that run as text: which object of the config and which tensors are the text model's.

Knows names only. The vision tower is left out. Mixtures of experts stay as they are: mlx-lm takes them apart itself.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from mlx_flash.errors import FormatError

from .key_spellings import WRAPPED_DEFAULTS, WRAPPERS

# Of the whole, and not of the text model alone.
OUTER = ("flash", "quantization", "quantization_config", "torch_dtype", "dtype", "model_file", "transformers_version")
# A module around everything, which transformers writes since 5 and mlx-lm does not know.
OUTER_MODULES = {"gpt2": "transformer."}
# What transformers calls modules that mlx-lm has under the names of the original code.
RENAMED_MODULES = {
    "nanochat": {
        "model.embed_tokens.": "transformer.wte.",
        "model.layers.": "transformer.h.",
        ".self_attn.q_proj.": ".attn.c_q.",
        ".self_attn.k_proj.": ".attn.c_k.",
        ".self_attn.v_proj.": ".attn.c_v.",
        ".self_attn.o_proj.": ".attn.c_proj.",
        ".mlp.fc1.": ".mlp.c_fc.",
        ".mlp.fc2.": ".mlp.c_proj.",
    }
}
# In their first files the text model's keys are the config's own.
FLAT = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
# Where releases of transformers and mlx-lm put the text model, longest first, and its names without a wrapper.
PREFIXES = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)
TEXT = ("model.layers.", "model.embed_tokens.", "model.norm.", "lm_head.")
VISION = (
    "vision_tower.",
    "vision_model.",
    "vision_encoder.",
    "visual.",
    "multi_modal_projector.",
    "mm_projector.",
    "patch_merger.",
    "pre_mm_projector_norm.",
    "vision_language_adapter.",
    "image_newline",
)


def wrapped_type(config: Mapping[str, Any]) -> str | None:
    """The text model's type, if the config is that of a vision-language model that runs as text; else None."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in WRAPPERS:
        return None
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        return WRAPPERS[kind][""] if kind in FLAT else None
    inner = text.get("model_type") or ""
    return WRAPPERS[kind].get(inner) if isinstance(inner, str) else None


def unwrap(config: dict[str, Any]) -> dict[str, Any]:
    """The text model's config; others as they are."""
    kind = wrapped_type(config)
    if kind is None:
        return config
    text = config.get("text_config")
    found = dict(text) if isinstance(text, dict) else {k: v for k, v in config.items() if k != "vision_config"}
    for key, value in WRAPPED_DEFAULTS.get(kind, {}).items():
        found.setdefault(key, value)
    if config.get("tie_word_embeddings") is not None:  # the whole model's is what transformers goes by
        found["tie_word_embeddings"] = config["tie_word_embeddings"]
    for key in ("bos_token_id", "eos_token_id"):
        if found.get(key) is None and config.get(key) is not None:
            found[key] = config[key]
    found |= {key: config[key] for key in OUTER if key in config}
    for key in ("quantization", "quantization_config"):
        if isinstance(found.get(key), dict):
            found[key] = _renamed_modules(found[key])
    found["model_type"] = kind
    return found


def _renamed_modules(quantisation: dict[str, Any]) -> dict[str, Any]:
    """A quantisation whose modules have the text model's names, without those of vision."""
    named = {text_name(f"{name}."): value for name, value in quantisation.items() if "." in name}
    plain = {name: value for name, value in quantisation.items() if "." not in name and name + "." not in VISION}
    return plain | {name.removesuffix("."): value for name, value in named.items() if name is not None}


def text_name(name: str) -> str | None:
    """A tensor's name in the text model; None for one of vision."""
    for prefix, instead in PREFIXES:
        if name.startswith(prefix):
            name = instead + name.removeprefix(prefix)
            break
    bare = name.removeprefix("model.")
    return None if bare.startswith(VISION) else name


def _inner_name(name: str, kind: str) -> str:
    name = name.removeprefix(OUTER_MODULES.get(kind, ""))
    for module, instead in RENAMED_MODULES.get(kind, {}).items():
        name = name.replace(module, instead)
    return name


def text_names(config: Mapping[str, Any], names: Collection[str]) -> dict[str, str]:
    """Name in the text model -> name in the files, of all tensors that are the text model's. Raises FormatError for
    tensors that belong to neither text nor vision, and for two with one name."""
    if wrapped_type(config) is None or "flash" in config:
        return {_inner_name(name, str(config.get("model_type"))): name for name in names}
    found: dict[str, str] = {}
    for name in names:
        text = text_name(name)
        if text is None:
            continue
        if text in found:
            raise FormatError(f"tensors {found[text]!r} and {name!r} are both the text model's {text!r}")
        found[text] = name
    strays = sorted(name for text, name in found.items() if not text.startswith(TEXT))
    if strays:
        raise FormatError(
            f"{len(strays)} tensors of this {str(config['model_type'])[:40]} are known neither of text nor of vision: "
            f"{', '.join(strays[:5])[:300]}"
        )
    return found
