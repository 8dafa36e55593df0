"""The stub of the extension module says what the module is: names, parameters, defaults and docstrings."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import pytest

from rnnfast import _core

STUB = ast.parse(files("rnnfast").joinpath("_core.pyi").read_text())
Parameters = list[tuple[str, str | None]]  # (name, default as source)


def members(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    """What a stub's module or class declares, by name."""
    found: dict[str, ast.stmt] = {}
    for statement in body:
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            found[statement.name] = statement
        elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            found[statement.target.id] = statement
    return found


def public(value: Any) -> set[str]:
    return {name for name in vars(value) if not name.startswith("_")}


def parameters(function: ast.FunctionDef) -> Parameters:
    """Positional parameters but `self`, with their defaults."""
    arguments = [argument.arg for argument in (*function.args.posonlyargs, *function.args.args)]
    defaults = [ast.unparse(default) for default in function.args.defaults]
    padded = [None] * (len(arguments) - len(defaults)) + defaults
    return [pair for pair in zip(arguments, padded, strict=True) if pair[0] != "self"]


def declared(value: Any) -> tuple[Parameters, str]:
    """The parameters and the rest of a compiled function's docstring, of which pybind11 writes the first line."""
    signature, _, text = (value.__doc__ or "").partition("\n")
    parsed = ast.parse(f"def {signature}: ...").body[0]
    assert isinstance(parsed, ast.FunctionDef)
    return parameters(parsed), text.strip()


def functions() -> Iterator[tuple[str, Any, ast.FunctionDef]]:
    """(qualified name, compiled function, its stub) of every function and method in the stub."""
    for name, node in members(STUB.body).items():
        if isinstance(node, ast.FunctionDef):
            yield name, getattr(_core, name, None), node
        elif isinstance(node, ast.ClassDef):
            for method, inner in members(node.body).items():
                if isinstance(inner, ast.FunctionDef) and not is_property(inner):
                    yield f"{name}.{method}", getattr(getattr(_core, name, None), method, None), inner


def is_property(function: ast.FunctionDef) -> bool:
    return any(isinstance(d, ast.Name) and d.id == "property" for d in function.decorator_list)


def test_module_declares_the_same_names():
    assert set(members(STUB.body)) == public(_core)


@pytest.mark.parametrize("name", [n for n, node in members(STUB.body).items() if isinstance(node, ast.ClassDef)])
def test_class_declares_the_same_names(name):
    node, kind = members(STUB.body)[name], getattr(_core, name)
    assert isinstance(node, ast.ClassDef)
    stubbed = members(node.body)
    assert set(stubbed) - {"__init__"} == public(kind)
    assert ast.get_docstring(node) == inspect.getdoc(kind)
    stubbed_properties = {n for n, f in stubbed.items() if isinstance(f, ast.FunctionDef) and is_property(f)}
    assert stubbed_properties == {n for n in public(kind) if isinstance(vars(kind)[n], property)}
    # A class that Python cannot make has pybind11's placeholder: a slot of its own, without a signature.
    made_in_python = not isinstance(vars(kind)["__init__"], type(object.__init__))
    assert ("__init__" in stubbed) == made_in_python


@pytest.mark.parametrize(("name", "value", "node"), [pytest.param(*f, id=f[0]) for f in functions()])
def test_function_has_the_same_signature(name, value, node):
    assert value is not None, f"{name} is in the stub alone"
    found, text = declared(value)
    assert parameters(node) == found
    assert (ast.get_docstring(node) or "") == text


@pytest.mark.parametrize("name", [n for n, node in members(STUB.body).items() if isinstance(node, ast.AnnAssign)])
def test_constant_has_the_type_it_says(name):
    node = members(STUB.body)[name]
    assert isinstance(node, ast.AnnAssign)
    assert type(getattr(_core, name)).__name__ == ast.unparse(node.annotation)


def test_package_is_marked_as_typed():
    assert files("rnnfast").joinpath("py.typed").is_file()
