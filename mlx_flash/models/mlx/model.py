"""mlx-lm's own models with their FFN modules replaced by parameterless ones that call a function. Needs mlx-lm.

Knows where a family keeps its FFN modules; does not know what the functions do, nor files of bundles.
mlx-lm's generate, caches, samplers and adapters take the result like any other of its models.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_flash.engine.backends.mlx.backend import cache_limit_bytes
from mlx_flash.errors import ConfigError, FormatError
from mlx_flash.models.prompt_cache import PromptCache
from mlx_flash.models.specs.dense import DENSE, DenseSpec
from mlx_flash.models.specs.families import ModelSpec
from mlx_flash.models.specs.normal_form import normalise
from mlx_flash.models.text.tokenizer import reading_tokenizer

from . import compat
from .compat import can_trim_prompt_cache, generation_stream, load_model, make_prompt_cache, make_sampler, wired_limit
from .config_keys import keys_read as keys_read
from .dense import check_kv_cache, check_module
from .fitting import fit_architecture, fit_class, fit_keys, fit_modules, fit_weights
from .head import fit_head
from .positions import mlx_keys, set_positions, set_windows

if TYPE_CHECKING:
    from mlx_flash.engine.storage.checkpoint import Checkpoint
    from mlx_flash.models.text.sampling import Sampling

FFN = Callable[[mx.array], mx.array]

# family -> mlx-lm's module, and the name of the FFN module in each of its layers.
MODULES = {
    "openelm": ("openelm", "ffn"),
    "llama": ("llama", "mlp"),
    "mistral": ("llama", "mlp"),
    "qwen2": ("qwen2", "mlp"),
    "qwen3": ("qwen3", "mlp"),
} | {name: (name, row.attribute) for name, row in DENSE.items()}

LEAST_TEMPERATURE = 1e-30  # logits divided by less are no numbers in fp32


class Bias(nn.Module):
    """What stays of a linear layer whose rows are on flash."""

    def __init__(self, size: int):
        super().__init__()
        self.bias = mx.zeros((size,))


class FlashFFNModule(nn.Module):
    """Stands where a layer's FFN was: calls `ffn` on x (B, T, d). No parameters but biases, where there are some:
    (name, size) of up's, down's and, where there is a gate, its."""

    def __init__(self, ffn: FFN, biases: Sequence[tuple[str, int]] = ()):
        super().__init__()
        self._ffn = ffn
        self._biased = [name for name, _ in biases]
        for name, size in biases:
            self[name] = Bias(size)

    def biases(self) -> list[mx.array]:
        return [self[name].bias for name in self._biased]

    def __call__(self, x: mx.array) -> mx.array:
        return self._ffn(x)


def build(
    checkpoint: Checkpoint, spec: ModelSpec, backend: Any, make_ffn: Callable[..., FFN], dtype: str, context: int
) -> nn.Module:
    """The model of a flash checkpoint; `make_ffn(layer)` gives each layer's FFN. Errors are those of `build_model`.

    dtype is not used: mlx-lm takes that of the tensors. context: what decides between tables of positions; mlx-lm's KV
    cache grows.
    """
    model = _without_ffns(checkpoint, spec, context)
    modules = [getattr(layer, MODULES[spec.family][1]) for layer in model.layers]
    for layer, module in enumerate(modules):
        module._ffn = make_ffn(layer, *module.biases())
    return model


def check(checkpoint: Checkpoint, spec: ModelSpec) -> None:
    """Raise what `build` would, from the config and the resident tensors' names and shapes: reads no numbers."""
    _without_ffns(checkpoint, spec, 0, lazy=True)


def _without_ffns(checkpoint: Checkpoint, spec: ModelSpec, context: int, lazy: bool = False) -> nn.Module:
    model = build_model(checkpoint.path, spec, [_nothing] * len(spec.layers), context, lazy)
    if isinstance(spec, DenseSpec):
        check_kv_cache(model, make_prompt_cache(model), spec)
    return model


def _nothing(x: mx.array) -> mx.array:
    """Where no FFN is yet."""
    return x


