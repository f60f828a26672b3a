"""An HTTP server with OpenAI's API, on top of mlx-lm's."""
