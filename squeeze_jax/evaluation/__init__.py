"""Samples of held-out examples, and scores."""