def build_model(path: Path, spec: ModelSpec, ffns: Sequence[FFN], context: int = 0, lazy: bool = False) -> nn.Module:
    """mlx-lm's model of a flash checkpoint folder, resident tensors in their own dtype, FFN of layer i = ffns[i], for
    runs of `context` tokens. lazy: without reading any.

    Raises ConfigError for a family or a config that mlx-lm does not run, FormatError when the resident tensors are
    not those of the model or cannot be read.
    """
    if spec.family not in MODULES:
        raise ConfigError(f"family {spec.family!r} does not run on mlx; known: {', '.join(MODULES)}")
    if len(ffns) != len(spec.layers):
        raise ValueError(f"{len(ffns)} FFNs for {len(spec.layers)} layers")

    # Before mlx-lm sees the folder: its older releases run the file without asking.
    config = json.loads((path / "config.json").read_text())
    if (program := config.get("model_file")) is not None:
        raise FormatError(f"{path}: config.json names a program to run ({program!r}); none is run")

    def classes(config: dict[str, Any]) -> Any:
        return _model_class(spec, ffns, normal)

    normal = normalise(config)
    try:
        given = normal | mlx_keys(normal) | fit_keys(normal) | _config(spec)
        model, _ = load_model(path, lazy=lazy, strict=True, model_config=given, get_model_classes=classes)
    except ModuleNotFoundError as error:
        raise ConfigError(f"this mlx-lm does not know {spec.family} ({error}); pip install -U mlx-lm") from error
    except (TypeError, NotImplementedError) as error:  # a dataclass of mlx-lm that misses a field
        raise ConfigError(f"{path / 'config.json'}: mlx-lm cannot build {spec.family}: {brief(error)}") from error
    except (ValueError, RuntimeError, FileNotFoundError) as error:
        raise FormatError(f"{path}: cannot load the resident tensors: {brief(error)}") from error
    set_windows(model, normal)
    set_positions(model, normal, context)
    mx.set_cache_limit(cache_limit_bytes(spec.dim))
    mx.clear_cache()
    return model


def brief(error: Exception) -> str:
    """A library's message on one line."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 500 else text[:497] + "..."
    if "Missing" in text and ("lm_head.weight" in text or "embed_out.weight" in text):
        text += " Where the head is the embedding, set tie_word_embeddings to true in config.json."
    return text


class _Replies:
    """Tells from the caches that a model is run with whether another reply begins: mlx-lm's own loops do not say so."""

    def __init__(self) -> None:
        self._last: tuple[weakref.ref[Any], int] | None = None  # the first layer's cache, and the tokens it then held

    def begins(self, tokens: int, cache: Sequence[Any] | None) -> bool:
        """Whether a call of so many tokens per sequence with this cache belongs to another reply than the last one."""
        last, self._last = self._last, None
        if not cache:
            return True
        first = cache[0]
        offset = getattr(first, "offset", None)
        if not isinstance(offset, int):  # a batch has an array of them
            return not hasattr(first, "empty") or first.empty() or last is not None
        self._last = weakref.ref(first), offset + tokens
        # A cache that is quantised on the way is another object, which goes on where the one before ended.
        goes_on = last is not None and (last[0]() is first or last[1] == offset)
        return offset == 0 or not goes_on


def flash_model(model_class: type, tied: bool = False, config: Mapping[str, Any] | None = None) -> type:
    """The architecture's class, which tells its run when a reply begins and takes no weights for an FFN on flash.
    tied: whether the head is the embedding, whatever the architecture makes of it. config: normalised; what it says and
    the architecture does not look at."""
    model_class = fit_class(model_class, config or {})

    class FlashModel(model_class):
        def __init__(self, *arguments: Any):
            super().__init__(*arguments)
            self._replies = _Replies()

        def __call__(self, inputs: mx.array, cache: Any = None, **options: Any) -> Any:
            if (run := getattr(self, "flash", None)) is not None and self._replies.begins(inputs.shape[1], cache):
                run.begin_reply()
            return super().__call__(inputs, cache=cache, **options)

        def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            found = super().sanitize(weights) if hasattr(model_class, "sanitize") else weights
            return fit_weights(self, fit_head(self, found, tied), config or {})

        def load_weights(self, file_or_weights: Any, strict: bool = True) -> Any:
            """As any module of MLX; raises ConfigError for an FFN's weights, which would be dropped if not strict."""
            if isinstance(file_or_weights, str):
                loaded: Any = mx.load(file_or_weights)
                file_or_weights = list(loaded.items())
            taken = tuple(f"{name}." for name, module in self.named_modules() if isinstance(module, FlashFFNModule))
            wrong = [] if strict else [name for name, _ in file_or_weights if name.startswith(taken)]
            if wrong:
                raise ConfigError(
                    f"{len(wrong)} tensors are for FFNs, which are read from flash, such as {wrong[0]!r}; an adapter "
                    'can change attention only ("keys" in its lora_parameters)'
                )
            return super().load_weights(file_or_weights, strict)

    return FlashModel


