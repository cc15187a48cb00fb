"""The aggregator in PyTorch: hidden states of a multimodal LLM to a transformer's context tokens.

Layerwise attention pooling (UniFusion, arXiv 2510.12789) lets each token attend across the layers
of its own stack of hidden states and mixes them to one vector; the Dual Layer Aggregator (arXiv
2605.26111) has one such pool for text tokens and one for image tokens. Refiner blocks then attend
over the tokens, in both directions.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu


class Aggregator(nn.Module):
    """`kind`: `dla` (a pool each for text and image tokens), `lap` (one for all), `last_layer`, or
    `last_layer_vit` (image tokens blended with the vision tower's features). `layers`: which hidden
    states are read, 0 = the embeddings.
    """

    def __init__(
        self, kind: str, layers: list[int], width: int, out_width: int, heads: int, mlp_width: int,
        layer_blocks: int, refiner_blocks: int, norm_eps: float = 1e-5,
    ) -> None:  # fmt: skip
        super().__init__()
        self.kind, self.layers, sizes = kind, list(layers), (width, heads, mlp_width, norm_eps)
        pools = {"dla": ("text", "image"), "lap": ("shared",)}.get(kind, ())
        made = {name: LayerPool(len(layers), layer_blocks, *sizes) for name in pools}
        self.pools = nn.ModuleDict(made)
        if kind == "last_layer_vit":
            self.vision_weight = nn.Parameter(torch.zeros(()))
        self.refiner_blocks = nn.ModuleList(FusionBlock(*sizes) for _ in range(refiner_blocks))
        self.out = nn.Linear(width, out_width)

    @classmethod
    def load(cls, folder: str | Path, dtype: torch.dtype = torch.float32) -> "Aggregator":
        """From a folder with `config.json` and `model.safetensors`."""
        with torch.device("meta"):
            module = cls(**json.loads((Path(folder) / "config.json").read_text()))
        weights = load_file(Path(folder) / "model.safetensors")
        module.load_state_dict(weights, strict=True, assign=True)
        return module.to(dtype).eval()

    @property
    def dtype(self) -> torch.dtype:
        return self.out.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.out.weight.device

    def forward(self, states: Tensor, is_image: Tensor) -> Tensor:
        """Context tokens [L, out_width] of one sequence, in its order.

        states: all hidden states [layers + 1, L, width], the last one after the final norm;
        is_image: bool [L].
        """
        x = states[self.layers].transpose(0, 1).to(self.dtype)  # [L, M, width]
        if self.kind == "dla":
            tokens = torch.empty_like(x[:, 0])
            tokens[~is_image] = self.pools["text"](x[~is_image])
            tokens[is_image] = self.pools["image"](x[is_image])
        elif self.kind == "lap":
            tokens = self.pools["shared"](x)
        else:
            tokens = x[:, -1]
            if self.kind == "last_layer_vit":
                weight, embeddings = torch.sigmoid(self.vision_weight), states[0].to(self.dtype)
                blended = tokens * (1 - weight) + embeddings * weight
                tokens = torch.where(is_image[:, None], blended, tokens)
        tokens = tokens[None]
        for block in self.refiner_blocks:
            tokens = block(tokens)
        return self.out(tokens)[0]


class LayerPool(nn.Module):
    """Attention across the layers of every token [T, M, C], then a learned mix of them: [T, C]."""

    def __init__(
        self, layers: int, blocks: int, width: int, heads: int, mlp_width: int, norm_eps: float
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            FusionBlock(width, heads, mlp_width, norm_eps) for _ in range(blocks)
        )
        self.projector = nn.Parameter(torch.full((layers,), 1 / layers))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return torch.einsum("tmc,m->tc", x, self.projector)


class FusionBlock(nn.Module):
    """Pre-norm attention with normed queries and keys and a sigmoid gate, then SwiGLU.

    There are no biases and no positions.
    """

    def __init__(self, width: int, heads: int, mlp_width: int, norm_eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = Norm(width, norm_eps), Norm(width, norm_eps)
        self.norm_q, self.norm_k = (Norm(width // heads, norm_eps) for _ in "qk")
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.to_gate = nn.Linear(width, width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)
        self.ff_gate = nn.Linear(width, mlp_width, bias=False)
        self.ff_up = nn.Linear(width, mlp_width, bias=False)
        self.ff_down = nn.Linear(mlp_width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in self.to_qkv(y).chunk(3, dim=-1))
        q, k, v = (part.transpose(1, 2) for part in (self.norm_q(q), self.norm_k(k), v))
        mixed = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.to_out(mixed * torch.sigmoid(self.to_gate(y)))
        y = self.norm2(x)
        return x + self.ff_down(silu(self.ff_gate(y)) * self.ff_up(y))


class Norm(nn.Module):
    """x / sqrt(mean(x²) + eps) · (1 + weight), in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (y * (1 + self.weight.float())).to(x.dtype)
