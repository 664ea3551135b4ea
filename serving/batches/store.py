"""Files and batches on disk, each tenant's in a folder of its own: what lies in another's is not even looked for.

    FOLDER/<digest of the tenant>/files/file-X.json, file-X.jsonl          what is told of a file; its content
    FOLDER/<digest of the tenant>/batches/batch_X.json                     what is told of a batch, and whose it is
                                  batches/batch_X.open                     while it is not over; its runner locks it
                                  batches/batch_X.lines, batch_X.cancel    answers so far; that it is to be ended

A file is there once its .json is; a .json is replaced at once. All replicas of a cluster share the folder.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

from runtime import locks
from runtime.files import replace_text
from serving.errors import ApiError

MOST_FILE_BYTES = 100 << 20
MOST_FILES = 500  # of a tenant
MOST_BYTES = 1 << 30  # of all files of a tenant together
MOST_OPEN = 20  # batches of a tenant that are not over
MOST_LINES = 50_000  # of a batch
LEFT_SECONDS = 24 * 3600.0  # after which what an upload that was killed has left is removed
FILE, BATCH = re.compile(r"file-[a-z0-9]{24,32}"), re.compile(r"batch_[a-z0-9]{24}")
PURPOSES = ("batch",)
OUTPUT = "batch_output"


def missing(what: str) -> ApiError:
    """The same for what is another tenant's, and what there is nowhere."""
    return ApiError(404, f"you have no {what} with this id", param="id", code=f"{what}_not_found")


