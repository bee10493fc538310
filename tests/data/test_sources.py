"""The file formats: what each row becomes, and what is refused in it."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from toy_data import square, write_jsonl

from vlcore.data import BadSample, Encoder, JsonlConversations, JsonlDocuments, JsonlText
from vlcore.data.jsonl import JsonRows

# Deeper than the parser goes.
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture
def root(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(3):
        square(number).save(tmp_path / "images" / f"{number}.png")
    return tmp_path


def conversations(root, *rows, **settings):
    return JsonlConversations(write_jsonl(root / "chat.jsonl", rows), root / "images", **settings)


def llava(*values, **keys):
    turns = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
    return {"conversations": turns, **keys}


def test_rows_are_found_by_offset_across_blank_lines_and_wide_characters(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": "图é"}\n\n  \n{"a": "\\u2028"}\n{"a": 3}', encoding="utf-8")
    rows = JsonRows(path)
    assert [rows[i]["a"] for i in range(len(rows))] == ["图é", "\u2028", 3]
    assert pickle.loads(pickle.dumps(rows))[2] == {"a": 3}


def test_a_json_array_gives_the_same_rows_as_json_lines(tmp_path):
    values = [{"text": "图 [x], {y}"}, {"text": 'a "quoted" word'}, {"text": "]"}]
    (tmp_path / "a.json").write_text(json.dumps(values, ensure_ascii=False, indent=2), encoding="utf-8")
    write_jsonl(tmp_path / "a.jsonl", values)
    array, lines = JsonRows(tmp_path / "a.json"), JsonRows(tmp_path / "a.jsonl")
    assert [array[i] for i in range(3)] == [lines[i] for i in range(3)] == values


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "is not a JSON array of rows"),
        ('{"a": 1}', "is not a JSON array of rows"),
        ("[]", "holds no rows"),
        ('[{"a": 1}, {"a": ', "row 2 is not JSON"),
        ('[{"a": 1}', "breaks off after row 1"),
        ('[{"a": 1} {"a": 2}]', "breaks off after row 1"),
        ('[{"a": 1}, ' + DEEP[:-1], "breaks off inside of a row"),
        ('[{"a": 1}]\n\n[{"a": 2}]\n', "goes on behind its array, in line 3"),
        ('[{"a": 1}]]', "goes on behind its array, in line 1"),
        ("[]{}", "goes on behind its array, in line 1"),
    ],
)
def test_a_bad_array_is_refused_by_name(tmp_path, text, message):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ValueError, match=rf"bad\.json.*{message}"):
        JsonRows(tmp_path / "bad.json")


def test_an_array_may_begin_with_a_byte_order_mark_and_must_be_utf8(tmp_path):
    (tmp_path / "a.json").write_text('[{"a": "é"}]', encoding="utf-8-sig")
    (tmp_path / "a.jsonl").write_text('{"a": "é"}', encoding="utf-8-sig")
    assert JsonRows(tmp_path / "a.json")[0] == JsonRows(tmp_path / "a.jsonl")[0] == {"a": "é"}
    (tmp_path / "latin.json").write_text('[{"a": "é"}]', encoding="latin-1")
    with pytest.raises(ValueError, match=r"latin\.json is not UTF-8: .*0xe9"):
        JsonRows(tmp_path / "latin.json")


@pytest.mark.parametrize(
    "value, reason",
    [(DEEP, "maximum recursion depth"), ("9" * 5000, "Exceeds the limit")],
    ids=["without bottom", "a number of 5000 digits"],
)
@pytest.mark.parametrize("name", ["chat.json", "chat.jsonl"])
def test_a_row_that_cannot_be_parsed_costs_only_itself(root, name, value, reason):
    rows = [json.dumps(llava("Hi", "Hello")), '{"a": "]\\"", "b": ' + value + "}", json.dumps(llava("a", "b"))]
    text = "[" + ",\n".join(rows) + "]" if name == "chat.json" else "\n".join(rows)
    (root / name).write_text(text)
    source = JsonlConversations(root / name)
    assert len(source) == 3
    with pytest.raises(BadSample, match=rf"{name}, row 2 is not JSON: {reason}"):
        source[1]
    assert source[2].conversation[1]["content"] == "b"


def test_empty_and_missing_files_are_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match=r"empty\.jsonl holds no rows"):
        JsonlText(tmp_path / "empty.jsonl")
    with pytest.raises(FileNotFoundError, match=r"gone\.jsonl"):
        JsonlText(tmp_path / "gone.jsonl")


def test_texts(tmp_path):
    source = JsonlText(write_jsonl(tmp_path / "news.jsonl", [{"text": "one"}, {"text": "two", "id": 7}]))
    assert (source.name, source.modality, len(source)) == ("news", "text", 2)
    assert [(source[i].id, source[i].document) for i in range(2)] == [("news.jsonl:1", ["one"]), ("7", ["two"])]
    assert JsonlText(write_jsonl(tmp_path / "none.jsonl", [{"text": "one", "id": None}]))[0].id == "none.jsonl:1"


@pytest.mark.parametrize(
    "row, reason",
    [
        ("{broken", r"news\.jsonl, row 1 is not JSON"),
        ("[1]", "row 1 is a list, not an object"),
        ('{"other": 1}', "'text' is missing"),
        ('{"text": 5}', "'text' is 5"),
        ('{"text": ' + DEEP + "}", "row 1 is not JSON: maximum recursion depth"),
        ('{"text": ""}', "'text' is ''"),
    ],
)
def test_bad_text_rows_say_why(tmp_path, row, reason):
    source = JsonlText(write_jsonl(tmp_path / "news.jsonl", [row]))
    with pytest.raises(BadSample, match=reason) as caught:
        source[0]
    assert caught.value.sample_id == "news.jsonl:1"


def test_documents_interleave_texts_and_images(root):
    rows = [{"id": "d", "parts": [{"image": "0.png"}, {"text": "between"}, {"image": "1.png"}]}]
    source = JsonlDocuments(write_jsonl(root / "pages.jsonl", rows), root / "images", name="pages")
    images = (root / "images").resolve()
    assert source[0].document == [images / "0.png", "between", images / "1.png"]
    assert (source[0].id, source.modality, source.name) == ("d", "multimodal", "pages")


@pytest.mark.parametrize(
    "parts, reason",
    [
        (None, "'parts' is missing"),
        ("text", "'parts' is 'text'"),
        ([{"text": "only"}], "no part is an image"),
        ([{"picture": "0.png"}], "is neither"),
        ([{"image": "../secret.png"}], "leads outside"),
        ([{"image": "/etc/passwd"}], "leads outside"),
        ([{"image": "http://example.org/a.png"}], "is a URL"),
        ([{"image": "data:image/png;base64,AAAA"}], "is a URL"),
        ([{"image": ""}], "is not a path"),
        ([{"image": "a\0b"}], "is not a path"),
        ([{"image": 5}], "is not a path"),
        ([{"image": "a\ud800.png"}], r"'a\\ud800.png' is not a path that can be followed"),
    ],
)
def test_bad_documents_say_why(root, parts, reason):
    rows = [{"id": "d", **({} if parts is None else {"parts": parts})}]
    with pytest.raises(BadSample, match=reason) as caught:
        JsonlDocuments(write_jsonl(root / "pages.jsonl", rows), root / "images")[0]
    assert caught.value.sample_id == "d"


def test_a_link_out_of_the_images_is_not_followed(root):
    (root / "secret.png").write_bytes((root / "images" / "0.png").read_bytes())
    (root / "images" / "link.png").symlink_to(root / "secret.png")
    rows = [{"parts": [{"image": "link.png"}]}]
    with pytest.raises(BadSample, match=r"'link\.png' leads outside"):
        JsonlDocuments(write_jsonl(root / "pages.jsonl", rows), root / "images")[0]


def test_a_circle_of_links_is_a_bad_sample(root, processor):
    (root / "images" / "circle.png").symlink_to(root / "images" / "circle.png")
    source = JsonlDocuments(write_jsonl(root / "pages.jsonl", [{"parts": [{"image": "circle.png"}]}]), root / "images")
    with pytest.raises(BadSample, match=r"circle\.png"):  # when it is drawn or, from Python 3.13 on, read
        Encoder(processor=processor, sequence_length=128)(source[0])


def test_llava_conversations(root):
    row = llava("<image>\nLook at <image>.", "Two.", "And now?", "None.", id="x", image=["0.png", "1.png"])
    source = conversations(root, row, name="llava")
    images = (root / "images").resolve()
    user, answer, again, last = source[0].conversation
    assert user == {
        "role": "user",
        "content": [
            {"type": "image", "image": images / "0.png"},
            {"type": "text", "text": "\nLook at "},
            {"type": "image", "image": images / "1.png"},
            {"type": "text", "text": "."},
        ],
    }
    assert answer == {"role": "assistant", "content": "Two."}
    assert again == {"role": "user", "content": [{"type": "text", "text": "And now?"}]}
    assert last == {"role": "assistant", "content": "None."}
    assert (source[0].id, source.modality) == ("x", "multimodal")


def messages(content, **keys):
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "Yes."}], **keys}


@pytest.mark.parametrize(
    "row",
    [
        messages("<image>Is it?", images=["0.png"]),
        messages([{"type": "image"}, {"type": "text", "text": "Is it?"}], images=["0.png"]),
        messages([{"type": "image", "image": "0.png"}, {"type": "text", "text": "Is it?"}]),
        messages([{"type": "image", "path": "0.png"}, {"type": "text", "text": "Is it?"}]),
        messages([{"type": "text", "text": "<image>Is it?"}], images=["0.png"]),
        messages([{"type": "text", "text": "<image>"}, {"type": "text", "text": "Is it?"}], images=["0.png"]),
    ],
)
def test_messages(root, row):
    path = (root / "images" / "0.png").resolve()
    sample = conversations(root, row)[0]
    assert sample.conversation[0]["content"] == [
        {"type": "image", "image": path},
        {"type": "text", "text": "Is it?"},
    ]


def test_texts_in_parts_are_joined_as_in_a_chat(root, processor):
    """Of every role, as the processor does with what a chat is given."""
    roles = ("system", "user", "assistant")
    turns = [
        {"role": role, "content": [{"type": "text", "text": text} for text in (role, "is", "a cat.")]} for role in roles
    ]
    sample = JsonlConversations(write_jsonl(root / "chat.jsonl", [{"messages": turns}]))[0]
    encoded, _ = Encoder(processor=processor, sequence_length=128)(sample)
    assert torch.equal(encoded.input_ids, processor.encode_conversation(turns).input_ids)
    assert "assistant is a cat." in processor.decode(encoded.input_ids)


def test_a_file_of_both_modalities_is_parted_and_nothing_is_lost(root):
    rows = [llava("Hi", "Hello"), llava("<image>?", "Cat", image="0.png"), "{broken", llava("a", "b", image=None)]
    path = write_jsonl(root / "mix.jsonl", rows)
    images = JsonlConversations(path, root / "images")
    text = JsonlConversations(path, name="chat")
    assert (images.modality, len(images)) == ("multimodal", 2)  # the broken row is reported by both
    assert (text.modality, len(text), text[2].id) == ("text", 3, "mix.jsonl:4")
    assert text[0].conversation[0]["content"] == [{"type": "text", "text": "Hi"}]


@pytest.mark.parametrize(
    "row, reason",
    [
        ({}, "neither 'conversations' nor 'messages'"),
        ({"foo": 1}, "neither 'conversations' nor 'messages'"),
        ({"messages": "Hi"}, "neither 'conversations' nor 'messages'"),
        (llava("<image>?", "a", picture="0.png"), "more <image> than it names images"),
        (llava("<image>?", "a", image=""), "more <image> than it names images"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "<image>?"}]}]}, "more <image> than"),
    ],
)
def test_a_row_that_does_not_tell_its_modality_is_a_bad_one_of_both(root, row, reason):
    path = write_jsonl(root / "mix.jsonl", [llava("Hi", "Hello"), row, llava("<image>?", "Cat", image="0.png")])
    for source, number in ((JsonlConversations(path, root / "images"), 0), (JsonlConversations(path), 1)):
        assert len(source) == 2
        with pytest.raises(BadSample, match=reason) as caught:
            source[number]
        assert caught.value.sample_id == "mix.jsonl:2"


@pytest.mark.parametrize("keys", [{"image": ""}, {"image": None}, {"images": []}, {"images": [""]}])
def test_a_row_of_text_may_name_no_image_in_many_ways(root, keys):
    rows = [llava("What is this tag?", "An <image>.", **keys), llava("<image>?", "Cat", image="0.png")]
    path = write_jsonl(root / "mix.jsonl", rows)
    assert [len(JsonlConversations(path, folder)) for folder in (None, root / "images")] == [1, 1]
    assert JsonlConversations(path)[0].conversation[1]["content"] == "An <image>."


def test_a_source_without_rows_of_its_modality_is_refused(root):
    path = write_jsonl(root / "mix.jsonl", [llava("Hi", "Hello"), "{broken", {"prompt": "Hi"}])
    with pytest.raises(ValueError, match=r"none of the 3 rows is multimodal"):
        JsonlConversations(path, root / "images")
    with pytest.raises(ValueError, match="needs images_root"):
        JsonlConversations(path, modality="multimodal")


@pytest.mark.parametrize(
    "row, reason",
    [
        (llava("<image><image>?", "a", image="0.png"), "more <image> than it names images"),
        (llava("What?", "a", image="0.png"), "names 1 images, but its text has 0 <image>"),
        (llava("<image>?", image="0.png"), "last turn is not the assistant's"),
        (llava("<image>?", "", image="0.png"), "a turn of 'gpt' has no text"),
        (llava("<image>?", " \n", image="0.png"), "a turn of 'gpt' has no text"),
        (messages([{"type": "text", "text": "<image><image>"}], images=["0.png"]), "more <image> than it names images"),
        (llava("<image>?", "a", image="../0.png"), "leads outside"),
        ({"image": "0.png"}, "neither 'conversations' nor 'messages'"),
        ({"image": "0.png", "conversations": []}, "neither 'conversations' nor 'messages'"),
        ({"image": "0.png", "conversations": ["x"]}, "turn 'x' is not an object"),
        ({"image": "0.png", "conversations": [{"from": ["human"], "value": "x"}]}, r"role \['human'\] is none of"),
        ({"image": "0.png", "conversations": [{"from": "robot", "value": "x"}]}, "role 'robot' is none of"),
        (messages([{"type": "video"}], images=["0.png"]), "neither text nor an image"),
        (messages([], images=["0.png"]), "a user's turn is empty"),
        (messages(None, images=["0.png"]), "a user's turn has no text"),
    ],
)
def test_bad_conversations_say_why(root, row, reason):
    with pytest.raises(BadSample, match=reason) as caught:
        conversations(root, row)[0]
    assert caught.value.sample_id == "chat.jsonl:1"


def test_sources_travel_to_workers(root):
    source = conversations(root, llava("<image>?", "Cat", image="0.png"))
    copy = pickle.loads(pickle.dumps(source))
    assert copy[0].conversation == source[0].conversation
    assert isinstance(copy.images_root, Path)
