"""Rectified flow, stages, latent packing: arithmetic that training and sampling share."""
