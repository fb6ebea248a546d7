"""An imitation of TensorRT's builder that can do only what the real bindings can.

Every class, method, property, enumeration and keyword that the code under test asks for is looked up in the real
bindings, and arguments are held to the types that pybind11 writes into the documentation; so nothing has to be listed
here. What calls give back is of the type that is documented, unless a test says otherwise.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

from trt_signatures import Signature, signatures

SUBCLASSED = ("ILogger", "IProgressMonitor")
NULL_POINTER = TypeError("pybind11::init(): factory function returned nullptr")


@dataclass
class World:
    """A library, what is answered in it, and what was asked of it."""

    real: Any
    answers: dict[str, Any] = field(default_factory=dict)
    """`Class.member` -> what it gives; a function is called with the object and the arguments."""
    calls: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)
    returns: dict[str, str] = field(default_factory=dict)
    """`Class.member` -> the type that is documented, of all that was called."""

    def resolve(self, text: str) -> Any:
        """The class of the bindings that a documented type names, or None."""
        found = self.real
        for part in text.removeprefix("nvonnxparser::I").split(".")[-2:]:
            found = getattr(found, part, found if part in ("tensorrt", "tensorrt_rtx") else None)
        return found if isinstance(found, type) else None

    def fits(self, value: Any, text: str) -> bool:
        """Whether the bindings would take a value for a documented type."""
        if text in ("int", "typing.SupportsInt"):
            return isinstance(value, int) or hasattr(value, "__members__")
        if text in ("bool", "str"):
            return isinstance(value, {"bool": bool, "str": str}[text])
        if text.lower().endswith("buffer"):
            return isinstance(value, bytes)
        if text.endswith(".Dims"):
            return isinstance(value, tuple) and all(isinstance(size, int) for size in value)
        wanted = self.resolve(text)
        assert wanted is not None, f"a type that this imitation does not know: {text}"
        return isinstance(value, wanted) or (isinstance(value, Imitated) and issubclass(value._real_class, wanted))

    def check(self, known: list[Signature], arguments: tuple[Any, ...], keywords: dict[str, Any], what: str) -> str:
        """The documented result of the overload that takes the arguments.

        Raises:
            TypeError: None does, as in the bindings.
        """
        assert known, f"no signature of {what} was found"
        for signature in known:
            given = dict(zip(signature.names, arguments, strict=False)) | keywords
            required = {name for name, free in zip(signature.names, signature.optional, strict=True) if not free}
            complete = required <= set(given) <= set(signature.names) and len(arguments) <= len(signature.names)
            types = dict(zip(signature.names, signature.types, strict=True))
            if complete and all(self.fits(value, types[name]) for name, value in given.items()):
                return signature.returns
        raise TypeError(f"{what} takes {known}; got {arguments} and {keywords}")

    def give(self, what: str, documented: str, owner: Any, arguments: tuple[Any, ...]) -> Any:
        """The answer of a test, else one of the documented type."""
        self.returns[what] = documented
        if what in self.answers:
            answer = self.answers[what]
            return answer(owner, *arguments) if inspect.isfunction(answer) else answer
        simple = {"None": None, "bool": True, "int": 0, "str": ""}
        if documented in simple:
            return simple[documented]
        if documented.endswith("IHostMemory"):
            return what.encode()  # the real one is a buffer too
        wanted = self.resolve(documented)
        assert wanted is not None, f"{what} gives a {documented}, which this imitation does not know"
        return Imitated(self, wanted)


class Imitated:
    """An object of one of the bindings' classes."""

    def __init__(self, world: World, real_class: type, **own: Any) -> None:
        self.__dict__.update(_world=world, _real_class=real_class, _own=own)

    def __getattr__(self, name: str) -> Any:
        member = inspect.getattr_static(self._real_class, name)  # AttributeError: the real class has no such thing
        what = f"{self._real_class.__name__}.{name}"
        if isinstance(member, property):
            if name in self._own:
                return self._own[name]
            (known,) = signatures(member.fget.__doc__)
            return self._world.give(what, known.returns, self, ())
        known = signatures(getattr(self._real_class, name).__doc__, name)

        def call(*arguments: Any, **keywords: Any) -> Any:
            documented = self._world.check(known, (self, *arguments), keywords, what)
            given = (*arguments, *keywords.values())
            self._world.calls.append((what, given))
            return self._world.give(what, documented, self, given)

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        member = inspect.getattr_static(self._real_class, name)
        assert isinstance(member, property) and member.fset, f"{name} cannot be set"
        self._world.check(signatures(member.fset.__doc__), (self, value), {}, f"{self._real_class.__name__}.{name}")
        self._world.calls.append((f"{self._real_class.__name__}.{name}", (value,)))
        self._own[name] = value


class Library:
    """What stands for the imported package."""

    def __init__(self, world: World, name: str) -> None:
        self.__dict__.update(_world=world, __name__=name)

    def __getattr__(self, name: str) -> Any:
        member = getattr(self._world.real, name)  # AttributeError: the real package has no such thing
        if not isinstance(member, type) or hasattr(member, "__members__") or name in SUBCLASSED:
            return member

        def construct(*arguments: Any) -> Imitated:
            self._world.check(signatures(member.__init__.__doc__, "__init__"), (made, *arguments), {}, name)
            self._world.calls.append((name, arguments))
            self._world.returns[name] = name
            if self._world.answers.get(name, made) is None:
                raise NULL_POINTER
            return made

        made = Imitated(self._world, member)
        return construct


def overrides_like(real_class: type, instance: Any) -> None:
    """Asserts that what a subclass overrides exists in the real class and takes as many arguments."""
    for name, function in vars(type(instance)).items():
        if not name.startswith("_") and inspect.isfunction(function):
            (known,) = signatures(getattr(real_class, name).__doc__, name)
            assert len(inspect.signature(function).parameters) == len(known.names), name


def network_of(world: World, layers: list[tuple[str, str]]) -> dict[str, Any]:
    """Answers of a network that consists of such layers, type and precision."""

    def layer(network: Any, index: int) -> Imitated:
        kind, precision = layers[index]
        output = Imitated(world, world.real.ITensor, dtype=getattr(world.real.DataType, precision))
        world.answers["ILayer.get_output"] = lambda layer, index: output
        return Imitated(world, world.real.ILayer, type=getattr(world.real.LayerType, kind), num_outputs=1)

    return {"INetworkDefinition.num_layers": len(layers), "INetworkDefinition.get_layer": layer}
