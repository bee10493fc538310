"""Whether a checkpoint is of the same run: weights and data that changed behind the same settings."""

import json

import pytest
import torch
from toy_data import sentence, write_jsonl

from vlcore.checkpoint import save_pretrained
from vlcore.config import preset
from vlcore.data import Entry, JsonlConversations, JsonlDocuments, JsonlText, Mixture
from vlcore.models import DeepSeekVL, init_weights
from vlcore.train import Stage, TrainConfig, train
from vlcore.train.description import fingerprint


def fresh(seed):
    model = DeepSeekVL(preset("tiny"))
    init_weights(model, seed)
    return model


@pytest.fixture
def rows(tmp_path):
    return write_jsonl(tmp_path / "rows.jsonl", [{"id": str(i), "text": sentence(i)} for i in range(9)])


@pytest.fixture
def go(rows, processor, tmp_path):
    """Train from a directory's weights on a file's rows; a second stage is asked for to go on with."""
    save_pretrained(fresh(1), tmp_path / "base")

    def go(*names, source=None):
        mix = Mixture(entries=(Entry(source=source or JsonlText(rows, name="articles")),))
        settings = {"trains": ("language",), "steps": 1, "learning_rate": 1e-3, "batch_size": 2, "sequence_length": 128}
        stages = tuple(Stage(name=name, mixture=mix, **settings) for name in names)
        config = TrainConfig(
            model=tmp_path / "base", stages=stages, output_dir=tmp_path / "run", plot=False, save_model=False
        )
        return train(config, processor=processor)

    return go


def test_other_starting_weights_are_refused(go, tmp_path):
    go("one")
    save_pretrained(fresh(2), tmp_path / "base")
    with pytest.raises(
        ValueError, match=r"step-00000001-done is of another run: it started from other weights than the "
    ):
        go("one", "two")
    save_pretrained(fresh(1), tmp_path / "base", layout="original")
    assert len(go("one", "two").stages) == 2


def test_other_rows_are_refused_and_those_of_stages_not_begun_are_not(go, rows):
    go("one")
    before = rows.read_text()
    rows.write_text(before.replace("cat", "mat"))
    with pytest.raises(
        ValueError, match="of another run: the source 'articles' of its stage 'one' held other rows than"
    ):
        go("one", "two")
    rows.write_text(before)
    assert len(go("one", "two").stages) == 2


def test_what_else_ends_an_answer_makes_no_other_run(go, tmp_path):
    go("one")
    (tmp_path / "base" / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert len(go("one", "two").stages) == 2


def test_a_checkpoint_that_knows_neither_is_gone_on_with(go, rows, tmp_path):
    go("one")
    path = tmp_path / "run" / "checkpoints" / "step-00000001-done" / "state.json"
    state = json.loads(path.read_text())
    del state["config"]["weights"], state["config"]["stages"][0]["mixture"][0]["rows"]
    path.write_text(json.dumps(state))
    save_pretrained(fresh(2), tmp_path / "base")
    rows.write_text(rows.read_text().replace("cat", "mat"))
    assert len(go("one", "two").stages) == 2


def test_a_model_that_is_handed_over_again_goes_on_however_far_it_was_trained(run, stage):
    model = fresh(3)
    run(stage(name="one"), model=model)
    assert len(run(stage(name="one"), stage(name="two"), model=model).stages) == 2


def test_every_part_of_a_model_is_in_its_fingerprint():
    before = fingerprint(fresh(1))
    assert before == fingerprint(fresh(1))
    for name in ("lm_head.weight", "language.embed_tokens.weight", "language.norm.weight"):
        changed = fresh(1)
        with torch.no_grad():
            changed.get_parameter(name).add_(1e-3)
        assert fingerprint(changed) != before, name


def test_the_fingerprint_of_a_source_is_of_its_file_and_of_what_it_reads(rows, tmp_path):
    same = write_jsonl(tmp_path / "copy.jsonl", rows.read_text().splitlines())
    other = write_jsonl(tmp_path / "other.jsonl", rows.read_text().upper().splitlines())
    text = JsonlText(rows).fingerprint()
    assert text == JsonlText(same).fingerprint() != JsonlText(other).fingerprint()
    assert text != JsonlText(rows, field="id").fingerprint()
    assert JsonlDocuments(rows, tmp_path).fingerprint() != JsonlDocuments(other, tmp_path).fingerprint()
    chats = [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": str(i)}]} for i in (1, 2)
    ]
    one, two = (JsonlConversations(write_jsonl(tmp_path / f"{i}.jsonl", [chats[i]])) for i in (0, 1))
    assert one.fingerprint() != two.fingerprint()
