"""InternVL in the `-hf` layout of transformers: its table of names, and its config.json."""

import re

from squeeze_jax.array_types import Json
from squeeze_jax.interop.mapping import Entry, Layout
from squeeze_jax.models.internvl import InternVLConfig, TextConfig, VisionConfig

# Our name within a block, the file's name, and whether the file has a weight alone or a bias as
# well.
VISION_BLOCK = {
    "attention_norm": "layernorm_before",
    "query": "attention.q_proj",
    "key": "attention.k_proj",
    "value": "attention.v_proj",
    "attention_output": "attention.projection_layer",
    "mlp_norm": "layernorm_after",
    "mlp_in": "mlp.fc1",
    "mlp_out": "mlp.fc2",
}
TEXT_BLOCK = {
    "attention_norm": "input_layernorm",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "attention_output": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
QKV = ("query", "key", "value")


def entries(config: InternVLConfig) -> list[Entry]:
    """Every tensor of an `-hf` checkpoint of this config (781 for InternVL3-8B), by its name on
    disk."""
    table = [
        Entry(("vision_tower.embeddings.cls_token",), "vision_tower.class_token"),
        Entry(("vision_tower.embeddings.position_embeddings",), "vision_tower.position_embedding"),
        Entry(
            ("vision_tower.embeddings.patch_embeddings.projection.weight",),
            "vision_tower.patch_embedding",
            "conv",
        ),
        Entry(
            ("vision_tower.embeddings.patch_embeddings.projection.bias",), "vision_tower.patch_bias"
        ),
        *_module("multi_modal_projector.layer_norm", "projector.norm", bias=True),
        *_module("multi_modal_projector.linear_1", "projector.linear_1", bias=True),
        *_module("multi_modal_projector.linear_2", "projector.linear_2", bias=True),
        Entry(("language_model.model.embed_tokens.weight",), "embedding"),
        *_module("language_model.model.norm", "norm"),
    ]
    if not config.text.tie_word_embeddings:
        table += _module("language_model.lm_head", "head")
    for layer in range(config.vision.num_hidden_layers):
        theirs, ours = f"vision_tower.encoder.layer.{layer}", "vision_tower.blocks"
        for name, source in VISION_BLOCK.items():
            bias = name not in QKV or config.vision.attention_bias
            table += _module(f"{theirs}.{source}", f"{ours}.{name}", layer, bias=bias)
        table.append(Entry((f"{theirs}.lambda_1",), f"{ours}.attention_scale", layer=layer))
        table.append(Entry((f"{theirs}.lambda_2",), f"{ours}.mlp_scale", layer=layer))
    for layer in range(config.text.num_hidden_layers):
        for name, source in TEXT_BLOCK.items():
            table += _module(
                f"language_model.model.layers.{layer}.{source}",
                f"blocks.{name}",
                layer,
                bias=name in QKV,
            )
    return table


def original_entries(config: InternVLConfig) -> list[Entry]:
    """The table for the layout that OpenGVLab publishes: fused q, k and v in the vision tower,
    `mlp1` for the projector."""
    table = []
    for entry in entries(config):
        name = entry.sources[0]
        for pattern, replacement in ORIGINAL:
            name = re.sub(pattern, replacement, name)
        fused = re.fullmatch(r"(vision_model\..*\.attn\.)([qkv])(\.weight|\.bias)", name)
        if fused:
            entry = entry._replace(
                sources=(f"{fused[1]}qkv{fused[3]}",), part=("qkv".index(fused[2]), 3)
            )
        else:
            entry = entry._replace(sources=(name,))
        table.append(entry)
    return table


ORIGINAL = (
    (r"^vision_tower\.embeddings\.cls_token", "vision_model.embeddings.class_embedding"),
    (
        r"^vision_tower\.embeddings\.position_embeddings",
        "vision_model.embeddings.position_embedding",
    ),
    (
        r"^vision_tower\.embeddings\.patch_embeddings\.projection",
        "vision_model.embeddings.patch_embedding",
    ),
    (r"^vision_tower\.encoder\.layer\.", "vision_model.encoder.layers."),
    (r"\.attention\.([qkv])_proj", r".attn.\1"),
    (r"\.attention\.projection_layer", ".attn.proj"),
    (r"\.layernorm_before", ".norm1"),
    (r"\.layernorm_after", ".norm2"),
    (r"\.lambda_([12])$", r".ls\1"),
    (r"^multi_modal_projector\.layer_norm", "mlp1.0"),
    (r"^multi_modal_projector\.linear_1", "mlp1.1"),
    (r"^multi_modal_projector\.linear_2", "mlp1.3"),
)
"""Patterns of `-hf` names and what the original layout has instead."""


def original_config_from_json(values: Json) -> InternVLConfig:
    """Our config from the original layout's `config.json` (`llm_config` beside `vision_config`).
    Raises ValueError naming what we do not compute."""
    vision, text = values["vision_config"], values["llm_config"]
    for name, found, wanted in (
        ("ps_version", values.get("ps_version", "v2"), "v2"),
        ("select_layer", values.get("select_layer", -1), -1),
        ("vision_config.qk_normalization", vision.get("qk_normalization", False), False),
        ("vision_config.norm_type", vision.get("norm_type", "layer_norm"), "layer_norm"),
    ):
        if found != wanted:
            raise ValueError(f"config.json: {name} is {found!r}, but only {wanted!r} is supported")
    return config_from_json(
        {
            "downsample_ratio": values.get("downsample_ratio", 0.5),
            "vision_config": {
                **{
                    name: value
                    for name, value in vision.items()
                    if name not in ("norm_type", "model_type")
                },
                "attention_bias": vision.get("qkv_bias", True),
                "image_size": values.get("force_image_size") or vision["image_size"],
                "layer_scale_init_value": vision.get("initializer_factor", 0.1),
            },
            "text_config": text,
        }
    )


def _module(source: str, path: str, layer: int | None = None, bias: bool = False) -> list[Entry]:
    """A norm or a linear layer: its weight, and its bias."""
    norm = path.endswith("norm")
    layout: Layout = "same" if norm else "linear"
    weight = Entry(
        (f"{source}.weight",), f"{path}.scale" if norm else f"{path}.kernel", layout, layer
    )
    return [weight, Entry((f"{source}.bias",), f"{path}.bias", layer=layer)] if bias else [weight]


def config_from_json(values: Json) -> InternVLConfig:
    """Our config from a `config.json`; what we do not compute is refused by name. Raises ValueError
    for it."""
    vision, text = values["vision_config"], values["text_config"]
    rope = text.get("rope_parameters") or {}
    scaling = text.get("rope_scaling") or rope
    scaling_type = scaling.get(
        "rope_type", scaling.get("type", "default")
    )  # `type` is its old name
    tied = values.get(
        "tie_word_embeddings", text.get("tie_word_embeddings", False)
    )  # transformers asks the whole
    wanted = [
        ("model_type", values.get("model_type", "internvl"), ("internvl",)),
        ("projector_hidden_act", values.get("projector_hidden_act", "gelu"), ("gelu",)),
        ("vision_feature_layer", values.get("vision_feature_layer", -1), (-1,)),
        (
            "vision_feature_select_strategy",
            values.get("vision_feature_select_strategy", "default"),
            ("default",),
        ),
        ("vision_config.hidden_act", vision.get("hidden_act", "gelu"), ("gelu",)),
        ("vision_config.norm_type", vision.get("norm_type", "layer_norm"), ("layer_norm",)),
        ("vision_config.use_qk_norm", vision.get("use_qk_norm", False), (False,)),
        ("vision_config.use_mask_token", vision.get("use_mask_token", False), (False,)),
        ("vision_config.use_mean_pooling", vision.get("use_mean_pooling", True), (True,)),
        ("vision_config.num_channels", vision.get("num_channels", 3), (3,)),
        (
            "vision_config.use_absolute_position_embeddings",
            vision.get("use_absolute_position_embeddings", True),
            (True,),
        ),
        ("text_config.model_type", text.get("model_type", "qwen2"), ("qwen2",)),
        ("text_config.hidden_act", text.get("hidden_act", "silu"), ("silu",)),
        ("text_config.use_sliding_window", text.get("use_sliding_window", False), (False,)),
        # Dynamic scaling begins beyond max_position_embeddings, which the model refuses.
        ("text_config.rope_scaling.rope_type", scaling_type, ("default", "dynamic")),
    ]
    for name, found, allowed in wanted:
        if found not in allowed:
            raise ValueError(
                f"config.json: {name} is {found!r}, but only {' or '.join(map(repr, allowed))} is supported"
            )
    return InternVLConfig(
        vision=VisionConfig(
            image_size=_side(vision["image_size"], "image_size"),
            patch_size=_side(vision["patch_size"], "patch_size"),
            hidden_size=vision["hidden_size"],
            num_hidden_layers=vision["num_hidden_layers"],
            num_attention_heads=vision["num_attention_heads"],
            intermediate_size=vision["intermediate_size"],
            attention_bias=vision.get("attention_bias", False),
            layer_norm_eps=vision.get("layer_norm_eps", 1e-6),
            layer_scale_init_value=vision.get("layer_scale_init_value", 0.1),
        ),
        text=TextConfig(
            vocab_size=text["vocab_size"],
            hidden_size=text["hidden_size"],
            num_hidden_layers=text["num_hidden_layers"],
            num_attention_heads=text["num_attention_heads"],
            num_key_value_heads=text["num_key_value_heads"],
            intermediate_size=text["intermediate_size"],
            rms_norm_eps=text.get("rms_norm_eps", 1e-6),
            rope_theta=text.get("rope_theta", rope.get("rope_theta", 10000.0)),
            max_position_embeddings=text.get("max_position_embeddings", 32768),
            tie_word_embeddings=tied,
        ),
        image_token_id=values.get("image_token_id", 151667),
        downsample=round(1 / values.get("downsample_ratio", 0.5)),
    )


def config_to_json(config: InternVLConfig) -> Json:
    """A `config.json` that transformers reads, and that `config_from_json` reads back."""
    vision, text = config.vision, config.text
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "downsample_ratio": 1 / config.downsample,
        "image_seq_length": config.image_tokens,
        "image_token_id": config.image_token_id,
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": text.tie_word_embeddings,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "text_config": {
            "model_type": "qwen2",
            "hidden_act": "silu",
            "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size,
            "max_position_embeddings": text.max_position_embeddings,
            "num_attention_heads": text.num_attention_heads,
            "num_hidden_layers": text.num_hidden_layers,
            "num_key_value_heads": text.num_key_value_heads,
            "rms_norm_eps": text.rms_norm_eps,
            "rope_theta": text.rope_theta,
            "tie_word_embeddings": text.tie_word_embeddings,
            "use_sliding_window": False,
            "vocab_size": text.vocab_size,
        },
        "vision_config": {
            "model_type": "internvl_vision",
            "attention_bias": vision.attention_bias,
            "hidden_act": "gelu",
            "hidden_size": vision.hidden_size,
            "image_size": [vision.image_size, vision.image_size],
            "intermediate_size": vision.intermediate_size,
            "layer_norm_eps": vision.layer_norm_eps,
            "layer_scale_init_value": vision.layer_scale_init_value,
            "norm_type": "layer_norm",
            "num_attention_heads": vision.num_attention_heads,
            "num_channels": 3,
            "num_hidden_layers": vision.num_hidden_layers,
            "patch_size": [vision.patch_size, vision.patch_size],
            "use_absolute_position_embeddings": True,
            "use_mask_token": False,
            "use_mean_pooling": True,
            "use_qk_norm": False,
        },
    }


def _side(value: int | list[int], name: str) -> int:
    height, width = (value, value) if isinstance(value, int) else value
    if height != width:
        raise ValueError(f"config.json: {name} is {value!r}, but only squares are supported")
    return height
