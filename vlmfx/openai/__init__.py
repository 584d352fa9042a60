"""The OpenAI API's bodies, with vLLM's extra fields, as plain dicts: requests to prompts and parameters, outputs to responses."""
