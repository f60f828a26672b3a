"""mlx-lm's models with their FFN taken out: the same logits and tokens as mlx-lm's own, and its tools still work."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")

import mlx_lm  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from mlx_lm.generate import generate_step  # noqa: E402
from mlx_lm.tuner.utils import linear_to_lora_layers  # noqa: E402
from mlx_lm.utils import load_model  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

from mlx_flash.engine.backends.base import BLOCK, FFNSpec  # noqa: E402
from mlx_flash.engine.backends.mlx.backend import MlxBackend, cache_limit_bytes  # noqa: E402
from mlx_flash.errors import ConfigError, FormatError  # noqa: E402
from mlx_flash.models.mlx.flash_modules import FlashFFNModule  # noqa: E402
from mlx_flash.models.mlx.model import build, build_model, load_tokenizer, steps  # noqa: E402
from mlx_flash.models.specs.config_reader import read_spec  # noqa: E402
from mlx_flash.models.specs.model_spec import ModelSpec  # noqa: E402
from mlx_flash.models.text.sampling import Sampling  # noqa: E402

VOCAB, DIM = 64, 64
PROMPT = [1, 5, 9, 33, 2, 17, 60, 8, 21]
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": DIM,
    "num_hidden_layers": 3,
    "intermediate_size": 2 * BLOCK + 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "rope_theta": 5000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "eos_token_id": [3, 4],
}
OPENELM = {
    "model_type": "openelm",
    "vocab_size": VOCAB,
    "model_dim": DIM,
    "head_dim": 16,
    "num_transformer_layers": 3,
    "ffn_dim_divisor": BLOCK,
    "ffn_multipliers": [2.0, 4.0, 11.0],
    "num_query_heads": [4, 4, 8],
    "num_kv_heads": [2, 2, 2],
    "activation_fn_name": "swish",
    "max_context_length": 128,
    "eos_token_id": 3,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "openelm": OPENELM,
    "openelm-untied": OPENELM | {"share_input_output_layers": False},
    "openelm-relu": OPENELM | {"activation_fn_name": "relu"},
    "llama": LLAMA | {"model_type": "llama", "tie_word_embeddings": False},
    "llama-relu": LLAMA | {"model_type": "llama", "hidden_act": "relu"},
    "llama3-rope": LLAMA
    | {
        "model_type": "llama",
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "mistral": LLAMA | {"model_type": "mistral", "head_dim": 32, "sliding_window": None},
    "qwen2": LLAMA | {"model_type": "qwen2"},
    "qwen3": LLAMA | {"model_type": "qwen3", "head_dim": 32},
}


def mlx_lms_tokens(model: Any, prompt: list[int], count: int) -> list[int]:
    return [int(token) for token, _ in generate_step(mx.array(prompt), model, max_tokens=count)]


def running(*arguments: Any) -> Any:
    """The model, as part of a run in which something is streamed."""
    model = build_model(*arguments)
    plan = SimpleNamespace(all_resident=False, exact=True, spec=arguments[1])
    shared = SimpleNamespace(phase=lambda decoding: nullcontext(), begin_reply=lambda: None)
    model.flash = SimpleNamespace(plan=plan, shared=shared)
    return model


@dataclass
class Case:
    """A model of mlx-lm with random weights, and the folder of its resident tensors beside its FFN as bundles."""

    config: dict[str, Any]
    spec: ModelSpec
    path: Path
    original: Any
    ffns: list[Callable[[Any], Any]]


def dense_ffn(spec: ModelSpec, layer: int, tensors: dict[str, np.ndarray], dtype: str) -> Callable[[Any], Any]:
    """All bundles of a layer in one slab, filled from the checkpoint's tensors; ReLU in decode through `gate`."""
    backend, layout = MlxBackend(), spec.layout(layer, dtype)
    names = [part.name for part in layout.parts]
    slab = backend.slab(layout, layout.count, names)
    for target, name in zip(slab.targets, names, strict=True):
        ref = spec.ffn_sources(layer)[name]
        rows = tensors[ref.name].T if ref.transposed else tensors[ref.name][ref.first_row :][: layout.count]
        target.rows[:] = np.ascontiguousarray(rows).view(np.uint8)
    ffn_spec = FFNSpec(layout, spec.activation, spec.gated)

    def ffn(x: Any) -> Any:
        work = backend.ffn(ffn_spec, x)
        if spec.activation == "relu" and x.shape[-2] == 1:
            fired = work.gate(slab)
            assert 0 < len(fired) < layout.count
            work.scalars(fired, slab, fired)
            work.down()
        else:
            work.dense(slab, 0, 0, layout.count)
        return work.result()

    return ffn


