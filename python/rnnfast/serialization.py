"""Modules in files: `save`, `load`, `load_checkpoint`.

A file is safetensors: the parameters under the names of `state_dict`, so that any reader of that format can open it,
beside them arrays of the optimiser and the user ("optimizer/0", "user/0"). The metadata entry "rnnfast" is JSON:

    version     of this format; a newer one is refused
    library     the version of rnnfast that wrote it
    module      {"class", "config"} or {"class": "Sequential", "children"}; config null: a class of the user's
    tied        {name: name of the parameter that it is}
    dropout     {path of module: {"seed", "call_count"}}
    optimizer   its state_dict, or null
    user        what the user gave, or null; {"__array__": name} stands for an array

No pickle is written or read. `read_file` and `write_file` know the bytes, `describe` and `rebuild` the modules.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from . import cells, layers, modules
from ._files import replace_file
from .base import Module, Parameter

__all__ = ["Checkpoint", "load", "load_checkpoint", "save"]

VERSION = 1
KEY = "rnnfast"
MAX_HEADER = 100_000_000  # bytes; safetensors' own limit
FREE_OPTIONS = ("batch_first", "dropout", "p", "seed")  # of a constructor; may differ between a file and a module
ARRAY_KINDS = "?bhilqBHILQefd"  # dtype characters: bool, integers, float16 to float64


class Checkpoint(NamedTuple):
    """What a file held."""

    module: Module
    optimizer: dict[str, Any] | None  # for `optimizer.load_state_dict`
    user: Any
    library: str  # the version of rnnfast that wrote it


def save(path: str | os.PathLike[str], module: Module, *, optimizer: Any = None, user: Any = None) -> None:
    """Write a module's parameters and configuration, atomically: after a failure the old file is there, intact.

    Parameters
    ----------
    path : path-like
        Usually ``.safetensors``. Where a file is, it is replaced and its permissions are kept.
    module : Module
        What consists of rnnfast's own modules and `Sequential` is rebuilt by `load`; of a class of your own the
        parameters are kept, and `load` asks for an instance.
    optimizer : Optimizer, optional
        Its `state_dict` is kept.
    user : optional
        Anything of dicts with string keys, lists, strings, numbers, None and arrays; tuples come back as lists.

    Raises
    ------
    TypeError, ValueError
        Something cannot be kept; named.
    OSError
        The file cannot be written.
    """
    if not isinstance(module, Module):
        raise TypeError(f"module: expected a Module, got {type(module).__name__}")
    if optimizer is not None and not hasattr(optimizer, "state_dict"):
        raise TypeError(f"optimizer: expected an Optimizer, got {type(optimizer).__name__}")
    arrays, tied = _parameters_of(module)
    header = {
        "version": VERSION,
        "library": _library_version(),
        "module": describe(module),
        "tied": tied,
        "dropout": _dropout_of(module),
        "optimizer": None if optimizer is None else _lift(optimizer.state_dict(), "optimizer", arrays),
        "user": _lift(user, "user", arrays),
    }
    write_file(path, header, arrays)


def _path_of(path: Any) -> str:
    try:
        return os.fsdecode(os.fspath(path))
    except TypeError:
        raise TypeError(f"path: expected a path, got {type(path).__name__}") from None


def load(path: str | os.PathLike[str], module: Module | None = None, *, optimizer: Any = None) -> Module:
    """Read a file that `save` wrote: a new module in training mode, or `module` filled. See `load_checkpoint`."""
    return load_checkpoint(path, module, optimizer=optimizer).module


def load_checkpoint(path: str | os.PathLike[str], module: Module | None = None, *, optimizer: Any = None) -> Checkpoint:
    """Read everything that `save` wrote.

    Parameters
    ----------
    path : path-like
    module : Module, optional
        Filled instead of a new one; its parameters must have the names, shapes and dtypes of the file's. It stays in
        its mode. Seeds and counters of dropout are taken over, so that a resumed training draws the same masks.
    optimizer : Optimizer, optional
        Takes over the optimiser's state; an optimiser over the parameters of `module`.

    Returns
    -------
    Checkpoint
        (module, optimizer, user, library); `optimizer` is a `state_dict`, for an optimiser that is made afterwards.

    Raises
    ------
    ValueError
        The file is truncated, of another kind, of a newer version, or holds something else than `module` or
        `optimizer`. Nothing has been changed.
    OSError
        The file cannot be read.
    """
    where = _path_of(path)
    if module is not None and not isinstance(module, Module):
        raise TypeError(f"module: expected a Module, got {type(module).__name__}")
    header, arrays = read_file(where)
    try:
        return _restore(header, arrays, module, optimizer)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        raise ValueError(f"{where}: {text}") from error


def _restore(header: dict[str, Any], arrays: dict[str, Any], module: Module | None, optimizer: Any) -> Checkpoint:
    user = _lower(header["user"], arrays)
    optimizer_state = _lower(header["optimizer"], arrays)
    if optimizer is not None:
        found = optimizer_state and optimizer_state.get("optimizer")
        if found != type(optimizer).__name__:
            raise ValueError(f"optimizer: expected a file with the state of {type(optimizer).__name__}, got {found}")
    parameters = {name: array for name, array in arrays.items() if "/" not in name}
    tied: dict[str, str] = header["tied"]
    for name, original in tied.items():
        if not isinstance(original, str) or original not in parameters:
            raise ValueError(f"damaged header: tied[{name!r}]: expected the name of a parameter, got {original!r:.60}")
    state = {**parameters, **{name: parameters[original] for name, original in tied.items()}}
    if module is None:
        module = rebuild(header["module"])
        _tie(module, tied)
    else:
        _check_kind(header["module"], describe(module), "module")
        _check_optimizer(optimizer, module)
    children = dict(module.named_modules(remove_duplicate=False))
    dropout = [(children[name], int(v["seed"]), int(v["call_count"])) for name, v in header["dropout"].items()]
    before = None if optimizer is None else optimizer.state_dict()
    if optimizer is not None:
        optimizer.load_state_dict(optimizer_state)
    try:
        module.load_state_dict(state)
    except BaseException:
        if optimizer is not None:
            optimizer.load_state_dict(before)
        raise
    for child, seed, call_count in dropout:
        child.seed, child.call_count = seed, call_count
    return Checkpoint(module, optimizer_state, user, str(header["library"]))


def _check_optimizer(optimizer: Any, module: Module) -> None:
    """It may have more parameters than the module, or some of them; with none of them it is another module's."""
    trained = getattr(optimizer, "parameters", ())
    if trained and not {id(p) for p in trained} & {id(p) for p in module.parameters()}:
        raise ValueError(
            f"optimizer: expected one over parameters of module, got {type(optimizer).__name__} with none of them"
        )


