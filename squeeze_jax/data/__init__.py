"""From pictures and prompts to batches: sources, images, the MLLM's input, records, pipeline."""
