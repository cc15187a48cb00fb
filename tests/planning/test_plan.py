"""`plan`: bad input is named; the compiler itself runs where it is installed (pytest -m slow)."""

import json
import os
import subprocess
import sys

import jax
import pytest

from squeeze_jax.commands import plan
from squeeze_jax.config import load_preset
from squeeze_jax.planning import report as report_module
from squeeze_jax.planning.chips import CHIPS
from squeeze_jax.planning.estimate import Estimate
from squeeze_jax.planning.report import PAPER_STAGES, lines, priced, train_report
from squeeze_jax.planning.train_program import Compiled, step_flops, too_large
from squeeze_jax.sharding import AXES

PRESET = "configs/flux_stage2.py"
GIB = 2**30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "v9:2x2"], "no chip 'v9'; choose one of v4, v5e, v5p, v6e"),
        (["--topology", "v5p:2x2x1", "--mesh", "fsdp:4"], "write data=1,fsdp=8,tensor=1"),
        (["--topology", "v5p:2x2x1", "--mesh", "model=4"], "--mesh has no axis model"),
        (["--topology", "v5p:2x2x1", "--search", "--mesh", "fsdp=4"], "leave --mesh out, or --search"),
        (["--topology", "v5p:2x2x1", "--search", "--what", "sample"], "--search looks for ways to train"),
        (["--topology", "v5p:2x2x1", "--chip-hour", "0"], "--chip-hour 0 must be above 0"),
        (["--topology", "v5p:2x2x1", "--chip-hour", "nan"], "--chip-hour is nan; give a finite"),
    ],
)
def test_what_cannot_be_planned_is_named(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    assert plan.main([PRESET, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_hours_and_cost_count_each_stage_for_what_it_computes():
    """Stage 1 has no references: fewer tokens, shorter steps."""
    config = load_preset(PRESET)
    mesh, chip = jax.make_mesh((1, 1, 1), AXES, devices=jax.devices()[:1]), CHIPS["v5p"]
    nothing = Compiled(0, 0, 0, 0, 0.0, 0.0, 0.0, 0, [], "")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_module, "compile_train_step", lambda *given: nothing)
        patch.setattr(report_module, "step_estimate", lambda *given: Estimate(3600.0, 0.0, 0.0, 0.0, 0.0, 0.0))
        report = priced(train_report(config, mesh, chip)[0], 2.0)
    one, two = (step_flops(config, stage, 1) for stage in PAPER_STAGES)
    assert 0.5 < one / two < 0.7
    assert report["chip_hours_25000_10000_steps"] == pytest.approx(25_000 * one / two + 10_000)
    assert report["chip_hours"] == pytest.approx(config.total_steps)  # a preset of stage 2 alone
    assert report["cost_25000_10000_steps"] == 2 * report["chip_hours_25000_10000_steps"]
    assert report["cost"] == 2 * report["chip_hours"] and report["price_of_a_chip_hour"] == 2
    assert any(line.endswith(f"chip-hours, {report['cost']:,.0f} at 2 an hour") for line in lines(report))
    assert "price_of_a_chip_hour" not in priced({"what": "sample"}, 2.0)


def run(out, *arguments, **options):
    """The report of a plan made in a process of its own."""
    pytest.importorskip("libtpu", reason="needs the `tpu` extra")
    command = [sys.executable, "-m", "squeeze_jax", "plan", *arguments, "--json", out]
    subprocess.run(command, check=True, timeout=1800, **options)
    return json.loads(out.read_text())


def test_a_single_chip_is_a_topology(tmp_path):
    """A host of v5e and v6e has four chips unless the compiler is told otherwise."""
    pytest.importorskip("libtpu", reason="needs the `tpu` extra")
    code = (
        "from squeeze_jax.planning.train_program import topology_mesh\n"
        "sizes = {'data': 1, 'fsdp': -1, 'tensor': 1}\n"
        "print([topology_mesh(f'{chip}:1x1', sizes)[0].size for chip in ('v5e', 'v6e')])"
    )
    environment = os.environ | plan.ENVIRONMENT
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.stdout.strip() == "[1, 1]", ran.stderr[-500:]


def check(report):
    """What holds of every plan."""
    memory = report["hbm_per_chip"]
    assert memory["total"] == memory["arguments"] + memory["temporaries"] + memory["output"] - memory["aliased"]
    assert report["fits"] == (memory["total"] <= report["hbm_capacity"])
    roofline, seconds = report["roofline_seconds"], report["predicted_step_seconds"]
    assert seconds > max(roofline.values())
    assert report["predicted_mfu"] == pytest.approx(roofline["compute"] / seconds)
    assert sum(one["bytes_per_chip"] for one in report["collectives"] if one["over"] == "dcn") == (
        0 if report["slices"] == 1 else pytest.approx(roofline["dcn"] * 6.25e9, rel=1e-6)
    )


@pytest.mark.slow
def test_a_mesh_that_does_not_fit_is_refused_and_nothing_is_written(tmp_path):
    pytest.importorskip("libtpu", reason="needs the `tpu` extra")
    out = tmp_path / "plan.json"
    command = [sys.executable, "-m", "squeeze_jax", "plan", PRESET, "--topology", "v5p:2x2x1", "--json", out]
    ended = subprocess.run([*command, "--mesh", "fsdp=3"], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 2
    assert "needs 3 devices, there are 4. The nearest that work: data=1, fsdp=4, tensor=1; " in ended.stderr
    assert not out.exists()


@pytest.mark.telling
@pytest.mark.slow
def test_the_full_step_fits_one_host_of_v5p(tmp_path):
    report = run(tmp_path / "plan.json", PRESET, "--topology", "v5p:2x2x1")
    check(report)
    assert report["fits"]
    assert report["hbm_per_chip"]["total"] < 24 * GIB
    assert report["parameters"]["frozen"] == pytest.approx(11.9e9, rel=0.01)
    # Every gather is of one matrix, never of the model; attention is a kernel throughout.
    assert not report["gathers_more_than_a_block"]
    assert report["largest_collective"] < 200e6
    assert not report["holds_attention_matrix"]


@pytest.mark.slow
def test_the_sampler_holds_its_weights_once(tmp_path):
    """Arguments are the weights, cut over four chips, and small inputs; temporaries hold no second
    copy of them. The LoRA is in its kernels, and the aggregator in bfloat16."""
    report = run(tmp_path / "plan.json", PRESET, "--topology", "v5p:2x2x1", "--what", "sample")
    check(report)
    memory, weights = report["hbm_per_chip"], report["weights_per_chip"]["system"]
    lora = 956_301_312
    values = sum(report["parameters"].values()) - lora
    assert weights == pytest.approx(2 * values / 4, rel=2e-3)
    assert weights < memory["arguments"] < 1.05 * weights
    assert memory["temporaries"] < weights / 2
    assert report["fits"] and report["fits_with_mllm"] and not report["holds_attention_matrix"]


@pytest.mark.slow
def test_selective_saving_reaches_sixty_percent_on_64_chips(tmp_path):
    report = run(
        tmp_path / "plan.json", PRESET, "--topology", "v5p:4x4x4", "--mesh", "data=4,fsdp=16",
        "--data.batch-per-chip", "6", "--parallel.remat", "save_products",
    )  # fmt: skip
    check(report)
    assert report["fits"]
    assert report["predicted_mfu"] >= 0.6


@pytest.mark.slow
def test_two_slices_beside_another_process_that_uses_jax(tmp_path):
    """At two blocks' depth: copies of the model on two slices sum their gradients over the network, and gather nothing."""
    holding = "import jax, time; jax.numpy.zeros(3).block_until_ready(); print('up', flush=True); time.sleep(1800)"
    beside = subprocess.Popen([sys.executable, "-c", holding], stdout=subprocess.PIPE, text=True)
    try:
        assert beside.stdout is not None and beside.stdout.readline() == "up\n"
        report = run(
            tmp_path / "plan.json", PRESET, "--topology", "v5p:2x2x1", "--slices", "2", "--mesh", "data=2,fsdp=4",
            "--model.dit.double-blocks", "1", "--model.dit.single-blocks", "1",
        )  # fmt: skip
    finally:
        beside.kill()
        beside.wait()
    check(report)
    between = [one for one in report["collectives"] if one["over"] == "dcn"]
    assert between and all("data" in one["axes"] for one in between)
    assert sum(one["bytes_per_chip"] for one in between) >= report["parameters"]["trained"] / 4 * 2 * 0.99


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (32.00G)", 32),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 512.0M of 15.75G hbm.", 0.5),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem while allocating on stack", None),
        ("INTERNAL: hbm", None),
    ],
)
def test_the_compilers_refusal_is_read(message, gib):
    error = too_large(message)
    assert (error and error.needed) == (gib and gib * GIB)
