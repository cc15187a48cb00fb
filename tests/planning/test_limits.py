"""What a plan is held against: published peaks of chips, the share that kernels reach, and whether it fits."""

import dataclasses

import jax
import pytest
from tiny import tiny_config

from squeeze_jax.config import load_preset
from squeeze_jax.interop.load import encoder_configs
from squeeze_jax.planning import estimate as estimate_module
from squeeze_jax.planning import report as report_module
from squeeze_jax.planning.chips import CHIPS, chip_of
from squeeze_jax.planning.estimate import Estimate, step_estimate
from squeeze_jax.planning.report import lines, reached, train_report
from squeeze_jax.planning.search import candidates
from squeeze_jax.planning.train_program import Compiled, abstract_system
from squeeze_jax.sharding import AXES

GIB = 2**30
PUBLISHED = {  # Google Cloud's pages: peak bfloat16 TFLOP/s, GiB and GB/s of HBM, GB/s between chips, axes of the torus
    "v4": (275, 32, 1228, 300, 3),
    "v5e": (197, 16, 819, 200, 2),
    "v5p": (459, 95, 2765, 600, 3),
    "v6e": (918, 32, 1640, 448, 2),
}
NOTHING = Compiled(0, 0, 0, 0, 0.0, 0.0, 0.0, 0, [], "")


def mesh():
    return jax.make_mesh((1, 1, 1), AXES, devices=jax.devices()[:1])


def test_chips_are_as_published():
    found = {
        name: (chip.flops / 1e12, chip.memory / GIB, chip.memory_rate / 1e9, chip.link_rate / 1e9, chip.torus_axes)
        for name, chip in CHIPS.items()
    }
    assert {name: pytest.approx(numbers) for name, numbers in PUBLISHED.items()} == found
    assert all(chip_of(f"{name}:2x2x1") is chip for name, chip in CHIPS.items())


def test_kernels_reach_six_tenths_of_the_published_peak(monkeypatch):
    """Stage 2 at 512 x 512 by hand: 57 blocks over 384 + 1,024 + 1,024 tokens, two refiners over 384; 2 products forward, 5
    backward, in whole blocks of tokens: 2,432 are 2,560."""
    config = load_preset("configs/flux_stage2.py")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, max_text_tokens=128))
    monkeypatch.setattr(estimate_module, "block_program", lambda *given: NOTHING)
    monkeypatch.setattr(estimate_module, "step_flops", lambda *given: 0)
    found = {}
    for name in ("v5p", "v6e"):
        found[name] = step_estimate(config, mesh(), CHIPS[name], config.training.stages[0], NOTHING).kernels
    products = 57 * 2560**2 * 3072 + 2 * 384**2 * 3584
    assert found["v5p"] == pytest.approx(7 * 2 * products / (0.6 * 459e12), rel=1e-9)
    assert found["v6e"] == pytest.approx(found["v5p"] / 2, rel=1e-9)


def test_utilisation_is_of_the_published_peak():
    """459 TFLOP on one v5p in two seconds: half of it, and a roofline of one second."""
    estimate = Estimate(compute=1.5, kernels=0.5, links=0.0, network=0.0, exposed=0.0, moved=2765e9)
    report = reached(int(459e12), estimate, mesh(), CHIPS["v5p"])
    assert report["predicted_mfu"] == pytest.approx(0.5)
    assert report["roofline_seconds"]["compute"] == report["roofline_seconds"]["hbm"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("arguments", "aliased", "fits"),
    [(95 * GIB, 0, True), (95 * GIB + 1, 0, False), (100 * GIB, 5 * GIB, True), (200 * GIB, 5 * GIB, False)],
)
def test_a_plan_that_needs_more_than_the_chip_has_does_not_fit(arguments, aliased, fits, monkeypatch):
    """Donated arguments count once."""
    whole = dataclasses.replace(NOTHING, arguments=arguments, aliased=aliased)
    monkeypatch.setattr(report_module, "compile_train_step", lambda *given: whole)
    monkeypatch.setattr(report_module, "step_flops", lambda *given: 10**12)
    monkeypatch.setattr(report_module, "step_estimate", lambda *given: Estimate(1.0, 0.0, 0.0, 0.0, 0.0, 0.0))
    report, _ = train_report(tiny_config(), mesh(), CHIPS["v5p"])
    assert report["fits"] is fits
    assert any("DOES NOT FIT" in line for line in lines(report)) is not fits


def test_the_search_leaves_out_what_does_not_fit(monkeypatch):
    """Of a model whose FLOPs and kept bytes are given: nothing on a chip without room, else only what there is room for."""
    monkeypatch.setattr("squeeze_jax.planning.search.link_rate", lambda *given: 1e9)
    monkeypatch.setattr("squeeze_jax.planning.search.traced", lambda *given: (10**12, GIB))
    config, chip = tiny_config(), CHIPS["v5p"]
    known = abstract_system(config)
    monkeypatch.setattr("squeeze_jax.planning.search.abstract_system", lambda config: known)
    stage = config.training.stages[0]
    for memory in (2 * GIB, 8 * GIB, 95 * GIB):
        found = candidates(config, [mesh()], dataclasses.replace(chip, memory=memory), stage)
        assert bool(found) == (memory >= 8 * GIB)
        assert all(one.memory <= memory and one.batch * GIB < memory for one in found)


def test_an_mllm_that_pytorch_runs_needs_no_sizes_of_ours(tmp_path):
    """Its config.json is another model's, and its memory PyTorch's own."""
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    config = load_preset("configs/flux_stage2.py")
    theirs = dataclasses.replace(config.model, mllm=str(tmp_path), mllm_source="transformers")
    found = encoder_configs(dataclasses.replace(config, model=theirs))
    assert found == encoder_configs(config)
