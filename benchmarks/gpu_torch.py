"""The train step of `gpu.py` in PyTorch: diffusers' transformer with PEFT's LoRA, no aggregator.

    python benchmarks/gpu.py train --sides ours checkpointed plain compiled

Base in bfloat16, LoRA in float32 on the layers that ours has (UNO's placement), bfloat16 autocast,
gradients clipped, fused AdamW.

    checkpointed  diffusers' gradient checkpointing of every block
    plain         every activation kept
    compiled      the same with its repeated blocks compiled by torch.compile
"""

import time

from gpu import IMAGE, PEAK, REFERENCE, TEXT, config_of, timed

LAYERS = (
    r"transformer_blocks\.\d+\.attn\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)"
    r"|single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out)"
)
"""Names of diffusers' layers in UNO's placement (squeeze_jax.layers.lora.UNO)."""
SIDES = ("checkpointed", "plain", "compiled")


def train_theirs(which: str, batches: list[int], depth: list[int], rank: int, rounds: int) -> None:
    """Prints a table with a row a batch: s a step, model TFLOP and utilisation as `gpu.py train` counts them,
    peak GiB, loss."""
    import diffusers
    import peft
    import torch

    from squeeze_jax.interop.flux import config_to_json
    from squeeze_jax.planning.train_program import step_flops

    config = config_of(depth)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    fields = {k: v for k, v in config_to_json(config.model.dit).items() if k[0] != "_"}
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        twin = diffusers.FluxTransformer2DModel(**fields).requires_grad_(False)
        twin.add_adapter(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=LAYERS))
    torch.set_default_dtype(torch.float32)
    trained = [p for p in twin.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    if which == "checkpointed":
        twin.enable_gradient_checkpointing()
    if which == "compiled":
        torch._dynamo.config.cache_size_limit = 64
        twin.compile_repeated_blocks(fullgraph=True, dynamic=False)
    twin.train()
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.01, fused=True)
    versions = f"diffusers {diffusers.__version__}, torch {torch.__version__}, {which}"
    side = config.data.height // 16
    grids = ((side, 0), (REFERENCE, side))  # side, and where it begins
    rows = [torch.cartesian_prod(torch.arange(n), torch.arange(n)) + start for n, start in grids]
    ids = torch.nn.functional.pad(torch.cat(rows), (1, 0)).to(device, torch.float32)
    count = sum(parameter.numel() for parameter in trained)
    print(f"\n{versions}: {count:,} trained values")
    print("| side | batch | first step, s | s a step | model TFLOP | MFU, % | GiB | loss |")
    print("|---" * 8 + "|", flush=True)
    for batch in batches:

        def normal(*shape: int):
            return torch.randn(batch, *shape, device=device)  # noqa: B023

        tokens, truth = normal(len(ids), 64), normal(side * side, 64)
        said = normal(TEXT + IMAGE, config.model.dit.context_width)
        pooled, t, one = normal(768), torch.rand(batch, device=device), torch.ones(batch).to(device)
        losses = []

        def step():
            with torch.autocast(device, torch.bfloat16):
                velocity = twin(
                    hidden_states=tokens,  # noqa: B023
                    encoder_hidden_states=said,  # noqa: B023
                    pooled_projections=pooled,  # noqa: B023
                    timestep=t,  # noqa: B023
                    guidance=one,  # noqa: B023
                    img_ids=ids,
                    txt_ids=torch.zeros(TEXT + IMAGE, 3, device=device),
                ).sample[:, : side * side]
                loss = torch.mean(torch.square(velocity.float() - truth))  # noqa: B023
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(float(loss.detach()))  # waits for the device  # noqa: B023

        start = time.perf_counter()
        try:
            step()
            first, seconds = time.perf_counter() - start, timed(step, rounds)
        except torch.cuda.OutOfMemoryError:
            print(f"| {which} | {batch} | does not fit | | | | |", flush=True)
            continue
        flops = step_flops(config, config.training.stages[-1], batch)
        peak = torch.cuda.max_memory_allocated() / 2**30
        print(
            f"| {which} | {batch} | {first:.0f} | {seconds:.3f} | {flops / 1e12:.0f} | "
            f"{100 * flops / seconds / PEAK:.1f} | {peak:.1f} | {losses[-1]:.4f} |",
            flush=True,
        )
