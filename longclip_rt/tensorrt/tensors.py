"""What an engine says of itself: its inputs, outputs and profiles, held to what a tower has."""

from __future__ import annotations

from typing import Any

from longclip_rt.backends.base import INPUT_NAMES
from longclip_rt.errors import BackendError
from longclip_rt.tensorrt.head import HeadFiles, states_name
from longclip_rt.tensorrt.profiles import Profile, Tensor


def tensors_of(library: Any, engine: Any, tower: str) -> list[Tensor]:
    """An engine's inputs and outputs.

    Args:
        library: `tensorrt` or `tensorrt_rtx`, imported.
        engine: A deserialised `ICudaEngine`.
        tower: `text` or `image`.

    Raises:
        BackendError: It is not an engine of this tower, or its numbers are of another type.
    """
    tensors = []
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        kind = engine.get_tensor_dtype(name)
        is_input = engine.get_tensor_mode(name) == library.TensorIOMode.INPUT
        expected = library.DataType.FLOAT
        if is_input and tower == "text":
            expected = library.DataType.INT32
        elif name == states_name(tower):
            expected = library.DataType.HALF
        if kind != expected:
            raise BackendError(
                f"The engine's {name} is {kind}, and should be {expected}. Build it from the bundle's own graphs: "
                "longclip-rt engine build"
            )
        on_host = name != states_name(tower)
        shape = tuple(engine.get_tensor_shape(name))
        tensors.append(Tensor(name, shape, 4 if on_host else 2, is_input, on_host))
    if [tensor.name for tensor in tensors if tensor.is_input] != [INPUT_NAMES[tower]]:
        raise BackendError(f"The engine is not one of a {tower} tower. Build it with: longclip-rt engine build")
    return tensors


def profiles_of(engine: Any, name: str, tower: str) -> tuple[Profile, ...]:
    """An engine's profiles, by the shapes of its input `name`."""
    profiles = []
    for index in range(engine.num_optimization_profiles):
        least, _, most = (tuple(shape) for shape in engine.get_tensor_profile_shape(name, index))
        profiles.append(Profile(index, most[1] if tower == "text" else None, least[0], most[0]))
    return tuple(profiles)


def check_states(tensors: list[Tensor], tower: str, head: HeadFiles) -> None:
    """Makes sure that an engine hands out what a PCA head reads.

    Raises:
        BackendError: It does not.
    """
    states = next((tensor for tensor in tensors if tensor.name == states_name(tower)), None)
    if states is None or states.shape[1:] != (head.width,):
        raise BackendError(
            f"The engine does not hand out the states [B, {head.width}] that the PCA head beside it reads. Build it "
            "again with: longclip-rt engine build"
        )
