"""What makes a file trustworthy: a digest of what it holds, on a disk that holds it."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def sha256_of(path: Path) -> str:
    """Hexadecimal digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def record_checksum(record: dict[str, Any]) -> str:
    """Hexadecimal digest of a JSON record, whatever the order of its fields."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def sync(path: Path) -> None:
    """Return when a file, or the names in a folder, are on the disk. Raises OSError where they cannot be."""
    # Windows can neither open a folder nor sync a file that is open for reading
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
