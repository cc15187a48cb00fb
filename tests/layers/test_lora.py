"""Adapters: no effect at the start, the right delta in the right channels, a base that is never copied or drifts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import randomised, tiny_config

from squeeze_jax.config import load_preset
from squeeze_jax.interop.build import build_system, is_trained
from squeeze_jax.layers.linear import Linear
from squeeze_jax.layers.lora import LoRAConfig, LoRAParam, add_lora, linears, merge_lora, qkv_ranges, unmerge_lora

CONFIG = tiny_config()


def randomise_adapters(module, seed=1):
    rng = np.random.default_rng(seed)
    for _, leaf in nnx.to_flat_state(nnx.state(module, LoRAParam)):
        leaf.set_value(jnp.asarray(0.3 * rng.standard_normal(leaf.shape), leaf.dtype))


def linear(seed=0, dtype=jnp.float32):
    layer = Linear(6, 8, param_dtype=dtype, rngs=nnx.Rngs(seed))
    layer.bias.set_value(jnp.arange(8, dtype=dtype))
    return layer


class Holder(nnx.Module):
    def __init__(self, layer):
        self.proj = layer


def test_a_fresh_adapter_changes_nothing_at_all():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 6)), jnp.float32)
    holder = Holder(linear())
    before = holder.proj(x)
    assert add_lora(holder, LoRAConfig(rank=2, target="proj"), rngs=nnx.Rngs(1)) == ["proj"]
    np.testing.assert_array_equal(holder.proj(x), before)


@pytest.mark.parametrize(("rank", "alpha"), [(8, 2.0), (2, None), (4, 16.0)])
def test_delta_equals_peft(rank, alpha):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: parity tests are skipped")
    peft = pytest.importorskip("peft")
    holder = Holder(linear())
    add_lora(holder, LoRAConfig(rank=rank, alpha=alpha, target="proj"), rngs=nnx.Rngs(1))
    randomise_adapters(holder)
    part = holder.proj.adapter.parts[0]
    twin = torch.nn.Sequential()
    twin.add_module("proj", torch.nn.Linear(6, 8))
    with torch.no_grad():
        twin.proj.weight.copy_(torch.from_numpy(np.array(holder.proj.kernel[...]).T))
        twin.proj.bias.copy_(torch.from_numpy(np.array(holder.proj.bias[...])))
    twin = peft.get_peft_model(twin, peft.LoraConfig(r=rank, lora_alpha=alpha or rank, target_modules=["proj"]))
    with torch.no_grad():
        twin.base_model.model.proj.lora_A["default"].weight.copy_(torch.from_numpy(np.array(part.down[...]).T))
        twin.base_model.model.proj.lora_B["default"].weight.copy_(torch.from_numpy(np.array(part.up[...]).T))
    x = np.random.default_rng(0).standard_normal((3, 6)).astype(np.float32)
    theirs = twin(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(holder.proj(jnp.asarray(x)), theirs, rtol=1e-5, atol=1e-5)
    merge_lora(holder)
    assert holder.proj.adapter is None
    np.testing.assert_allclose(holder.proj(jnp.asarray(x)), theirs, rtol=1e-5, atol=1e-5)


def test_twenty_merges_leave_a_bfloat16_base_bit_identical():
    holder = Holder(linear(dtype=jnp.bfloat16))
    first = np.asarray(holder.proj.kernel[...])
    for seed in range(20):
        add_lora(holder, LoRAConfig(rank=2, target="proj"), rngs=nnx.Rngs(seed))
        randomise_adapters(holder, seed)
        before = merge_lora(holder)
        assert not np.array_equal(np.asarray(holder.proj.kernel[...]), first)
        unmerge_lora(holder, before)
    np.testing.assert_array_equal(np.asarray(holder.proj.kernel[...]), first)


@pytest.mark.parametrize("layout", ["shared", "separate"])
def test_uno_touches_only_q_k_v_of_a_single_blocks_first_layer(layout):
    system = randomised(CONFIG)
    paths = add_lora(system.dit, LoRAConfig(rank=2, qkv=layout), rngs=nnx.Rngs(0))
    assert paths == [
        "double_blocks.img_attn.proj", "double_blocks.img_attn.qkv", "double_blocks.txt_attn.proj",
        "double_blocks.txt_attn.qkv", "single_blocks.linear1", "single_blocks.linear2",
    ]  # fmt: skip
    randomise_adapters(system.dit)
    layers = dict(linears(system.dit))
    width = CONFIG.model.dit.width
    delta = layers["single_blocks.linear1"].adapter.matrix(7 * width)
    assert delta.shape == (2, width, 7 * width)
    assert np.all(delta[..., 3 * width :] == 0)
    assert np.all(np.any(np.asarray(delta[..., : 3 * width]) != 0, axis=1))
    assert len(layers["double_blocks.img_attn.qkv"].adapter.parts) == (1 if layout == "shared" else 3)


def test_only_adapters_and_the_aggregator_are_trained_and_the_base_is_left_where_it_is():
    config = tiny_config(lora=LoRAConfig(rank=2))
    system = nnx.eval_shape(lambda: build_system(config))
    _, trained, frozen = nnx.split(system, is_trained(config), ...)
    names = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(trained)}
    assert all(name.startswith("aggregator.") or ".adapter." in name for name in names)
    base = nnx.eval_shape(lambda: build_system(tiny_config()))
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
    scales = 4 * 1 + 2 * 2  # one a layer: four linears of one double block, two of two single blocks
    assert count(frozen) - count(nnx.state(base.dit)) == scales


def test_full_size_counts_are_the_papers():
    """AMENDMENTS, "Sizes": LoRA 956 M, DLA about 690 M."""
    import dataclasses
    from pathlib import Path

    preset = load_preset(Path(__file__).parents[2] / "configs" / "flux_stage2.py")
    config = dataclasses.replace(preset, model=dataclasses.replace(preset.model, dit_weights=None))
    system = nnx.eval_shape(lambda: build_system(config))
    leaves = nnx.to_flat_state(nnx.state(system, is_trained(config)))
    lora = sum(leaf.size for path, leaf in leaves if path[0] == "dit")
    aggregator = sum(leaf.size for path, leaf in leaves if path[0] == "aggregator")
    assert 955e6 < lora < 958e6
    assert 650e6 < aggregator < 730e6


def test_a_target_that_matches_nothing_is_refused_and_paths_are_exact():
    system = randomised(CONFIG)
    with pytest.raises(ValueError, match="matches no linear layer"):
        add_lora(system.dit, LoRAConfig(rank=2, target="linear2"), rngs=nnx.Rngs(0))
    chosen = add_lora(system.dit, LoRAConfig(rank=2, target=r"final_layer\.linear"), rngs=nnx.Rngs(0))
    assert chosen == ["final_layer.linear"]
    with pytest.raises(ValueError, match="already carries"):
        add_lora(system.dit, LoRAConfig(rank=2, target=r"final_layer\.linear"), rngs=nnx.Rngs(0))
    assert qkv_ranges("final_layer.linear", 16, 64, "separate") == [(0, 64)]
