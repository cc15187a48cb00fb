"""Staged subject-driven sampling in PyTorch: new pictures from a prompt and pictures of a subject.

Time t runs from 1 (noise) to 0 on the transformer's schedule. At t ≥ tau1 the transformer sees
the LLM's tokens alone, at tau2 ≤ t < tau1 these and the references' latents, at t < tau2 the
references alone (arXiv 2605.26111). The first step begins at t = 1, so that tau1 = 1.1 with
tau2 = 0 keeps both on throughout. What a stage does not use is left out of the sequence.
Classifier-free guidance contrasts with the target alone.
"""

import json
import math
import warnings
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FluxTransformer2DModel, ModelMixin
from PIL import Image, ImageOps
from squeeze_aggregator import Aggregator
from tokenizers import Tokenizer
from torch import Tensor
from transformers import InternVLForConditionalGeneration
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.utils import cached_file

LORA = "pytorch_lora_weights.safetensors"
IMAGE_TOKEN = "<IMG_CONTEXT>"
MAX_TEXT_TOKENS = 128  # of folders whose config does not say
MULTIPLE = 16  # pixels: sides of references and pictures
MAX_TAU = 1.1  # no step has t >= tau above 1


class SqueezePipeline(DiffusionPipeline):
    """Samples with FLUX.1. transformer: with its LoRA, if it has one. settings: see `settings_of`.

    mllm: InternVL3 in transformers' layout.
    """

    model_cpu_offload_seq = "mllm->aggregator->transformer->vae"
    classes: ClassVar = {"transformer": FluxTransformer2DModel, "vae": AutoencoderKL}
    time_proj, rope_axes = "time_text_embed.time_proj", 3

    def __init__(
        self, transformer: ModelMixin, vae: ModelMixin, aggregator: Aggregator,
        mllm: InternVLForConditionalGeneration, tokenizer: Tokenizer,
        settings: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.register_modules(
            transformer=transformer, vae=vae, aggregator=aggregator, mllm=mllm, tokenizer=tokenizer
        )
        if settings is None:  # diffusers takes an argument without a default for a module
            raise ValueError("settings are missing; use SqueezePipeline.load")
        self.settings = settings
        side = mllm.config.vision_config.image_size[0]
        self.tiles = GotOcr2ImageProcessorPil(
            size={"height": side, "width": side}, image_mean=(0.485, 0.456, 0.406),
            image_std=(0.229, 0.224, 0.225), crop_to_patches=True,
            max_patches=settings["max_tiles"],
        )  # fmt: skip
        # diffusers rounds time and guidance to the transformer's dtype; what is embedded is put
        # back in float32.
        self.told: list[Tensor] = []
        transformer.get_submodule(self.time_proj).register_forward_pre_hook(
            lambda module, given: (self.told.pop(0),) if self.told else given
        )

    @classmethod
    def load(
        cls, folder: str, transformer: Any = None, vae: Any = None, mllm: str | None = None,
        torch_dtype: torch.dtype = torch.bfloat16,
    ) -> "SqueezePipeline":  # fmt: skip
        """From an exported folder, which may hold `transformer`, `vae` and `mllm`.

        Else say where they are. transformer, vae: a module, a folder, or a name on the hub (with a
        `subfolder` of that name if it is a whole pipeline).
        """
        home, options = Path(folder), {"torch_dtype": torch_dtype, "use_safetensors": True}
        config = json.loads((home / "config.json").read_text())
        if len(config["model"]["dit"].get("rope_axes", [16, 56, 56])) != cls.rope_axes:
            raise ValueError(f"{home} is not for {cls.__name__}; its README.md names the class")

        def check(name: str, found: str) -> None:
            if found != (kind := cls.classes[name].__name__):
                raise ValueError(f"{name} is of class {found}, but {home} goes with {kind}")

        def part(name: str, given: Any) -> Any:
            kind, place, where = cls.classes[name], home, {"subfolder": name}
            if given is None and not (home / name).is_dir():
                raise ValueError(f"{home} has no {name}: say where it is, {name}=…")
            if isinstance(given, (str, Path)):
                place, where = given, {} if (Path(given) / "config.json").is_file() else where
            elif given is not None:
                if isinstance(given, ModelMixin) and not isinstance(given, kind):
                    check(name, type(given).__name__)
                return given
            check(name, kind.load_config(place, **where).get("_class_name", kind.__name__))
            return kind.from_pretrained(place, **where, **options)

        if mllm is None and not (home / "mllm").is_dir():
            raise ValueError(
                f"{home} has no mllm: say where InternVL3 is, mllm='OpenGVLab/InternVL3-8B-hf'"
            )
        reader = str(mllm or home / "mllm")
        model = part("transformer", transformer)
        merged = transformer is None and (home / "transformer").is_dir()
        if (home / LORA).is_file() and not merged:
            model.load_lora_adapter(str(home), weight_name=LORA)
        read_by = InternVLForConditionalGeneration.from_pretrained(
            reader, dtype=torch_dtype, use_safetensors=True
        )
        return cls(
            model.eval(), part("vae", vae).eval(),
            Aggregator.load(home / "aggregator", torch_dtype), read_by.eval(),
            Tokenizer.from_file(cached_file(reader, "tokenizer.json")), settings_of(config),
        )  # fmt: skip

    @torch.no_grad()
    def __call__(
        self, prompt: str, references: list[Image.Image] | tuple = (),
        height: int | None = None, width: int | None = None, num_inference_steps: int | None = None,
        tau1: float | None = None, tau2: float | None = None, guidance_scale: float | None = None,
        num_images: int = 1, generator: torch.Generator | None = None,
        latents: Tensor | None = None, output_type: str = "pil",
    ) -> Any:  # fmt: skip
        """Pictures; what is None is as the training run's config has it. No references: text only.

        latents: noise as packed tokens [images, rows · columns, channels] in float32, row by row,
        where a token is 2 x 2 latents with channels ordered (channel, dy, dx); else it is drawn
        from `generator`. output_type: `pil`, `np` (float32 [images, height, width, 3] in [-1, 1])
        or `latent` (denoised tokens).
        """
        own = self.settings
        height, width = height or own["height"], width or own["width"]
        if height % MULTIPLE or width % MULTIPLE:
            raise ValueError(f"{height}x{width}: both must be multiples of {MULTIPLE} pixels")
        token = 2 ** len(self.vae.config.block_out_channels)  # pixels along a token's side
        grid = (height // token, width // token)
        base, count = own.get("tau_tokens"), grid[0] * grid[1]
        tau1, tau2 = (
            v if v is not None else carry_tau(own[k], base, count) if base else own[k]
            for k, v in (("tau1", tau1), ("tau2", tau2))
        )  # fmt: skip
        scale = own["cfg_scale"] if guidance_scale is None else guidance_scale
        if not 0 <= tau2 <= tau1 <= MAX_TAU:
            needed = f"0 <= tau2 <= tau1 <= {MAX_TAU}"
            raise ValueError(f"tau1 is {tau1} and tau2 is {tau2}; they must satisfy {needed}")
        pictures = [to_rgb(image) for image in references]
        context = self.aggregator(*self.read(prompt, pictures))
        shown = [self.encode(image) for image in pictures] if own["references"] else []

        if latents is None:
            shape = (num_images, grid[0] * grid[1], self.transformer.config.in_channels)
            device = getattr(generator, "device", "cpu")
            latents = torch.randn(shape, generator=generator, device=device)
        x = latents.to(self._execution_device, torch.float32)
        positions = self.positions(grid, shown).to(x)
        tokens = torch.cat([self.pack(latent) for latent in shown], dim=1) if shown else None
        times = self.schedule(num_inference_steps or own["steps"], count, own["shifted"])
        kept = stages(times, tau1, tau2) if shown else [(True, False)] * (len(times) - 1)
        for i in self.progress_bar(range(len(kept))):
            (mllm, identity), t, t_next = kept[i], times[i], times[i + 1]
            said, seen = context if mllm else context[:0], tokens if identity else None
            v = self.velocity(x, float(t), positions, said, seen)
            if scale != 1.0:
                bare = self.velocity(x, float(t), positions, context[:0], None)
                v = bare + scale * (v - bare)
            x = x + float(t_next - t) * v
        if output_type != "latent":
            x = self.decode(x, grid)
        if output_type == "pil":
            x = [Image.fromarray(np.rint((picture + 1) * 127.5).astype(np.uint8)) for picture in x]
        self.maybe_free_model_hooks()
        return x

    def velocity(
        self, x: Tensor, t: float, positions: Tensor, context: Tensor, references: Tensor | None
    ) -> Tensor:
        """v = ε - x_0 of tokens x [B, N, c] at time t; context [L, width], references [1, R, c]."""
        batch, count, model, tokens, told = len(x), x.shape[1], self.transformer, x, None
        if references is not None:
            tokens = torch.cat([x, references.to(x).expand(batch, -1, -1)], dim=1)
        if model.config.guidance_embeds:
            told = torch.full((batch,), self.settings["guidance"], device=x.device)
        time = torch.full((batch,), t, device=x.device)
        self.told = [1000.0 * value for value in (time, told) if value is not None]
        output = model(
            hidden_states=tokens.to(model.dtype), timestep=time, guidance=told,
            encoder_hidden_states=context.to(model.dtype).expand(batch, -1, -1),
            img_ids=positions[: tokens.shape[1]], **self.context_inputs(x, len(context)),
        )  # fmt: skip
        return output.sample[:, :count].float()

    def read(self, prompt: str, pictures: list[Image.Image]) -> tuple[Tensor, Tensor]:
        """Hidden states [layers + 1, L, width] of the user's turn; which tokens [L] are images."""
        config, device = self.mllm.config, self._execution_device
        found = [self.tiles(images=one, return_tensors="pt")["pixel_values"] for one in pictures]
        lengths = [len(tiles) * config.image_seq_length for tiles in found]
        ids = torch.tensor([self.token_ids(prompt, lengths)])
        pixels = torch.cat(found).to(device, self.mllm.dtype) if found else None
        states = self.mllm(
            input_ids=ids.to(device), pixel_values=pixels, output_hidden_states=True,
            use_cache=False, logits_to_keep=1,
        ).hidden_states  # fmt: skip
        return torch.cat(states), ids[0].to(device) == config.image_token_id

    def token_ids(self, prompt: str, images: list[int]) -> list[int]:
        """References, then the prompt, where special tokens' names are text; no answer's header."""
        if not prompt.strip():
            raise ValueError("the prompt is empty; say what the picture should show")
        special, model = self.tokenizer.token_to_id, self.tokenizer.model

        def text(said: str) -> list[int]:
            if self.tokenizer.normalizer is not None:
                said = self.tokenizer.normalizer.normalize_str(said)
            split = self.tokenizer.pre_tokenizer
            pieces = [(said, None)] if split is None else split.pre_tokenize_str(said)
            return [token.id for piece, _ in pieces for token in model.tokenize(piece)]

        ids, system = [], self.settings["system_text"]
        if system is not None:
            turn = text("system\n" + system)
            ids += [special("<|im_start|>"), *turn, special("<|im_end|>"), *text("\n")]
        ids.append(special("<|im_start|>"))
        said = "user\n"
        for count in images:
            tokens = [special(IMAGE_TOKEN)] * count
            ids += [*text(said), special("<img>"), *tokens, special("</img>")]
            said = "\n"
        ids += [*text(said + prompt), special("<|im_end|>"), *text("\n")]
        most = self.settings.get("max_text_tokens", MAX_TEXT_TOKENS)
        if len(ids) - sum(images) > most:
            raise ValueError(
                f"the prompt is too long: with its template more than {most} tokens; shorten it"
            )
        return ids

    def encode(self, picture: Image.Image) -> Tensor:
        """Latents [1, C, h, w] of a reference.

        It keeps its aspect ratio; sides are rounded, and at most as long as in training.
        """
        longest = self.settings["reference_long_side"]
        scale = min(1.0, longest / max(picture.size))
        most = longest // MULTIPLE * MULTIPLE
        size = [round(side * scale / MULTIPLE) * MULTIPLE for side in picture.size]
        size = [max(MULTIPLE, min(most, side)) for side in size]
        resized = picture.resize(size, Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.asarray(resized, np.float32) / 127.5 - 1.0)
        x = pixels.permute(2, 0, 1)[None].to(self._execution_device, self.vae.dtype)
        return self.normalise(self.vae.encode(x).latent_dist.mode().float())

    def decode(self, tokens: Tensor, grid: tuple[int, int]) -> np.ndarray:
        """Pictures [B, height, width, 3] in [-1, 1] of tokens [B, N, c]."""
        x = tokens.unflatten(1, grid).unflatten(3, (-1, 2, 2))
        x = x.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
        x = self.denormalise(x).to(self.vae.dtype)
        pictures = self.vae.decode(x).sample.clamp(-1, 1)
        return pictures.permute(0, 2, 3, 1).float().cpu().numpy()

    @staticmethod
    def pack(latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] to tokens [B, (h/2)(w/2), 4C]: channels go (channel, dy, dx)."""
        x = latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # [B, C, rows, dy, columns, dx]
        return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    # What another family does otherwise.

    def context_inputs(self, x: Tensor, length: int) -> dict[str, Tensor]:
        """What the transformer takes beside `length` context tokens: positions, a pooled vector."""
        model = self.transformer
        pooled = x.new_zeros(len(x), model.config.pooled_projection_dim, dtype=model.dtype)
        return {"pooled_projections": pooled, "txt_ids": x.new_zeros(length, 3)}

    def normalise(self, latents: Tensor) -> Tensor:
        """The autoencoder's latents [B, C, h, w] as the transformer knows them."""
        return (latents - self.vae.config.shift_factor) * self.vae.config.scaling_factor

    def denormalise(self, latents: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        return latents / self.vae.config.scaling_factor + self.vae.config.shift_factor

    @staticmethod
    def positions(grid: tuple[int, int], references: list[Tensor]) -> Tensor:
        """(0, row, column) of every token of the target and then of the references.

        Each picture's grid begins diagonally past all before it (UNO, arXiv 2504.02160).
        """
        places, row, column = [], 0, 0
        for rows, columns in [grid, *((x.shape[2] // 2, x.shape[3] // 2) for x in references)]:
            ranges = torch.arange(row, row + rows), torch.arange(column, column + columns)
            places.append(torch.cartesian_prod(torch.tensor([0]), *ranges))
            row, column = row + rows, column + columns
        return torch.cat(places)

    @staticmethod
    def schedule(steps: int, target_tokens: int, shifted: bool) -> np.ndarray:
        return schedule(steps, target_tokens, shifted)


def settings_of(config: dict[str, Any]) -> dict[str, Any]:
    """Of a training run's config: what sampling has to know."""
    names = ("height", "width", "reference_long_side", "system_text", "max_tiles")
    told = {name: config["data"][name] for name in names}
    told["max_text_tokens"] = config["data"].get("max_text_tokens", MAX_TEXT_TOKENS)
    told["guidance"] = config["diffusion"]["guidance"]
    # Else the transformer has never seen any.
    told["references"] = any(stage["references"] for stage in config["training"]["stages"])
    return {**config["sampling"], **told}


def schedule(steps: int, target_tokens: int, shifted: bool) -> np.ndarray:
    """μ is linear in the target's tokens, .5 at 256 and 1.15 at 4,096; not shifted (schnell): 0."""
    mu = 0.5 + (1.15 - 0.5) / (4096 - 256) * (target_tokens - 256)
    return shifted_times(steps, mu if shifted else 0.0)


def shifted_times(steps: int, mu: float) -> np.ndarray:
    """steps + 1 times from 1 to 0: t = e^μ / (e^μ + 1/s - 1)."""
    s, shift = 1.0 - np.arange(steps + 1) / steps, math.exp(mu)
    return (shift * s / (shift * s + (1.0 - s))).astype(np.float32)


def stages(times: np.ndarray, tau1: float, tau2: float) -> list[tuple[bool, bool]]:
    """Of each step, by the time at its start: whether it sees the LLM's tokens, the references'.

    Warns of a stage that the thresholds leave room for without any step, as happens on few steps.
    """
    high, low = np.float32(tau1), np.float32(tau2)
    kept = [(bool(t >= low), bool(t < high)) for t in times[:-1]]
    both, alone = ("both conditions", tau2, tau1), ("the references alone", 0.0, tau2)
    for seen, (name, start, end) in {(True, True): both, (False, True): alone}.items():
        if start < min(end, 1.0) and seen not in kept:
            why = f"none of {len(kept)} begins at {start:g} <= t < {end:g}"
            advice = "take more steps or move tau1 and tau2"
            warnings.warn(f"no step has {name}: {why}; {advice}", stacklevel=4)
    return kept


def carry_tau(tau: float, base_tokens: int, tokens: int) -> float:
    """A threshold of base_tokens at equal signal-to-noise for tokens.

    logit(t) moves by half the log of the ratio; 1 and above stay.
    """
    if tau >= 1.0:
        return tau
    odds = tau / (1.0 - tau) * math.sqrt(tokens / base_tokens)
    return odds / (1.0 + odds)


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright RGB, what is transparent laid on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or (image.mode == "I" and np.asarray(image).max(initial=0) > 65535):
        raise ValueError("a picture of 32-bit values has no known range; save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # 16-bit grey, which `convert` would clip at 255
        grey = np.clip(np.asarray(image, np.float32) / 257.0, 0, 255)
        image = Image.fromarray(np.rint(grey).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
