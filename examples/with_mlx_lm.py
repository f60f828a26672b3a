"""The model that `load` gives on the mlx backend is an mlx-lm model: mlx_lm.generate takes it unchanged."""

import sys

import mlx_flash

try:
    import mlx_lm
except ImportError:
    sys.exit(print("mlx-lm is not installed here; nothing to show"))

model, tokenizer = mlx_flash.load(memory="auto", backend="mlx")
print(mlx_lm.generate(model, tokenizer, "Once upon a time there was a", max_tokens=40))
model.flash.close()
