"""squeeze_jax: subject-driven image generation in JAX.

    from PIL import Image
    from squeeze_jax import Pipeline, Settings

    pipeline = Pipeline.load()  # the shipped miniature; or a run's, weights or exported folder
    critter = Image.open("critter.png")
    pictures = pipeline("a critter on the beach", [critter], Settings(num_images=4))
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from squeeze_jax.sampling.pipeline import Pipeline, Settings

__version__ = "0.1.0"
__all__ = ["Pipeline", "Settings"]


def __getattr__(name: str) -> Any:
    """The public names, imported at first use: `import squeeze_jax` alone stays quick and starts
    no device."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from squeeze_jax.sampling import pipeline

    return getattr(pipeline, name)
