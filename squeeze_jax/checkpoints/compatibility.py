"""Which fields of a config may differ from those that weights were trained with.

Weights keep their meaning only under the fields that decide what they compute. One table says it
for every field, in the two cases that weights meet another config: a run that is resumed, and a run
that begins with another's (`--from`).
"""

import re
from typing import Literal, NamedTuple

from squeeze_jax.config import Config
from squeeze_jax.config_json import differences
from squeeze_jax.errors import InputError
from squeeze_jax.storage import AnyPath

Decision = Literal["free", "carried", "ask", "refused"]
"""Of a field that differs:

- `free`: it changes nothing that loaded weights compute, or something else guards it;
- `carried`: the weights, or the run, are adapted so that they compute what they did;
- `ask`: refused unless the user accepts it (`--accept-changes`);
- `refused`: refused.
"""


class Rule(NamedTuple):
    """What is decided of a field."""

    resume: Decision
    begin: Decision
    """Under `--from`."""


def _rows(resume: Decision, begin: Decision, fields: str) -> dict[str, Rule]:
    return dict.fromkeys(fields.split(), Rule(resume, begin))


RULES: dict[str, Rule] = {
    # Frozen weights may move, and a folder's name says nothing of what is in it. Checkpoints have
    # the base's fingerprint, and records the encoders' digests, which a resumed run checks.
    **_rows("free", "free", "model.dit_weights model.autoencoder model.mllm"),
    # Where things lie and what is written and shown.
    **_rows("free", "free", """
        data.features data.image_root data.mix data.workers data.batch_per_chip data.extract_batch
        data.max_text_tokens
        optimizer.accumulate
        training.validate_every training.sample_every
        sampling.tau1 sampling.tau2 sampling.tau_tokens sampling.cfg_scale
        parallel.data parallel.fsdp parallel.tensor parallel.remat parallel.unroll
        checkpoint.every checkpoint.keep checkpoint.keep_every
        log.every log.tensorboard log.profile log.grid log.score
    """),
    # What a run learns, and from what: another run may do it otherwise, the same one may not
    # without a word.
    **_rows("ask", "free", """
        name
        data.source data.min_score data.limit data.long_captions lora.init_gain
        data.manifest data.critters.train data.critters.held_out data.critters.size
        data.critters.seed data.emoji.train data.emoji.held_out data.emoji.subjects
        data.emoji.seed data.emoji.near data.height data.width data.buckets data.reference_long_side
        data.held_out data.skip_bad data.codec data.online data.keep
        diffusion.time_sampling
        optimizer.learning_rate optimizer.vector_learning_rate optimizer.warmup_steps
        optimizer.decay optimizer.b1 optimizer.b2 optimizer.weight_decay optimizer.clip_norm
        training.stages.N.steps training.stages.N.references
        training.stages.N.dropout.both training.stages.N.dropout.mllm
        training.stages.N.dropout.vae training.stages.N.dropout.neither
    """),
    # The times that training draws follow the sampler's schedule: asked where they change.
    **_rows("ask", "free", "sampling.steps sampling.shifted"),
    # Precision, the optimizer's arrays, the order of records: of this run alone.
    **_rows("refused", "free", """
        model.dtype model.frozen_dtype optimizer.kind optimizer.ema training.seed
    """),
    # What the weights are told beside the picture: the form of the MLLM's input, who reads it, and
    # the distilled guidance.
    **_rows("ask", "ask", """
        model.mllm_source data.system_text data.max_tiles diffusion.guidance
    """),
    # What the arrays are and mean.
    **_rows("refused", "refused", """
        model.latent_pixels
        model.dit.in_channels model.dit.context_width model.dit.pooled_width model.dit.heads
        model.dit.head_width model.dit.num_double_blocks model.dit.num_single_blocks
        model.dit.mlp_ratio model.dit.rope_theta
        model.dit.rope_axes model.dit.guidance model.dit.reference_attention
        aggregator.kind aggregator.layers aggregator.width aggregator.out_width aggregator.heads
        aggregator.mlp_width aggregator.layer_blocks aggregator.refiner_blocks
        aggregator.norm_eps
        lora.rank lora.target lora.qkv
    """),
    # The adapters' scale goes into their weights; a run keeps its place in the stream of draws.
    **_rows("refused", "carried", "lora.alpha"),
    **_rows("carried", "carried", "training.steps_before"),
}  # fmt: skip
"""Dotted field → what is decided where it differs; N is any number of a stage."""


