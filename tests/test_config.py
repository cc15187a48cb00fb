"""The configuration: written and read back whole, impossible combinations refused with the reason."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
from flax import nnx
from tiny import tiny_config

from squeeze_jax.checkpoints.build import build_system
from squeeze_jax.config import Config, global_batch, load_preset, override
from squeeze_jax.config_json import differences, from_json, to_json
from squeeze_jax.errors import InputError
from squeeze_jax.layers.lora import LoRAConfig
from squeeze_jax.models.dit import DiTConfig
from squeeze_jax.preset_files import find_presets

ROOT = Path(__file__).parents[1]
PRESETS = sorted((ROOT / "configs").rglob("*.py"))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_preset_survives_json(path):
    config = load_preset(path)
    again = from_json(to_json(config))
    assert again == config
    assert hash(again) == hash(config)  # no list where a tuple was
    assert differences(config, again) == []


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_preset_tells_how_to_run_it(path):
    assert path.relative_to(ROOT).as_posix() in path.read_text().split('"""')[1]


def test_every_presets_system_can_be_built():
    """Abstractly, at full size, without the published weights."""
    systems = {(c.model.dit, c.aggregator, c.lora): c for c in map(load_preset, PRESETS)}
    for config in systems.values():
        system = nnx.eval_shape(lambda config=config: build_system(config, with_base=False))
        assert system.aggregator.config.out_width == system.dit.config.context_width, config.name


def test_overrides_reach_nested_fields_and_keep_the_rest():
    config = tiny_config()
    other = override(config, ["--optimizer.learning-rate", "3e-4", "--training.stages.0.steps", "7"], "train.py")
    assert differences(config, other) == [
        "optimizer.learning_rate: 0.01 → 0.0003",
        f"training.stages.0.steps: {config.training.stages[0].steps} → 7",
    ]


def test_an_optional_section_is_one_flag():
    config = load_preset(ROOT / "configs" / "demo.py")
    bare = override(config, ["--data.critters", "None", "--log.score=0"], "train.py")
    assert bare == dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, critters=None),
        log=dataclasses.replace(config.log, score=0),
    )
    assert override(tiny_config(lora=None), ["--lora=none"], "train.py").lora is None
    begun = override(tiny_config(lora=None), ["--lora.rank", "3", "--lora.qkv=separate"], "train.py")
    assert begun.lora == LoRAConfig(rank=3, qkv="separate")
    again = override(config, ["--data.critters.train", "7"], "train.py").data.critters
    assert again == dataclasses.replace(config.data.critters, train=7)


@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(
    "field",
    ["optimizer.learning_rate", "sampling.tau2", "lora.alpha", "aggregator.norm_eps",
     "training.stages.0.dropout.vae", "diffusion.guidance"],
)  # fmt: skip
def test_numbers_that_are_none_are_refused_by_name(field, number, capsys):
    with pytest.raises((InputError, SystemExit)) as stop:
        override(tiny_config(lora=LoRAConfig()), [f"--{field}={number}"], "train.py")
    said = " ".join((str(stop.value) + capsys.readouterr().err).replace("│", " ").split())
    assert re.search(rf"{re.escape(field)} is {number}|dropout \(both.*{number}", said), said
    values = json.loads(to_json(tiny_config(lora=LoRAConfig())))
    *sections, name = field.split(".")
    section = values
    for part in sections:
        section = section[int(part) if part.isdigit() else part]
    section[name] = float(number)
    with pytest.raises(InputError, match=r"number -?(NaN|Infinity) is not finite"):
        from_json(json.dumps(values))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data.height", "60"], ["data.height 60", "multiple of 16"]),
        (["--model.latent-pixels", "3"], ["model.latent_pixels is 3"]),
        (["--aggregator.out-width", "32"], ["aggregator.out_width 32", "model.dit.context_width 24"]),
        (["--sampling.tau1", "0.3", "--sampling.tau2", "0.6"], ["sampling.tau2 0.6", "sampling.tau1 0.3"]),
        (["--training.stages.0.steps", "0"], ["training.stages.0.steps is 0"]),
        (["--optimizer.ema", "1.0"], ["optimizer.ema is 1.0"]),
        (["--optimizer.accumulate", "0"], ["optimizer.accumulate is 0"]),
        (["--parallel.remat", "some"], ["remat"]),
        (["--data.max-tiles", "13"], ["data.max_tiles is 13", "between 1 and 12"]),
        (["--data.buckets", "512", "500"], ["data.buckets has 512x500", "multiples of 16"]),
        (["--data.buckets", "64", "32", "64", "32"], ["data.buckets names a size twice"]),
        (["--data.max-tiles", "4", "--model.mllm-source", "transformers"], ["data.max_tiles is 4", "leave it at 1"]),
    ],
)
def test_impossible_combinations_say_why(arguments, words, capsys):
    with pytest.raises((InputError, SystemExit)) as stop:
        override(tiny_config(), arguments, "train.py")
    said = " ".join((str(stop.value) + capsys.readouterr().err).replace("│", " ").split())
    for word in words:
        assert word in said, said


