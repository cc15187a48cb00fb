"""Helpers of the parity tests: the relative error, and random weights that hide nothing."""

import numpy as np


def relative_error(ours, theirs) -> float:
    """‖a − b‖ / ‖b‖ in float64."""
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert a.shape == b.shape, (a.shape, b.shape)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def randomise(module, seed: int = 0) -> None:
    """Fills a torch module in place: weights of scale in^-1/2, norms around 1, biases and gates clearly not zero."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                parameter.copy_(around + 0.2 * noise)
            else:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
