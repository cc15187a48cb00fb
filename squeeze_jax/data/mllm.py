"""What reads a prompt and its references: InternVL here, or any model of transformers as PyTorch
runs it.

A reader gives every hidden state of a frozen multimodal LLM, text and image tokens apart. Which one
is a choice of the config (`model.mllm_source`); records, aggregator and sampler do not know the
difference.
"""

from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from PIL import Image

from squeeze_jax.array_types import DType, Json
from squeeze_jax.batch import HiddenStates
from squeeze_jax.config_data import MAX_TEXT_TOKENS
from squeeze_jax.data.chat import (
    IMAGE,
    build_input,
    check_prompt,
    check_text_length,
    image_tiles,
    load_tokenizer,
    pad_inputs,
)
from squeeze_jax.data.placement import shard_inputs
from squeeze_jax.errors import InputError
from squeeze_jax.interop.load import load_internvl
from squeeze_jax.models.internvl import InternVL, InternVLConfig, split_hidden_states
from squeeze_jax.sharding import compiler_options, use_mesh

TEXT_BUCKET = 32
"""Text tokens are padded to a multiple of this, so that a new prompt compiles nothing new."""


@runtime_checkable
class MLLM(Protocol):
    """A frozen multimodal LLM."""

    @property
    def width(self) -> int:
        """Channels of a hidden state."""
        ...

    @property
    def layers(self) -> int:
        """Layers above the embeddings; there is one hidden state more."""
        ...

    @property
    def settings(self) -> Json:
        """JSON values besides the weights that decide what comes out."""
        ...

    def check(self, prompt: str, references: int) -> None:
        """Raises InputError, before anything is read, for a prompt that `read` would refuse with so
        many references."""
        ...

    def read(self, prompts: list[str], images: list[list[Image.Image]]) -> HiddenStates:
        """Hidden states of prompts, each with its references; InputError for an empty or too long
        prompt."""
        ...