# Modules -------------------------------------------------------------------------------------------------------------


def describe(module: Module) -> dict[str, Any]:
    """What `rebuild` needs to make a module of the same kind and sizes; JSON."""
    name = type(module).__name__
    if _own_class(name) is not type(module):
        return {"class": f"{type(module).__module__}.{type(module).__qualname__}", "config": None}
    if isinstance(module, layers.Sequential):
        return {"class": name, "children": [describe(child) for child in module]}
    return {"class": name, "config": _config(module)}


def rebuild(node: Mapping[str, Any]) -> Module:
    """A module with fresh parameters from its description.

    ValueError: the description is of a user's class, or its values make no module.
    """
    name = node["class"]
    kind = _own_class(name)
    if kind is None:
        raise ValueError(f"holds a {name}, which is not of rnnfast: pass an instance as module=")
    if kind is layers.Sequential:
        return kind(*(rebuild(child) for child in node["children"]))
    return kind(**node["config"])


def _check_kind(found: Mapping[str, Any], wanted: Mapping[str, Any], where: str) -> None:
    """What a file holds and what it shall fill: two classes can have parameters of the same names and shapes.

    Of the user's own classes only the parameters are compared: they may have moved since.
    """
    if wanted.get("config", {}) is None:
        return
    if found["class"] != wanted["class"]:
        raise ValueError(f"{where}: expected a file with {wanted['class']}, got one with {found['class']}")
    if "children" in wanted:
        if len(found["children"]) != len(wanted["children"]):
            raise ValueError(f"{where}: expected {len(wanted['children'])} children, got {len(found['children'])}")
        for i, (child, wanted_child) in enumerate(zip(found["children"], wanted["children"], strict=True)):
            _check_kind(child, wanted_child, f"{where}.{i}")
        return
    config = found["config"]
    for name, value in wanted["config"].items():
        if name in config and name not in FREE_OPTIONS and config[name] != value:
            raise ValueError(f"{where}: expected a file with {name}={value!r}, got {config[name]!r}")


