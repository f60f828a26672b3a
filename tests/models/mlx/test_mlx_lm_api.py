"""On the mlx backend `model` is an mlx-lm model: mlx-lm's own functions take it unchanged, and give the same tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mlx_flash
from mlx_flash.tools.inspection import inspect_model
from mlx_flash.tools.trace_recording import record_ids
from tests.conftest import shared_path
from tests.tiny import make_tiny, three_budgets

mx = pytest.importorskip("mlx.core", reason="this is about mlx-lm")
mlx_lm = pytest.importorskip("mlx_lm", reason="this is about mlx-lm")

from mlx_lm.generate import batch_generate, generate_step, speculative_generate_step  # noqa: E402
from mlx_lm.models.cache import (  # noqa: E402
    QuantizedKVCache,
    RotatingKVCache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)
from mlx_lm.sample_utils import make_logits_processors, make_sampler  # noqa: E402
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters  # noqa: E402

from mlx_flash.errors import ConfigError  # noqa: E402

PROMPT = "Once upon a time"
IDS = [256, *range(40, 70)]
LONG = [256, *np.random.default_rng(1).integers(0, 255, 59).tolist()]


@pytest.fixture
def flash(tmp_path: Path) -> Path:
    return mlx_flash.convert(shared_path("data/models/stories260K"), tmp_path / "flash")


def test_generate_and_stream_generate_take_the_model(flash: Path) -> None:
    import mlx.nn as nn

    plain = mlx_lm.generate(*mlx_lm.load(str(shared_path("data/models/stories260K"))), PROMPT, max_tokens=60)
    assert plain.startswith(", there was a little girl named Lily.")
    for memory in ("auto", "25MB"):
        model, tokenizer = mlx_flash.load(flash, backend="mlx", memory=memory)
        assert isinstance(model, nn.Module)
        assert mlx_lm.generate(model, tokenizer, PROMPT, max_tokens=60) == plain
        streamed = "".join(r.text for r in mlx_lm.stream_generate(model, tokenizer, PROMPT, max_tokens=60))
        assert streamed == plain
        assert mlx_flash.generate(model, tokenizer, PROMPT, max_tokens=60) == plain
        model.flash.close()


def test_both_backends_give_the_same_text(flash: Path) -> None:
    texts = set()
    for backend in ("mlx", "numpy"):
        model, tokenizer = mlx_flash.load(flash, backend=backend)
        texts.add(mlx_flash.generate(model, tokenizer, PROMPT, max_tokens=60))
        model.flash.close()
    assert len(texts) == 1


class Pair:
    """mlx-lm's own model of a folder, and ours, which reads most of its FFN for every token."""

    def __init__(self, source: Path, **fields: Any):
        self.plain, self.plain_tokenizer = mlx_lm.load(str(source))
        path = mlx_flash.convert(source, source.parent / f"{source.name}-flash")
        self.path, select = path, fields.get("select", "auto")
        smallest = three_budgets(path, "mlx", select)[0]
        self.flash, self.tokenizer = mlx_flash.load(path, backend="mlx", memory=smallest, **fields)


