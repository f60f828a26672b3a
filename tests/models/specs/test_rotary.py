"""Frequencies of rotary positions, windows and the context that follows from them: numbers and refusals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from mlx_flash.errors import ConfigError, UsageError
from mlx_flash.models.specs.attention_windows import read_windows
from mlx_flash.models.specs.config_reader import read_limits
from mlx_flash.models.specs.config_values import ConfigValues
from mlx_flash.models.specs.model_spec import ContextLimit
from mlx_flash.models.specs.rotary import attention_factor, inverse_frequencies, read_rope
from mlx_flash.runtime.planning.context_length import decide_context

DIMS = 8
PLAIN = 100.0 ** (-np.arange(4) / 4)


def config(scaling: dict[str, Any] | None = None, **more: Any) -> ConfigValues:
    base = {"model_type": "llama", "rope_theta": 100.0, "max_position_embeddings": 64, "rope_scaling": scaling}
    return ConfigValues(base | more)


def frequencies(scaling: dict[str, Any], context: int = 64, **more: Any) -> np.ndarray:
    return inverse_frequencies(read_rope(config(scaling, **more)), DIMS, context)


def test_default_linear_dynamic_and_proportional() -> None:
    np.testing.assert_allclose(inverse_frequencies(read_rope(config()), DIMS), PLAIN)
    np.testing.assert_allclose(frequencies({"type": "linear", "factor": 4.0}), PLAIN / 4)
    np.testing.assert_allclose(frequencies({"rope_type": "dynamic", "factor": 4.0}), PLAIN)
    half = frequencies({"rope_type": "proportional", "partial_rotary_factor": 0.5})
    np.testing.assert_allclose(half, [*PLAIN[:2], 0, 0])
    stretched = frequencies({"type": "dynamic", "alpha": 3.0, "factor": 1.0})
    np.testing.assert_allclose(stretched, (100 * 3 ** (8 / 6)) ** (-np.arange(4) / 4))


def test_llama3_keeps_fast_frequencies_and_divides_slow_ones() -> None:
    scaling = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    found = frequencies(scaling | {"original_max_position_embeddings": 32})
    turns = 32 * PLAIN / (2 * math.pi)  # 5.1, 1.6, 0.5, 0.2
    assert found[0] == PLAIN[0]
    smooth = (turns[1] - 1) / 3
    np.testing.assert_allclose(found[1], PLAIN[1] * (smooth + (1 - smooth) / 4))
    np.testing.assert_allclose(found[2:], PLAIN[2:] / 4)


def test_yarn_by_hand() -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 2.0}
    rope = read_rope(config(scaling))
    assert rope.attention_factor == pytest.approx(0.1 * math.log(4) + 1)
    # The frequency of two turns is the 8 ln(32 / 4 pi) / (2 ln 100) = 0.81st, that of one the 1.41st: 0 to 2.
    np.testing.assert_allclose(inverse_frequencies(rope, DIMS), PLAIN * [1, (1 + 1 / 4) / 2, 1 / 4, 1 / 4])
    low, high = (8 * math.log(32 / (turns * 2 * math.pi)) / (2 * math.log(100)) for turns in (2, 1))
    ramp = np.clip((np.arange(4) - low) / (high - low), 0, 1)
    np.testing.assert_allclose(frequencies(scaling | {"truncate": False}), PLAIN * (1 - ramp + ramp / 4))
    several = read_rope(config(scaling | {"mscale": 1.0, "mscale_all_dim": 0.5}))
    assert several.attention_factor == pytest.approx((0.1 * math.log(4) + 1) / (0.05 * math.log(4) + 1))
    assert read_rope(config(scaling | {"attention_factor": 1.5, "mscale": 1.0})).attention_factor == 1.5
    without = {"rope_type": "yarn", "original_max_position_embeddings": 16}  # the factor is 64 / 16
    assert read_rope(config(without)).factor == 4.0


LONGROPE = {
    **{"rope_type": "longrope", "short_factor": [1.0, 1.0, 2.0, 2.0], "long_factor": [1.0, 4.0, 8.0, 16.0]},
    "original_max_position_embeddings": 16,
}


def test_longrope_takes_one_table_by_the_planned_context() -> None:
    rope = read_rope(config(LONGROPE))
    np.testing.assert_allclose(inverse_frequencies(rope, DIMS, 16), PLAIN / LONGROPE["short_factor"])
    np.testing.assert_allclose(inverse_frequencies(rope, DIMS, 17), PLAIN / LONGROPE["long_factor"])
    assert attention_factor(rope, 64) == pytest.approx(math.sqrt(1 + math.log(4) / math.log(16)))
    scales = read_rope(config(LONGROPE | {"short_mscale": 1.1, "long_mscale": 1.2}))
    assert (attention_factor(scales, 16), attention_factor(scales, 17)) == (1.1, 1.2)
    elsewhere = {key: value for key, value in LONGROPE.items() if not key.startswith("original")}
    rope = read_rope(config(elsewhere, original_max_position_embeddings=32))
    assert rope.original_context == 32
    su = read_rope(config(LONGROPE | {"rope_type": None, "type": "su"}, model_type="phi3"))
    assert su == read_rope(config(LONGROPE, model_type="phi3"))


def test_each_type_of_layer_has_its_own() -> None:
    nested = {"sliding_attention": {"rope_theta": 7.0}, "full_attention": {"rope_type": "linear", "factor": 2.0}}
    gemma = config(None, model_type="gemma3_text", rope_theta=None, rope_parameters=nested)
    assert read_rope(gemma, "sliding_attention").base == 7
    assert (read_rope(gemma, "full_attention").kind, read_rope(gemma, "full_attention").base) == ("linear", 10000)
    old = config({"type": "linear", "factor": 2.0}, model_type="gemma3_text", rope_local_base_freq=9.0)
    assert (read_rope(old, "sliding_attention").kind, read_rope(old, "sliding_attention").base) == ("default", 9)
    assert (read_rope(old, "full_attention").kind, read_rope(old, "full_attention").base) == ("linear", 100)


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        ({"rope_type": "spiral"}, "'spiral'.*known: default, linear"),
        ({"rope_type": ["linear"]}, "linear"),
        ({"rope_type": "linear"}, "'factor' is None"),
        ({"rope_type": "dynamic", "factor": 0.5}, "at least 1"),
        ({"rope_type": "yarn", "factor": 2.0, "beta_fast": "32"}, "beta_fast"),
        ({"rope_type": "yarn", "factor": 2.0, "truncate": "no"}, "truncate"),
        ({"rope_type": "yarn", "factor": 2.0, "attention_factor": -1.0}, "attention_factor"),
        ({"rope_type": "dynamic", "alpha": "much"}, "alpha"),
        (LONGROPE | {"long_factor": 4.0}, "long_factor"),
        (LONGROPE | {"short_factor": [1.0] * 3}, "'short_factor' has 3 numbers; 8 rotated items need 4"),
        (LONGROPE | {"long_factor": [1.0, 0.0, 1.0, 1.0]}, "long_factor"),
        ([1], "not an object"),
    ],
    ids=str,
)
def test_refused_scalings(scaling: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        frequencies(scaling)


def windows(family: str, layers: int = 4, **keys: Any) -> list[int | None]:
    return read_windows(ConfigValues({"model_type": family} | keys), layers)


def test_windows_by_family() -> None:
    types = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    assert windows("mistral", sliding_window=8) == [8] * 4
    assert windows("mistral", sliding_window=None) == windows("mistral") == [None] * 4
    assert windows("llama", sliding_window=8) == [None] * 4  # as transformers
    assert windows("qwen2", sliding_window=8, max_window_layers=3) == [None] * 4
    late = {"sliding_window": 8, "max_window_layers": 3, "use_sliding_window": True}
    assert windows("qwen2", **late) == windows("qwen3", **late) == [None, None, None, 8]
    assert windows("qwen2", **late, layer_types=types) == [None, 8, 8, None]
    assert windows("qwen3_moe", **late, layer_types=types) == [8] * 4
    assert windows("qwen2_moe", **late) == [8, None, 8, None]
    assert windows("gemma2", sliding_window=8, sliding_window_pattern=3) == [8, None, 8, None]
    assert windows("cohere2", sliding_window=8) == [8, 8, 8, None]
    assert windows("exaone4", sliding_window=8, sliding_window_pattern="LG") == [8, None, 8, None]
    assert windows("smollm3", use_sliding_window=True, sliding_window=8) == [None, None, None, 8]
    assert windows("mimo_v2_flash", sliding_window_size=7, hybrid_layer_pattern=[1, 0, 1, 0]) == [8, None, 8, None]


@pytest.mark.parametrize(
    ("family", "keys", "word"),
    [
        ("mistral", {"sliding_window": 0}, "sliding_window"),
        ("mistral", {"sliding_window": "8"}, "sliding_window"),
        ("qwen2", {"use_sliding_window": "true"}, "use_sliding_window"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": -1}, "max_window_layers"),
        ("gemma2", {"layer_types": ["full_attention"]}, "layer_types"),
        ("gemma2", {"layer_types": "full"}, "layer_types"),
        ("cohere2", {"sliding_window_pattern": "x"}, "sliding_window_pattern"),
        ("mimo_v2_flash", {}, "hybrid_layer_pattern"),
    ],
)
def test_refused_windows(family: str, keys: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        windows(family, **keys)


def test_the_context_and_why() -> None:
    hard = ContextLimit(64, "attention window")
    assert str(decide_context(None, 512, hard)) == "64 of 512: attention window"
    assert decide_context(16, 512, hard).reason is None
    with pytest.raises(UsageError, match="--max-context 65 is beyond 64 of the model's 512 tokens: attention window"):
        decide_context(65, 512, hard)
    assert str(decide_context(None, 4096, None)) == "2048 tokens"
    with pytest.raises(UsageError, match="513 is beyond the model's 512 tokens"):
        decide_context(513, 512, None)


def test_the_context_of_positions_that_depend_on_the_length() -> None:
    limit = read_limits(config(LONGROPE).values, 64)
    assert limit is not None and not limit.hard
    assert str(decide_context(None, 64, limit)).startswith("16 of 64: short RoPE factors")
    assert str(decide_context(17, 64, limit)).startswith("17 of 64: long RoPE factors for all of it")
    with pytest.raises(UsageError, match="65 is beyond the model's 64"):
        decide_context(65, 64, limit)
    dynamic = read_limits(config({"type": "dynamic", "factor": 2.0}).values, 64)
    with pytest.raises(UsageError, match="65 is beyond 64 of the model's 64 tokens: 'rope_scaling' of type dynamic"):
        decide_context(65, 64, dynamic)


def test_a_window_that_is_not_known_ends_the_context() -> None:
    limit = read_limits({"model_type": "telechat3", "sliding_window": 64, "max_position_embeddings": 512}, 512)
    assert str(decide_context(None, 512, limit)) == "64 of 512: attention window"
    assert read_limits({"model_type": "telechat3", "sliding_window": 64, "use_sliding_window": False}, 512) is None
    first_qwen = read_limits({"model_type": "qwen", "use_dynamic_ntk": True, "seq_length": 64}, 512)
    assert first_qwen is not None and first_qwen.tokens == 64
