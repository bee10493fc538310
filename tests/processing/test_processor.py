import copy
import dataclasses
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_tokenizer import BOS, EOS, IMAGE, small_tokenizer
from tokenizers import Tokenizer

from vlcore import layouts
from vlcore.config import preset
from vlcore.processing import IGNORE_INDEX, ChatTemplate, ImageError, Processor
from vlcore.processing.chat import DEFAULT_SYSTEM

TINY = preset("tiny")
SIDE = TINY.siglip.image_size
RED = Image.new("RGB", (20, 10), "red")
FILES = {
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
}


@pytest.fixture
def directory(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(layouts.config_to_dict(TINY, "transformers")))
    return tmp_path


def change_json(tokenizer, change):
    content = json.loads(tokenizer.to_str())
    change(content)
    return Tokenizer.from_str(json.dumps(content))


def test_documents(processor, tmp_path):
    RED.save(tmp_path / "red.png")
    control = processor.control
    text = "The cat sat."
    sources = [RED, tmp_path / "red.png", (tmp_path / "red.png").read_bytes(), np.asarray(RED), {"image": RED}]
    for source in sources:
        encoded = processor.encode_document([text, source, {"text": " 图 12"}])
        before, after = processor.encode_text(text), processor.encode_text(" 图 12")
        assert encoded.input_ids.tolist() == [control.bos, *before, *[control.image] * 16, *after, control.eos]
        expected = [IGNORE_INDEX, *before, *[IGNORE_INDEX] * 16, *after, control.eos]
        assert encoded.labels.tolist() == expected and len(encoded.images) == 1
    joined = processor.encode_document(["The c", "at sat."]).input_ids.tolist()
    assert joined == processor.encode_document([text]).input_ids.tolist()
    assert processor.encode_document([IMAGE]).images == []


@pytest.mark.parametrize(
    "parts, message",
    [
        ([], r"A document is a list of one or more parts, not \[\]"),
        ("text", "A document is a list of one or more parts, not 'text'"),
        ([{"text": "a", "image": RED}], r"document\[0\] has keys \['image', 'text'\]"),
        (["a", {"text": 3}], r"document\[1\]\['text'\] is 3; it must be a string"),
    ],
)
def test_malformed_documents(processor, parts, message):
    with pytest.raises(ValueError, match=message):
        processor.encode_document(parts)


def test_an_unusable_image_of_a_document_is_named(processor):
    with pytest.raises(ImageError, match=r"^document\[1\]: an image is a path"):
        processor.encode_document(["a", 3])
    with pytest.raises(ImageError, match="^no.png: it cannot be opened"):
        processor.encode_document([Path("no.png")])


def test_text_and_back(processor):
    for text in ("Hello, 图 é 🦉!", f"{BOS}a{EOS}{IMAGE}", "", " \n\n "):
        ids = processor.encode_text(text)
        assert not set(ids) & {processor.control.bos, processor.control.eos, processor.control.image}
        assert processor.decode(ids) == text
    assert processor.decode([processor.control.bos, *processor.encode_text("x"), processor.control.eos]) == "x"


def test_text_that_is_not_unicode(processor):
    with pytest.raises(ValueError, match=r"The text 'a\\udcffb' cannot be tokenised: half of a surrogate pair"):
        processor.encode_text("a\udcffb")
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        processor.encode_conversation([{"role": "user", "content": "\ud83d"}])


def test_the_callers_tokenizer_is_left_as_it_is():
    tokenizer = small_tokenizer(TINY)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=9)
    before = tokenizer.to_str()
    processor = Processor(tokenizer, TINY)
    assert tokenizer.to_str() == before and not tokenizer.encode_special_tokens
    assert len(processor.encode_text("a b c d e f g h i")) > 9 and len(processor.encode_text("a")) == 1


def test_control_tokens_that_were_not_marked_special():
    def unmark(content):
        for token in content["added_tokens"]:
            token["special"] = False

    processor = Processor(change_json(small_tokenizer(TINY), unmark), TINY)
    text = f"{BOS}{IMAGE}{EOS}"
    assert processor.decode(processor.encode_text(text)) == text
    assert processor.decode([1, 3, 2]) == ""


@pytest.mark.parametrize("copy", [copy.deepcopy, lambda processor: pickle.loads(pickle.dumps(processor))])
def test_copies_and_worker_processes_keep_control_tokens_out_of_text(processor, copy):
    text = f"{BOS}{IMAGE}{EOS}"
    assert copy(processor).encode_text(text) == processor.encode_text(text)


def test_other_added_tokens_stay_tokens(processor):
    # DeepSeek-LLM's tokenizer holds thirteen letters such as ø as added tokens; they are ordinary text.
    tokenizer = small_tokenizer(preset("demo"))
    tokenizer.add_tokens(["ø"])
    processor = Processor(tokenizer, preset("demo"))
    assert tokenizer.token_to_id("ø") in processor.encode_text("smørrebrød")


