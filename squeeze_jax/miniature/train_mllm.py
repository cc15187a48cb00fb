"""Trains the demo's small MLLM to describe critters: first its eyes to name what is there, then all
of it to talk.

What is wanted of it is what a large MLLM has: hidden states that know *what* is in the picture and
what the prompt asks for, layer by layer differently, and that have lost fine detail. So it sees a
thumbnail. As with a large one, the vision tower comes pretrained: with next-token loss alone it
tells colours apart and stays blind to shapes for thousands of steps. Then every conversation makes
the whole say what it sees and what it is to draw. Every number here is our decision; README says
what it reached.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from optax.contrib import MuonDimensionNumbers, muon

from squeeze_jax.array_types import Array, Bool, Float, Int
from squeeze_jax.data.chat import IMAGE, SPECIAL_TOKENS, Vocabulary, preprocess_image
from squeeze_jax.miniature.critters import Split, pair_at, questions
from squeeze_jax.miniature.tokenizer import build_demo_tokenizer
from squeeze_jax.miniature.world import CRITTERS, Talk, World
from squeeze_jax.models.internvl import InternVL, InternVLConfig, TextConfig, VisionConfig

GREETING = "user\n"
ANSWER = "assistant\n"


@dataclass(frozen=True)
class MLLMTraining:
    """How the demo's MLLM is trained; the defaults made the shipped weights."""

    vision_steps: int = 900
    """Steps in which the vision tower and the projector learn to name factors, before the
    conversations."""
    vision_batch: int = 128
    steps: int = 1200
    batch: int = 32
    """Conversations a step, each about one picture."""
    length: int = 96
    """Tokens a conversation; it holds as many questions as fit."""
    learning_rate: float = 0.02
    """Muon's peak, for kernels, reached after `warmup` steps, then a cosine to zero."""
    vector_learning_rate: float = 2e-3
    """AdamW's peak, for embeddings, norms and biases, on the same schedule."""
    warmup: int = 50
    weight_decay: float = 0.01
    prompt_weight: float = 0.2
    """Weight of the loss on a prompt's own tokens beside 1 on answers."""
    spelled: float = 0.1
    """Share of prompts in which one word is spelled in bytes, so that the model learns to read
    words it has no token of."""
    seed: int = 0


def demo_tokenizer() -> Any:
    """The critters' tokenizer (`tokenizers.Tokenizer`), made from what 3,000 conversations say."""

    def texts() -> Iterable[str]:
        for index in range(3000):
            pair, rng = pair_at(0, index), np.random.default_rng(index)
            yield from (GREETING, ANSWER, "system\n", pair.prompt)
            for shown in (pair.reference_pose, pair.scene):
                for question, answer in questions(pair.subject, shown, rng):
                    yield from (question, answer)

    return build_demo_tokenizer(texts())


def tokenizer_of(world: World, vocab_size: int = 2048, conversations: int = 20_000) -> Any:
    """A world's tokenizer (`tokenizers.Tokenizer`), made from what its conversations say.

    Words of held-out subjects' names that no other text has are spelled in bytes.
    """

    def texts() -> Iterable[str]:
        yield from (GREETING, ANSWER, "system\n")
        for index in range(conversations):
            talk = world.talk(0, index, "train", np.random.default_rng(index))
            yield talk.prompt or ""
            for question, answer in talk.questions:
                yield from (question, answer)

    return build_demo_tokenizer(texts(), vocab_size)


def demo_config(tokenizer: Any, image_size: int = 16) -> InternVLConfig:
    """The demo's MLLM for a tokenizer: 1.1 M parameters with the critters' words, 4 image tokens
    of a thumbnail of 16x16 pixels (9 of 24x24)."""
    return InternVLConfig(
        vision=VisionConfig(
            image_size=image_size,
            patch_size=4,
            hidden_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=128,
            layer_scale_init_value=1.0,
        ),
        text=TextConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=320,
            rope_theta=10_000.0,
            max_position_embeddings=512,
            tie_word_embeddings=True,
        ),
        image_token_id=tokenizer.token_to_id(IMAGE),
    )


