"""What the exported PyTorch pipeline makes of a run's config, step by step.

Its parts only note what they are told.
"""

import dataclasses
import itertools
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from qwen_like import qwen_like

from squeeze_jax.config import load_preset
from squeeze_jax.config_json import to_json
from squeeze_jax.diffusion.flow import empirical_shift, no_shift, schedule_shift
from squeeze_jax.diffusion.stages import carry_tau, plan_stages, time_steps
from squeeze_jax.interop.exported import TORCH_FILES
from squeeze_jax.models.flux2 import Flux2Config

torch = pytest.importorskip("torch", reason="PyTorch is not installed: parity tests are skipped")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def theirs():
    sys.path.insert(0, str(TORCH_FILES))
    try:
        import squeeze_pipeline

        yield squeeze_pipeline
    finally:
        sys.path.remove(str(TORCH_FILES))


def pipeline_of(theirs, config):
    """The pipeline's class for a config."""
    if not isinstance(config.model.dit, Flux2Config):
        return theirs.SqueezePipeline
    from squeeze_flux2 import SqueezeFlux2Pipeline

    return SqueezeFlux2Pipeline


def preset(name):
    return load_preset(ROOT / "configs" / f"{name}.py")


def steps_of(theirs, config, references=1, **arguments):
    """Of every velocity of a run: t, and whether the MLLM's and references' tokens were there."""
    told, encoded, kind = [], [], pipeline_of(theirs, config)

    def velocity(x, t, positions, context, references):
        told.append((t, len(context) > 0, references is not None))
        return torch.zeros_like(x)

    def encode(picture):
        encoded.append(picture)
        return torch.zeros(1, 16, 4, 4)

    own = SimpleNamespace(
        settings=theirs.settings_of(json.loads(to_json(config))),
        vae=SimpleNamespace(config=SimpleNamespace(block_out_channels=(1, 1, 1, 1))),
        transformer=SimpleNamespace(config=SimpleNamespace(in_channels=64)),
        aggregator=lambda *read: torch.zeros(3, 8), read=lambda prompt, pictures: (), encode=encode,
        pack=kind.pack, positions=kind.positions, schedule=kind.schedule,
        velocity=velocity, progress_bar=lambda steps: steps,
        _execution_device="cpu", maybe_free_model_hooks=lambda: None, 
    )  # fmt: skip
    pictures = [Image.new("RGB", (32, 32))] * references
    kind.__call__(own, "a prompt", pictures, output_type="latent", **arguments)
    return told, encoded


def times(steps, tokens, shifted):
    s = 1.0 - np.arange(steps) / steps
    factor = math.exp(0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)) if shifted else 1.0
    return factor * s / (factor * s + 1.0 - s)


def test_stage_one_never_shows_its_transformer_a_reference(theirs):
    """It has never seen any: the MLLM stays on throughout, whatever τ the caller gives.

    Source: docs/decisions.md, "Sampling without references".
    """
    for thresholds in ({}, {"tau1": 0.95, "tau2": 0.85}):
        told, encoded = steps_of(theirs, preset("flux_stage1"), references=2, **thresholds)
        assert not encoded
        assert len(told) == 2 * 25
        assert [(mllm, vae) for _, mllm, vae in told] == [(True, False), (False, False)] * 25


@pytest.mark.parametrize("shifted", [True, False])
def test_stage_two_sees_the_papers_stages_on_the_configs_schedule(theirs, shifted):
    config = preset("flux_stage2")
    config = dataclasses.replace(
        config, sampling=dataclasses.replace(config.sampling, shifted=shifted)
    )
    told, encoded = steps_of(theirs, config, references=2)
    assert len(encoded) == 2
    own, bare = told[::2], told[1::2]
    np.testing.assert_allclose([t for t, *_ in own], times(25, 1024, shifted), atol=1e-6)
    assert [tuple(seen) for _, *seen in own] == [
        (True, False) if t >= 0.95 else (True, True) if t >= 0.85 else (False, True)
        for t in times(25, 1024, shifted)
    ]
    assert [(mllm, vae) for _, mllm, vae in bare] == [(False, False)] * 25


@pytest.mark.parametrize("tau_tokens", [None, 1024])
def test_both_conditions_can_stay_on_throughout(theirs, tau_tokens):
    """By the config of the ablation, at its own size and at another, and by a caller's τ."""
    config = preset("ablations/single_stage")
    sampling = dataclasses.replace(config.sampling, tau_tokens=tau_tokens)
    config = dataclasses.replace(config, sampling=sampling)
    for arguments in ({}, {"height": 256, "width": 256}, {"tau1": 1.1, "tau2": 0.0}):
        told, _ = steps_of(theirs, config, **arguments)
        assert [tuple(seen) for _, *seen in told[::2]] == [(True, True)] * 25
    told, _ = steps_of(theirs, config, tau1=1.1, tau2=1.1)
    assert [tuple(seen) for _, *seen in told[::2]] == [(False, True)] * 25
    with pytest.raises(ValueError, match=r"tau1 is 1\.2 .* <= 1\.1"):
        steps_of(theirs, config, tau1=1.2)


def test_schnell_takes_four_even_steps_without_guidance(theirs):
    told, _ = steps_of(theirs, preset("flux_schnell"))
    assert [t for t, *_ in told] == [1.0, 0.75, 0.5, 0.25]
    assert [tuple(seen) for _, *seen in told] == [(True, False), (True, True)] + [(False, True)] * 2


