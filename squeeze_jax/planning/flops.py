"""FLOPs of a program, exact to the matrix product, from what JAX traces: nothing is compiled.

A multiply and an add count two. A scan's body counts as often as it runs. Rematerialised products
count once for every time they are run, so trace with `remat="none"` for what the mathematics needs.
"""

import math
from collections.abc import Callable

import jax
from jax.extend import core

from squeeze_jax.array_types import PyTree
from squeeze_jax.sharding import trace_for_platform


def matmul_flops(function: Callable[..., PyTree], *arguments: PyTree) -> int:
    """FLOPs of all matrix products of `function(*arguments)`; arguments may be
    `jax.ShapeDtypeStruct`."""
    with trace_for_platform(
        "cpu"
    ):  # a function of our own, or JAX might remember what it traced elsewhere
        return _of_jaxpr(jax.make_jaxpr(lambda *given: function(*given))(*arguments).jaxpr)


def _of_jaxpr(jaxpr: core.Jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        match equation.primitive.name:
            case "dot_general":
                total += _of_product(equation)
            case "conv_general_dilated":
                total += _of_convolution(equation)
            case "scan":
                total += equation.params["length"] * _of_jaxpr(equation.params["jaxpr"].jaxpr)
            case "cond":
                total += max(_of_jaxpr(branch.jaxpr) for branch in equation.params["branches"])
            case "while":
                raise ValueError(
                    "a loop of unknown length has no number of FLOPs: trace one step of it"
                )
            case _:
                for value in equation.params.values():
                    inner = getattr(value, "jaxpr", value)
                    if isinstance(inner, core.Jaxpr):
                        total += _of_jaxpr(inner)
    return total


def _of_product(equation: PyTree) -> int:
    left = equation.invars[0].aval.shape
    (contracted, _), _ = equation.params["dimension_numbers"]
    return (
        2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
    )


def _of_convolution(equation: PyTree) -> int:
    kernel = equation.invars[1].aval.shape
    numbers = equation.params["dimension_numbers"]
    per_output = (
        math.prod(kernel) // kernel[numbers.rhs_spec[0]]
    )  # input channels of a group times the window
    return 2 * math.prod(equation.outvars[0].aval.shape) * per_output
