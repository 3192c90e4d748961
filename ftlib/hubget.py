"""The process that downloads: `python -m ftlib.hubget`, started by ftlib.download, which may end it at any moment.

Arguments are one JSON object on the command line (`Order`). What has arrived of a large file stays in
<cache>/models--…/blobs/<etag>.ftlib.incomplete, and the next download resumes there: huggingface_hub itself begins
every file anew, because it cannot know that nobody else writes the same partial file. Here a lease sees to that.
The last line of standard error is the reason of a failure; exit codes are those of ftlib.errors.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from ftlib import modelfiles
from ftlib.errors import INPUT_WRONG, UNAVAILABLE

PARTIAL = ".ftlib.incomplete"
# Smaller ones are not worth resuming; huggingface_hub fetches them whole.
LARGE_BYTES = 16 * 2**20
# Plain HTTP serves no file that is larger; huggingface_hub then takes its own protocol, from the start.
LARGEST_HTTP_BYTES = 50 * 10**9
FILES_AT_ONCE = 4
BLOCK_BYTES = 2**20


@dataclasses.dataclass(frozen=True)
class Order:
    """What is to be downloaded."""

    name: str
    commit: str
    cache: str  # the hub cache, $HF_HOME/hub
    files: dict[str, int]  # path in the repository -> size in bytes, 0 where unknown
    kind: str = "model"


def partial_bytes(repository: Path) -> int:
    """Bytes of files that are there in part."""
    found = 0
    for path in (repository / "blobs").glob("*.incomplete"):
        try:
            found += path.stat().st_size
        except OSError:
            continue  # renamed, whole now
    return found


def main(argument: str) -> int:
    """Download; returns the exit code."""
    order = Order(**json.loads(argument))
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    from huggingface_hub import errors
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()  # the parent tells of progress
    # Not left through `with`: that would wait for the others when one fails.
    pool = ThreadPoolExecutor(FILES_AT_ONCE)
    try:
        for done in as_completed([pool.submit(_get, order, name, size) for name, size in order.files.items()]):
            done.result()
    except (errors.GatedRepoError, errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        return _failed(INPUT_WRONG, error)
    except errors.EntryNotFoundError as error:
        return _failed(INPUT_WRONG, error)
    except OSError as error:
        # HTTP errors of huggingface_hub are OSErrors, too; of ours, only those with a number are the disk's.
        return _failed(1 if error.errno else UNAVAILABLE, error)
    except Exception as error:  # httpx has a tree of its own, under no common name that is stable
        return _failed(UNAVAILABLE, error)
    return 0


def _failed(code: int, error: BaseException) -> int:
    print(f"{type(error).__name__}: {' '.join(str(error).split())[:400]}", file=sys.stderr, flush=True)
    # Threads of other files are still at work, and would be waited for.
    os._exit(code)


def _get(order: Order, name: str, size: int) -> None:
    """Put one file into the cache, as huggingface_hub does."""
    from huggingface_hub import hf_hub_download

    if LARGE_BYTES <= size < LARGEST_HTTP_BYTES:
        _get_large(order, name)
    # Of a blob that is there it only makes the link in the snapshot.
    hf_hub_download(
        order.name, name, revision=order.commit, cache_dir=order.cache, repo_type=order.kind)


def _get_large(order: Order, name: str) -> None:
    """Download one file's blob, going on from what an earlier process left of it."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    address = hf_hub_url(order.name, name, revision=order.commit, repo_type=order.kind)
    found = get_hf_file_metadata(address)
    if found.etag is None or found.size is None:
        return  # hf_hub_download fetches it its own way
    blob = modelfiles.repository(Path(order.cache), order.name, kind=order.kind) / "blobs" / found.etag
    if blob.exists():
        return
    blob.parent.mkdir(parents=True, exist_ok=True)
    partial = blob.with_name(blob.name + PARTIAL)
    resumed_at = partial.stat().st_size if partial.exists() else 0
    if resumed_at > found.size:
        partial.unlink()
        resumed_at = 0
    with partial.open("r+b" if resumed_at else "wb") as file:
        file.seek(resumed_at)
        http_get(
            address, file, resume_size=resumed_at, headers=build_hf_headers(), expected_size=found.size,
            displayed_filename=name)
        file.flush()
        os.fsync(file.fileno())
    # What a crashed machine left of a file may hold anything; the etag of a large file is its content's sha256.
    if resumed_at and len(found.etag) == 64 and _sha256(partial) != found.etag:
        partial.unlink()
        raise OSError(f"{name}: what had arrived before was damaged and is deleted; it is downloaded anew")
    os.replace(partial, blob)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _end_with_parent(parent: int) -> None:
    """A parent that was killed cannot end us, and the lease is another process's soon."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def argument(order: Order) -> str:
    """An order for the command line."""
    fields: dict[str, Any] = dataclasses.asdict(order)
    return json.dumps(fields)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