class Store:
    """The folder of all tenants. Its methods take and give what clients see; they are for threads."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._incoming = folder / "incoming"
        self._incoming.mkdir(mode=0o700, exist_ok=True)
        for left in self._incoming.iterdir():
            with contextlib.suppress(OSError):
                if time.time() - left.stat().st_mtime > LEFT_SECONDS:
                    left.unlink()

    def incoming(self) -> Path:
        """A new name for what is being uploaded."""
        return self._incoming / secrets.token_hex(12)

    def _of(self, tenant: str, kind: str) -> Path:
        return self.folder / hashlib.sha256(tenant.encode()).hexdigest()[:32] / kind

    @contextlib.contextmanager
    def _alone(self, tenant: str) -> Iterator[None]:
        """No other process adds or removes something of this tenant inside."""
        for kind in ("files", "batches"):
            self._of(tenant, kind).mkdir(mode=0o700, parents=True, exist_ok=True)
        with locks.locked(self._of(tenant, "lock"), on_wait=lambda: None):
            yield

    # ---- files ----

    def add_file(self, tenant: str, source: Path, start: int, end: int, filename: str, purpose: str) -> dict:
        """Keeps the bytes `start` to `end` of an upload. Raises ApiError 400 or 413 beyond a tenant's share."""
        with self._alone(tenant):
            kept = self.files(tenant)
            if len(kept) >= MOST_FILES:
                told = f"{len(kept)} files are kept for you, at most {MOST_FILES} may be: delete some"
                raise ApiError(400, told, code="too_many_files")
            if (total := sum(file["bytes"] for file in kept) + end - start) > MOST_BYTES:
                told = f"your files would have {total} bytes, at most {MOST_BYTES} may be: delete some"
                raise ApiError(413, told, code="storage_full")
            id = f"file-{secrets.token_hex(12)}"
            cut = self._incoming / f"{id}.part"
            try:
                with source.open("rb") as file, cut.open("xb") as target:
                    file.seek(start)
                    _copy(file, target, end - start)
                return self._put(tenant, id, cut, filename, purpose)
            finally:
                cut.unlink(missing_ok=True)

    def _put(self, tenant: str, id: str, path: Path, filename: str, purpose: str) -> dict:
        folder, size = self._of(tenant, "files"), path.stat().st_size
        told = {"id": id, "object": "file", "bytes": size, "created_at": int(time.time()), "filename": filename}
        told |= {"purpose": purpose, "status": "processed"}
        os.replace(path, folder / f"{id}.jsonl")
        replace_text(folder / f"{id}.json", json.dumps(told))
        return told

    def file(self, tenant: str, id: str) -> dict:
        """What is told of a file. Raises ApiError 404."""
        return _read(self._of(tenant, "files"), id, FILE, "file")

    def files(self, tenant: str) -> list[dict]:
        """All of a tenant, the newest first."""
        return _all(self._of(tenant, "files"), FILE)

    def content(self, tenant: str, id: str) -> Path:
        """Where a file lies. Raises ApiError 404."""
        self.file(tenant, id)
        return self._of(tenant, "files") / f"{id}.jsonl"

    def delete_file(self, tenant: str, id: str) -> None:
        """Raises ApiError 404, or 409 where a batch that is not over reads it."""
        with self._alone(tenant):
            self.file(tenant, id)
            for batch in self.batches(tenant):
                if batch["input_file_id"] == id and self._path(tenant, batch["id"], "open").exists():
                    raise ApiError(409, f"{batch['id']} reads this file: cancel it first", code="file_in_use")
            folder = self._of(tenant, "files")
            (folder / f"{id}.json").unlink()
            (folder / f"{id}.jsonl").unlink(missing_ok=True)

    # ---- batches ----

    def _path(self, tenant: str, id: str, ending: str) -> Path:
        return self._of(tenant, "batches") / f"{id}.{ending}"

    def add_batch(self, tenant: str, owner: dict, asked: dict) -> dict:
        """A batch from now on. Raises ApiError 404 for a file that is not there, 400 beyond a tenant's share."""
        with self._alone(tenant):
            file = self.file(tenant, asked["input_file_id"])
            if file["purpose"] != "batch":
                told = f"{file['id']} has the purpose {file['purpose']}, not batch"
                raise ApiError(400, told, param="input_file_id", code="invalid_value")
            count = sum(1 for _ in self._of(tenant, "batches").glob("*.open"))
            if count >= MOST_OPEN:
                told = f"{count} of your batches are not over, at most {MOST_OPEN} may be: wait, or cancel one"
                raise ApiError(400, told, code="too_many_batches")
            now = int(time.time())
            told = {"id": f"batch_{secrets.token_hex(12)}", "object": "batch", **asked, "status": "validating"}
            told |= {"created_at": now, "expires_at": now + 24 * 3600}
            told |= {"request_counts": {"total": 0, "completed": 0, "failed": 0}, "tenant": tenant, "owner": owner}
            replace_text(self._path(tenant, told["id"], "json"), json.dumps(told))
            self._path(tenant, told["id"], "open").touch()
            return told

    def batch(self, tenant: str, id: str) -> dict:
        """What is known of a batch. Raises ApiError 404."""
        told = _read(self._of(tenant, "batches"), id, BATCH, "batch")
        if self._path(tenant, id, "cancel").exists() and self._path(tenant, id, "open").exists():
            told["status"] = "cancelling"
        return told

    def batches(self, tenant: str) -> list[dict]:
        """All of a tenant, the newest first."""
        found = _all(self._of(tenant, "batches"), BATCH)
        return [self.batch(tenant, one["id"]) for one in found]

    def cancel(self, tenant: str, id: str) -> dict:
        """Asks for the end of a batch, which its runner brings about. Raises ApiError 404, or 409 where it is over."""
        with self._alone(tenant):
            told = self.batch(tenant, id)
            if not self._path(tenant, id, "open").exists():
                raise ApiError(409, f"{id} is {told['status']} already", code="batch_is_over")
            if not self._path(tenant, id, "cancel").exists():
                self._path(tenant, id, "cancel").write_text(str(int(time.time())))
            return self.batch(tenant, id)

    # ---- for who runs them ----

    def open_batches(self) -> list[Path]:
        """The marks of all batches that are not over, of all tenants; the oldest first."""
        found = []
        for mark in self.folder.glob("*/batches/*.open"):
            with contextlib.suppress(OSError):
                found.append((mark.stat().st_mtime, mark))
        return [mark for _, mark in sorted(found)]

    def keep_result(self, tenant: str, id: str, lines: Path, filename: str) -> str:
        """Makes a file of what a batch brought; a second time, as after a kill, it is the same one."""
        with self._alone(tenant):
            if not (self._of(tenant, "files") / f"{id}.json").exists():
                self._put(tenant, id, lines, filename, OUTPUT)
            lines.unlink(missing_ok=True)
        return id


def _copy(source, target, size: int) -> None:
    while size > 0 and (part := source.read(min(size, 1 << 20))):
        target.write(part)
        size -= len(part)
    target.flush()
    os.fsync(target.fileno())


def _read(folder: Path, id: str, shape: re.Pattern, what: str) -> dict:
    if not shape.fullmatch(id):
        raise missing(what)
    try:
        return json.loads((folder / f"{id}.json").read_text())
    except FileNotFoundError:
        raise missing(what) from None


def _all(folder: Path, shape: re.Pattern) -> list[dict]:
    found = []
    for path in folder.glob("*.json"):
        if shape.fullmatch(path.stem):
            with contextlib.suppress(OSError):  # it was deleted meanwhile
                found.append(json.loads(path.read_text()))
    return sorted(found, key=lambda one: (one["created_at"], one["id"]), reverse=True)
