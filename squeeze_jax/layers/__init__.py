"""Building blocks of models: attention, norms, LoRA, stacks of blocks."""
