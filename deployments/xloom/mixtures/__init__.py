"""X-LoRA in plain torch: bundle formats, the prepared format, routing, mixing. Imports neither vLLM nor Ray."""
