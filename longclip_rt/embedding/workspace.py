"""The folder `<out>.parts`: work in progress, committed in shards, that outlives a kill at any moment.

What it holds, and what makes each step all or nothing:

    lock             held by the run that works here
    state.json       the inputs and options of the work, written first; without it nothing here counts
    input-N          a copy of standard input
    NNNNNN.parquet   the rows of a shard
    NNNNNN.json      written after it: its hash, counts and rejects; without this record a shard does not count
    assembling/      the output's files while they are written
    ready/           the same folder under its last name: the files are whole and only have to be moved to their places
    replaced/        a folder that an output of the same name has taken the place of
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from types import TracebackType
from typing import Any, BinaryIO, TypeVar

from longclip_rt.errors import OutputError, ResumeError
from longclip_rt.formats.outputs import OutputFiles, json_line, write_output, write_table
from longclip_rt.system.files import output_errors, sync_file, sync_folder, whole_file
from longclip_rt.system.lock import lock_folder

logger = logging.getLogger("longclip_rt")

_T = TypeVar("_T")
_OURS = re.compile(r"lock|state\.json|input-\d+|\d{6,}\.(parquet|json)|assembling|ready|replaced|.*\.tmp")


@dataclass(frozen=True)
class Totals:
    """Counts over shards.

    Attributes:
        entries: Input entries, rejected ones included.
        images: Rows that are images.
        texts: Rows that are texts.
        truncated: Texts that were cut to the context length.
        rejects: Entries that have no row.
    """

    entries: int = 0
    images: int = 0
    texts: int = 0
    truncated: int = 0
    rejects: int = 0

    @property
    def rows(self) -> int:
        """Rows written."""
        return self.images + self.texts

    def __add__(self, other: Totals) -> Totals:
        return Totals(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def to_metadata(self) -> dict[str, str]:
        """The counts as an output's metadata holds them, `rows` included."""
        return {"rows": str(self.rows)} | {key: str(value) for key, value in asdict(self).items()}

    @staticmethod
    def from_metadata(metadata: Mapping[str, str], prefix: str) -> Totals:
        """The counts that `to_metadata` wrote."""
        return Totals(**{field.name: int(metadata[prefix + field.name]) for field in fields(Totals)})


@dataclass(frozen=True)
class Record:
    """What `NNNNNN.json` says of a shard.

    Attributes:
        inputs: Digest of its entries.
        totals: Its counts.
        rejects: Its rejects in order, each a line of `<out>.rejects.jsonl`.
        sha256: Hash of its Parquet file.
    """

    inputs: str
    totals: Totals
    rejects: tuple[dict[str, Any], ...]
    sha256: str


