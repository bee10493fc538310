"""What a file of results says besides its measurements: what made it, and how the tests went there.

`python -m vlcore.bench.record FILE --commit NAME --tests JUNIT.xml` adds it, and
`python -m vlcore.bench.record --begin FOLDER` prints where the file of this machine is in a folder, with a copy of what
was measured on the same machine before, and what nvcc is to compile for.
"""

import argparse
import platform
import re
import subprocess
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from xml.etree import ElementTree

import torch

from vlcore.bench.report import RESULTS, Results, read
from vlcore.bench.timing import machine

ROOT = Path(__file__).resolve().parent.parent


def begin(folder: Path, device: str) -> Path:
    """The file of this machine in `folder`: cpu.json, or by the name of the GPU."""
    name = torch.cuda.get_device_name() if device == "cuda" else device
    name = re.sub(r"\W+", "-", name.lower()).strip("-") + ".json"
    earlier, file = RESULTS / name, folder / name
    if earlier.exists() and not file.exists():
        results = read(earlier)
        if results.machine == machine(device):
            _name_commit(results, "an earlier one")
            results.write(file)
    return file


def _name_commit(results: Results, commit: str) -> None:
    """Of measurements that do not name theirs."""
    results.measurements = [replace(found, commit=found.commit or commit) for found in results.measurements]


def architecture() -> str:
    """Of the GPU, as nvcc names it: with the instructions that no other GPU has; nothing without one."""
    if not torch.cuda.is_available():
        return ""
    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}" + "a" * (major >= 9)


def made_by() -> dict[str, str]:
    """The commit, and the versions of what a time depends on."""
    found = {"commit": _commit(), "python": platform.python_version(), "cuda": torch.version.cuda or ""}
    for package in ("torch", "triton", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return {name: value for name, value in found.items() if value}


def _commit() -> str:
    """Of the checkout; nothing where there is none."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def counts(junit: Path) -> dict[str, int]:
    """How many tests passed, failed and were skipped, by pytest's XML."""
    suites = ElementTree.parse(junit).getroot().iter("testsuite")
    total = {name: 0 for name in ("tests", "failures", "errors", "skipped")}
    for suite in suites:
        total = {name: count + int(suite.get(name, 0)) for name, count in total.items()}
    failed = total["failures"] + total["errors"]
    return {"passed": total["tests"] - failed - total["skipped"], "failed": failed, "skipped": total["skipped"]}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m vlcore.bench.record")
    parser.add_argument("file", nargs="?", type=Path, help="results, which need not be there yet")
    parser.add_argument("--begin", type=Path, metavar="FOLDER", help="print where the file is to be")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--commit", default="", help="of what was measured, where no checkout says it")
    parser.add_argument("--tests", type=Path, metavar="XML", help="pytest's --junit-xml")
    given = parser.parse_args(argv)
    if given.begin:
        print(begin(given.begin, given.device), architecture(), sep="\n")
    if given.file:
        results = read(given.file) if given.file.exists() else Results(machine(given.device))
        before = results.made_by.get("commit")
        results.made_by = made_by() | ({"commit": given.commit} if given.commit else {})
        if given.tests and given.tests.exists():
            results.tests = counts(given.tests)
        elif results.made_by.get("commit") != before:
            results.tests = {}  # of another commit
        _name_commit(results, results.made_by.get("commit", ""))
        results.write(given.file)


if __name__ == "__main__":
    main()