def as_stored(tensor: Any) -> np.ndarray:
    """The tensor's items, bfloat16 as uint16."""
    return np.array(tensor.view(mx.uint16) if tensor.dtype == mx.bfloat16 else tensor)


def make_case(name: str, root: Path, dtype: str = "float32") -> Case:
    """Weights large enough that a wrong FFN cannot go unnoticed in the logits."""
    config = CONFIGS[name]
    spec = read_spec(config)
    rng = np.random.default_rng(3)
    shapes = spec.resident_shapes() | spec.ffn_shapes()
    tensors = {}
    for key, shape in shapes.items():
        spread = 1.0 if "embed" in key else 2 * shape[-1] ** -0.5
        values = rng.standard_normal(shape) * spread + (1.0 if len(shape) == 1 else 0.0)
        tensors[key] = mx.array(values.astype(np.float32)).astype(getattr(mx, dtype))
    original, flash = root / "original", root / "flash"
    for folder, keys in ((original, shapes), (flash, spec.resident_shapes())):
        folder.mkdir(parents=True)
        mx.save_safetensors(str(folder / "model.safetensors"), {key: tensors[key] for key in keys})
        extra = {"flash": {"format_version": 1}} if folder == flash else {}
        (folder / "config.json").write_text(json.dumps(config | extra))
    model, _ = load_model(original)
    stored = {key: as_stored(tensors[key]) for key in spec.ffn_shapes()}
    ffns = [dense_ffn(spec, layer, stored, dtype) for layer in range(len(spec.layers))]
    return Case(config, spec, flash, model, ffns)