class Conversation(NamedTuple):
    """A batch of conversations, padded on the right."""

    input_ids: Int[Array, "B L"]
    weights: Float[Array, "B L"]
    """Weight of the loss on predicting this token."""
    mask: Bool[Array, "B L"]
    pixel_values: Float[Array, "B images height width 3"]


class Speaker:
    """Turns pairs into conversations: texts to ids (remembered, since the sentences repeat),
    pictures to tiles."""

    def __init__(
        self,
        config: InternVLConfig,
        tokenizer: Any,
        training: MLLMTraining,
        world: World = CRITTERS,
    ) -> None:
        self.config, self.training, self.world = config, training, world
        self.vocabulary = Vocabulary(tokenizer)
        self.start, self.end, self.image_start, self.image_end, self.image = map(
            self.vocabulary.special, SPECIAL_TOKENS
        )
        self.text = lru_cache(maxsize=None)(self.vocabulary.text)

    def turn(
        self, content: list[int], weight: float = 0.0, role: str = GREETING
    ) -> tuple[list[int], list[float]]:
        """Ids of a turn, and the loss's weight of each: `weight` for what is said and for the
        end of it."""
        head = [self.start, *self.text(role)]
        ids = [*head, *content, self.end, *self.text("\n")]
        weights = [0.0] * len(head) + [weight] * (len(content) + 1) + [0.0]
        return ids, weights

    def conversation(self, talk: Talk, rng: np.random.Generator) -> tuple[list[int], list[float]]:
        """The pictures with a prompt or with a first question, then questions while they fit."""
        pictures = [
            token
            for _ in talk.pictures
            for token in (
                self.image_start,
                *[self.image] * self.config.image_tokens,
                self.image_end,
                *self.text("\n"),
            )
        ]
        asked = iter(talk.questions)
        if talk.prompt is not None:
            said = (
                self.spell(talk.prompt, rng)
                if rng.random() < self.training.spelled
                else self.text(talk.prompt)
            )
            ids, weights = self.turn([*pictures, *said], self.training.prompt_weight)
            # The pictures are not to be predicted.
            last = max(place for place, one in enumerate(ids) if one == self.image_end)
            weights[: last + 2] = [0.0] * (last + 2)
        else:
            question, answer = next(asked)
            ids, weights = self.turn([*pictures, *self.text(question)])
            more, more_weights = self.turn(list(self.text(answer)), 1.0, ANSWER)
            ids, weights = ids + more, weights + more_weights
        for question, answer in asked:
            question_ids, question_weights = self.turn(list(self.text(question)))
            answer_ids, answer_weights = self.turn(list(self.text(answer)), 1.0, ANSWER)
            if len(ids) + len(question_ids) + len(answer_ids) > self.training.length:
                break
            ids, weights = (
                ids + question_ids + answer_ids,
                weights + question_weights + answer_weights,
            )
        return ids, weights

    def spell(self, text: str, rng: np.random.Generator) -> list[int]:
        """The text with one word in bytes."""
        words = text.split(" ")
        chosen = int(rng.integers(len(words)))
        ids: list[int] = []
        for place, word in enumerate(words):
            word = word if place == 0 else " " + word
            ids += [i for c in word for i in self.text(c)] if place == chosen else self.text(word)
        return ids

    def batch(self, step: int, split: Split = "train") -> Conversation:
        """The batch of a step: it follows from (seed, step) alone."""
        training, size = self.training, self.config.vision.image_size
        shape = (training.batch, training.length)
        input_ids, weights, mask = (
            np.zeros(shape, np.int32),
            np.zeros(shape, np.float32),
            np.zeros(shape, bool),
        )
        # Unused pictures stay zero, at the end of their row.
        pixels = np.zeros((training.batch, self.world.references, size, size, 3), np.float32)
        for row in range(training.batch):
            index = step * training.batch + row
            rng = np.random.default_rng((training.seed, index, 7))
            talk = self.world.talk(training.seed, index, split, rng)
            ids, of_ids = self.conversation(talk, rng)
            ids, of_ids = ids[: training.length], of_ids[: training.length]
            input_ids[row, : len(ids)], weights[row, : len(ids)], mask[row, : len(ids)] = (
                ids,
                of_ids,
                True,
            )
            for place, picture in enumerate(talk.pictures):
                pixels[row, place] = preprocess_image(picture, size)
        return Conversation(input_ids, weights, mask, pixels)