def test_buckets_are_given_in_pairs_and_survive_json():
    config = override(tiny_config(), ["--data.buckets", "512", "768", "64", "64"], "train.py")
    assert config.data.buckets == ((512, 768), (64, 64))
    assert config.training_grids == ((32, 48), (4, 4))
    assert from_json(to_json(config)) == config
    assert tiny_config().training_grids == (tiny_config().target_grid,)


def test_a_section_gives_all_its_reasons_at_once():
    data = tiny_config().data
    with pytest.raises(InputError, match=r"data\.height 60.*; data\.batch_per_chip is 0; it must"):
        dataclasses.replace(data, height=60, batch_per_chip=0)


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("model", {"latent_pixels": 3}, "model.latent_pixels is 3; it must be 1, 2, 4 or 8"),
        ("data", {"batch_per_chip": 0}, "data.batch_per_chip is 0; it must be larger than 0"),
        ("data", {"online": True, "workers": 2}, "data.online and data.workers are both set"),
        ("optimizer", {"ema": 1.0}, "optimizer.ema is 1.0; it must be between 0 and 0.999999"),
        ("optimizer", {"clip_norm": 0.0}, "optimizer.clip_norm is 0.0; it must be larger than 0"),
        ("training", {"stages": ()}, "training.stages is empty"),
        ("training", {"validate_every": 0}, "training.validate_every is 0"),
        ("sampling", {"tau2": 0.99}, "sampling.tau2 0.99 must not be larger than sampling.tau1"),
        ("sampling", {"tau1": 1.2}, "sampling.tau1 is 1.2; it must be between 0 and 1.1"),
        ("sampling", {"tau_tokens": 0}, "sampling.tau_tokens is 0"),
        ("checkpoint", {"keep": 0}, "checkpoint.keep is 0; it must be larger than 0"),
        ("log", {"every": 0}, "log.every is 0; it must be larger than 0"),
    ],
)
def test_a_section_checks_itself_and_names_the_whole_path(section, changes, message):
    with pytest.raises(InputError) as stop:
        dataclasses.replace(getattr(tiny_config(), section), **changes)
    assert message in str(stop.value)
    values = json.loads(to_json(tiny_config()))
    values[section] |= changes
    with pytest.raises(InputError, match=re.escape(message)):
        from_json(json.dumps(values))


@pytest.mark.parametrize(("data", "fsdp", "tensor"), [(1, 1, 1), (2, 4, 1), (1, 4, 2), (3, 2, 4)])
def test_the_global_batch_is_per_chip_by_data_by_fsdp_by_accumulated(data, fsdp, tensor):
    optimizer = dataclasses.replace(tiny_config().optimizer, accumulate=5)
    shape = {"data": data, "fsdp": fsdp, "tensor": tensor}
    assert global_batch(tiny_config(optimizer=optimizer), shape) == 4 * data * fsdp * 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_axes": (2, 2, 2)}, "sum"),
        ({"rope_axes": (1, 3, 4)}, "even"),
    ],
)
def test_a_transformer_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        DiTConfig(heads=2, head_width=8, **changes)


