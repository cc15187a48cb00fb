"""The flags of commands that sample: over which devices weights and images are laid."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from squeeze_jax.storage import AnyPath

if TYPE_CHECKING:
    from jax.sharding import Mesh


@dataclass(frozen=True)
class Parallel:
    """Mesh of this machine's devices. Without any of these: all of them, as suits the images."""

    data: int | None = None
    """Copies of the weights, each for other images."""
    fsdp: int | None = None
    """Slices of the weights, each place with other images; none: what data and tensor leave."""
    tensor: int | None = None
    """Devices that share an image; it divides the transformer's heads."""

    def mesh(self, checkpoint: AnyPath, images: int) -> "Mesh | None":
        """The mesh to draw so many images of a checkpoint at once; None is one device.

        Raises InputError for a folder without a config, and for a mesh that cannot be.
        """
        from squeeze_jax.checkpoints.manager import read_config
        from squeeze_jax.sampling.layout import sampling_mesh
        from squeeze_jax.sharding import format_mesh

        heads = read_config(checkpoint).model.dit.heads
        mesh = sampling_mesh(heads, images, data=self.data, fsdp=self.fsdp, tensor=self.tensor)
        if mesh is not None:
            print(f"{mesh.size} devices: {format_mesh(list(mesh.shape.values()))}")
        return mesh
