"""What a GPU engine's profiles mean for a batch: which one takes it, how it is split, and the memory they all need.

Plain arithmetic on shapes; nothing here touches a device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

from longclip_rt.errors import BackendError

SLOTS = 2
"""Batches in flight: while one is computed, the next one is copied in and the last one out."""

_ALIGNMENT = 256  # bytes; what CUDA's allocators round up to


@dataclass(frozen=True)
class Profile:
    """One optimisation profile of an engine.

    Attributes:
        index: Its number in the engine.
        length: Tokens that a text batch is padded to; None for images.
        least: Fewest rows of a batch.
        most: Most rows of a batch.
    """

    index: int
    length: int | None
    least: int
    most: int

    def __str__(self) -> str:
        """For messages."""
        rows = f"{self.least} to {self.most} rows"
        return rows if self.length is None else f"{rows} of up to {self.length} tokens"


@dataclass(frozen=True)
class Piece:
    """Rows of a batch that run together.

    Attributes:
        start: The first row.
        stop: One past the last row.
        profile: What runs them.
        rows: Rows that the profile is given: `stop - start`, or its fewest; the others are filled up and dropped.
    """

    start: int
    stop: int
    profile: Profile
    rows: int


def bucket_lengths(profiles: Sequence[Profile]) -> tuple[int, ...]:
    """The lengths that text batches are padded to, shortest first; empty for images."""
    return tuple(sorted({profile.length for profile in profiles if profile.length is not None}))


def pieces(profiles: Sequence[Profile], rows: int, length: int | None) -> Iterator[Piece]:
    """Cuts a batch into what the engine takes: the smallest bucket that holds it, as few pieces as there can be.

    Full pieces come first, so that most pieces of a long run have one shape, and so one CUDA graph.

    Args:
        profiles: The engine's.
        rows: Rows of the batch, at least 1.
        length: Tokens of its rows; None for images.

    Raises:
        BackendError: No profile holds rows of this length; the message names them all.
    """
    holding = [profile for profile in profiles if (profile.length is None) == (length is None)]
    if length is not None:
        holding = [profile for profile in holding if profile.length is not None and profile.length >= length]
        shortest = min((profile.length or 0 for profile in holding), default=0)
        holding = [profile for profile in holding if profile.length == shortest]
    if not holding:
        shape = f"{rows} rows" if length is None else f"{rows} rows of {length} tokens"
        raise BackendError(
            f"The engine has no profile for {shape}; it has {'; '.join(map(str, profiles)) or 'none'}. "
            "Build one with: longclip-rt engine build"
        )
    holding.sort(key=lambda profile: (profile.most, profile.index))
    start = 0
    while start < rows:
        stop = min(rows, start + holding[-1].most)
        profile = next(profile for profile in holding if profile.most >= stop - start)
        yield Piece(start, stop, profile, max(stop - start, profile.least))
        start = stop


@dataclass(frozen=True)
class Tensor:
    """An input or output of an engine.

    Attributes:
        name: In the graph.
        shape: -1 where it is free: the batch at first, then a text's length.
        itemsize: Bytes of a number.
        is_input: Whether it is copied to the device; outputs are copied from it.
        on_host: Whether the host sees it at all; what one kernel hands to the next stays on the device.
    """

    name: str
    shape: tuple[int, ...]
    itemsize: int
    is_input: bool
    on_host: bool = True

    def shape_for(self, profile: Profile, rows: int) -> tuple[int, ...]:
        """The shape in a batch of `rows` rows, padded to the profile's length.

        Raises:
            BackendError: A dimension other than the batch and a text's length is free.
        """
        free = [rows] if profile.length is None else [rows, profile.length]
        if sum(dimension < 0 for dimension in self.shape) > len(free) or self.shape[0] >= 0:
            raise BackendError(
                f"The engine's {self.name} has the shape {list(self.shape)}, and only the batch and a text's length "
                "may be free. Build the engine from the bundle's own graphs: longclip-rt engine build"
            )
        left = iter(free)
        return tuple(next(left) if dimension < 0 else dimension for dimension in self.shape)

    def bytes_for(self, profile: Profile) -> int:
        """Bytes in the profile's largest batch, rounded up as allocators do."""
        size = prod(self.shape_for(profile, profile.most)) * self.itemsize
        return -(-size // _ALIGNMENT) * _ALIGNMENT


@dataclass(frozen=True)
class Memory:
    """What a tower allocates when it is opened; afterwards nothing grows.

    Attributes:
        workspace: Bytes on the device that the engine computes in, shared by all profiles and slots.
        device: Bytes of the inputs and outputs on the device, over all profiles and slots.
        pinned: Bytes of page-locked host memory.
        weights: Bytes of the plan, about what the engine keeps on the device for its weights.
    """

    workspace: int
    device: int
    pinned: int
    weights: int

    @property
    def on_device(self) -> int:
        """All bytes on the device, but for what the driver keeps for itself and for captured graphs."""
        return self.workspace + self.device + self.weights


def memory_for(
    profiles: Sequence[Profile], tensors: Sequence[Tensor], workspaces: Sequence[int], weights: int, slots: int = SLOTS
) -> Memory:
    """Computes what an engine will take before anything is allocated.

    Args:
        profiles: The engine's.
        tensors: Its inputs and outputs.
        workspaces: Bytes that it computes in, by profile.
        weights: Bytes of its plan.
        slots: Batches in flight.
    """
    device = pinned = 0
    for profile in profiles:
        for tensor in tensors:
            device += slots * tensor.bytes_for(profile)
            pinned += slots * tensor.bytes_for(profile) * tensor.on_host
    return Memory(max(workspaces, default=0), device, pinned, weights)