def train_mllm(
    config: InternVLConfig,
    training: MLLMTraining,
    tokenizer: Any,
    world: World = CRITTERS,
    *,
    vision_progress: Callable[[int, dict[str, float]], None] = lambda step, metrics: None,
    progress: Callable[[int, dict[str, float]], None] = lambda step, metrics: None,
) -> InternVL:
    """An MLLM that describes the training subjects' pictures, in float32.

    `vision_progress` and `progress(step, metrics)` are called after every step of the two parts.
    The same config, training and tokenizer give the same weights on one machine.
    """
    speaker = Speaker(config, tokenizer, training, world)
    mllm = initial_mllm(config, training.seed)
    pretrain_vision(mllm, training, world, progress=vision_progress)
    graph, parameters = nnx.split(mllm, nnx.Param)
    optimizer = make_optimizer(training, training.steps)
    moments = optimizer.init(parameters)

    @jax.jit
    def train_step(parameters, moments, batch: Conversation):
        def loss(parameters):
            return describing_loss(nnx.merge(graph, parameters), batch)

        (_, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(parameters)
        updates, moments = optimizer.update(gradients, moments, parameters)
        return optax.apply_updates(parameters, updates), moments, metrics

    with ThreadPoolExecutor(1) as drawing:
        upcoming = drawing.submit(speaker.batch, 0)
        for step in range(training.steps):
            batch = upcoming.result()
            upcoming = drawing.submit(speaker.batch, step + 1)
            parameters, moments, metrics = train_step(parameters, moments, batch)
            progress(step + 1, {name: float(value) for name, value in metrics.items()})
    return nnx.merge(graph, parameters)


class FactorHeads(nnx.Module):
    """Image tokens to one set of logits a label; thrown away after the pretraining."""

    def __init__(self, mllm: InternVL, sizes: Iterable[int], rngs: nnx.Rngs) -> None:
        features = mllm.config.image_tokens * mllm.config.text.hidden_size
        self.sizes = tuple(sizes)
        self.mllm, self.heads = mllm, nnx.Linear(features, sum(self.sizes), rngs=rngs)

    def __call__(
        self, pixel_values: Float[Array, "B height width 3"]
    ) -> list[Float[Array, "B values"]]:
        tokens = self.mllm.vision(pixel_values)
        logits = self.heads(tokens.reshape(tokens.shape[0], -1))
        return jnp.split(logits, np.cumsum(self.sizes)[:-1].tolist(), axis=-1)


def pretrain_vision(
    mllm: InternVL,
    training: MLLMTraining,
    world: World = CRITTERS,
    *,
    progress: Callable[[int, dict[str, float]], None] = lambda step, metrics: None,
) -> None:
    """Trains the vision tower and the projector, in place, so that the world's labels can be
    read off linearly."""
    heads = FactorHeads(mllm, world.label_sizes.values(), nnx.Rngs(training.seed + 1))
    graph, parameters = nnx.split(heads, nnx.Param)
    optimizer = make_optimizer(training, training.vision_steps)
    moments = optimizer.init(parameters)

    def loss(parameters: nnx.State, pixels: jax.Array, factors: jax.Array) -> tuple:
        logits = nnx.merge(graph, parameters)(pixels)
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels
        total = sum(cross_entropy(row, factors[:, i]).mean() for i, row in enumerate(logits))
        right = jnp.stack([row.argmax(-1) == factors[:, i] for i, row in enumerate(logits)]).mean()
        return total, {"loss": total, "right": right}

    @jax.jit
    def train_step(parameters, moments, pixels, factors):
        (_, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(
            parameters, pixels, factors
        )
        updates, moments = optimizer.update(gradients, moments, parameters)
        return optax.apply_updates(parameters, updates), moments, metrics

    def batch(step: int) -> tuple[np.ndarray, np.ndarray]:
        first = step * training.vision_batch
        rows = [world.labelled(training.seed, first + row) for row in range(training.vision_batch)]
        size = mllm.config.vision.image_size
        tiles = np.stack([preprocess_image(picture, size) for picture, _ in rows])
        return tiles, np.array([labels for _, labels in rows], np.int32)

    with ThreadPoolExecutor(1) as drawing:
        upcoming = drawing.submit(batch, 0)
        for step in range(training.vision_steps):
            pixels, factors = upcoming.result()
            upcoming = drawing.submit(batch, step + 1)
            parameters, moments, metrics = train_step(parameters, moments, pixels, factors)
            progress(step + 1, {name: float(value) for name, value in metrics.items()})
    trained = nnx.merge(graph, parameters).mllm
    nnx.update(
        mllm.vision_tower, nnx.state(trained.vision_tower)
    )  # the rest had no gradient, but weight decay
    nnx.update(mllm.projector, nnx.state(trained.projector))


def answers_right(
    mllm: InternVL,
    training: MLLMTraining,
    tokenizer: Any,
    world: World,
    split: Split,
    batches: int = 8,
) -> float:
    """The share of answers' tokens that are guessed right, 0 to 1, in conversations that were not
    trained on, about subjects of a split."""
    unseen = replace(training, seed=training.seed + 50, spelled=0.0)
    speaker, loss = Speaker(mllm.config, tokenizer, unseen, world), nnx.jit(describing_loss)
    found = [loss(mllm, speaker.batch(step, split))[1]["right"] for step in range(batches)]
    return float(np.mean(found))


def describing_loss(
    mllm: InternVL, batch: Conversation
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean cross-entropy of the next token, in nats, over the weighted tokens; and the share of
    answers guessed right."""
    hidden = mllm(batch.input_ids, batch.pixel_values, batch.mask)[:, -1, :-1]
    logits, targets, weights = mllm.logits(hidden), batch.input_ids[:, 1:], batch.weights[:, 1:]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    loss = (losses * weights).sum() / weights.sum()
    answers = weights == 1.0
    right = ((logits.argmax(-1) == targets) & answers).sum() / answers.sum()
    return loss, {"loss": loss, "right": right}


def initial_mllm(config: InternVLConfig, seed: int) -> InternVL:
    """Random weights with five times the usual embeddings and a fifth of the blocks' output.

    So a token's own identity is not drowned in the first block, and looking at the picture is
    learned in a hundred steps instead of a thousand.
    """
    mllm = InternVL(config, rngs=nnx.Rngs(seed))
    mllm.embedding.set_value(5.0 * mllm.embedding[...])
    for linear in (mllm.blocks.attention_output, mllm.blocks.down):
        linear.kernel.set_value(0.2 * linear.kernel[...])
    return mllm


def make_optimizer(training: MLLMTraining, steps: int) -> optax.GradientTransformation:
    """Muon for kernels, AdamW for the rest; clipping, warm-up and a cosine to zero."""
    warmup = min(training.warmup, max(steps // 10, 1))
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup, steps)

    def matrices(parameters: nnx.State) -> nnx.State:
        def dimensions(path: tuple[Any, ...], leaf: Array) -> MuonDimensionNumbers | None:
            is_kernel = any(getattr(key, "key", None) == "kernel" for key in path)
            return MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1) if is_kernel else None

        return jax.tree_util.tree_map_with_path(dimensions, parameters)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        muon(
            lambda step: schedule(step) * training.learning_rate,
            muon_weight_dimension_numbers=matrices,  # pyright: ignore[reportArgumentType]
            adam_learning_rate=lambda step: schedule(step) * training.vector_learning_rate,
            weight_decay=training.weight_decay,
        ),
    )