def forget(*keys):
    def change(content):
        for token in content["added_tokens"]:
            if token["content"] in keys:
                token["content"] += "?"
        for key in keys:
            content["model"]["vocab"][f"{key}?"] = content["model"]["vocab"].pop(key)

    return change


def whole_words(content):
    content["pre_tokenizer"] = None
    vocab = {token["content"]: token["id"] for token in content["added_tokens"]}
    content["model"] = {"type": "WordLevel", "vocab": vocab, "unk_token": EOS}


@pytest.mark.parametrize(
    "change, config, message",
    [
        (forget(IMAGE), TINY, r"The tokenizer has <image_placeholder> at id None; image_token_id is 3"),
        (None, preset("demo"), r"The tokenizer has <image_placeholder> at id 3; image_token_id is 2"),
        (whole_words, TINY, r"makes the control token 1 \(bos_token_id\) of the plain text"),
    ],
)
def test_tokenizers_that_do_not_fit(change, config, message):
    tokenizer = small_tokenizer(TINY)
    with pytest.raises(ValueError, match=message):
        Processor(change_json(tokenizer, change) if change else tokenizer, config)


def test_sizes_and_ids_that_do_not_fit():
    tokenizer = small_tokenizer(TINY)
    size = tokenizer.get_vocab_size()
    tokenizer.add_tokens([f"<{index}>" for index in range(600)])
    with pytest.raises(ValueError, match=rf"has {size + 600} tokens; the model's vocab_size is 512"):
        Processor(tokenizer, TINY)
    short = small_tokenizer(TINY, corpus=("a",))
    with pytest.raises(ValueError, match="no token of id 500, which is the configuration's eos_token_id"):
        Processor(short, replace_language(TINY, eos_token_id=500))


def replace_language(config, **changes):
    return dataclasses.replace(config, language=dataclasses.replace(config.language, **changes))


def test_save_and_load(processor, directory):
    assert {path.name for path in directory.iterdir()} == FILES | {"config.json"}
    loaded = Processor.from_pretrained(str(directory))
    assert loaded.config == TINY and loaded.template == ChatTemplate() and loaded.control == processor.control
    conversation = [{"role": "user", "content": [{"type": "image", "image": RED}, {"type": "text", "text": "x 图"}]}]
    before, after = (p.encode_conversation(conversation) for p in (processor, loaded))
    assert before.input_ids.tolist() == after.input_ids.tolist()
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    assert json.loads((directory / "generation_config.json").read_text()) == ids
    Processor(processor.tokenizer, replace_language(TINY, other_eos_token_ids=(7,))).save_pretrained(directory)
    assert json.loads((directory / "generation_config.json").read_text()) == ids | {"eos_token_id": [2, 7]}
    assert Processor.from_pretrained(directory).config.language.other_eos_token_ids == (7,)


@pytest.mark.parametrize("name", ["tiny", "siglip"])
def test_a_processor_is_loaded_from_where_it_alone_was_saved(tmp_path, name):
    config = replace_language(TINY, other_eos_token_ids=(7,), tie_embeddings=True)
    if name == "siglip":
        config = dataclasses.replace(config, sam=None, adaptor="mlp_gelu", pad_color=(1, 2, 3))
    Processor(small_tokenizer(config), config, ChatTemplate(system="Be brief.")).save_pretrained(tmp_path)
    loaded = Processor.from_pretrained(tmp_path)
    assert loaded.config == config and loaded.template == ChatTemplate(system="Be brief.")
    (tmp_path / "config.json").write_text(json.dumps(layouts.config_to_dict(TINY, "original")))
    (tmp_path / "generation_config.json").unlink()
    assert Processor.from_pretrained(tmp_path).config == TINY


@pytest.mark.parametrize(
    "raw, message",
    [(3, "'model_config' is 3; it must be what a config.json holds"), ({}, "model_config: model_type None")],
)
def test_a_saved_configuration_that_is_none_is_refused(processor, tmp_path, raw, message):
    processor.save_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text(json.dumps({"model_config": raw}))
    with pytest.raises(ValueError, match=f"processor_config.json: {message}"):
        Processor.from_pretrained(tmp_path)


def test_a_template_comes_back(processor, directory):
    template = ChatTemplate(system='Say "é".\n', user="Human")
    Processor(processor.tokenizer, TINY, template).save_pretrained(directory)
    assert Processor.from_pretrained(directory).template == template
    assert Processor.from_pretrained(directory, ChatTemplate()).template == ChatTemplate()
    (directory / "processor_config.json").unlink()
    assert Processor.from_pretrained(directory).template == ChatTemplate()


