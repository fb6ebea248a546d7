"""Weights from elsewhere: Hugging Face's hub, and open_clip's own collection."""

from __future__ import annotations

import contextlib
import logging
import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longclip_rt.errors import WeightsError
from longclip_rt.system.extras import require
from longclip_rt.weights.config import CONFIG_FILES
from longclip_rt.weights.files import choose_weights, split_parts

_log = logging.getLogger("longclip_rt")

HUB_PREFIX = "hf-hub:"

_TIMEOUT_SECONDS = 10.0


@dataclass(frozen=True)
class HubId:
    """A repository on the hub, and perhaps a file in it.

    Attributes:
        repository: `owner/name`.
        file: The file's path inside it; empty where the weights are to be found.
    """

    repository: str
    file: str = ""


def parse_hub_id(text: str) -> HubId | None:
    """Reads `owner/name` or `owner/name/file`, with or without `hf-hub:` before it; None where it is neither."""
    found = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:/([\w@+=./ -]+))?", text.removeprefix(HUB_PREFIX))
    return HubId(found[1], found[2] or "") if found else None


def download_weights(
    hub_id: HubId, *, endpoint: str | None = None, cache_dir: Path | None = None, progress: bool = True
) -> Path:
    """Brings a repository's weights, and the JSON that describes them, into huggingface_hub's cache.

    Args:
        hub_id: What to bring. Without a file, the repository's own is chosen as `choose_weights` does.
        endpoint: Address of the hub, where it is not huggingface_hub's default.
        cache_dir: Folder of the cache, where it is not huggingface_hub's default.
        progress: Whether to show bars on stderr.

    Returns:
        The file of weights; its configuration lies beside it.

    Raises:
        WeightsError: The hub cannot be reached and the cache has no copy, the repository or file does not exist or is
            closed, or several files of weights might be meant.
    """
    hub = require("huggingface_hub", "export")
    for part in ("errors", "utils"):  # not imported by the package itself
        require(f"huggingface_hub.{part}", "export")
    repository = hub_id.repository

    def fetch(name: str) -> Path:
        return Path(hub.hf_hub_download(repository, name, endpoint=endpoint, cache_dir=cache_dir))

    with _progress_bars(hub, progress), _as_sentences(hub, hub_id):
        try:
            # One request, where listing the tree would be tried again and again for half a minute when offline.
            info = hub.HfApi(endpoint=endpoint).model_info(repository, timeout=_TIMEOUT_SECONDS)
            names = {sibling.rfilename for sibling in info.siblings or ()}
        except hub.errors.HfHubHTTPError:
            raise
        except _unreachable(hub) as error:
            return _cached_weights(hub, hub_id, cache_dir, error)
        weights = hub_id.file or choose_weights(names, repository)
        folder = posixpath.dirname(weights)
        for name in CONFIG_FILES:
            if posixpath.join(folder, name) in names:
                fetch(posixpath.join(folder, name))
        path = fetch(weights)
        if path.name.endswith(".index.json"):
            for part in split_parts(path):
                fetch(posixpath.join(folder, part))
        return path


def _unreachable(hub: Any) -> tuple[type[BaseException], ...]:
    """What huggingface_hub raises when it gets no answer. A refusal is an HfHubHTTPError, to be caught before these."""
    errors = hub.errors
    # HTTPError is the root of the HTTP library's errors; which library that is depends on huggingface_hub's version.
    return (
        errors.OfflineModeIsEnabled,
        errors.LocalEntryNotFoundError,
        errors.HTTPError,
        ConnectionError,
        TimeoutError,
    )


def _cached_weights(hub: Any, hub_id: HubId, cache_dir: Path | None, error: BaseException) -> Path:
    """The weights in the cache, of the revision that `main` last was; for when the hub cannot be reached."""
    with contextlib.suppress(hub.CacheNotFound):
        revisions = [
            revision
            for repository in hub.scan_cache_dir(cache_dir).repos
            if repository.repo_id == hub_id.repository and repository.repo_type == "model"
            for revision in repository.revisions
        ]
        for revision in sorted(revisions, key=lambda one: ("main" in one.refs, one.last_modified), reverse=True):
            names = {file.file_path.relative_to(revision.snapshot_path).as_posix() for file in revision.files}
            with contextlib.suppress(WeightsError):
                name = hub_id.file or choose_weights(names, hub_id.repository)
                if name in names:
                    _log.warning("the hub cannot be reached; using the copy of %s in the cache", hub_id.repository)
                    return Path(revision.snapshot_path) / name
    raise error


@contextlib.contextmanager
def _as_sentences(hub: Any, hub_id: HubId) -> Iterator[None]:
    """Turns huggingface_hub's errors into sentences that say how to go on."""
    errors, repository = hub.errors, hub_id.repository
    try:
        yield
    except errors.GatedRepoError as error:
        raise WeightsError(
            f"The repository {repository} is open only to those who accepted its terms. Accept them on its page, then "
            "log in with `hf auth login`."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise WeightsError(
            f"There is no repository {repository} on the hub, or it is private. Check the spelling, or log in with "
            "`hf auth login`; for a local file, check the path."
        ) from error
    except errors.HFValidationError as error:
        raise WeightsError(f"{repository} is no name of a repository on the hub: {error}") from error
    except errors.RemoteEntryNotFoundError as error:
        raise WeightsError(
            f"The repository {repository} has no file {hub_id.file}. Look at its page for the name."
        ) from error
    except errors.HfHubHTTPError as error:
        first = str(error).strip().splitlines()[0]
        raise WeightsError(f"The hub refused to give {repository}: {first} Try again later.") from error
    except _unreachable(hub) as error:
        raise WeightsError(
            f"The hub cannot be reached, and no copy of {repository} is in the cache. Download the weights on a "
            f"machine with a connection (`hf download {repository}`), copy the file here and pass its path."
        ) from error
    except OSError as error:
        raise WeightsError(
            f"{repository} cannot be stored in the hub's cache: {error.strerror or error}. Free some space, or "
            "set HF_HOME to another place."
        ) from error


@contextlib.contextmanager
def _progress_bars(hub: Any, show: bool) -> Iterator[None]:
    if show or hub.utils.are_progress_bars_disabled():
        yield
        return
    hub.utils.disable_progress_bars()
    try:
        yield
    finally:
        hub.utils.enable_progress_bars()