def _model_class(
    spec: ModelSpec, ffns: Sequence[FFN], config: Mapping[str, Any]
) -> tuple[Callable[[Any], nn.Module], type]:
    """What mlx-lm calls to make a model of a family: its own class, with the FFN modules replaced from the start.
    Strict loading then asks for the resident tensors only, and the FFN's own, lazy until used, are never allocated."""
    module, attribute = MODULES[spec.family]
    code = fit_architecture(module, config)

    def make(args: Any) -> nn.Module:
        model = flash_model(code.Model, spec.tied, config)(args)
        if len(model.layers) != len(ffns):
            raise ConfigError(f"mlx-lm builds {len(model.layers)} layers, the checkpoint has {len(ffns)}")
        for i, (layer, ffn) in enumerate(zip(model.layers, ffns, strict=True)):
            biases: list[tuple[str, int]] = []
            if isinstance(spec, DenseSpec):
                check_module(getattr(layer, attribute), spec, i)
            if spec.ffn_bias:
                sizes = {"up": spec.layers[i].intermediate, "down": spec.dim, "gate": spec.layers[i].intermediate}
                names = {role: spec.table.names[role].rpartition(".")[2] for role in sizes if role in spec.table.names}
                biases = [(name, sizes[role]) for role, name in names.items()]
            setattr(layer, attribute, FlashFFNModule(ffn, biases))
        fit_modules(model, config)
        return model

    return make, code.ModelArgs


def _config(spec: ModelSpec) -> dict[str, Any]:
    """What the spec says, in mlx-lm's keys: its own defaults and spellings (`rope_parameters`, whether the head is
    tied when the config is silent) are not those of every config.json, and both backends must read one config alike."""
    if isinstance(spec, DenseSpec):  # MiniCPM's scale of the head is left out by mlx-lm where it is tied
        return {"tie_word_embeddings": False} if spec.family == "minicpm" else {}
    rope = spec.rope
    if rope is None:
        raise ConfigError(f"family {spec.family!r} without rotary positions does not run on mlx")
    if spec.family == "openelm":
        return {
            "share_input_output_layers": spec.tied,
            "normalize_qk_projections": spec.qk_norm,
            "rms_norm_eps": spec.eps,
            "rope_freq_constant": rope.base,
        }
    return {
        "tie_word_embeddings": spec.tied,
        "head_dim": spec.head_dim,
        "num_key_value_heads": spec.layers[0].kv_heads,
        "max_position_embeddings": spec.max_context,
        "rope_theta": rope.base,
        "rope_scaling": None,  # positions are set when the model is built
        "layer_types": None,
        "sliding_window": None,
    }


def load_tokenizer(path: Path, eos_ids: Sequence[int]) -> Any:
    """mlx-lm's tokenizer of a folder, which stops at any of `eos_ids` (none given: at the tokenizer's own)."""
    with reading_tokenizer(path) as keywords:
        return compat.load_tokenizer(path, dict(keywords), eos_token_ids=list(eos_ids) or None)


def steps(
    model: nn.Module,
    prompt_ids: Sequence[int],
    max_tokens: int,
    sampling: Sampling,
    prefill_chunk: int,
    kept: PromptCache | None = None,
) -> Iterator[int]:
    """Ids of the reply, at most `max_tokens`; the prompt passes in chunks of `prefill_chunk` tokens, without what
    `kept` holds of it."""
    if max_tokens < 1:
        return
    if sampling.seed is not None:
        mx.random.seed(sampling.seed)
    temp = 0.0 if sampling.temp < LEAST_TEMPERATURE else sampling.temp
    top_k = sampling.top_k if sampling.top_k < model.flash.plan.spec.vocab else 0  # mlx-lm refuses more
    sampler = make_sampler(temp=temp, top_p=sampling.top_p, top_k=top_k)
    reply = _Reply(model, prefill_chunk, kept or PromptCache())
    with _wired(model):
        loop = _steps_ahead if _never_reads(model.flash.plan) else _steps_in_turn
        yield from loop(reply, prompt_ids, max_tokens, sampler)


def _never_reads(plan: Any) -> bool:
    """Whether decoding reads nothing, but for what it may read once."""
    if plan.exact or plan.all_resident:
        return bool(plan.all_resident)
    if plan.selection.name not in ("prompt", "static") or plan.config.reselect is not None:
        return False
    slots = zip(plan.memory.capacities, plan.costs.counts, strict=True)
    return all(capacity >= round(plan.selection.fraction * count) for capacity, count in slots)


