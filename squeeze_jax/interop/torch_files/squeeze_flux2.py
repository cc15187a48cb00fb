"""Staged subject-driven sampling with FLUX.2: what its transformer and autoencoder do otherwise."""

from typing import ClassVar

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from squeeze_pipeline import SqueezePipeline, shifted_times
from torch import Tensor
from torch.nn.functional import pad, pixel_shuffle, pixel_unshuffle


class SqueezeFlux2Pipeline(SqueezePipeline):
    """`SqueezePipeline` with a FLUX.2 transformer and its autoencoder.

    The unconditional branch of guidance sees the target alone, as it was trained; diffusers' own
    pipeline of FLUX.2 keeps references in both branches.
    """

    classes: ClassVar = {"transformer": Flux2Transformer2DModel, "vae": AutoencoderKLFlux2}
    time_proj, rope_axes = "time_guidance_embed.time_proj", 4

    def context_inputs(self, x: Tensor, length: int) -> dict[str, Tensor]:
        """Context token i is at (0, 0, 0, i); there is no pooled vector."""
        return {"txt_ids": pad(torch.arange(length, device=x.device)[:, None], (3, 0)).to(x)}

    def normalise(self, latents: Tensor) -> Tensor:
        """The autoencoder's latents [B, C, h, w] as the transformer knows them.

        2 x 2 are packed to 4C channels, each with a stored mean and variance of its own.
        """
        mean, deviation = self.moments(latents)
        return pixel_shuffle((pixel_unshuffle(latents, 2) - mean) / deviation, 2)

    def denormalise(self, latents: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        mean, deviation = self.moments(latents)
        return pixel_shuffle(pixel_unshuffle(latents, 2) * deviation + mean, 2)

    def moments(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation [1, 4C, 1, 1] of every packed channel."""
        kept = self.vae.bn.running_mean, self.vae.bn.running_var
        mean, variance = (values.to(like).view(1, -1, 1, 1) for values in kept)
        return mean, torch.sqrt(variance + self.vae.config.batch_norm_eps)

    @staticmethod
    def positions(grid: tuple[int, int], references: list[Tensor]) -> Tensor:
        """(t, row, column, 0) of every token: t is 0 in the target, 10, 20, … in references."""
        places = []
        for rows, columns in [grid, *((x.shape[2] // 2, x.shape[3] // 2) for x in references)]:
            ranges = torch.tensor([10 * len(places)]), torch.arange(rows), torch.arange(columns)
            places.append(torch.cartesian_prod(*ranges))
        return pad(torch.cat(places), (0, 1))

    @staticmethod
    def schedule(steps: int, target_tokens: int, shifted: bool) -> np.ndarray:
        """steps + 1 times from 1 to 0.

        μ is diffusers' `compute_empirical_mu`: linear in the target's tokens for 10 and for 200
        steps, and linear in the steps between; above 4,300 tokens that of 200 steps.
        """
        mu = at_200 = 1.6927e-4 * target_tokens + 0.45666666
        if target_tokens <= 4300:
            at_10 = 8.73809524e-5 * target_tokens + 1.89833333
            mu = at_200 + (at_10 - at_200) * (200 - steps) / 190
        return shifted_times(steps, mu if shifted else 0.0)
