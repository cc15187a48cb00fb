"""The real sizes against PyTorch, with random weights: run by hand (pytest -m slow), about 12 GB of
memory.

Folders are written by diffusers' and transformers' own code; `verify` reads them as it would the
published ones.
"""

import gc

import pytest
from parity import randomise

from squeeze_jax.interop.verify import verify

torch = pytest.importorskip("torch", reason="parity needs PyTorch")
pytestmark = pytest.mark.slow


def check(folder, kind: str, parameters: int, rows: int) -> None:
    gc.collect()
    report = verify(folder)
    assert report.kind == kind
    assert not report.problems
    assert report.parameters == parameters
    assert len(report.rows) == rows
    assert all(row.error is not None for row in report.rows)
    assert report.passed, report.rows


def test_the_autoencoder_of_flux(tmp_path):
    from diffusers import AutoencoderKL

    theirs = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16,
        norm_num_groups=32, sample_size=1024, scaling_factor=0.3611, shift_factor=0.1159,
        use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    randomise(theirs)
    count = sum(parameter.numel() for parameter in theirs.parameters())
    assert count == 83_819_683  # published
    theirs.save_pretrained(tmp_path)
    check(tmp_path, "autoencoder", count, rows=2)


def test_flux_of_full_width_with_one_block_of_each_kind(tmp_path):
    from diffusers import FluxTransformer2DModel

    theirs = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    randomise(theirs)
    count = sum(parameter.numel() for parameter in theirs.parameters())
    theirs.save_pretrained(tmp_path)
    del theirs
    check(tmp_path, "flux", count, rows=1)


def test_klein_of_full_width_with_one_block_of_each_kind(tmp_path):
    from diffusers import Flux2Transformer2DModel

    sizes = {"num_attention_heads": 24, "joint_attention_dim": 7680, "guidance_embeds": False}
    theirs = Flux2Transformer2DModel(num_layers=1, num_single_layers=1, **sizes)
    randomise(theirs)
    count = sum(parameter.numel() for parameter in theirs.parameters())
    theirs.save_pretrained(tmp_path)
    del theirs
    check(tmp_path, "flux2", count, rows=1)


def test_the_autoencoder_of_flux2(tmp_path):
    from diffusers import AutoencoderKLFlux2

    theirs = AutoencoderKLFlux2()
    randomise(theirs)
    generator = torch.Generator().manual_seed(1)
    theirs.bn.running_mean.copy_(0.2 * torch.randn(128, generator=generator))
    theirs.bn.running_var.copy_(0.5 + torch.rand(128, generator=generator))
    count = sum(parameter.numel() for parameter in theirs.parameters())
    assert count == 84_046_115  # published
    theirs.save_pretrained(tmp_path)
    check(tmp_path, "autoencoder", count + 2 * 128, rows=2)  # with both statistics


def test_internvl_of_full_width_with_one_layer_of_each_kind(tmp_path):
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    words = 1000  # of 151,674: the rest would only be looked up
    config = InternVLConfig(
        vision_config={"num_hidden_layers": 1},
        text_config={
            "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944,
            "num_hidden_layers": 1, "num_attention_heads": 28, "num_key_value_heads": 4,
            "vocab_size": words, "rope_theta": 1e6,
        },
        image_token_id=words - 1, tie_word_embeddings=False,
    )  # fmt: skip
    theirs = InternVLForConditionalGeneration(config)
    randomise(theirs)
    count = sum(parameter.numel() for parameter in theirs.parameters())
    theirs.save_pretrained(tmp_path)
    del theirs
    check(tmp_path, "internvl", count, rows=1)