class _Reply:
    """One reply's KV cache."""

    def __init__(self, model: nn.Module, prefill_chunk: int, kept: PromptCache):
        self.model, self.chunk, self.kept = model, prefill_chunk, kept
        self.cache: list[Any] = []

    def _take_up(self, ids: Sequence[int]) -> int:
        """How many tokens of a prompt the kept cache holds, which is cut to them; a new one where it holds none."""
        held, cache = self.kept.common(ids), self.kept.cache
        if held and can_trim_prompt_cache(cache):
            for layer in cache:  # each by itself: an interrupt leaves some of them a token ahead
                layer.trim(layer.offset - held)
        else:
            held, cache = 0, make_prompt_cache(self.model)
        self.cache = self.kept.cache = cache
        self.kept.ids = list(ids[:held])
        return held

    def prefill(self, ids: Sequence[int]) -> mx.array:  # (T,) -> (1, vocab)
        """An exact selector takes the last token alone, as mlx-lm does, so that the head runs for one token only; a
        lossy one selects for no token of the prompt."""
        alone = 1 if self.model.flash.plan.exact else 0
        prompt = mx.array(list(ids[self._take_up(ids) :]), mx.int32)
        self.model.flash.begin_reply()
        while prompt.size > max(alone, 1):
            count = min(self.chunk, prompt.size - alone)
            logits = self._logits(prompt[:count], decoding=False)
            prompt = prompt[count:]
            if prompt.size:
                mx.eval([layer.state for layer in self.cache])
                mx.clear_cache()
        if prompt.size:
            logits = self._logits(prompt, decoding=False)
        self.kept.ids = list(ids)
        return logits

    def decode(self, token: mx.array) -> mx.array:  # (1,) -> (1, vocab)
        return self._logits(token, decoding=True)

    def _logits(self, ids: mx.array, decoding: bool) -> mx.array:
        with mx.stream(generation_stream), self.model.flash.phase(decoding):
            return self.model(ids[None], cache=self.cache)[:, -1, :]


Sampler = Callable[[mx.array], mx.array]


def _sample(logits: mx.array, sampler: Sampler) -> mx.array:
    """logits (1, vocab) -> the token (1,), begun but not waited for."""
    with mx.stream(generation_stream):
        token = sampler(logits - mx.logsumexp(logits, keepdims=True))
        mx.async_eval(token)
    return token


def _steps_ahead(reply: _Reply, prompt: Sequence[int], max_tokens: int, sampler: Sampler) -> Iterator[int]:
    """Each step is begun before the token that it follows is given: the GPU never waits for Python. Not the first one,
    which may read what it selects."""
    token = _sample(reply.prefill(prompt), sampler)
    known = _as_int(token)
    yield known
    if max_tokens > 1:
        token = _sample(reply.decode(token), sampler)
    for made in range(2, max_tokens + 1):
        reply.kept.ids.append(known)
        following = _sample(reply.decode(token), sampler) if made < max_tokens else token
        known = _as_int(token)
        yield known
        token = following


def _steps_in_turn(reply: _Reply, prompt: Sequence[int], max_tokens: int, sampler: Sampler) -> Iterator[int]:
    """Where steps read, a step ahead would delay each token by the next one's reads."""
    token = _sample(reply.prefill(prompt), sampler)
    for made in range(1, max_tokens + 1):
        known = _as_int(token)
        yield known
        if made < max_tokens:
            token = _sample(reply.decode(token), sampler)
            reply.kept.ids.append(known)


def _as_int(token: mx.array) -> int:
    found = token.item()
    assert isinstance(found, int)
    return found


def forced(
    model: nn.Module, prompt_ids: Sequence[int], next_ids: Sequence[int], prefill_chunk: int
) -> Iterator[np.ndarray]:
    """Yield the logits (vocab,) fp32 after the prompt, then after each of `next_ids`."""
    reply = _Reply(model, prefill_chunk, PromptCache())
    logits = reply.prefill(prompt_ids)
    yield np.array(logits[0].astype(mx.float32))
    for token in next_ids:
        yield np.array(reply.decode(mx.array([token], mx.int32))[0].astype(mx.float32))


@contextmanager
def _wired(model: nn.Module) -> Iterator[None]:
    """On Metal, wire what is allocated now (dense part, slabs, staging) and no more: mlx-lm's own limit is the most
    that the machine recommends. Theirs is put back at the end. Not run: needs Metal."""
    with wired_limit(model, [generation_stream]):  # type: ignore[list-item]
        most = mx.device_info().get("max_recommended_working_set_size")
        if most is not None:
            mx.set_wired_limit(min(int(most), mx.get_active_memory()))
        yield