def test_klein_takes_its_empirical_schedule_in_the_papers_stages(theirs):
    """Times of diffusers' `compute_empirical_mu`; guidance contrasts with the target alone."""
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    told, _ = steps_of(theirs, preset("klein_stage2"), references=2)
    s, factor = 1.0 - np.arange(50) / 50, math.exp(compute_empirical_mu(1024, 50))
    expected = factor * s / (factor * s + 1.0 - s)
    np.testing.assert_allclose([t for t, *_ in told[::2]], expected, atol=1e-6)
    assert [tuple(seen) for _, *seen in told[::2]] == [
        (True, False) if t >= 0.95 else (True, True) if t >= 0.85 else (False, True)
        for t in expected
    ]
    assert [tuple(seen) for _, *seen in told[1::2]] == [(False, False)] * 50


@pytest.mark.parametrize("steps", [1, 4, 10, 50, 100])
@pytest.mark.parametrize("tokens", [4, 1024, 4096, 4300, 4301, 9216])
def test_kleins_times_are_those_of_our_sampler(theirs, steps, tokens):
    """The same bits, on both sides of the formula's border."""
    schedule = pipeline_of(theirs, preset("klein_stage2")).schedule
    for shift, shifted in ((empirical_shift, True), (no_shift, False)):
        ours = time_steps(steps, tokens, shift)
        np.testing.assert_array_equal(schedule(steps, tokens, shifted), ours)


def test_a_stage_that_no_step_begins_in_is_named(theirs):
    few = {"num_inference_steps": 4, "tau1": 0.95, "tau2": 0.85}
    with pytest.warns(
        UserWarning, match=r"no step has both conditions: none of 4 begins at 0\.85 <= t < 0\.95"
    ):
        steps_of(theirs, preset("flux_schnell"), **few)
    with pytest.warns(UserWarning, match="no step has") as said:
        steps_of(theirs, preset("flux_schnell"), **few | {"num_inference_steps": 1})
    assert [
        "both conditions" in str(said[0].message),
        "references alone" in str(said[1].message),
    ] == [True, True]
    steps_of(
        theirs, preset("flux_schnell"), references=0, **few
    )  # text only: one stage, no warning


@pytest.mark.filterwarnings("ignore:no step has")
@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 25, 50, 100])
def test_times_and_stages_are_those_of_our_sampler(theirs, steps, shifted):
    """The exported file stands alone, so it has the formulas again: the same bits.

    Thresholds that lie on a step's time are among them.
    """
    for tokens in (4, 64, 256, 1024, 1536, 4096, 9216):
        ours = time_steps(steps, tokens, schedule_shift if shifted else no_shift)
        found = theirs.schedule(steps, tokens, shifted)
        np.testing.assert_array_equal(found, ours)
        assert found.dtype == ours.dtype
        thresholds = sorted(
            {0.0, 0.3, 0.59, 0.75, 0.83, 0.85, 0.95, 1.0, 1.1, *map(float, ours[:3])}
        )
        for tau2, tau1 in itertools.combinations_with_replacement(thresholds, 2):
            plan = plan_stages(ours, tau1, tau2)
            kept = [(stage.mllm, stage.vae) for stage in plan for _ in range(*stage.steps)]
            assert theirs.stages(ours, tau1, tau2) == kept, (tokens, tau1, tau2)
        for tau in thresholds:
            assert theirs.carry_tau(tau, 1024, tokens) == pytest.approx(
                carry_tau(tau, 1024, tokens), rel=1e-12
            )


def test_settings_are_those_of_the_config(theirs):
    config = preset("flux_stage2")
    data = {
        "height": 256,
        "width": 768,
        "reference_long_side": 320,
        "system_text": "be brief",
        "max_tiles": 3,
        "max_text_tokens": 200,
    }
    sampling = {
        "steps": 7,
        "tau1": 0.8,
        "tau2": 0.3,
        "cfg_scale": 1.5,
        "shifted": False,
        "tau_tokens": 64,
    }
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, **data),
        sampling=dataclasses.replace(config.sampling, **sampling),
        diffusion=dataclasses.replace(config.diffusion, guidance=2.0),
    )
    wanted = data | sampling | {"guidance": 2.0, "references": True}
    assert theirs.settings_of(json.loads(to_json(config))) == wanted
    assert theirs.settings_of(json.loads(to_json(preset("flux_stage1"))))["references"] is False


@pytest.mark.parametrize("system", [None, "You draw critters."])
def test_the_system_text_stands_before_the_users_turn(theirs, system):
    """The chat by hand: a turn of its own, then references, the prompt, and no answer's header."""
    tokenizer = qwen_like()
    own = SimpleNamespace(tokenizer=tokenizer, settings={"system_text": system})
    ids = theirs.SqueezePipeline.token_ids(own, "a red one", [2, 1])
    said = "" if system is None else f"<|im_start|>system\n{system}<|im_end|>\n"
    said += "<|im_start|>user\n<img><IMG_CONTEXT><IMG_CONTEXT></img>\n<img><IMG_CONTEXT></img>\n"
    said += "a red one<|im_end|>\n"
    assert ids == tokenizer.encode(said, add_special_tokens=False).ids
