"""The public names stay what they say, whatever was imported before."""

import importlib
import pkgutil

import pytest

import protoprune


def test_no_submodule_hides_a_public_name():
    """Importing `protoprune.x` sets the attribute x of the package: a function of that name would be gone."""
    modules = {module.name for module in pkgutil.iter_modules(protoprune.__path__)}
    assert modules.isdisjoint(protoprune.__all__)


@pytest.mark.parametrize("name", [name for name in protoprune.__all__ if name != "__version__"])
def test_public_names_are_documented_callables(name):
    value = getattr(protoprune, name)
    assert callable(value)
    assert value.__doc__
    assert value.__module__.startswith("protoprune.")


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'prunes'"):
        protoprune.prunes  # noqa: B018


MODULES = list(pkgutil.walk_packages(protoprune.__path__, "protoprune."))


@pytest.mark.parametrize("module", MODULES, ids=[module.name for module in MODULES])
def test_every_module_says_what_it_is(module):
    if module.name != "protoprune.__main__":
        assert importlib.import_module(module.name).__doc__