@pytest.fixture(scope="module")
def silu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Heads of 32 items: MLX quantises no fewer."""
    pair = Pair(make_tiny("llama3-rope", tmp_path_factory.mktemp("silu")))
    yield pair
    pair.flash.flash.close()


@pytest.fixture(scope="module")
def relu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """`gate` at work: only what fires is read."""
    with pytest.MonkeyPatch.context() as patch:  # mlx-lm's Qwen3 knows SiLU only
        patch.setattr("mlx_lm.models.qwen3.swiglu", lambda gate, up: mx.maximum(gate, 0) * up)
        pair = Pair(make_tiny("qwen3-relu", tmp_path_factory.mktemp("relu")), select="gate")
        yield pair
    pair.flash.flash.close()


@pytest.fixture(params=["silu", "relu"])
def pair(request: pytest.FixtureRequest) -> Pair:
    return request.getfixturevalue(request.param)


def tokens(model: Any, prompt: list[int] = IDS, count: int = 12, **options: Any) -> list[int]:
    return [int(token) for token, _ in generate_step(mx.array(prompt), model, max_tokens=count, **options)]


def test_samplers_and_logits_processors(pair: Pair) -> None:
    greedy = tokens(pair.plain)
    bias = {greedy[0]: -100.0}
    for options in ({"temp": 0.8, "top_p": 0.9}, {"temp": 1.0, "top_k": 5}, {"temp": 1.0, "min_p": 0.05}):
        found = []
        for model in (pair.plain, pair.flash):
            mx.random.seed(5)
            found.append(tokens(model, sampler=make_sampler(**options)))
        assert found[0] == found[1] != greedy
    for options in ({"logit_bias": bias}, {"repetition_penalty": 1.5}, {"presence_penalty": 2.0}):
        wanted, got = (tokens(m, logits_processors=make_logits_processors(**options)) for m in (pair.plain, pair.flash))
        assert got == wanted
    assert wanted != tokens(pair.plain, logits_processors=make_logits_processors(bias)) != greedy
    stream = mlx_lm.stream_generate(
        pair.flash, pair.tokenizer, IDS, max_tokens=4, logits_processors=make_logits_processors(bias)
    )
    assert next(stream).token == tokens(pair.plain, logits_processors=make_logits_processors(bias))[0]


def test_batch_generate_takes_prompts_of_several_lengths(pair: Pair) -> None:
    prompts = [IDS, IDS[:3], IDS[:1], LONG, IDS[:17]]
    alone = [tokens(pair.plain, prompt, 9) for prompt in prompts]
    for options in ({}, {"prefill_batch_size": 2, "completion_batch_size": 3}):
        found = batch_generate(
            pair.flash, pair.tokenizer, prompts, max_tokens=9, return_token_ids=True, **options
        ).token_ids
        for wanted, got in zip(alone, found, strict=True):
            assert got == wanted[: len(got)] and (len(got) == 9 or wanted[len(got)] in pair.tokenizer.eos_token_ids)


def test_a_batch_reads_the_union_of_its_sequences_bundles(relu: Pair) -> None:
    model, asked = relu.flash, {}
    record_ids(model.flash, lambda layer, ids: asked.setdefault(layer, []).append(set(ids.tolist())))

    def ids_of(prompts: list[list[int]]) -> set[int]:
        asked.clear()
        batch_generate(model, relu.tokenizer, prompts, max_tokens=1)
        return asked[0][0]  # of the prompts' last tokens

    first, second = ids_of([IDS]), ids_of([LONG])
    assert first != second
    assert ids_of([IDS, LONG]) == first | second


def test_a_prompt_cache_is_saved_loaded_trimmed_and_used_again(pair: Pair, tmp_path: Path) -> None:
    file = str(tmp_path / "cache.safetensors")
    found = []
    for model in (pair.plain, pair.flash):
        cache = make_prompt_cache(model)
        first = tokens(model, LONG, 6, prompt_cache=cache)
        save_prompt_cache(file, cache)
        again = load_prompt_cache(file)
        on = tokens(model, IDS[:5], 6, prompt_cache=again)
        one = tokens(model, [first[-1]], 6, prompt_cache=load_prompt_cache(file))
        held = cache[0].offset
        assert trim_prompt_cache(cache, held - 20) == held - 20
        trimmed = tokens(model, LONG[20:], 6, prompt_cache=cache)
        assert trimmed == first
        found.append([first, on, one])
    assert found[0] == found[1]


def test_a_rotating_kv_cache(relu: Pair) -> None:
    assert isinstance(make_prompt_cache(relu.flash, max_kv_size=16)[0], RotatingKVCache)
    found = [tokens(model, LONG, 20, max_kv_size=16) for model in (relu.plain, relu.flash)]
    assert found[0] == found[1] != tokens(relu.plain, LONG, 20)


def test_a_quantised_kv_cache(silu: Pair) -> None:
    found = []
    for model in (silu.plain, silu.flash):
        cache = make_prompt_cache(model)
        # Quantised from the 70th token on: in the midst of the reply.
        late = tokens(model, LONG, 20, prompt_cache=cache, kv_bits=4, kv_group_size=32, quantized_kv_start=70)
        assert all(isinstance(layer, QuantizedKVCache) for layer in cache)
        found.append([late, tokens(model, LONG, 20, kv_bits=8, kv_group_size=32, quantized_kv_start=0)])
    assert found[0] == found[1]


def test_speculative_decoding_with_a_resident_draft(flash: Path) -> None:
    draft, _ = mlx_lm.load(str(shared_path("data/models/llama2xs")))
    plain, tokenizer = mlx_lm.load(str(shared_path("data/models/stories260K")))
    prompt = tokenizer.encode(PROMPT)
    wanted = tokens(plain, prompt, 40)
    model, _ = mlx_flash.load(flash, backend="mlx", memory=three_budgets(flash, "mlx", "auto")[0])
    for number in (1, 3):
        made = list(speculative_generate_step(mx.array(prompt), model, draft, num_draft_tokens=number, max_tokens=40))
        assert [int(token) for token, _, _ in made] == wanted
        drafted = sum(from_draft for *_, from_draft in made)
        assert 0 < drafted < 40
    # A pass for several tokens reads what is not resident once.
    model.flash.stats.reset()
    list(speculative_generate_step(mx.array(prompt), model, draft, num_draft_tokens=3, max_tokens=40))
    drafted_bytes = model.flash.stats.bytes_read
    model.flash.stats.reset()
    tokens(model, prompt, 40)
    assert drafted_bytes < model.flash.stats.bytes_read
    model.flash.close()


def make_adapter(model: Any, folder: Path, keys: list[str]) -> Path:
    """A LoRA adapter with random weights on `keys` of the last two layers of `model`, which it changes."""
    parameters = {"rank": 4, "scale": 10.0, "dropout": 0.0, "keys": keys}
    linear_to_lora_layers(model, 2, parameters)
    adapters = {name: value for name, value in flat(model) if "lora" in name}
    folder.mkdir()
    rng = np.random.default_rng(2)
    changed = {n: mx.array(rng.standard_normal(v.shape).astype(np.float32) * 0.2) for n, v in adapters.items()}
    mx.save_safetensors(str(folder / "adapters.safetensors"), changed)
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def flat(model: Any) -> list[tuple[str, Any]]:
    from mlx.utils import tree_flatten

    return tree_flatten(model.parameters())


def test_a_lora_adapter_on_attention_is_loaded(tmp_path: Path) -> None:
    source = make_tiny("llama", tmp_path)
    pair = Pair(source)
    wanted = tokens(pair.plain)
    assert tokens(pair.flash) == wanted
    folder = make_adapter(mlx_lm.load(str(source))[0], tmp_path / "attention", ["self_attn.q_proj", "self_attn.v_proj"])
    changed = tokens(load_adapters(pair.plain, str(folder)))
    assert tokens(load_adapters(pair.flash, str(folder))) == changed != wanted
    pair.flash.flash.close()


def test_an_adapter_for_ffns_is_refused(silu: Pair, tmp_path: Path) -> None:
    """Else what it changes of an FFN would be dropped in silence."""
    model, _ = mlx_flash.load(silu.path, backend="mlx")
    name = "model.layers.2.mlp.up_proj.lora_a"
    with pytest.raises(ConfigError, match=f"{name}.*attention only"):
        model.load_weights([(name, mx.zeros((64, 4)))], strict=False)
    mx.save_safetensors(str(tmp_path / "a.safetensors"), {name: mx.zeros((64, 4))})
    with pytest.raises(ConfigError, match=name):
        model.load_weights(str(tmp_path / "a.safetensors"), strict=False)
    folder = make_adapter(mlx_lm.load(str(silu.path.parent / "llama3-rope"))[0], tmp_path / "ffn", ["mlp.up_proj"])
    with pytest.raises((ConfigError, ValueError), match=name):
        load_adapters(model, str(folder))
    model.flash.close()


def test_a_selection_lasts_as_long_as_its_conversation(tmp_path: Path) -> None:
    """`prompt` selects anew where mlx-lm's loops turn to another conversation, of which nothing but a cache tells."""
    path = mlx_flash.convert(make_tiny("llama3-rope", tmp_path), tmp_path / "flash")
    model, tokenizer = mlx_flash.load(path, backend="mlx", select="prompt:0.3")
    shared = model.flash.shared
    caches = [make_prompt_cache(model), make_prompt_cache(model)]

    def replies(prompt: list[int], **options: Any) -> int:
        before = shared.reply
        tokens(model, prompt, 3, **options)
        return shared.reply - before

    assert replies(LONG, prefill_step_size=8, prompt_cache=caches[0]) == 1
    assert replies(IDS, prompt_cache=caches[1]) == 1
    assert replies(IDS[:1], prompt_cache=caches[1]) == 0
    assert replies(IDS[:1], prompt_cache=caches[0]) == 1
    assert replies(LONG, kv_bits=8, kv_group_size=32, quantized_kv_start=0) == 1
    assert replies(IDS, max_kv_size=8) == 1
    before = shared.reply
    for count in (1, 2):
        batch_generate(model, tokenizer, [IDS, LONG, IDS[:4]], max_tokens=4)
        assert shared.reply == before + count
    model.flash.close()


