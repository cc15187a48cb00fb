"""Backbone, aggregator, autoencoder, MLLM, and the system that is trained: pure modules."""
