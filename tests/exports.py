"""What tests of exported folders share: exporting, and comparing two folders' leaves."""

import numpy as np
from PIL import Image

from squeeze_jax.checkpoints.manager import read_weights
from squeeze_jax.commands import export


def exporting(checkpoint, out, *flags):
    assert export.main([str(checkpoint), "--out", str(out), *flags]) == 0
    return out


def pictures(count):
    rng = np.random.default_rng(1)
    return [Image.fromarray(rng.integers(0, 256, size, np.uint8)) for size in ((40, 64, 3), (32, 32, 3))[:count]]


def same_leaves(one, other):
    wanted, found = (read_weights(folder)[1] for folder in (one, other))
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)
