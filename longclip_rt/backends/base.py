"""What every backend offers: token ids or pixels in, float32 arrays out."""

from __future__ import annotations

import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NoReturn

import numpy as np
from numpy.typing import NDArray

from longclip_rt.bundle.bundle import Bundle
from longclip_rt.errors import BackendError
from longclip_rt.system.forks import ends_in_forks

Float32 = NDArray[np.float32]

INPUT_NAMES = {"text": "input_ids", "image": "pixel_values"}
EMBEDDINGS = {"text": "text_embeds", "image": "image_embeds"}


_START_METHODS = "Start processes with multiprocessing's spawn or forkserver, and open the bundle in each."
_first_opened: dict[type, int] = {}
"""Kind of backend -> the process that first opened one."""

Shapes = Mapping[str, Sequence[object]]


def _fits(found: Sequence[object], wanted: Sequence[int | None]) -> bool:
    return len(found) == len(wanted) and all(
        size is None or not isinstance(given, int) or given == size for given, size in zip(found, wanted, strict=True)
    )


def _finite(tower: str, inputs: NDArray[np.generic], results: list[Float32]) -> list[Float32]:
    """The results, unless pixels are not finite: then neither are the vectors, at which it is quicker to look."""
    if tower == "image" and not np.isfinite(results[0]).all() and not np.isfinite(inputs).all():
        raise BackendError("Pixels must be finite; some are NaN or infinite, or too large for float32.")
    return results


