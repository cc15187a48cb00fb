"""The staged sampler: denoiser, solvers, pipeline."""