def with_relu(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """mlx-lm's gated MLPs know SiLU only."""
    module = __import__(f"mlx_lm.models.{family}", fromlist=["swiglu"])
    monkeypatch.setattr(module, "swiglu", lambda gate, up: mx.maximum(gate, 0) * up)


@pytest.fixture
def case(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    name = request.param
    if "relu" in name:
        with_relu(monkeypatch, CONFIGS[name]["model_type"])
    return make_case(name, tmp_path)


@pytest.fixture
def llama(tmp_path: Path) -> Case:
    return make_case("llama", tmp_path)


GREEDY = Sampling()


def expect_close(got: Any, wanted: Any, tolerance: float) -> None:
    got, wanted = np.array(got.astype(mx.float32)), np.array(wanted.astype(mx.float32))
    assert np.abs(got - wanted).max() <= tolerance * np.abs(wanted).max()


@pytest.mark.parametrize("case", CONFIGS, indirect=True)
def test_logits_and_greedy_tokens_are_those_of_mlx_lm(case: Case) -> None:
    model = running(case.path, case.spec, case.ffns)
    prompt = mx.array([PROMPT])
    expect_close(model(prompt), case.original(prompt), 1e-5)
    caches = [mlx_lm.models.cache.make_prompt_cache(m) for m in (model, case.original)]
    for ids in (prompt[:, :5], prompt[:, 5:], prompt[:, :1], prompt[:, 1:2]):
        expect_close(model(ids, cache=caches[0]), case.original(ids, cache=caches[1]), 1e-5)
    wanted = mlx_lms_tokens(case.original, PROMPT, 12)
    assert len(set(wanted)) > 2
    for chunk in (1, 4, 512):
        assert list(steps(model, PROMPT, 12, GREEDY, chunk)) == wanted


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_checkpoints_dtype_stays_and_logits_are_close(dtype: str, tmp_path: Path) -> None:
    case = make_case("qwen3", tmp_path, dtype)
    model = running(case.path, case.spec, case.ffns)
    logits = model(mx.array([PROMPT]))
    assert logits.dtype == getattr(mx, dtype)
    assert {tensor.dtype for _, tensor in tree_flatten(model.parameters())} == {getattr(mx, dtype)}
    expect_close(logits, case.original(mx.array([PROMPT])), {"bfloat16": 0.03, "float16": 0.004}[dtype])


def test_only_resident_tensors_are_held_and_mlx_keeps_little_else(llama: Case) -> None:
    llama.original = None
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = running(llama.path, llama.spec, llama.ffns)
    names = {name for name, _ in tree_flatten(model.parameters())}
    assert names == set(llama.spec.resident_shapes())
    resident = sum(tensor.nbytes for _, tensor in tree_flatten(model.parameters()))
    ffn = sum(4 * int(np.prod(shape)) for shape in llama.spec.ffn_shapes().values())
    assert mx.get_peak_memory() - before < resident + ffn // 10
    assert mx.set_cache_limit(1 << 30) == cache_limit_bytes(DIM)


def test_build_asks_for_each_layers_ffn(llama: Case) -> None:
    asked = []

    def make_ffn(layer: int) -> Any:
        asked.append(layer)
        return llama.ffns[layer]

    checkpoint: Any = SimpleNamespace(path=llama.path)
    model = build(checkpoint, llama.spec, MlxBackend(), make_ffn, "float32", 128)
    assert asked == [0, 1, 2]
    assert all(isinstance(layer.mlp, FlashFFNModule) for layer in model.layers)
    expect_close(model(mx.array([PROMPT])), llama.original(mx.array([PROMPT])), 1e-5)


def test_the_config_is_read_as_the_spec_reads_it(tmp_path: Path) -> None:
    """mlx-lm's Llama takes neither the newer spelling of RoPE's base nor an absent key for an untied head."""
    wanted = make_case("llama", tmp_path)
    config = {k: v for k, v in wanted.config.items() if k not in ("rope_theta", "tie_word_embeddings")}
    config["rope_parameters"] = {"rope_theta": 5000.0, "rope_type": "default"}
    (wanted.path / "config.json").write_text(json.dumps(config))
    model = running(wanted.path, read_spec(config, wanted.spec.resident_shapes()), wanted.ffns)
    expect_close(model(mx.array([PROMPT])), wanted.original(mx.array([PROMPT])), 1e-5)


def word_tokenizer(path: Path) -> None:
    """Token i is the word `w<i>`."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w3").save_pretrained(path)


def test_mlx_lms_own_generation_accepts_the_model(llama: Case) -> None:
    word_tokenizer(llama.path)
    model = running(llama.path, llama.spec, llama.ffns)
    tokenizer = load_tokenizer(llama.path, llama.spec.eos_ids)
    assert tokenizer.eos_token_ids == {3, 4}
    tokens = mlx_lms_tokens(llama.original, PROMPT, 8)
    kept = next((i for i, token in enumerate(tokens) if token in (3, 4)), len(tokens))
    assert kept > 2
    text = mlx_lm.generate(model, tokenizer, PROMPT, max_tokens=8)
    assert text.split() == [f"w{token}" for token in tokens[:kept]]
    assert text == mlx_lm.generate(llama.original, tokenizer, PROMPT, max_tokens=8)
    streamed = list(mlx_lm.stream_generate(model, tokenizer, PROMPT, max_tokens=8, prefill_step_size=3))
    assert [each.token for each in streamed] == tokens[: kept + 1][: len(streamed)]
    drafted = mlx_lm.generate(model, tokenizer, PROMPT, max_tokens=8, draft_model=llama.original)
    assert drafted == text


def test_a_lora_adapter_goes_on(llama: Case) -> None:
    model = running(llama.path, llama.spec, llama.ffns)
    before = model(mx.array([PROMPT]))
    linear_to_lora_layers(model, 2, {"rank": 4, "scale": 10.0, "dropout": 0.0})
    expect_close(model(mx.array([PROMPT])), before, 1e-6)  # an adapter begins as nothing
    adapters = {name for name, _ in tree_flatten(model.parameters()) if "lora" in name}
    assert adapters and not any("mlp" in name for name in adapters)


def test_steps_end_where_they_are_told_and_may_be_abandoned(llama: Case) -> None:
    model = running(llama.path, llama.spec, llama.ffns)
    ten = list(steps(model, PROMPT, 10, GREEDY, 4))
    assert len(ten) == 10 and all(type(token) is int for token in ten)
    assert list(steps(model, PROMPT, 1, GREEDY, 4)) == ten[:1]
    assert list(steps(model, PROMPT, 0, GREEDY, 4)) == list(steps(model, PROMPT, -1, GREEDY, 4)) == []
    started = steps(model, PROMPT, 10, GREEDY, 4)
    assert [next(started), next(started)] == ten[:2]
    started.close()
    assert list(steps(model, [PROMPT[0]], 2, GREEDY, 4)) == mlx_lms_tokens(llama.original, [PROMPT[0]], 2)
    assert list(steps(model, PROMPT, 10, GREEDY, 4)) == ten


def test_a_prompt_passes_in_chunks(llama: Case) -> None:
    lengths = []

    def first(x: Any) -> Any:
        lengths.append(x.shape[-2])
        return llama.ffns[0](x)

    model = running(llama.path, llama.spec, [first, *llama.ffns[1:]])
    list(steps(model, PROMPT, 3, GREEDY, 3))
    # The prompt's last token is the first step; nothing is computed beyond the last token asked for.
    assert lengths == [3, 3, 2, 1, 1, 1]


def test_top_k_and_top_p_reach_the_sampler(llama: Case) -> None:
    model = running(llama.path, llama.spec, llama.ffns)
    best = list(steps(model, PROMPT, 12, GREEDY, 64))
    for field in ({"top_k": 1}, {"top_p": 1e-6}):
        assert list(steps(model, PROMPT, 12, Sampling(temp=3.0, seed=1, **field), 64)) == best
    assert list(steps(model, PROMPT, 12, Sampling(temp=3.0, seed=1), 64)) != best


def test_a_seed_repeats_and_another_differs(llama: Case) -> None:
    model = running(llama.path, llama.spec, llama.ffns)
    first, again, other = (list(steps(model, PROMPT, 16, Sampling(temp=3.0, seed=seed), 64)) for seed in (5, 5, 6))
    assert first == again != other


def test_an_unsuitable_checkpoint_is_refused_by_name(llama: Case, tmp_path: Path) -> None:
    opt = read_spec(
        {
            "model_type": "opt",
            "vocab_size": VOCAB,
            "hidden_size": DIM,
            "ffn_dim": 128,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "activation_function": "relu",
        }
    )
    with pytest.raises(ConfigError, match="opt.*openelm, llama"):
        build_model(llama.path, opt, llama.ffns[:1])
    file = llama.path / "model.safetensors"
    whole, tensors = file.read_bytes(), mx.load(str(file))
    mx.eval(tensors)
    lacking = {name: tensor for name, tensor in tensors.items() if "layers.1.self_attn.q" not in name}
    mx.save_safetensors(str(file), lacking)
    with pytest.raises(FormatError, match="layers.1.self_attn.q_proj"):
        build_model(llama.path, llama.spec, llama.ffns)
    mx.save_safetensors(str(file), tensors | {"model.layers.0.mlp.up_proj.weight": mx.zeros((8, 8))})
    with pytest.raises(FormatError, match="mlp.up_proj"):
        build_model(llama.path, llama.spec, llama.ffns)
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FormatError, match=str(llama.path)):
        build_model(llama.path, llama.spec, llama.ffns)
    file.unlink()
    with pytest.raises(FormatError, match="No safetensors"):
        build_model(llama.path, llama.spec, llama.ffns)
    file.write_bytes(whole)
    config = {key: value for key, value in llama.config.items() if key != "num_attention_heads"}
    (llama.path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="num_attention_heads"):
        build_model(llama.path, llama.spec, llama.ffns)
    (llama.path / "config.json").write_text(json.dumps(llama.config | {"model_file": "evil.py"}))
    (llama.path / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(FormatError, match="evil.py"):
        build_model(llama.path, llama.spec, llama.ffns)