def test_the_first_token_of_every_sequence_counts_for_no_selection(tmp_path: Path) -> None:
    """Its activations are like no other's."""
    path = mlx_flash.convert(make_tiny("llama", tmp_path), tmp_path / "flash")
    model, tokenizer = mlx_flash.load(path, backend="mlx", select="prompt:0.3")
    selector = model.layers[0].mlp._ffn

    def learnt(prompts: list[list[int]]) -> tuple[int, np.ndarray, np.ndarray]:
        model(mx.array(prompts), cache=None)
        return selector.tokens, selector.energy.copy(), selector.output.copy()

    one, other = learnt([IDS]), learnt([LONG[: len(IDS)]])
    both = learnt([IDS, LONG[: len(IDS)]])
    assert one[0] == len(IDS) - 1 and both[0] == 2 * one[0]
    for k in (1, 2):
        np.testing.assert_allclose(both[k], one[k] + other[k], rtol=1e-3, atol=1e-5)
    model.flash.close()


def test_auto_takes_the_whole_ffn_where_small_layers_stay_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asking which neurons fired costs a wait per layer; where bundles are read, or layers are large, it pays."""
    path = mlx_flash.convert(make_tiny("openelm-relu", tmp_path), tmp_path / "flash")

    def chosen(backend: str, memory: int | str, slots: float | str = "auto") -> Any:
        return inspect_model(path, mlx_flash.FlashConfig(memory, backend=backend, slots=slots))["selector"]

    assert chosen("mlx", "1GB") == "all" and chosen("mlx", "1GB", 0.5) == chosen("numpy", "1GB") == "gate"
    monkeypatch.setattr("mlx_flash.runtime.planning.selector_choice.SMALL_LAYER", 1000)
    assert chosen("mlx", "1GB") == "gate"
