"""Launch tables: which entry is taken on which GPU, and that those of the repository are well-formed."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vlcore.kernels import launch

ROOT = Path(__file__).parent.parent
TABLES = sorted(ROOT.glob("kernels/*.json"))
ARCHITECTURES = {"sm_80", "sm_90", "sm_100"}
TABLE = {
    "forward": {
        "sm_80": [
            {"up_to": {"rows": 16, "bits": 16}, "BLOCK_M": 16, "num_warps": 4},
            {"up_to": {"rows": 64}, "BLOCK_M": 64, "num_warps": 4},
            {"BLOCK_M": 128, "num_warps": 8},
        ],
        "sm_90": [{"BLOCK_M": 256, "num_warps": 8}],
        "sm_100": [{"up_to": {"rows": 64}, "BLOCK_M": 64, "num_warps": 4}],
    }
}


@pytest.fixture
def tables(monkeypatch):
    launch.look_up.cache_clear()
    monkeypatch.setattr(launch, "table", lambda operator: {"example": TABLE}[operator])
    yield
    launch.look_up.cache_clear()


def on(monkeypatch, major: int, minor: int) -> torch.device:
    """A GPU of this compute capability."""
    forget()
    properties = SimpleNamespace(major=major, minor=minor)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    return torch.device("cuda", 0)


def forget():
    launch.architecture.cache_clear()
    launch._properties.cache_clear()


@pytest.fixture(autouse=True)
def no_gpu_is_remembered():
    yield
    forget()


@pytest.mark.parametrize(
    ("rows", "bits", "block"), [(16, 16, 16), (1, 8, 16), (17, 16, 64), (16, 32, 64), (65, 8, 128)]
)
def test_takes_the_first_entry_whose_limits_hold(tables, rows, bits, block):
    found = launch.settings("example", "forward", torch.device("cpu"), rows=rows, bits=bits)
    assert found == {"BLOCK_M": block, "num_warps": 8 if block == 128 else 4}


def test_says_what_there_is_no_entry_for(monkeypatch, tables):
    message = "The table of example's forward on sm_100 has no entry for {'rows': 65}"
    with pytest.raises(LookupError, match=message):
        launch.settings("example", "forward", on(monkeypatch, 10, 0), rows=65)


@pytest.mark.parametrize(
    ("capability", "table"),
    [
        ((8, 0), "sm_80"),
        ((8, 6), "sm_80"),
        ((8, 9), "sm_80"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_100"),
        ((10, 3), "sm_100"),
        ((12, 0), "sm_80"),
        ((12, 1), "sm_80"),
    ],
)
def test_which_table_a_gpu_is_launched_by(monkeypatch, tables, capability, table):
    assert launch.architecture(on(monkeypatch, *capability).index) == table


def test_the_interpreter_is_launched_as_ampere():
    assert launch.architecture(torch.device("cpu").index) == "sm_80"


@pytest.mark.parametrize(
    ("capability", "reasons"), [((7, 5), ["it needs a GPU since Ampere"]), ((8, 0), []), ((12, 0), [])]
)
def test_a_gpu_older_than_ampere_is_refused(monkeypatch, capability, reasons):
    monkeypatch.setattr(launch, "AVAILABLE", True)
    x = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, device=on(monkeypatch, *capability))
    assert [reason.split(" (")[0] for reason in launch.refusals(x, x)] == reasons


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_a_launch_table_is_well_formed(path):
    for kernel, table in json.loads(path.read_text()).items():
        assert set(table) == ARCHITECTURES, kernel
        for entries in table.values():
            assert entries and "up_to" not in entries[-1], f"{kernel}: the last entry takes what no other takes"
            assert all(entry["up_to"] for entry in entries[:-1]), f"{kernel}: an entry without limits hides the rest"
            for entry in entries:
                assert 1 <= entry["num_warps"] <= 32 and is_power_of_two(entry["num_warps"]), kernel
                blocks = [value for name, value in entry.items() if name.startswith("BLOCK")]
                assert all(is_power_of_two(block) for block in blocks), kernel
                assert 1 <= entry.get("num_stages", 1) <= 8, kernel


def is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0
