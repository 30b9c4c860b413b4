"""A model behind OpenAI's protocol: continuous batching, limits, metrics and a page to try it."""
