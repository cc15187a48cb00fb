"""Names of the solvers, apart from their code: the command line reads them without starting JAX."""

from typing import Literal

SolverName = Literal["euler", "multistep"]
