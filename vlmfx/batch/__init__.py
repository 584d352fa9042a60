"""`vlmfx batch`: a file of OpenAI batch requests to a file of their responses."""
