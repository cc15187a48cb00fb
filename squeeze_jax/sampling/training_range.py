"""What a checkpoint was trained for, and what is asked beyond it."""

from squeeze_jax.config import Config


def most_references(config: Config) -> int | None:
    """The most references that an example of the training data had; None: it is not known."""
    if config.data.critters is not None:
        return 1
    return None if config.data.emoji is None else config.data.emoji.subjects


def beyond_training(config: Config, references: int, height: int, width: int) -> list[str]:
    """Sentences about what the checkpoint was not trained for: more references than it ever saw at
    once, and sides (in pixels) outside those of its training.

    Sizes are only named where the whole transformer was trained here (`lora` None): a pre-trained
    one knows many more.
    """
    found = []
    most = most_references(config)
    if most is not None and references > most:
        at_once = "one reference" if most == 1 else f"up to {most} references"
        found.append(
            f"this checkpoint was trained with {at_once}, not with {references}: it will probably "
            "draw debris"
        )
    sizes = config.data.buckets or ((config.data.height, config.data.width),)
    sides = [side for size in sizes for side in size]
    if config.lora is None and not min(sides) <= min(height, width) <= max(height, width) <= max(
        sides
    ):
        trained = f"{min(sides)} to {max(sides)} pixels a side"
        if min(sides) == max(sides):
            trained = f"{sides[0]} x {sides[0]} pixels"
        found.append(
            f"this checkpoint was trained at {trained}, not at {height} x {width}: what it draws "
            "will probably be blurred or torn"
        )
    return found
