"""`vlmfx serve`: an HTTP server over AsyncEngine that OpenAI's clients, and vLLM's, can talk to."""
