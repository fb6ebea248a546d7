"""Several GPUs as one backend: each batch goes to a GPU that is free."""

from __future__ import annotations

import queue
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from longclip_rt.backends.base import Backend, Float32
from longclip_rt.errors import BackendError


class DevicePool(Backend):
    """The same encoders on several devices. Callers keep the order of their batches, whichever device is quicker.

    Args:
        members: One backend a device, all of one kind; closed with the pool.

    Raises:
        BackendError: Two would give vectors of different making, which must not be mixed in one output.
    """

    def __init__(self, members: Sequence[Backend]) -> None:
        first = members[0]
        super().__init__(first.bundle, first.precision)
        self.name = first.name
        self.members = tuple(members)
        kinds = {(member.name, member.version, member.precision, member.device): member for member in members}
        if len(kinds) > 1:
            unlike = " and ".join(" ".join(kind) for kind in kinds)
            raise BackendError(
                f"The devices are not alike: {unlike}. Vectors of both would be mixed in one output; name devices of "
                "one kind with --devices."
            )
        self.batch_size, self.pad_multiple = first.batch_size, first.pad_multiple
        self.takes_crops = first.takes_crops
        self.concurrency = sum(member.concurrency for member in members)
        # Each as often as it takes calls at a time, in turn, so that the first calls spread over all.
        self._free: queue.SimpleQueue[Backend] = queue.SimpleQueue()
        for turn in range(max(member.concurrency for member in members)):
            for member in members:
                if turn < member.concurrency:
                    self._free.put(member)

    @property
    def version(self) -> str:
        """The members'."""
        return self.members[0].version

    @property
    def device(self) -> str:
        """The members', which are alike."""
        return self.members[0].device

    @property
    def buckets(self) -> tuple[int, ...]:
        """The members'."""
        return self.members[0].buckets

    @property
    def fused_pca(self) -> str:
        """The members'."""
        return self.members[0].fused_pca

    def prepare(self) -> None:
        """Prepares each."""
        for member in self.members:
            member.prepare()

    def _run(self, tower: str, inputs: NDArray[np.generic], outputs: Sequence[str]) -> list[Float32]:
        member = self._free.get()
        try:
            return member.run(tower, inputs, outputs)
        finally:
            self._free.put(member)

    def _close(self) -> None:
        """Closes each, whatever becomes of the others.

        Raises:
            BackendError: The first of what went wrong.
        """
        errors = []
        for member in self.members:
            try:
                member.close()
            except BackendError as error:
                errors.append(error)
        if errors:
            raise errors[0]