class Workspace:
    """The begun work of one output. A context manager: it holds the lock of the folder.

    Args:
        files: The output's files; the folder is `<main>.parts`.

    Raises:
        OutputError: On entering, when the folder cannot be made, is somebody else's, or another run works in it.
    """

    def __init__(self, files: OutputFiles) -> None:
        self.files = files
        self.folder = files.main.with_name(files.main.name + ".parts")
        self._lock: BinaryIO | None = None

    def __enter__(self) -> Workspace:
        with output_errors(self.files.main):
            if self.folder.exists() and not self.folder.is_dir():
                raise OutputError(f"{str(self.folder)!r} is in the way: it is not a folder. Move it away.")
            if self.folder.is_dir():
                strangers = sorted(path.name for path in self.folder.iterdir() if not _OURS.fullmatch(path.name))
                if strangers:
                    raise OutputError(
                        f"{str(self.folder)!r} is where the begun work would be kept, but {strangers[0]!r} in it is "
                        "not of this program. Move the folder away, or choose another name with -o."
                    )
            self._lock = lock_folder(self.folder, f"is writing {str(self.files.main)!r}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._lock is not None
        with contextlib.suppress(OSError):
            if not self.holds_work():
                shutil.rmtree(self.folder)
            for copy in self.folder.glob("input-*"):
                copy.unlink()
        self._lock.close()

    def begun(self) -> dict[str, str] | None:
        """What the begun work was begun with, None when there is none.

        Raises:
            ResumeError: When it cannot be read.
        """
        path = self.folder / "state.json"
        try:
            stored = json.loads(path.read_bytes())
            return {str(key): str(value) for key, value in stored.items()}
        except FileNotFoundError:
            return None
        except (ValueError, AttributeError) as error:
            raise ResumeError(f"{str(path)!r} is damaged. Add --restart to discard the begun work.") from error

    def holds_work(self) -> bool:
        """Whether there is anything that a further run would not have to do again."""
        if not (self.folder / "state.json").exists():
            return False
        return (self.folder / "ready").exists() or any(path.stem.isdecimal() for path in self.folder.glob("*.json"))

    def begin(self, state: Mapping[str, str]) -> None:
        """Clears the folder of what does not count, and writes `state.json`.

        Raises:
            OutputError: When the disk refuses.
        """
        self.discard()
        self.note(state)

    def note(self, state: Mapping[str, str]) -> None:
        """Writes `state.json`.

        Raises:
            OutputError: When the disk refuses.
        """
        with output_errors(self.files.main), whole_file(self.folder / "state.json") as stream:
            stream.write(json.dumps(dict(state), indent=2).encode() + b"\n")

    def discard(self) -> None:
        """Removes the begun work, but neither the lock nor copies of standard input.

        Raises:
            OutputError: When the disk refuses.
        """
        with output_errors(self.files.main):
            # The state goes first, for without it the rest does not count.
            (self.folder / "state.json").unlink(missing_ok=True)
            for path in self.folder.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != "lock" and not path.name.startswith("input-"):
                    path.unlink()

    def commit(
        self, number: int, inputs: str, table: Any, totals: Totals, rejects: Iterable[Mapping[str, Any]]
    ) -> None:
        """Writes a finished shard.

        Args:
            number: From 0.
            inputs: Digest of its entries.
            table: Its rows, from `outputs.table_from_rows`.
            totals: Its counts.
            rejects: Its rejects, in order.

        Raises:
            OutputError: When the disk refuses.
        """
        content = io.BytesIO()
        write_table(content, table)
        data = content.getvalue()
        record = Record(inputs, totals, tuple(dict(reject) for reject in rejects), hashlib.sha256(data).hexdigest())
        with output_errors(self.files.main):
            with whole_file(self.folder / f"{number:06}.parquet") as stream:
                stream.write(data)
            with whole_file(self.folder / f"{number:06}.json") as stream:
                stream.write(json_line(asdict(record)))

    def whole_shards(self) -> dict[int, Record]:
        """The shards that were committed and are undamaged, by number."""
        found = {}
        for path in sorted(self.folder.glob("*.json")):
            if path.stem.isdecimal() and self._content(number := int(path.stem)) is not None:
                record = self._record(number)
                assert record is not None, "nobody else writes here"
                # Rejects can be many, and are read again when the output is assembled.
                found[number] = replace(record, rejects=())
        return found

    def _record(self, number: int) -> Record | None:
        try:
            stored = json.loads((self.folder / f"{number:06}.json").read_bytes())
            return Record(stored["inputs"], Totals(**stored["totals"]), tuple(stored["rejects"]), stored["sha256"])
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError) as error:
            logger.warning("shard %d in %s has a damaged record (%s)", number, self.folder, error)
            return None

    def _content(self, number: int) -> bytes | None:
        """The Parquet bytes of a shard; None when it is absent or damaged."""
        record = self._record(number)
        if record is None:
            return None
        try:
            content = (self.folder / f"{number:06}.parquet").read_bytes()
        except FileNotFoundError:
            content = b""
        if hashlib.sha256(content).hexdigest() == record.sha256:
            return content
        logger.warning("shard %d in %s is damaged", number, self.folder)
        return None

    def table(self, number: int) -> Any:
        """The rows of a shard.

        Raises:
            OutputError: It is damaged.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        return pq.read_table(pa.BufferReader(self._required(self._content(number), number)))

    def _required(self, value: _T | None, number: int) -> _T:
        if value is None:
            raise OutputError(
                f"Shard {number} in {str(self.folder)!r} was damaged after it had been written. Run the same command "
                "again: it makes the shard anew."
            )
        return value

    def assemble(self, count: int, dim: int, dtype: str, metadata: Mapping[str, str], index: str = "flat") -> Totals:
        """Writes the output's files from shards 0 to `count` - 1 into `ready/`.

        Args:
            count: Shards.
            dim: Length of a vector.
            dtype: "float32" or "float16".
            metadata: For the output; the counts are added.
            index: As `write_output` takes it.

        Raises:
            OutputError: When the disk refuses, or a shard is damaged.
        """
        making, ready = self.folder / "assembling", self.folder / "ready"
        with output_errors(self.files.main):
            for folder in (making, ready):
                if folder.exists():
                    shutil.rmtree(folder)
            making.mkdir()
            try:
                totals = Totals()
                with (making / self.files.rejects.name).open("wb") as stream:
                    for number in range(count):
                        record = self._required(self._record(number), number)
                        totals += record.totals
                        stream.writelines(json_line(reject) for reject in record.rejects)
                    sync_file(stream)
                complete = {**metadata, **totals.to_metadata()}
                write_output(
                    making,
                    self.files,
                    _Tables(self, count),
                    rows=totals.rows,
                    dim=dim,
                    dtype=dtype,
                    metadata=complete,
                    index=index,
                )
                sync_folder(making)
                making.rename(ready)
            except BaseException:
                # On a full disk the shards must be able to wait for room.
                shutil.rmtree(making, ignore_errors=True)
                raise
            sync_folder(self.folder)
        return totals

    def is_ready(self) -> bool:
        """Whether an earlier run was stopped between assembling the output and removing the begun work."""
        ready = self.folder / "ready"
        return ready.is_dir() and ((ready / self.files.main.name).exists() or self.files.main.exists())

    def publish(self) -> None:
        """Moves the files of `ready/` to their places and removes the begun work; may be repeated after a kill.

        Raises:
            OutputError: When the disk refuses.
        """
        with output_errors(self.files.main):
            for path in self.files.all:
                made = self.folder / "ready" / path.name
                if not made.exists():
                    continue  # Moved before a kill.
                if path == self.files.rejects and made.stat().st_size == 0:
                    # No rejects: those of an older output go. The empty file goes after them, as a record of that.
                    path.unlink(missing_ok=True)
                    made.unlink()
                else:
                    if made.is_dir() and path.exists():  # a folder takes no other's place
                        replaced = self.folder / "replaced"
                        shutil.rmtree(replaced, ignore_errors=True)
                        path.replace(replaced)
                    made.replace(path)
            sync_folder(self.files.main.absolute().parent)
        self.discard()


class _Tables:
    """The rows of shards 0 to `count` - 1, one table a shard, read anew each time."""

    def __init__(self, workspace: Workspace, count: int) -> None:
        self._workspace, self._count = workspace, count

    def __iter__(self) -> Iterator[Any]:
        return map(self._workspace.table, range(self._count))
