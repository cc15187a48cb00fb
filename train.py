"""The same as `python -m squeeze_jax train`."""

import sys

from squeeze_jax.commands.train import main

if __name__ == "__main__":
    sys.exit(main())