class Backend(ABC):
    """Runs the two encoders of one bundle in one precision. Safe to call from several threads.

    Attributes:
        name: The backend's name, as `--backend` takes it.
        bundle: The model that it runs.
        precision: `fp32`, `bf16` or `fp16`: what the matrix products are computed in.
        concurrency: How many calls at a time make best use of the machine.
        batch_size: Images in a batch, a good default.
        pad_multiple: Text batches are padded to a multiple of this many tokens.
        takes_crops: Whether the image tower takes crops too, and normalises them where it runs.
        not_apart: Which stages `timed` cannot tell apart, in words.
        opens_in_forks: Whether its library can be used anew in a fork of a process that has used it.

    Raises:
        BackendError: This process is a fork of one that has opened such a backend, and the library cannot do that.
    """

    name: str
    takes_crops: bool = False
    batch_size: int = 8
    pad_multiple: int = 8
    concurrency: int = 1
    not_apart: str = "copies, encoder and head are one call of the library"
    opens_in_forks: ClassVar[bool] = False

    def __init__(self, bundle: Bundle, precision: str) -> None:
        if _first_opened.setdefault(type(self), os.getpid()) != os.getpid() and not self.opens_in_forks:
            raise BackendError(
                f"This process is a fork of process {_first_opened[type(self)]}, which has opened such a backend "
                f"({type(self).__name__}): its library would wait for threads that are not here. {_START_METHODS}"
            )
        self.bundle = bundle
        self.precision = precision
        self._process = os.getpid()
        self._alone = threading.Lock()
        self._used: set[str] = set()
        ends_in_forks(self)

    @property
    @abstractmethod
    def version(self) -> str:
        """The version of the library underneath."""

    @property
    @abstractmethod
    def device(self) -> str:
        """What it runs on, for people."""

    @property
    def buckets(self) -> tuple[int, ...]:
        """The lengths that text batches are padded to, shortest first; empty where `pad_multiple` says it."""
        return ()

    @property
    def fused_pca(self) -> str:
        """SHA-256 of the PCA that a kernel of its own gives as `text_pca` and `image_pca`; empty where none does."""
        return ""

    @property
    def tensors_on(self) -> str:
        """The PyTorch device whose tensors `run_on_device` takes, such as `cuda:0`; empty where it takes none."""
        return ""

    def corners(self, tower: str) -> list[tuple[str, int | None, int]]:
        """Batches at which the kernels may change, which the self-check tries: what runs them, tokens, and rows."""
        return []

    def prepare(self) -> None:
        """Makes the first conversion and inference, in the thread that opens the backend and before any other can.

        Libraries set up their interface to numpy at the first conversion, behind a lock that two threads can deadlock
        on: one holds it and waits for Python's interpreter lock, the other the reverse. OpenVINO and ONNX Runtime make
        only a conversion on the CPU, and load a tower when it is first needed.
        """
        self.run("text", np.full((1, 1), self.bundle.architecture.eot_id, np.int32))

    @abstractmethod
    def _run(self, tower: str, inputs: NDArray[np.generic], outputs: Sequence[str]) -> list[Float32]:
        """Runs a tower and returns the named outputs in order."""

    def run(self, tower: str, inputs: NDArray[np.generic], outputs: Sequence[str] | None = None) -> list[Float32]:
        """Runs one tower.

        Args:
            tower: `text` or `image`.
            inputs: Token ids [B, S], any integers, 1 <= S <= the context length; or what `images` gave, pixels in any
                floats. They are run as int32 and float32 (crops as uint8).
            outputs: Names out of `bundle.outputs(tower)`; None for the embedding alone.

        Returns:
            One float32 array an output; embeddings are [B, D] and L2-normalised.

        Raises:
            BackendError: The tower, the shape or an output's name is not the model's, an input is of another kind or
                not finite, or the process is a fork of the one that opened the backend.
        """
        if tower not in INPUT_NAMES:
            raise BackendError(f"There is no tower {tower!r}; there are {' and '.join(INPUT_NAMES)}.")
        names = [EMBEDDINGS[tower]] if outputs is None else list(outputs)
        if not names:
            raise BackendError("No output was named. Leave outputs away for the embedding.")
        known = self.bundle.outputs(tower)
        if unknown := [name for name in names if name not in known]:
            raise BackendError(
                f"The bundle has no {tower} output {', '.join(unknown)}; it has {', '.join(known)}. "
                f"Export it again with --output-name {unknown[0]}."
            )
        given = self._checked_inputs(tower, inputs)
        self.check_process()
        if tower not in self._used:
            with self._alone:  # whatever a library does at the first inference of a model, one thread does it
                if tower not in self._used:
                    results = self._run(tower, given, names)
                    self._used.add(tower)
                    return _finite(tower, given, results)
        return _finite(tower, given, self._run(tower, given, names))

    def timed(self, tower: str, inputs: NDArray[np.generic]) -> dict[str, float]:
        """Runs one tower, and takes the time of the stages that the backend can tell apart.

        Args:
            tower: `text` or `image`.
            inputs: As for `run`.

        Returns:
            Seconds, under some of the names `copy in`, `encoder`, `head`, `copy out`.

        Raises:
            BackendError: As for `run`.
        """
        started = time.perf_counter()
        self.run(tower, inputs)
        return {"encoder": time.perf_counter() - started}

    def images(self, crops: NDArray[np.uint8]) -> NDArray[np.generic]:
        """What `run` takes for cropped images [B, H, W, 3] uint8.

        Returns:
            The crops themselves where `takes_crops`, else normalised pixels [B, 3, H, W] float32.

        Raises:
            InputError: Another shape or dtype.
        """
        return crops if self.takes_crops else self.bundle.transform.normalize(crops)

    def run_on_device(self, tower: str, inputs: object, outputs: Sequence[str] | None = None) -> list[Any]:
        """Runs one tower on what lies on a GPU, and leaves the outputs there.

        Raises:
            BackendError: This backend cannot.
        """
        raise BackendError(
            f"The {self.name} backend on {self.device} takes numpy arrays. Tensors on a GPU are taken by "
            f"--backend torch on that GPU; got {type(inputs).__name__}."
        )

    def check_process(self) -> None:
        """Makes sure that this process opened the backend.

        Raises:
            BackendError: It is a fork of the one that did.
        """
        if self._process != os.getpid():
            raise BackendError(
                f"This {self.name} backend was opened by process {self._process}, of which this one is a fork: its "
                f"threads are not here, and it would hang. {_START_METHODS}"
            )

    def _checked_inputs(self, tower: str, inputs: NDArray[np.generic]) -> NDArray[np.generic]:
        """The inputs as every library takes them: int32 or float32 in the machine's byte order, contiguous."""
        if not isinstance(inputs, np.ndarray):
            raise BackendError(f"The {tower} encoder takes a numpy array; got {type(inputs).__name__}.")
        architecture, shape = self.bundle.architecture, inputs.shape
        size, context = architecture.image_size, architecture.context_length
        if tower == "text":
            if len(shape) != 2 or not shape[0] or not 1 <= shape[1] <= context:
                raise BackendError(f"Token ids must be [batch, 1 to {context}], batch at least 1; got {list(shape)}.")
            if not np.issubdtype(inputs.dtype, np.integer):
                raise BackendError(f"Token ids must be integers; got {inputs.dtype}.")
            least, most = int(inputs.min()), int(inputs.max())
            if least < 0 or most >= architecture.vocab_size:
                raise BackendError(
                    f"Token ids must be from 0 to {architecture.vocab_size - 1}, the model's vocabulary; got {least} "
                    f"to {most}. Tokenize with the bundle's own tokenizer."
                )
            return np.ascontiguousarray(inputs, np.int32)
        if self.takes_crops and inputs.dtype == np.uint8:
            if len(shape) != 4 or not shape[0] or shape[1:] != (size, size, 3):
                raise BackendError(f"Crops must be [batch, {size}, {size}, 3], batch at least 1; got {list(shape)}.")
            return np.ascontiguousarray(inputs)
        if len(shape) != 4 or not shape[0] or shape[1:] != (3, size, size):
            raise BackendError(f"Pixels must be [batch, 3, {size}, {size}], batch at least 1; got {list(shape)}.")
        if not np.issubdtype(inputs.dtype, np.floating):
            raise BackendError(
                f"Pixels must be normalised floats; got {inputs.dtype}. Normalise them with bundle.transform, or give "
                "uint8 crops to Embedder.encode_crops."
            )
        with np.errstate(over="ignore"):  # is found in the results
            return np.ascontiguousarray(inputs, np.float32)

    def _check_graph(self, tower: str, inputs: Shapes, outputs: Shapes) -> None:
        """Refuses a graph that is not the architecture's, by the shapes that the library read from it.

        Args:
            tower: `text` or `image`.
            inputs: Name -> sizes; what is free, or not known, is no number.
            outputs: Likewise.

        Raises:
            BackendError: It lacks an input or output, or one has another size.
        """
        architecture = self.bundle.architecture
        size, dim = architecture.image_size, architecture.embed_dim
        wanted_inputs = {INPUT_NAMES[tower]: (None, None) if tower == "text" else (None, 3, size, size)}
        wanted_outputs = {name: None for name in self.bundle.outputs(tower)} | {EMBEDDINGS[tower]: (None, dim)}
        for given, wanted in ((inputs, wanted_inputs), (outputs, wanted_outputs)):
            for name, shape in wanted.items():
                found = given.get(name)
                if found is None or (shape is not None and not _fits(found, shape)):
                    raise BackendError(
                        f"The {tower} graph of {self.bundle.path} is not this model's: {name} is "
                        f"{'absent' if found is None else list(found)}. Export or copy the bundle again."
                    )

    def __reduce__(self) -> NoReturn:
        """Backends hold compiled models and threads, which no other process can be given.

        Raises:
            BackendError: Always.
        """
        raise BackendError("A backend cannot be pickled. Open the bundle again in the other process.")

    def close(self) -> None:
        """Lets go of the encoders' memory; in a fork, of nothing. Closing twice is fine."""
        if self._process == os.getpid():
            self._close()

    @abstractmethod
    def _close(self) -> None:
        """Lets go of the encoders' memory, which the next call may take again."""