def test_directories_that_cannot_be_read(processor, directory):
    (directory / "processor_config.json").write_text('{"prompt": {"system": 3}}')
    with pytest.raises(ValueError, match=r"processor_config.json: 'prompt' is {'system': 3}; it must hold strings"):
        Processor.from_pretrained(directory)
    (directory / "processor_config.json").write_text("{")
    with pytest.raises(ValueError, match="processor_config.json is not JSON"):
        Processor.from_pretrained(directory)
    (directory / "processor_config.json").unlink()
    (directory / "tokenizer.json").write_text('{"version": "1.0", "model"')
    with pytest.raises(ValueError, match="tokenizer.json is no tokenizer that can be read: "):
        Processor.from_pretrained(directory)
    (directory / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="tokenizer.json does not exist; a processor needs the tokenizer"):
        Processor.from_pretrained(directory)
    small_tokenizer(preset("demo")).save(str(directory / "tokenizer.json"))
    with pytest.raises(
        ValueError, match=f"^{directory}: The tokenizer has <image_placeholder> at id 2; image_token_id"
    ):
        Processor.from_pretrained(directory)
    (directory / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="neither config.json nor a processor_config.json with 'model_config'"):
        Processor.from_pretrained(directory)


@pytest.mark.parametrize("is_new", [True, False])
def test_a_full_disk_leaves_what_was_there(processor, tmp_path, monkeypatch, is_new):
    target = tmp_path / "model"
    if not is_new:
        processor.save_pretrained(target)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("model/*")}
    calls = []

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fsync)
    with pytest.raises(OSError, match="No space left on device"):
        Processor(processor.tokenizer, TINY, ChatTemplate(system="x")).save_pretrained(target)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("model/*")} == before
    assert target.exists() == (not is_new)


@pytest.fixture(scope="module", params=["tiny", "siglip"])
def both(request, tmp_path_factory):
    """Our processor, and transformers' own, loaded from the directory that ours wrote."""
    transformers = pytest.importorskip("transformers")
    config = TINY
    if request.param == "siglip":
        config = dataclasses.replace(TINY, sam=None, adaptor="mlp_gelu", pad_color=(127, 127, 127))
    directory = tmp_path_factory.mktemp(request.param)
    ours = Processor(small_tokenizer(config), config)
    ours.save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(layouts.config_to_dict(config, "transformers")))
    return ours, transformers.AutoProcessor.from_pretrained(directory)


def conversations():
    def user(*parts):
        return {"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}

    image = {"type": "image", "image": RED}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "Red. 图 12"}]}
    return {
        "text": [user("What is it?")],
        "image": [user(image, "What is it?")],
        "spaces": [user("  And ", image, " this,", "too? ")],
        "turns": [user(image, "What is it?"), answer, user("Is it?")],
        "system": [{"role": "system", "content": [{"type": "text", "text": "Be brief. "}]}, user("What?")],
        "closed": [user(image, image, "What is it?"), answer],
    }


@pytest.mark.parametrize("name", conversations())
def test_transformers_reads_what_was_saved(both, name):
    ours, theirs = both
    conversation = conversations()[name]
    encoded = ours.encode_conversation(conversation)
    inputs = theirs.apply_chat_template(
        conversation, tokenize=True, return_dict=True, add_generation_prompt=name != "closed", return_tensors="pt"
    )
    assert inputs["input_ids"].tolist() == [encoded.input_ids.tolist()]
    if encoded.images:
        config = ours.config
        key, tower = ("high_res_pixel_values", config.sam) if config.sam else ("pixel_values", config.siglip)
        mean, std = (np.array(value, np.float32)[:, None, None] for value in (tower.mean, tower.std))
        expected = (ours.pixels(encoded.images).numpy() - mean) / std
        assert np.abs(inputs[key].numpy() - expected).max() < 1e-5


def test_transformers_makes_the_low_resolution_image_that_our_model_does(both):
    """But for the rounding to 8 bits, which ours is spared where there are two towers."""
    ours, theirs = both
    spots = np.random.default_rng(0).integers(0, 255, (16, 8, 3), dtype=np.uint8)
    image = Image.fromarray(spots).resize((128, 256), Image.Resampling.BICUBIC)
    found = theirs.image_processor([image], return_tensors="pt")["pixel_values"].reshape(1, 3, *[SIDE] * 2) * 0.5 + 0.5
    pixels = ours.pixels([image])
    if ours.config.sam:
        pixels = torch.nn.functional.interpolate(pixels, (SIDE, SIDE), mode="bilinear", antialias=True)
    assert (found - pixels).abs().max() < (1.1 / 255 if ours.config.sam else 1e-5)


def test_transformers_sees_the_default_system_prompt(both):
    ours, theirs = both
    prompt = theirs.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False)
    assert prompt == f"{BOS}{DEFAULT_SYSTEM}\n\nUser: Hi\n\nAssistant:"
