"""Checksums of the files in a folder, in a file that has one of its own."""

import hashlib
from pathlib import Path

# SHA-256, size and path of every other file, and the SHA-256 of these lines.
_CHECKSUMS = "checksums.txt"


def write_checksums(folder: Path) -> None:
    """Writes the file of checksums of all that is in a folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [
        f"{_sha256(path)} {path.stat().st_size} {path.relative_to(folder).as_posix()}\n"
        for path in paths
    ]
    text = "".join(lines).encode()
    (folder / _CHECKSUMS).write_bytes(text + hashlib.sha256(text).hexdigest().encode())


def damage_of(folder: Path) -> str | None:
    """Names a file that is not as it was written, and says in what."""
    name = _CHECKSUMS
    try:
        contents = (folder / name).read_bytes()
        lines, _, own_sha256 = contents.rpartition(b"\n")
        if hashlib.sha256(lines + b"\n").hexdigest().encode() != own_sha256:
            return f"{name}: other contents"
        for line in lines.decode().split("\n"):
            sha256, size, name = line.split(" ", 2)
            size_now = (folder / name).stat().st_size
            if size_now != int(size):
                return f"{name}: {size_now:,} bytes instead of {int(size):,}"
            if _sha256(folder / name) != sha256:
                return f"{name}: other contents"
    except OSError as error:
        return f"{name}: {error.strerror}"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
