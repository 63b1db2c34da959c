"""Generation: continuous batching over a paged KV cache. engine.py has the start."""
