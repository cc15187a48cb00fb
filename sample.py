"""The same as `python -m squeeze_jax sample`."""

import sys

from squeeze_jax.commands.sample import main

if __name__ == "__main__":
    sys.exit(main())
