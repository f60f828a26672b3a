"""The invariant, shown: the reply does not depend on the memory budget, only what is read does."""

import mlx_flash

replies = {}
for memory in ("18MB", "20MB", "auto"):
    model, tokenizer = mlx_flash.load(memory=memory, backend="numpy")
    responses = list(mlx_flash.stream_generate(model, tokenizer, "The king said to his daughter", max_tokens=40))
    replies[memory] = [response.token for response in responses]
    print(f"{memory:>5}: {responses[-1].bytes_read_per_token / 1e3:6.0f} kB read per token")
    model.flash.close()
assert len(set(map(tuple, replies.values()))) == 1, "the budget changed the reply"
print("the same tokens each time")
