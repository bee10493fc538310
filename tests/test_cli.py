import hashlib
import json

import pytest

import vlcore
from vlcore.cli import main


def output_of(capsys, *arguments: str) -> str:
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


# SHA-256 of the public checkpoints' own tables (key -> shape), as json.dumps(table, sort_keys=True).
@pytest.mark.parametrize(
    ("preset", "num_tensors", "digest"),
    [
        ("deepseek_vl_1_3b", 529, "7b7ecc357c68d61e9350a533f17fbd5dee9fe1a4a5407451f042d6fb56a65a64"),
        ("deepseek_vl_7b", 775, "7c854a12cec78404bb79ce3c9a72312520764e25d5d7dce1723d4094d6b976e8"),
    ],
)
def test_prints_the_table_of_weights_of_the_public_checkpoint(capsys, preset, num_tensors, digest):
    table = json.loads(output_of(capsys, "info", "--preset", preset, "--weights", "original", "--json"))
    assert len(table) == num_tensors
    assert hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest() == digest


def test_info_is_readable_and_machine_readable(capsys):
    description = json.loads(output_of(capsys, "info", "--preset", "tiny", "--json"))
    assert description["parameters"]["total"] > 0
    assert "parameters" in output_of(capsys, "info", "--preset", "tiny").lower()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "--preset", "huge"], "no preset 'huge'; there are tiny, demo"),
        (["info", "--model", "/nowhere/at/all"], "/nowhere/at/all"),
        (["train", "/nowhere/runs.py:demo"], "/nowhere/runs.py"),
        (["chat", "--model", "/nowhere/at/all", "Hello"], "/nowhere/at/all"),
    ],
)
def test_what_the_user_got_wrong_is_one_line(capsys, arguments, message):
    assert main(arguments) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"vlcore {arguments[0]}: ") and message in errors and len(errors.splitlines()) == 1


def test_says_its_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"vlcore {vlcore.__version__}\n"


def test_an_unknown_command_shows_the_usage(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["fly"])
    assert "usage: vlcore" in capsys.readouterr().err
