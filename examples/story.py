"""Stream a story from the default model within a budget, and show what was read."""

import mlx_flash

model, tokenizer = mlx_flash.load(memory="18MB", backend="numpy")
for response in mlx_flash.stream_generate(model, tokenizer, "Once upon a time there was a", max_tokens=60):
    print(response.text, end="", flush=True)
print(
    f"\n{response.bytes_read_per_token / 1e3:.0f} kB read per token, {response.hit_rate:.0%} of the neurons were there"
)
model.flash.close()