def rule_of(field: str) -> Rule:
    """The rule of a field; of a whole section or tuple that differs, that of its fields."""
    field = re.sub(r"\.\d+\.", ".N.", field)
    return RULES.get(field) or next(
        rule for name, rule in RULES.items() if name.startswith(f"{field}.")
    )


OF_TIMES = ("sampling.steps", "sampling.shifted")


def _training_shift(config: Config) -> float:
    """The shift of the times that training draws, at the config's own size of target."""
    rows, columns = config.target_grid
    return config.schedule_shift(rows * columns, config.sampling.steps)


def check_same_run(
    saved: Config, config: Config, workdir: AnyPath, *, accept_changes: bool = False
) -> list[str]:
    """What differs between the config that a folder's run was saved with and this one, one line a
    field; those that are free are left out.

    Raises InputError where that would not continue the run.
    """
    decided = {line: rule_of(_field(line)).resume for line in differences(saved, config)}
    if _training_shift(saved) == _training_shift(config):
        decided = {line: rule for line, rule in decided.items() if _field(line) not in OF_TIMES}
    changed = {line: rule for line, rule in decided.items() if rule in ("ask", "refused")}
    fixed = [line for line, decision in changed.items() if decision == "refused"]
    if fixed or (changed and not accept_changes):
        how = "these decide its arrays or the order of its records: give another --workdir"
        if not fixed:
            how = (
                "give the same config, another --workdir, or --accept-changes to go on with the "
                "new one"
            )
        listed = _listed(fixed if accept_changes else list(changed))
        raise InputError(f"{workdir} holds a checkpoint of another config ({listed}); {how}")
    return list(changed)


def check_start(
    saved: Config, config: Config, start: AnyPath, *, exported: bool, accept_changes: bool = False
) -> None:
    """Raises InputError where the weights of a folder would compute something else under a config
    than under the one that they were trained with, and are not adapted to it.

    `exported`: the folder's adapters are read from a LoRA file, which has its own rank, layout and
    layers, and its transformer may be there with the adapters merged.
    """
    changed: dict[str, Decision] = {}
    for line in differences(saved, config):
        field = _field(line)
        decision = rule_of(field).begin
        if decision in ("ask", "refused") and not _has_no_effect(field, saved, config, exported):
            changed[line] = decision
    changed |= dict.fromkeys(_other_base(saved, config), "refused")
    fixed = [line for line, decision in changed.items() if decision == "refused"]
    if fixed or (changed and not accept_changes):
        how = "set these as they were"
        if not fixed:
            how += ", or give --accept-changes to begin with them all the same"
        listed = _listed(fixed if accept_changes else list(changed))
        raise InputError(
            f"--from {start}: its weights were trained under another config and would compute "
            f"something else under this one ({listed}); {how}"
        )


def _has_no_effect(field: str, saved: Config, config: Config, exported: bool) -> bool:
    """Whether a field that differs changes nothing here."""
    if field == "model.dit.reference_attention":  # of weights that have seen no references
        return not any(stage.references for stage in saved.training.stages)
    if field == "aggregator.layers":  # kinds that read the last one
        return saved.aggregator.reads == config.aggregator.reads
    if field == "diffusion.guidance":
        return not config.model.dit.guidance
    return field.startswith("lora") and exported


def _other_base(saved: Config, config: Config) -> list[str]:
    """What differs of a base under adapters that is random, or was. Fingerprints tell pre-trained
    bases apart; a random one differs in its last bits with how it was compiled."""
    if config.lora is None:
        return []
    bases = saved.model.dit_weights, config.model.dit_weights
    if not any(bases) and saved.training.seed != config.training.seed:
        return [f"training.seed: {saved.training.seed} → {config.training.seed}"]
    return [] if all(bases) or not any(bases) else ["model.dit_weights: {} → {}".format(*bases)]


def _field(line: str) -> str:
    """The field of a line of `differences`."""
    return re.split(": ", line, maxsplit=1)[0]


def _listed(lines: list[str]) -> str:
    return "; ".join(lines[:8]) + (f"; and {len(lines) - 8} more" if len(lines) > 8 else "")
