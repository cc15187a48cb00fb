"""What is public says what it is."""

import importlib
import inspect

import pytest

PUBLIC = ("squeeze_jax", "squeeze_jax.interop", "squeeze_jax.functional")


def members():
    for name in PUBLIC:
        module = importlib.import_module(name)
        for public in module.__all__:
            found = getattr(module, public)
            yield f"{name}.{public}", found
            if inspect.isclass(found):
                for method, value in vars(found).items():
                    function = inspect.unwrap(getattr(value, "__func__", value))
                    if not method.startswith("_") and inspect.isfunction(function):
                        yield f"{name}.{public}.{method}", function


@pytest.mark.parametrize(("name", "member"), [pytest.param(*one, id=one[0]) for one in members()])
def test_a_public_name_has_a_docstring_of_its_own(name, member):
    text = inspect.getdoc(member) or ""
    assert text.strip() and not text.startswith(f"{name.rpartition('.')[2]}("), name
    source = inspect.getsource(member)
    if inspect.isfunction(member) and "raise InputError" in source:
        assert "Raises" in text, f"{name} raises InputError and does not say when"
