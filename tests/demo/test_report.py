"""The report: the form that programs read, a page that people read, and the sheet of samples."""

import json

import numpy as np
import pytest
from PIL import Image

from vlcore.demo import report
from vlcore.demo.fetch import PACKAGES
from vlcore.demo.machine import describe, fast_precision, read_cpu
from vlcore.demo.measure import Answer, Measurement

MEASURED = Measurement(multiple_choice=0.951234, exact_name=0.5, text_perplexity=123.45678, character_accuracy=0.25)
KEYS = {
    "name",
    "seconds",
    "samples_per_second",
    "multiple_choice",
    "exact_name",
    "text_perplexity",
    "character_accuracy",
}


def write(tmp_path):
    stages = [report.stage_row("start", MEASURED), report.stage_row("stage1", MEASURED, 12.345, 67.89)]
    data = report.describe_data(PACKAGES, {"twemoji": {"drawings": 235}, "matplotlib": {"fonts": 3}})
    found = {"seed": 7, "data": data, "machine": describe("fp32"), "stages": stages}
    report.write_report(tmp_path, found, parameters=2_345_678)
    return stages


def test_report_json_has_its_form(tmp_path):
    stages = write(tmp_path)
    found = json.loads((tmp_path / "report.json").read_text())
    assert list(found) == ["seed", "data", "machine", "stages"]
    assert found["seed"] == 7 and found["stages"] == stages
    assert all(set(row) == KEYS for row in found["stages"])
    assert found["stages"][0]["seconds"] == 0 and found["stages"][1]["seconds"] == 12.3
    assert found["stages"][1]["multiple_choice"] == 0.9512
    twemoji = found["data"]["@iconify-json/twemoji"]
    assert twemoji["sizes"] == {"drawings": 235} and twemoji["licence"] == "CC-BY-4.0" and twemoji["version"]
    assert {"cpu", "cores", "threads", "torch", "precision"} <= set(found["machine"])


def test_report_md_has_a_table_the_pictures_and_the_licences(tmp_path):
    write(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "2.3 million parameters" in text and "from random weights (seed 7)" in text
    assert "The towers start random too" in text
    assert "| stage1 | 12.3 | 67.9 | 0.9512 | 0.5 | 123.4568 | 0.25 |" in text
    assert "(loss.png)" in text and "(samples.png)" in text and "`openmoji`" in text
    assert all(package.licence in text and package.origin in text for package in PACKAGES)
    assert "precision: fp32" in text


def sheet(tmp_path, *answers: Answer) -> np.ndarray:
    report.draw_samples([answers[:-1], answers[-1:]], tmp_path / "samples.png", tiles=(30, 6), seed=0)
    with Image.open(tmp_path / "samples.png") as opened:
        return np.asarray(opened)


def has_color(pixels: np.ndarray, color: tuple[int, int, int]) -> bool:
    return bool((np.abs(pixels.astype(int) - color).max(-1) < 12).any())


def test_right_answers_are_green_and_wrong_ones_red(tmp_path):
    Image.new("RGB", (60, 40), (0, 0, 200)).save(tmp_path / "flag.png")
    image = str(tmp_path / "flag.png")
    right, wrong = Answer(image, "Which?", "France", "France"), Answer(image, "Which?", "France", "Chad")
    good = sheet(tmp_path, right, right)
    assert has_color(good, report.RIGHT) and not has_color(good, report.WRONG)
    bad = sheet(tmp_path, wrong, wrong)
    assert has_color(bad, report.WRONG) and not has_color(bad, report.RIGHT)
    assert has_color(good, (0, 0, 200))


def test_long_and_many_lined_answers_stay_in_their_tile(tmp_path):
    Image.new("RGB", (60, 40), (0, 0, 200)).save(tmp_path / "flag.png")
    long = Answer(str(tmp_path / "flag.png"), "Which?", "France", "W" * 400 + "\nsecond")
    empty = Answer(str(tmp_path / "flag.png"), "Which?", "France", "")
    pixels = sheet(tmp_path, long, empty)
    assert pixels.shape == (report.TILE_HEIGHT, report.COLUMNS * report.TILE_WIDTH, 3)
    assert (pixels[:, report.TILE_WIDTH - 7 : report.TILE_WIDTH] == 255).all()


def test_the_sheet_shows_as_many_of_each_kind_as_asked_for(tmp_path):
    Image.new("RGB", (60, 40), (0, 0, 200)).save(tmp_path / "flag.png")
    answers = [Answer(str(tmp_path / "flag.png"), "Which?", "France", "Chad")] * 50
    report.draw_samples([answers, answers], tmp_path / "samples.png", tiles=(9, 4), seed=0)
    with Image.open(tmp_path / "samples.png") as opened:
        assert opened.size == (report.COLUMNS * report.TILE_WIDTH, 3 * report.TILE_HEIGHT)


@pytest.mark.parametrize(
    "flags, precision",
    [("fpu sse2 avx2", "fp32"), ("avx2 avx512f avx512_bf16", "bf16"), ("amx_bf16 amx_tile", "bf16")],
)
def test_bf16_is_used_where_the_processor_multiplies_it(tmp_path, flags, precision):
    path = tmp_path / "cpuinfo"
    path.write_text(f"processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t\t: {flags}\n\nprocessor\t: 1\n")
    name, found = read_cpu(path)
    assert name == "Some CPU @ 2 GHz" and found == frozenset(flags.split())
    assert fast_precision(found) == precision


def test_a_machine_without_cpuinfo_has_no_flags(tmp_path):
    _, flags = read_cpu(tmp_path / "missing")
    assert flags == frozenset() and fast_precision(flags) == "fp32"