class InternVLMLLM:
    """InternVL3, compiled per shape."""

    def __init__(
        self,
        folder: Path,
        system_text: str | None,
        max_tiles: int,
        dtype: DType,
        max_text_tokens: int = MAX_TEXT_TOKENS,
        *,
        mesh: Mesh | None = None,
    ) -> None:
        self.mesh = mesh
        self.mllm = load_internvl(folder, dtype, mesh)
        self.mllm.head = None  # it predicts words, which nobody asks for
        self.tokenizer = load_tokenizer(folder)
        self.system_text, self.max_tiles = system_text, max_tiles
        self.max_text_tokens = max_text_tokens
        check_vocabulary(folder, self.tokenizer, self.mllm.config)
        self.graph, self.state = nnx.split(self.mllm)
        # No bound method: memory is free as soon as nobody holds this object.
        program = partial(_read_states, self.graph, mesh)
        self.program = jax.jit(program, compiler_options=compiler_options(mesh))

    @property
    def width(self) -> int:
        return self.mllm.config.text.hidden_size

    @property
    def layers(self) -> int:
        return self.mllm.config.text.num_hidden_layers

    @property
    def settings(self) -> Json:
        # One tile is left out: records from before there was a choice go on being continued.
        return {"system_text": self.system_text} | (
            {"max_tiles": self.max_tiles} if self.max_tiles > 1 else {}
        )

    def check(self, prompt: str, references: int) -> None:
        """A picture's tiles, however many, stand between one pair of text tokens."""
        self._ids(prompt, [self.mllm.config.image_tokens] * references)

    def _ids(self, prompt: str, images: Sequence[int]) -> list[int]:
        most = self.max_text_tokens
        return build_input(self.tokenizer, prompt, images, self.system_text, max_text_tokens=most)

    def read(self, prompts: list[str], images: list[list[Image.Image]]) -> HiddenStates:
        """Hidden states padded to buckets of static shape."""
        config = self.mllm.config
        size, per_tile = config.vision.image_size, config.image_tokens
        tiles = [[image_tiles(image, size, self.max_tiles) for image in row] for row in images]
        counts = [[per_tile * len(of_image) for of_image in row] for row in tiles]
        sequences = [self._ids(prompt, row) for prompt, row in zip(prompts, counts, strict=True)]
        most = max(map(sum, counts))
        longest = max(len(ids) - sum(row) for ids, row in zip(sequences, counts))
        text = bucket(longest, self.max_text_tokens)
        ids, mask = pad_inputs(sequences, text + most)
        pixels = np.zeros((len(prompts) * most // per_tile, size, size, 3), np.float32)
        for place, tile in enumerate(chain.from_iterable(chain.from_iterable(tiles))):
            pixels[place] = tile
        return self.program(self.state, *shard_inputs(self.mesh, (ids, pixels, mask)))


def _read_states(
    graph: Any, mesh: Mesh | None, state: Any, ids: jax.Array, pixels: jax.Array, mask: jax.Array
) -> HiddenStates:
    """All hidden states, text and image tokens apart: both lengths follow from the shapes."""
    mllm: InternVL = nnx.merge(graph, state)
    with use_mesh(mesh):
        hidden = mllm(ids, pixels if pixels.shape[0] else None, mask)
    image = mllm.config.image_tokens * (pixels.shape[0] // ids.shape[0])
    return split_hidden_states(
        hidden,
        ids,
        mask,
        mllm.config.image_token_id,
        text_length=ids.shape[1] - image,
        image_length=image,
    )


class TransformersMLLM:
    """Any image-text-to-text model of transformers, with its own processor and chat template, run
    by PyTorch.

    What the template puts around the prompt is the model's own, without the header of an answer.
    Image tokens are the positions of the model's image token.
    """

    def __init__(
        self,
        processor: Any,
        model: Any,
        system_text: str | None = None,
        max_text_tokens: int = MAX_TEXT_TOKENS,
    ) -> None:
        """Around a processor and a model in memory. Raises InputError where the model's config
        names no image token."""
        names = ("image_token_id", "image_token_index")
        token = next(
            (t for name in names if (t := getattr(model.config, name, None)) is not None), None
        )
        if token is None:
            raise InputError(
                f"the config of {type(model).__name__} names no image_token_id, so image tokens "
                "cannot be told from text"
            )
        self.image_token = int(token)
        self.processor, self.model, self.system_text = processor, model.eval(), system_text
        self.max_text_tokens = max_text_tokens
        self.added = sorted(processor.tokenizer.get_added_vocab(), key=len, reverse=True)

    @classmethod
    def load(
        cls,
        folder: Path,
        system_text: str | None,
        dtype: str,
        max_text_tokens: int = MAX_TEXT_TOKENS,
    ) -> "TransformersMLLM":
        """From a folder, in `dtype`, on the GPU where PyTorch sees one. Raises InputError where
        that cannot be."""
        try:
            import torch
            from transformers import AutoModelForImageTextToText, AutoProcessor
        except ImportError as error:
            raise InputError(
                f'model.mllm_source "transformers" needs PyTorch and transformers ({error}); '
                "install them, or use an InternVL folder and the default"
            ) from None
        try:
            processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
            model: Any = AutoModelForImageTextToText.from_pretrained(
                folder, dtype=getattr(torch, dtype), use_safetensors=True, trust_remote_code=False
            )
        except Exception as error:  # many kinds, from its many model classes
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(f"{folder}: transformers cannot load it ({reason})") from error
        model = model.to("cuda" if torch.cuda.is_available() else "cpu")
        return cls(processor, model, system_text, max_text_tokens)

    @property
    def width(self) -> int:
        return self.model.config.get_text_config().hidden_size

    @property
    def layers(self) -> int:
        return self.model.config.get_text_config().num_hidden_layers

    @property
    def settings(self) -> Json:
        return {"system_text": self.system_text, "source": "transformers"}

    def check(self, prompt: str, references: int) -> None:
        """All but its length, which the model's own template decides."""
        self._conversation(prompt, [])

    def read(self, prompts: list[str], images: list[list[Image.Image]]) -> HiddenStates:
        """Hidden states; InputError also where a prompt spells one of the tokenizer's special
        tokens."""
        import torch

        conversations = [
            self._conversation(prompt, row) for prompt, row in zip(prompts, images, strict=True)
        ]
        inputs = self.processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )
        ids, mask = inputs["input_ids"].numpy(), inputs["attention_mask"].numpy().astype(bool)
        is_image = (ids == self.image_token) & mask
        text, image = (mask & ~is_image).sum(axis=1), is_image.sum(axis=1)
        check_text_length(int(text.max()), self.max_text_tokens)
        device = self.model.device
        moved = {
            name: value.to(device, self.model.dtype if value.is_floating_point() else value.dtype)
            for name, value in inputs.items()
        }
        with torch.inference_mode():
            states = self.model(**moved, output_hidden_states=True, use_cache=False).hidden_states
        hidden = torch.stack(states, dim=1).float().cpu().numpy()
        return split_hidden_states(
            hidden,
            ids,
            mask,
            self.image_token,
            text_length=bucket(int(text.max()), self.max_text_tokens),
            image_length=int(image.max()),
        )

    def _conversation(self, prompt: str, images: Sequence[Image.Image]) -> list[Json]:
        check_prompt(prompt)
        for said in (prompt, self.system_text or ""):
            if token := next((token for token in self.added if token in said), None):
                raise InputError(
                    f"the text {said!r} spells {token!r}, a special token of this model; leave "
                    "it out"
                )
        content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
        turns = [{"role": "user", "content": [*content, {"type": "text", "text": prompt}]}]
        if self.system_text is None:
            return turns
        return [{"role": "system", "content": [{"type": "text", "text": self.system_text}]}, *turns]


def check_vocabulary(folder: Path, tokenizer: Any, config: InternVLConfig) -> None:
    """Raises InputError where tokenizer and model cannot belong together: a picture would be lost
    without a word."""
    image, most = tokenizer.token_to_id(IMAGE), tokenizer.get_vocab_size() - 1
    if image is not None and image != config.image_token_id:
        raise InputError(
            f"{folder}: tokenizer.json gives {IMAGE} the id {image}, config.json "
            f"{config.image_token_id}; "
            "they are not of one model"
        )
    if most >= config.text.vocab_size:
        raise InputError(
            f"{folder}: tokenizer.json has ids up to {most}, the model embeds "
            f"{config.text.vocab_size} tokens; "
            "they are not of one model"
        )


def bucket(text_tokens: int, most: int) -> int:
    """Text tokens to pad to, of at most `most`."""
    return min(-(-text_tokens // TEXT_BUCKET) * TEXT_BUCKET, most)