def _own_class(name: str) -> type[Module] | None:
    """The public module class of rnnfast with this name."""
    for source in (modules, cells, layers):
        if name in source.__all__:
            kind: type[Module] = getattr(source, name)
            return kind
    return None


def _config(module: Module) -> dict[str, Any]:
    """The constructor's arguments: from `config`, or for the plain layers from the attributes of the same names."""
    if hasattr(module, "config"):
        return dict(module.config())
    names = [name for name in inspect.signature(type(module)).parameters if name != "device"]
    values = {name: getattr(module, name) for name in names if hasattr(module, name)}
    if "bias" in values:
        values["bias"] = values["bias"] is not None
    if "dtype" in names:
        values["dtype"] = next(module.parameters()).dtype.name
    return values


def _parameters_of(module: Module) -> tuple[dict[str, Any], dict[str, str]]:
    """Each parameter once, by its first name, and {other name: first name} of the tied ones."""
    arrays: dict[str, Any] = {}
    tied: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if "/" in name:
            raise ValueError(f"module: expected no '/' in the names of parameters, got {name!r}")
        if id(parameter) in first:
            tied[name] = first[id(parameter)]
        else:
            first[id(parameter)] = name
            arrays[name] = _plain_array(parameter.data, name)
    return arrays, tied


def _tie(module: Module, tied: Mapping[str, str]) -> None:
    for name, original in tied.items():
        path, _, local = name.rpartition(".")
        owners = dict(module.named_modules())
        setattr(owners[path], local, _find_parameter(module, original))


def _find_parameter(module: Module, name: str) -> Parameter:
    return dict(module.named_parameters(remove_duplicate=False))[name]


def _dropout_of(module: Module) -> dict[str, dict[str, int]]:
    return {
        name: {"seed": int(child.seed), "call_count": int(child.call_count)}
        for name, child in module.named_modules()
        if hasattr(child, "call_count") and hasattr(child, "seed")
    }


def _library_version() -> str:
    import rnnfast

    return str(getattr(rnnfast, "__version__", "unknown"))


# JSON with arrays ----------------------------------------------------------------------------------------------------


