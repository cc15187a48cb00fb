"""Our own checkpoints: Orbax, resuming, fingerprints, and the system that a config describes."""
