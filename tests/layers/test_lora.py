"""Adapters against PEFT, and what they must leave alone: the base, other rows, other layers."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from parity import relative_error
from safetensors.numpy import load_file
from small_dit import (
    CONFIG,
    arrays_of,
    compiled,
    inputs,
    like_twin,
    random_dit,
    run_twin,
    torch_twin,
)
from tiny import tiny_config

from squeeze_jax.checkpoints.build import build_system, is_trained
from squeeze_jax.config import Config, load_preset
from squeeze_jax.interop.flux import diffusers_entries
from squeeze_jax.interop.load import save_dit
from squeeze_jax.interop.mapping import export_entries
from squeeze_jax.layers.linear import Linear
from squeeze_jax.layers.lora import (
    UNO,
    Adapter,
    LoRAConfig,
    LoRAParam,
    LowRank,
    add_lora,
    linears,
    merge_lora,
    remove_lora,
    unmerge_lora,
)
from squeeze_jax.models.dit import DiTConfig

QKV = r"double_blocks\.(img|txt)_attn\.qkv|single_blocks\.linear1"


def fill(module, seed=3):
    """Adapters with random numbers everywhere; `up` is zero at the start."""
    rng = np.random.default_rng(seed)
    state = nnx.state(module, LoRAParam)
    for _, leaf in nnx.to_flat_state(state):
        leaf.set_value(jnp.asarray(0.3 * rng.standard_normal(leaf.shape), leaf.dtype))
    nnx.update(module, state)


def adapters(model):
    return {path: linear.adapter for path, linear in linears(model) if linear.adapter is not None}


def kernels(model):
    return {path: linear.kernel[...] for path, linear in linears(model)}


class Holder(nnx.Module):
    def __init__(self, dtype=jnp.float32) -> None:
        self.layer = Linear(6, 10, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))


# --- against PEFT ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "alpha"), [(8, 2.0), (4, None), (3, 12.0)])
def test_a_layer_equals_peft_merged_and_unmerged(rank, alpha):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: parity tests are skipped")
    peft = pytest.importorskip("peft")
    ours = Holder()
    add_lora(ours, LoRAConfig(rank=rank, alpha=alpha, target="layer"), rngs=nnx.Rngs(1))
    fill(ours)
    ours.layer.bias.set_value(jnp.arange(10.0))
    (part,) = ours.layer.adapter.parts

    plain = torch.nn.Sequential()
    plain.add_module("layer", torch.nn.Linear(6, 10))
    config = peft.LoraConfig(r=rank, lora_alpha=rank if alpha is None else alpha, target_modules=["layer"])
    theirs = peft.get_peft_model(plain, config).base_model.model
    as_torch = lambda x: torch.tensor(np.asarray(x))  # noqa: E731
    with torch.no_grad():
        theirs.layer.base_layer.weight.copy_(as_torch(ours.layer.kernel[...]).T)
        theirs.layer.base_layer.bias.copy_(as_torch(ours.layer.bias[...]))
        theirs.layer.lora_A["default"].weight.copy_(as_torch(part.down[...]).T)
        theirs.layer.lora_B["default"].weight.copy_(as_torch(part.up[...]).T)
        x = np.random.default_rng(0).standard_normal((5, 6)).astype(np.float32)
        out = theirs(torch.from_numpy(x)).numpy()
        theirs.layer.merge()
    assert relative_error(ours.layer(x), out) < 1e-5
    merge_lora(ours)
    assert ours.layer.adapter is None
    assert relative_error(ours.layer(x), out) < 1e-5
    assert relative_error(ours.layer.kernel[...].T, theirs.layer.base_layer.weight.detach()) < 1e-6


@pytest.fixture(scope="module")
def small():
    """A transformer with `separate` adapters on every q, k and v: one compiled call for both tests below."""
    dit, x = random_dit(), inputs()
    grids = [grid for _, grid in x["references"]]
    plain, base = compiled(dit, x["target_grid"], grids)
    without = plain(base, arrays_of(x))
    add_lora(dit, LoRAConfig(rank=4, alpha=2.0, target=QKV, qkv="separate"), rngs=nnx.Rngs(1))
    return dit, x, without, compiled(dit, x["target_grid"], grids)


def test_a_fresh_adapter_has_exactly_no_effect(small):
    dit, x, without, (function, state) = small
    carried = adapters(dit)
    assert set(carried) == {"double_blocks.img_attn.qkv", "double_blocks.txt_attn.qkv", "single_blocks.linear1"}
    for path, adapter in carried.items():
        assert not jnp.any(adapter.matrix(dict(linears(dit))[path].kernel.shape[-1])), path
        assert all(float(jnp.abs(part.down[...]).min()) > 0 for part in adapter.parts), path
    one = jax.tree.map(lambda leaf: leaf[0], nnx.state(carried["single_blocks.linear1"]))
    adapter = nnx.merge(nnx.graphdef(carried["single_blocks.linear1"]), one)
    rng = np.random.default_rng(0)
    tokens, y = (jnp.asarray(rng.standard_normal((2, 5, n * CONFIG.width)), jnp.float32) for n in (1, 7))
    [found] = adapter.add([y], [tokens])
    np.testing.assert_array_equal(found, y)
    # The two whole programs differ by the compiler's order of additions.
    assert relative_error(function(state, arrays_of(x)), without) < 1e-6


def test_the_transformer_equals_peft_on_separate_projections(small):
    dit, x, _, (function, _) = small
    torch, twin = torch_twin()
    peft = pytest.importorskip("peft")
    base, _ = like_twin(twin)
    nnx.update(dit, nnx.state(base, nnx.Param))
    fill(dit)
    names = {
        "double_blocks.img_attn.qkv": ("transformer_blocks.{}.attn.", ("to_q", "to_k", "to_v")),
        "double_blocks.txt_attn.qkv": ("transformer_blocks.{}.attn.", ("add_q_proj", "add_k_proj", "add_v_proj")),
        "single_blocks.linear1": ("single_transformer_blocks.{}.attn.", ("to_q", "to_k", "to_v")),
    }
    targets = sorted({name for _, parts in names.values() for name in parts})
    twin.add_adapter(peft.LoraConfig(r=4, lora_alpha=2, target_modules=targets))
    modules, touched = dict(twin.named_modules()), 0
    with torch.no_grad():
        for path, adapter in adapters(dit).items():
            prefix, parts = names[path]
            for part, name in zip(adapter.parts, parts, strict=True):
                for i in range(part.down.shape[0]):
                    layer = modules[prefix.format(i) + name]
                    layer.lora_A["default"].weight.copy_(torch.tensor(np.asarray(part.down[i])).T)
                    layer.lora_B["default"].weight.copy_(torch.tensor(np.asarray(part.up[i])).T)
                    touched += 1
        theirs = run_twin(torch, twin, x)
    assert touched == sum(type(m).__name__ == "Linear" and hasattr(m, "lora_A") for m in modules.values()) == 21
    assert relative_error(function(nnx.state(dit), arrays_of(x)), theirs) < 1e-5

    # Gradients of the pairs.
    weights = np.random.default_rng(5).standard_normal(theirs.shape).astype(np.float32)
    ours, rest = nnx.state(dit, LoRAParam), nnx.state(dit, nnx.Not(LoRAParam))
    gradient = jax.grad(lambda pairs: jnp.sum(function(nnx.merge_state(pairs, rest), arrays_of(x)) * weights))
    found = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(jax.jit(gradient)(ours))}
    (run_twin(torch, twin, x) * torch.from_numpy(weights)).sum().backward()
    for path, (prefix, parts) in names.items():
        for number, name in enumerate(parts):
            layers = [modules[prefix.format(i) + name] for i in range(3 if path.startswith("single") else 2)]
            for leaf, matrix in (("down", "lora_A"), ("up", "lora_B")):
                wanted = np.stack([getattr(layer, matrix)["default"].weight.grad.numpy().T for layer in layers])
                assert relative_error(found[f"{path}.adapter.parts.{number}.{leaf}"], wanted) < 1e-4, (path, name, leaf)

    # Merged, every tensor equals PEFT's merged ones: nothing else has changed.
    merge_lora(dit)
    twin.fuse_lora()
    twin.unload_lora()
    merged = {k: v.detach().numpy() for k, v in twin.state_dict().items()}
    exported = export_entries(dit, diffusers_entries(CONFIG))
    assert exported.keys() == merged.keys()
    assert max(relative_error(exported[name], merged[name]) for name in merged) < 1e-6


# --- which layers and which rows -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uno():
    dit = random_dit()
    chosen = add_lora(dit, LoRAConfig(rank=4), rngs=nnx.Rngs(1))
    fill(dit)
    return dit, chosen


def test_unos_placement(uno):
    dit, chosen = uno
    attention = [f"double_blocks.{stream}_attn.{name}" for stream in ("img", "txt") for name in ("proj", "qkv")]
    assert chosen == [*attention, "single_blocks.linear1", "single_blocks.linear2"]
    assert chosen == sorted(adapters(dit))


def test_shared_qkv_touches_the_first_three_widths_of_linear1_only(uno):
    dit, _ = uno
    width, linear = CONFIG.width, dit.single_blocks.linear1
    (part,) = linear.adapter.parts
    assert part.down.shape == (3, width, 4)
    assert part.up.shape == (3, 4, 3 * width)
    delta = linear.adapter.matrix(7 * width)
    assert delta.shape == (3, width, 7 * width)
    assert float(jnp.abs(delta[..., : 3 * width]).min()) > 0
    assert not jnp.any(delta[..., 3 * width :])
    # In the forward pass too, for one block of the stack.
    graph, state = nnx.split(linear)
    block = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[1], state))
    x = np.random.default_rng(0).standard_normal((2, 5, width)).astype(np.float32)
    changed = block(x)
    block.adapter = nnx.data(None)
    difference = np.asarray(changed - block(x))
    assert relative_error(difference[..., : 3 * width], x @ np.asarray(delta[1, :, : 3 * width])) < 1e-4
    assert not difference[..., 3 * width :].any()


def test_separate_qkv_equals_shared_qkv_with_a_down_projection_in_common(uno):
    shared = uno[0].double_blocks.img_attn.qkv.adapter
    (whole,), width = shared.parts, CONFIG.width
    parts = [
        LowRank(whole.down[...], whole.up[..., i * width : (i + 1) * width], whole.scale[...], i * width) for i in range(3)
    ]
    np.testing.assert_allclose(Adapter(parts).matrix(3 * width), shared.matrix(3 * width), atol=1e-6)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (r"final_layer\.linear", ["final_layer.linear"]),  # the top-level `proj_out` of diffusers, not the blocks'
        (r"single_blocks\.linear2", ["single_blocks.linear2"]),
        (r"double_blocks\.img_attn\.proj", ["double_blocks.img_attn.proj"]),
        (r"(img|txt)_in", ["img_in", "txt_in"]),
    ],
)
def test_paths_match_from_start_to_end(target, expected):
    dit = random_dit()
    assert add_lora(dit, LoRAConfig(1, target=target), rngs=nnx.Rngs(0)) == sorted(adapters(dit)) == expected


@pytest.mark.parametrize("target", ["linear", "linear2", "proj", r"attn\.qkv", "blocks.*", "final_layer"])
def test_a_target_that_matches_nothing_is_refused(target):
    dit = random_dit()
    with pytest.raises(ValueError, match="matches no linear layer"):
        add_lora(dit, LoRAConfig(4, target=target), rngs=nnx.Rngs(0))


def test_a_second_adapter_on_a_layer_is_refused_and_changes_nothing():
    dit = random_dit()
    add_lora(dit, LoRAConfig(4, target=r"single_blocks\.linear2"), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"single_blocks\.linear2 already carries"):
        add_lora(dit, LoRAConfig(4, target=r"single_blocks\.linear[12]"), rngs=nnx.Rngs(0))
    assert list(adapters(dit)) == ["single_blocks.linear2"]
    remove_lora(dit)
    assert not adapters(dit)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"alpha": 0.0}, "alpha is 0"),
        ({"target": "("}, "not a regular expression"),
        ({"init_gain": 0.0}, "init_gain is 0"),
    ],
)
def test_impossible_settings_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        LoRAConfig(**values)


# --- the base stays as it is -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_twenty_merges_and_unmerges_leave_the_base_bit_identical(dtype):
    dit = random_dit(dtype=dtype, param_dtype=dtype)
    base = {path: np.asarray(kernel) for path, kernel in kernels(dit).items()}
    chosen = set()
    for cycle in range(20):
        chosen |= set(add_lora(dit, LoRAConfig(4, target=UNO), rngs=nnx.Rngs(cycle)))
        fill(dit, seed=cycle)
        before = merge_lora(dit)
        merged = kernels(dit)
        assert all((np.asarray(merged[path]) != base[path]).any() == (path in chosen) for path in base)
        assert all(kernel.dtype == dtype for kernel in merged.values())
        unmerge_lora(dit, before)
    after = kernels(dit)
    assert all(np.asarray(after[path]).tobytes() == base[path].tobytes() for path in base)


def test_merging_in_bfloat16_rounds_once():
    ours = Holder(jnp.bfloat16)
    add_lora(ours, LoRAConfig(rank=3, target="layer"), rngs=nnx.Rngs(1))
    fill(ours)
    (part,) = ours.layer.adapter.parts
    exact = np.asarray(ours.layer.kernel[...], np.float64) + np.asarray(part.down[...], np.float64) @ np.asarray(
        part.up[...], np.float64
    )
    merge_lora(ours)
    rounded = jnp.asarray(exact.astype(np.float32), jnp.bfloat16)
    np.testing.assert_array_equal(ours.layer.kernel[...], rounded)


def test_adding_an_adapter_shares_the_base():
    dit = random_dit()
    base = kernels(dit)
    add_lora(dit, LoRAConfig(4), rngs=nnx.Rngs(1))
    assert all(base[path] is kernel for path, kernel in kernels(dit).items())
    grown = sum(leaf.size for _, leaf in nnx.to_flat_state(nnx.state(dit, LoRAParam)))
    w = CONFIG.width
    assert grown == 2 * 2 * 4 * ((w + 3 * w) + (w + w)) + 3 * 4 * ((w + 3 * w) + (5 * w + w))


def test_in_the_scanned_stack_gradients_exist_for_adapters_alone():
    config = DiTConfig(
        in_channels=4, context_width=4, pooled_width=4, heads=1, head_width=8,
        num_double_blocks=2, num_single_blocks=2,
        rope_axes=(2, 2, 4), guidance=False,
    )  # fmt: skip
    dit = random_dit(config)
    add_lora(dit, LoRAConfig(rank=2), rngs=nnx.Rngs(1))
    fill(dit)
    graph, adapted, base = nnx.split(dit, LoRAParam, ...)
    rng = np.random.default_rng(0)
    target, context = (rng.standard_normal((1, n, 4)).astype(np.float32) for n in (4, 3))
    t = np.array([0.6], np.float32)

    @jax.jit
    def gradient(adapted, base):
        loss = lambda a: jnp.sum(jnp.sin(nnx.merge(graph, a, base)(target, context, t, target_grid=(2, 2))))  # noqa: E731
        return jax.grad(loss)(adapted)

    leaves = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(gradient(adapted, base))}
    assert sorted(leaves) == sorted(f"{p}.adapter.parts.0.{m}" for p in adapters(dit) for m in ("down", "up"))
    for name, value in leaves.items():
        assert value.shape[0] == 2, name
        # The last double block's context output is read by the single blocks: every block of the stack learns.
        assert bool(jnp.all(jnp.any(value.reshape(2, -1) != 0, axis=1))), f"{name}: a block without gradient"


# --- sizes -----------------------------------------------------------------------------------------------------------


def sizes(config: Config) -> dict[str, list[int]]:
    """Sizes of trained and frozen leaves, by part of the system; nothing is allocated."""
    system = nnx.eval_shape(lambda: build_system(config, with_base=False))
    _, trained, frozen = nnx.split(system, is_trained(config), ...)
    found = {}
    for kind, state in (("trained", trained), ("frozen", frozen)):
        for path, leaf in nnx.to_flat_state(state):
            found.setdefault(f"{kind} {path[0]}", []).append(math.prod(leaf.shape))
    return found


def test_what_is_trained_is_the_aggregator_and_the_adapters():
    whole = sizes(tiny_config())
    assert set(whole) == {"trained aggregator", "trained dit"}
    adapted = sizes(tiny_config(lora=LoRAConfig(rank=2)))
    assert adapted["trained aggregator"] == whole["trained aggregator"]
    assert len(adapted["trained dit"]) == 12  # down and up of six layers
    assert len(adapted["frozen dit"]) == len(whole["trained dit"]) + 6  # the base, and a scale a layer
    assert sum(adapted["frozen dit"]) == sum(whole["trained dit"]) + 4 * 1 + 2 * 2  # one double block, two single ones
    separate = sizes(tiny_config(lora=LoRAConfig(rank=2, qkv="separate")))
    assert len(separate["trained dit"]) == 24  # qkv and linear1 have three parts each


def test_full_size_counts():
    """docs/decisions.md, "LoRA placement": LoRA 956 M values, DLA about 690 M, over FLUX.1's 11.9 B."""
    full = load_preset(Path(__file__).parents[2] / "configs" / "flux_stage2.py")
    found = {part: sum(leaves) for part, leaves in sizes(full).items()}
    assert found["trained dit"] == 512 * 3072 * (19 * 2 * (4 + 2) + 38 * (4 + 6)) == 956_301_312
    assert found["trained aggregator"] == pytest.approx(690e6, rel=0.01)
    assert found["frozen dit"] == pytest.approx(11.9e9, rel=0.01)
    lean = sizes(dataclasses.replace(full, lora=LoRAConfig(rank=16)))
    assert sum(lean["trained dit"]) == 956_301_312 // 32


def test_a_merged_transformer_is_saved_under_the_bases_names(tmp_path):
    dit = random_dit(dataclasses.replace(CONFIG, heads=2, head_width=32, rope_axes=(4, 14, 14)))
    save_dit(tmp_path / "base", dit, jnp.float32)
    add_lora(dit, LoRAConfig(4, target=UNO), rngs=nnx.Rngs(0))
    fill(dit)
    merge_lora(dit)
    save_dit(tmp_path / "merged", dit, jnp.float32)
    base, merged = (load_file(tmp_path / name / "diffusion_pytorch_model.safetensors") for name in ("base", "merged"))
    assert {name: tensor.shape for name, tensor in merged.items()} == {n: tensor.shape for n, tensor in base.items()}
    double = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.to_add_out")
    double += ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
    single = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_out")
    carried = {f"transformer_blocks.{i}.{name}.weight" for i in range(2) for name in double}
    carried |= {f"single_transformer_blocks.{i}.{name}.weight" for i in range(3) for name in single}
    assert {name for name in base if (merged[name] != base[name]).any()} == carried
