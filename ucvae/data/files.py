"""Where data files are looked for, and how they are unpacked, checked and downloaded.

A file is looked for under ``data_dir``, then in the system's folders, and then downloaded into
``data_dir``; in each folder plain first, then gzipped (``.gz`` after the name).
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import http.client
import io
import os
import socket
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ucvae.errors import DataError

SYSTEM_FOLDERS = (Path("/usr/share/datasets"), Path("/usr/local/share/datasets"))
"""Folders with a subfolder for each data set; Debian's packages use the first."""

DOWNLOAD_TIMEOUT_S = 20.0
"""How long a server may stay silent, so that a dead network is told soon."""

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class FileSet:
    """The files of one data set, and where they may be.

    Attributes:
        title: name of the data set for messages.
        names: file names, unpacked.
        folder: their folder under ``data_dir``.
        system_folder: their folder under each of :data:`SYSTEM_FOLDERS`.
        fetch: downloads the files named in its first argument into the empty folder that is its
            second, and returns the folder in which they then lie; it may leave other files.
    """

    title: str
    names: tuple[str, ...]
    folder: str
    system_folder: str
    fetch: Callable[[Sequence[str], Path], Path]

    def locate(self, data_dir: Path) -> dict[str, Path]:
        """Find every file, downloading what is missing; the paths by unpacked name.

        Raises:
            DataError: a file is nowhere and cannot be downloaded.
        """
        folder = Path(data_dir).expanduser() / self.folder
        places = [folder, *(system / self.system_folder for system in SYSTEM_FOLDERS)]
        found = {name: _first_file(places, name) for name in self.names}
        missing = [name for name, path in found.items() if path is None]
        if missing:
            self._download(missing, folder)
        return {name: path or folder / name for name, path in found.items()}

    def _download(self, missing: Sequence[str], folder: Path) -> None:
        """Put files into ``folder``, each whole or not at all."""
        try:
            # Beside the final place, so that the move is a rename; in a folder that exists, so
            # that a failed download leaves nothing behind.
            with tempfile.TemporaryDirectory(
                prefix=".ucvae-download-", dir=_existing_ancestor(folder)
            ) as staging:
                with _silence_limit(), contextlib.redirect_stdout(io.StringIO()):
                    fetched = self.fetch(missing, Path(staging))
                folder.mkdir(parents=True, exist_ok=True)
                for name in missing:
                    os.replace(fetched / name, folder / name)
        except (OSError, http.client.HTTPException, RuntimeError, ValueError, DataError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(
                f"{self.title} is not found: put {', '.join(missing)} (or .gz) into "
                f"{folder.absolute()}, or use dataset=digits, which needs no files; "
                f"they could not be downloaded: {reason}"
            ) from None


def _first_file(places: Sequence[Path], name: str) -> Path | None:
    candidates = (place / file for place in places for file in (name, name + ".gz"))
    return next((path for path in candidates if os.path.isfile(path)), None)


def _existing_ancestor(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.is_dir())


@contextlib.contextmanager
def _silence_limit() -> Iterator[None]:
    previous = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_S)
    try:
        yield
    finally:
        socket.setdefaulttimeout(previous)


@contextlib.contextmanager
def unpacked(path: Path, max_bytes: int) -> Iterator[Path]:
    """Give a plain file with the content of ``path``, which may end in ``.gz``.

    What is packed is unpacked to a temporary file for as long as the context lasts.

    Raises:
        DataError: the content is not gzip's or damaged, or has more than ``max_bytes`` bytes; or
            the system refused to read the file, here or in the context.
    """
    try:
        if path.suffix == ".gz":
            with tempfile.TemporaryDirectory(prefix="ucvae-") as folder:
                plain = Path(folder) / path.stem
                _unpack(path, plain, max_bytes)
                yield plain
        else:
            _check_size(path, path, max_bytes)
            yield path
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read: {reason}") from None


def _unpack(path: Path, plain: Path, max_bytes: int) -> None:
    with gzip.open(path) as packed, open(plain, "wb") as out:
        while out.tell() <= max_bytes and (chunk := packed.read(_CHUNK_BYTES)):
            out.write(chunk)
    _check_size(plain, path, max_bytes)


def _check_size(plain: Path, path: Path, max_bytes: int) -> None:
    if plain.stat().st_size > max_bytes:
        raise DataError(f"{path}: longer than the {max_bytes} bytes that such a file may have")


def check_md5(plain: Path, path: Path, expected: str) -> None:
    """Refuse a known file with unknown content.

    Args:
        plain: the unpacked content.
        path: the name to tell the user.
        expected: MD5 of the unpacked content, in hexadecimal.

    Raises:
        DataError: names the file and both hashes.
    """
    with open(plain, "rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if found != expected:
        raise DataError(f"{path}: wrong content: MD5 {found}, expected {expected}")


def download_url(url: str, folder: Path) -> Path:
    """Download ``url`` into ``folder`` under its own name; the path of the file."""
    # Here, because torchvision takes seconds to import and few runs download.
    from torchvision.datasets.utils import download_url as download

    download(url, folder)
    return folder / url.rpartition("/")[2]