def test_old_files_and_flags_still_count():
    """Names that fields once had, and fields that there were not: as older versions wrote them."""
    config = tiny_config(lora=LoRAConfig())
    values = json.loads(to_json(config))
    dit = values["model"]["dit"]
    for kind in ("double", "single"):
        dit[f"{kind}_blocks"] = dit.pop(f"num_{kind}_blocks")
    del values["lora"]["init_gain"], values["aggregator"]["norm_eps"]
    assert from_json(json.dumps(values)) == config
    assert (config.lora.init_gain, config.aggregator.norm_eps) == (1.0, 1e-5)
    for flags in (["--model.dit.double-blocks", "5"], ["--model.dit.double_blocks=5"]):
        assert override(config, flags, "train.py").model.dit.num_double_blocks == 5
    dit["num_double_blocks"] = 3
    with pytest.raises(InputError, match=r"config\.model\.dit has unknown fields double_blocks"):
        from_json(json.dumps(values))


def test_json_of_another_version_is_refused():
    values = json.loads(to_json(tiny_config(lora=LoRAConfig())))
    values["optimizer"]["momentum"] = 0.9
    with pytest.raises(InputError, match=r"config\.optimizer has unknown fields momentum"):
        from_json(json.dumps(values))


def test_a_file_without_a_config_is_refused(tmp_path):
    path = tmp_path / "preset.py"
    path.write_text("config = 3\n")
    with pytest.raises(InputError, match="must define `config`"):
        load_preset(path)


FAMILY = {
    "flux_stage2": ("FLUX.1-dev", True, 25, "Non-Commercial"),
    "flux_krea": ("FLUX.1-Krea-dev", True, 25, "Non-Commercial"),
    "flux_kontext": ("FLUX.1-Kontext-dev", True, 25, "Non-Commercial"),
    "flux_schnell": ("FLUX.1-schnell", False, 4, "Apache-2.0"),
}


def test_the_family_shares_an_architecture_and_each_names_its_licence():
    base = load_preset(ROOT / "configs" / "flux_stage2.py").model.dit
    for name, (repository, guidance, steps, licence) in FAMILY.items():
        config = load_preset(ROOT / "configs" / f"{name}.py")
        assert config.model.dit == dataclasses.replace(base, guidance=guidance)
        assert config.model.dit_weights == f"{repository}/transformer"
        assert config.sampling.steps == steps
        assert config.sampling.shifted == guidance  # schnell's schedule is not shifted
        assert licence in (ROOT / "configs" / f"{name}.py").read_text().split('"""')[1]
    for path in (ROOT / "configs").glob("flux_*.py"):
        assert "Licence of the weights: " in path.read_text().split('"""')[1], path.name


def test_the_papers_numbers_stand_in_the_presets():
    one, two = (load_preset(ROOT / "configs" / f"flux_stage{i}.py") for i in (1, 2))
    assert [stage.steps for stage in one.training.stages] == [25_000]
    assert [stage.steps for stage in two.training.stages] == [10_000]
    assert not one.training.stages[0].references
    assert two.training.stages[0].references
    assert isinstance(two.lora, LoRAConfig)
    assert (two.lora.rank, two.sampling.steps, two.sampling.cfg_scale) == (512, 25, 2.5)
    assert (two.sampling.tau1, two.sampling.tau2) == (0.95, 0.85)
    assert isinstance(one, Config)


def test_what_is_no_config_is_one_sentence():
    for text in ("{", "[]", "{}", '{"name": "a", "data": 3}'):
        with pytest.raises(InputError):
            from_json(text)


def test_validation_needs_rows_and_grids_no_negative_number():
    config = tiny_config()
    with pytest.raises(InputError, match=r"data\.held_out is 0"):
        dataclasses.replace(config, data=dataclasses.replace(config.data, held_out=0))
    with pytest.raises(InputError, match=r"log\.grid is -1"):
        dataclasses.replace(config, log=dataclasses.replace(config.log, grid=-1))


def test_a_folder_of_shipped_presets_is_found_from_anywhere(tmp_path, monkeypatch):
    """What docs/training.md gives to `ablate` is there where the package is installed, too."""
    monkeypatch.chdir(tmp_path)
    shipped = ROOT / "configs" / "ablations"
    for name in ("configs/ablations/", "ablations"):
        assert find_presets(name) == sorted(shipped.glob("*.py"))
    assert find_presets("ablations/lap") == [shipped / "lap.py"]
    (tmp_path / "mine.py").touch()
    assert find_presets(tmp_path) == [tmp_path / "mine.py"]
    with pytest.raises(InputError, match="no preset nothing"):
        find_presets("nothing")
