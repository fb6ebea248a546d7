"""A run's folder: whose it is, what is there to go on with, and the configuration that made it."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path

from longclip_rt.errors import TrainingError
from longclip_rt.system.files import output_errors, write_text_atomically
from longclip_rt.train.config import TrainConfig
from longclip_rt.train.distributed import Processes
from longclip_rt.train.run.card import CARD_FILE
from longclip_rt.train.run.checkpoints import FOLDER, TrainState, load_newest_checkpoint
from longclip_rt.train.run.report import CURVES_FILE, EVENTS_FOLDER, METRICS_FILE
from longclip_rt.train.run.results import BAD_ROWS, WEIGHTS

logger = logging.getLogger("longclip_rt")

CONFIG = "config.json"

_LOCK = ".lock"
_OURS = (FOLDER, METRICS_FILE, EVENTS_FOLDER, WEIGHTS, CURVES_FILE, BAD_ROWS, CARD_FILE)

# What may differ when a run goes on: what is learnt depends on none of it, but for the last bits of the ways out of a
# full memory.
_FREE = (
    "workers",
    "checkpoint_every",
    "keep_checkpoints",
    "validate_every",
    "chunk_size",
    "gradient_checkpointing",
    "compile",
)


@contextlib.contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Makes a folder, and keeps other runs out of it until the block or the process ends.

    Raises:
        TrainingError: Another process trains there.
        OutputError: It cannot be written.
    """
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / _LOCK).open("a")
    with lock:
        try:
            import fcntl

            # Not flock: its locks pass to the processes that decode images, which outlive a killed run by seconds.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            logger.warning("this system has no file locks: make sure that no second run trains in %s", folder)
        except (BlockingIOError, PermissionError) as error:
            raise TrainingError(f"Another run is training in {folder}. Wait for it, or stop it.") from error
        except OSError as error:
            logger.warning("%s has no locks (%s): make sure that no second run trains there", folder, error)
        yield


def claim_folder(config: TrainConfig, folder: Path, resume: bool, procs: Processes) -> TrainState | None:
    """Makes sure that a run may use its folder, and finds what to go on with.

    Args:
        config: The run.
        folder: Its folder.
        resume: Whether to go on with what is there.
        procs: All of them look.

    Returns:
        The newest good checkpoint; None for a new run, and for one that has none yet.

    Raises:
        TrainingError: The folder holds another run, one that was not asked to go on, or other things that a run would
            write over; or not every process sees the same folder.
    """
    file = folder / CONFIG
    state = None
    if file.is_file():
        if not resume:
            raise TrainingError(f"{folder} holds a run. Add --resume to go on with it, or choose another --out.")
        _check_config(config, file)
        state = load_newest_checkpoint(folder)
    elif found := [name for name in _OURS if (folder / name).exists()]:
        raise TrainingError(
            f"{folder} holds {', '.join(found)}, but no {CONFIG}: it is not a run's folder, and a run would write over "
            "them. Choose another --out."
        )
    steps = procs.collect(None if state is None else state.step)
    if len(set(steps)) > 1:
        raise TrainingError(
            f"The processes do not find the same checkpoint in {folder} (steps {steps}). All machines of a run must "
            "share its folder."
        )
    if state is not None and state.world != procs.world:
        logger.warning(
            "the run had %d processes before and has %d now: rows of shards come in another order, and PCM with the "
            "scope `local` looks at batches of another size",
            state.world,
            procs.world,
        )
    return state


def note_config(config: TrainConfig, folder: Path) -> None:
    """Writes the configuration, by which the folder is known as the run's.

    Raises:
        OutputError: The disk refuses.
    """
    write_text_atomically(folder / CONFIG, _json(config))


def _check_config(config: TrainConfig, file: Path) -> None:
    try:
        before = TrainConfig.from_dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise TrainingError(f"{file} cannot be read: {error}. Choose another --out.") from error
    old, new = json.loads(_json(before)), json.loads(_json(config))
    differing = [name for name in new if name not in _FREE and old[name] != new[name]]
    if differing:
        told = ", ".join(f"{name} ({old[name]!r} there, {new[name]!r} here)" for name in differing)
        raise TrainingError(
            f"The run in {file.parent} has another {told}. Resume it with its own settings, or choose another --out."
        )


def _json(config: TrainConfig) -> str:
    return json.dumps(config.to_dict(), indent=2) + "\n"
