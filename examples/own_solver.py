"""A solver of one's own: a function, put into the table under a name.

    python examples/own_solver.py

Here Adams-Bashforth of order 2 with its correction damped by half, beside Euler's steps, on a field
whose answer is known. The same name then works in `Settings(solver=…)`.
"""

import jax
import jax.numpy as jnp

from squeeze_jax.sampling.solvers import SOLVERS, Step, euler, multistep


def damped(x: jax.Array, velocity: jax.Array, before: jax.Array, step: Step) -> jax.Array:
    """Half way between Euler's step and the second-order one."""
    return 0.5 * (euler(x, velocity, before, step) + multistep(x, velocity, before, step))


SOLVERS["damped"] = damped  # pyright: ignore[reportArgumentType]


def solve(name: str, steps: int) -> float:
    """x' = x from t = 1 to 0 with x(1) = 1; exactly, x(0) = 1/e."""
    times, x, before = jnp.linspace(1.0, 0.0, steps + 1), jnp.ones((1, 1, 1)), jnp.ones((1, 1, 1))
    for i in range(steps):
        v = x
        step = Step(times[max(i - 1, 0)], times[i], times[i + 1], jnp.array(i == 0))
        x, before = SOLVERS[name](x, v, before, step), v
    return float(x[0, 0, 0])


def main() -> None:
    exact = float(jnp.exp(-1.0))
    for name in ("euler", "damped", "multistep"):
        errors = [abs(solve(name, steps) - exact) for steps in (10, 20)]
        print(f"{name:10} error {errors[0]:.1e} on 10 steps, {errors[1]:.1e} on 20")


if __name__ == "__main__":
    main()