def _lift(value: Any, where: str, arrays: dict[str, Any]) -> Any:
    """`value` as JSON, its arrays moved to `arrays`; `where` is its path, for errors and for the arrays' names."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.ndarray):
        name = f"{where.partition('[')[0]}/{len(arrays)}"
        arrays[name] = _plain_array(value, where)
        return {"__array__": name}
    if isinstance(value, (list, tuple)):
        return [_lift(element, f"{where}[{i}]", arrays) for i, element in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str) or key == "__array__":
                raise TypeError(f"{where}: expected keys that are strings, and not '__array__', got {key!r}")
        return {key: _lift(element, f"{where}[{key!r}]", arrays) for key, element in value.items()}
    raise TypeError(f"{where}: expected numbers, strings, lists, dicts and arrays, got {type(value).__name__}")


def _lower(value: Any, arrays: Mapping[str, Any]) -> Any:
    """The inverse of `_lift`."""
    if isinstance(value, list):
        return [_lower(element, arrays) for element in value]
    if isinstance(value, dict):
        if "__array__" in value:
            return arrays[value["__array__"]]
        return {key: _lower(element, arrays) for key, element in value.items()}
    return value


def _plain_array(value: Any, where: str) -> np.ndarray:
    """A contiguous copy in native byte order."""
    array = np.array(value, order="C")
    if array.dtype.char not in ARRAY_KINDS:
        raise TypeError(f"{where}: expected bool, integers or float16 to float64, got dtype {array.dtype}")
    return array.astype(array.dtype.newbyteorder("="))


# Bytes ---------------------------------------------------------------------------------------------------------------


def write_file(path: str | os.PathLike[str], header: Mapping[str, Any], arrays: dict[str, Any]) -> None:
    """Write the header and the arrays; see `save` for what is promised."""
    from safetensors.numpy import save as serialize

    data = serialize(arrays, {KEY: json.dumps(header)})
    size = int.from_bytes(data[:8], "little")
    if size > MAX_HEADER:
        raise ValueError(f"user: expected less than {MAX_HEADER} bytes beside the arrays, got {size}")
    given = _path_of(path)
    try:
        replace_file(given, data)
    except OSError as error:
        if error.errno is None:  # told by replace_file itself
            raise
        raise OSError(error.errno, error.strerror, given) from error  # not the name of the temporary file


def read_file(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The header and all arrays, writeable, of a file. ValueError: see `load_checkpoint`."""
    with open(path, "rb") as file:
        start = file.read(8)
        size = int.from_bytes(start, "little")
        text = file.read(size) if len(start) == 8 and size <= MAX_HEADER else b""
        if len(text) < max(size, 1):
            raise ValueError(f"{path}: expected a file of rnnfast, got a truncated or foreign one")
        header = _parse_header(path, text)
        return header, _parse_arrays(path, start + text + file.read())


def _parse_header(path: Any, text: bytes) -> dict[str, Any]:
    try:
        outer = json.loads(text)
        metadata = outer.get("__metadata__", {}) if isinstance(outer, dict) else {}
        header = json.loads(metadata[KEY]) if KEY in metadata else None
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: expected a file of rnnfast, got a damaged or foreign one ({error})") from error
    if not isinstance(header, dict) or type(header.get("version")) is not int:
        raise ValueError(f"{path}: expected a file of rnnfast, got one without its header")
    if header["version"] > VERSION:
        raise ValueError(
            f"{path}: expected format version {VERSION} or older, got {header['version']}, written by rnnfast "
            f"{header.get('library')}; a newer rnnfast reads it"
        )
    missing = {"library", "module", "tied", "dropout", "optimizer", "user"} - header.keys()
    if missing:
        raise ValueError(f"{path}: damaged header: missing {sorted(missing)}")
    _check_header(path, header)
    return header


def _check_header(path: Any, header: dict[str, Any]) -> None:
    """Only the kinds of values; names are compared where the modules are known."""
    for key, kind in (("module", dict), ("tied", dict), ("dropout", dict), ("library", str)):
        if not isinstance(header[key], kind):
            got = type(header[key]).__name__
            raise ValueError(f"{path}: damaged header: {key}: expected a {kind.__name__}, got {got}")
    _check_node(path, header["module"], "module")


def _check_node(path: Any, node: Any, where: str) -> None:
    if not isinstance(node, dict) or not isinstance(node.get("class"), str):
        raise ValueError(f"{path}: damaged header: {where}: expected a dict with a class, got {node!r:.60}")
    if "children" in node:
        if not isinstance(node["children"], list):
            raise ValueError(f"{path}: damaged header: {where}.children: expected a list, got {node['children']!r:.60}")
        for i, child in enumerate(node["children"]):
            _check_node(path, child, f"{where}.{i}")
    elif "config" not in node:
        raise ValueError(f"{path}: damaged header: {where}: expected config or children, got neither")
    elif not isinstance(node["config"], (dict, type(None))):
        raise ValueError(f"{path}: damaged header: {where}.config: expected a dict, got {node['config']!r:.60}")


def _parse_arrays(path: Any, data: bytes) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.numpy import load as deserialize

    try:
        arrays = deserialize(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: expected a whole file, got a truncated or damaged one ({error})") from error
    return {name: np.array(array) for name, array in arrays.items()}
