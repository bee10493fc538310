"""The whole demo: a few steps on invented data, the real data where it was fetched, and its targets where asked."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from vlcore import Processor, config, from_pretrained, generate
from vlcore.demo import __main__ as program
from vlcore.demo import flags, recipe
from vlcore.demo.build import Sizes, build
from vlcore.demo.fetch import PACKAGES, FetchError
from vlcore.demo.measure import ask
from vlcore.demo.questions import NAME_QUESTION
from vlcore.processing import ChatTemplate

ROOT = Path(__file__).parents[2]
REAL_PACKAGES = ROOT / "data" / "demo" / "packages"
missing = [package.folder for package in PACKAGES if not (REAL_PACKAGES / package.folder).is_dir()]
needs_real_data = pytest.mark.skipif(
    bool(missing), reason=f"data/demo/packages lacks {', '.join(missing)}: run `make data`"
)


@pytest.fixture(scope="module")
def finished(packages, tmp_path_factory) -> tuple[Path, list[dict], Path]:
    """(runs/demo, the stages reported, data/demo) of a run of a few steps."""
    folder = tmp_path_factory.mktemp("demo")
    sizes = Sizes(held_out_articles=6, held_out_words=10, held_out_pages=4, pages=8)
    rows = program.run(packages, folder / "data", folder / "out", seed=3, sizes=sizes, lengths=recipe.QUICK)
    return folder / "out", rows, folder / "data"


def test_a_run_writes_everything(finished):
    out, rows, _ = finished
    for name in ("report.json", "report.md", "loss.png", "samples.png", "metrics.jsonl", "model/model.safetensors"):
        assert (out / name).stat().st_size > 0, name
    found = json.loads((out / "report.json").read_text())
    assert [row["name"] for row in found["stages"]] == ["start", "stage1", "stage2", "stage3"]
    assert found["stages"] == rows and found["seed"] == 3
    assert all(row["seconds"] > 0 and row["samples_per_second"] > 0 for row in rows[1:])
    assert not (out / "bad_samples.jsonl").exists() or not (out / "bad_samples.jsonl").read_text()


def test_the_final_model_loads_and_answers(finished):
    out, _, data = finished
    layout = json.loads((out / "model" / "config.json").read_text())
    assert layout["model_type"] == "deepseek_vl_hybrid", "the transformers layout"
    model, processor = from_pretrained(out / "model"), Processor.from_pretrained(out / "model")
    image = next(data.glob("set-*/flags/openmoji/fr.png"))
    answer = generate(model, processor, ask(str(image), NAME_QUESTION), max_new_tokens=3)
    assert isinstance(answer, str)
    prompt = processor.encode_conversation(ask(str(image), NAME_QUESTION)).input_ids
    assert processor.decode(prompt).startswith("User:"), (
        "the demo's prompt has no system text, and says so in its files"
    )


def test_the_stages_are_the_papers(packages, tmp_path):
    data = build(packages, tmp_path, config.demo(), Sizes(held_out_articles=6, held_out_words=10, pages=2), seed=0)
    run = recipe.make_config(data, config.demo(), recipe.Lengths(), tmp_path / "out", seed=0, precision="fp32")
    stage1, stage2, stage3 = run.stages
    assert (stage1.trains, stage1.supervise) == (("adaptor",), "text")
    assert {entry.source.name for entry in stage1.mixture.entries} == {"captions", "pages"}
    assert (stage2.trains, stage2.grouping, stage2.text_ratio) == (("adaptor", "language"), True, 0.7)
    assert stage2.modality_warmup > 0 and stage2.packing
    assert {entry.source.name for entry in stage2.mixture.entries} == {"captions", "pages", "articles"}
    assert set(stage3.trains) == {"language", "adaptor", "siglip", "sam"} and stage3.supervise == "answers"
    assert {e.source.name for e in stage3.mixture.entries} == {"flag_questions", "page_questions", "article_questions"}


def test_no_sample_is_too_long_for_its_stage(packages, tmp_path):
    data = build(packages, tmp_path, config.demo(), Sizes(held_out_articles=6, held_out_words=10, pages=4), seed=0)
    tokenizer = Tokenizer.from_file(str(data.root / "tokenizer.json"))
    processor = Processor(tokenizer, config.demo(), ChatTemplate(system=""))
    run = recipe.make_config(data, config.demo(), recipe.Lengths(), tmp_path / "out", seed=0, precision="fp32")
    for stage in run.stages:
        for entry in stage.mixture.entries:
            for index in range(len(entry.source)):
                sample = entry.source[index]
                encoded = (
                    processor.encode_conversation(sample.conversation, supervise=True)
                    if sample.conversation
                    else processor.encode_document(sample.document)
                )
                assert len(encoded) <= stage.sequence_length or stage.overlong == "truncate", sample.id


def test_a_failed_fetch_is_one_line_and_status_2(monkeypatch, capsys, tmp_path):
    def fail(directory):
        raise FetchError("npm did not bring @scope/toy 1.2.3: no network")

    monkeypatch.setattr(program, "fetch", fail)
    assert program.main(["--data", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "vlcore.demo: npm did not bring @scope/toy 1.2.3: no network\n"


def test_fetch_only_stops_there(monkeypatch, tmp_path):
    monkeypatch.setattr(program, "fetch", lambda directory: {})
    monkeypatch.setattr(program, "run", lambda *arguments, **options: pytest.fail("it went on"))
    assert program.main(["--fetch-only", "--data", str(tmp_path)]) == 0


@needs_real_data
def test_the_real_drawings_and_articles_are_what_they_were():
    folders = {package.name.split("/")[-1]: REAL_PACKAGES / package.folder for package in PACKAGES}
    places = flags.read_countries(folders["flag-icons"] / "country.json")
    assert len(places) == 235
    drawings = flags.read_drawings(folders, [place.code for place in places])
    found = {style: len(drawn) for style, drawn in drawings.items()}
    assert found == {
        "circle-flags": 232,
        "flag-icons-4x3": 235,
        "flag-icons-1x1": 235,
        "flagpack": 232,
        "coreui": 198,
        "emojione": 235,
        "emojione-v1": 215,
        "twemoji": 235,
        "openmoji": 235,
    }
    picture = flags.draw(drawings["openmoji"]["fr"])
    assert picture.size[0] == 96


@pytest.mark.soak
@needs_real_data
def test_the_demo_reaches_its_targets(tmp_path):
    command = [sys.executable, "-m", "vlcore.demo", "--data", str(ROOT / "data/demo"), "--out", str(tmp_path)]
    subprocess.run(command, check=True)
    rows = {row["name"]: row for row in json.loads((tmp_path / "report.json").read_text())["stages"]}
    assert rows["stage3"]["multiple_choice"] >= 0.90
    assert rows["stage3"]["text_perplexity"] <= 1.1 * rows["stage2"]["text_perplexity"]
    assert sum(row["seconds"] for row in rows.values()) <= 600
