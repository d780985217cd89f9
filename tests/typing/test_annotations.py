"""What is public says the type of every argument and result."""

import inspect

import pytest

import efficient_tx.attention
import efficient_tx.kernels
import efficient_tx.linear
import efficient_tx.models

PACKAGES = (efficient_tx.attention, efficient_tx.kernels, efficient_tx.linear, efficient_tx.models)
PUBLIC = [
    value
    for package in PACKAGES
    for value in vars(package).values()
    if callable(value) and value.__module__.startswith("efficient_tx.")
]

pytestmark = pytest.mark.quick


def untyped(function):
    """The arguments without annotation, and "return"."""
    signature = inspect.signature(function)
    missing = [
        name
        for name, parameter in signature.parameters.items()
        if parameter.annotation is parameter.empty and name not in ("self", "cls")
    ]
    return missing + (["return"] if signature.return_annotation is signature.empty else [])


@pytest.mark.parametrize("public", PUBLIC, ids=lambda value: value.__name__)
def test_arguments_and_results_have_types(public):
    if not inspect.isclass(public):
        assert untyped(public) == []
        return
    found = {}
    for name, method in vars(public).items():
        method = getattr(method, "__func__", method)
        if inspect.isfunction(method) and (name in ("__init__", "__call__") or name[0] != "_"):
            missing = untyped(method)
            found[name] = [each for each in missing if (name, each) != ("__init__", "return")]
    assert {name: missing for name, missing in found.items() if missing} == {}
