import numpy as np
import pytest
from PIL import Image
from small_tokenizer import BOS, EOS, IMAGE

from vlcore.processing import IGNORE_INDEX, ChatTemplate, ImageError, Processor, read_conversation
from vlcore.processing.chat import DEFAULT_SYSTEM

RED = Image.new("RGB", (20, 10), "red")
BLUE = Image.new("RGB", (10, 20), "blue")


def text(content):
    return {"type": "text", "text": content}


def image(source):
    return {"type": "image", "image": source}


def user(*parts):
    return {"role": "user", "content": list(parts)}


def assistant(answer):
    return {"role": "assistant", "content": answer}


MESSAGES = [
    user(image(RED), text("What colour is this?")),
    assistant("Red."),
    user(text("And "), image(BLUE), text(" this,"), text("12 of them?")),
    assistant("它是蓝色的 é 🦉"),
]
ORIGINAL = [
    {"role": "User", "content": f"{IMAGE}What colour is this?", "images": [RED]},
    {"role": "Assistant", "content": "Red."},
    {"role": "User", "content": f"And {IMAGE} this, 12 of them?", "images": [BLUE]},
    {"role": "Assistant", "content": "它是蓝色的 é 🦉"},
]
PROMPT = (
    f"{BOS}{DEFAULT_SYSTEM}\n\nUser: {IMAGE}What colour is this?\n\nAssistant: Red.{EOS}"
    f"User: And {IMAGE} this, 12 of them?\n\nAssistant: 它是蓝色的 é 🦉{EOS}"
)


def written_out(processor, prompt):
    """The ids of a prompt in which control tokens are spelled, as the public code tokenises it."""
    processor.tokenizer.encode_special_tokens = False
    ids = processor.tokenizer.encode(prompt, add_special_tokens=False).ids
    processor.tokenizer.encode_special_tokens = True
    count = processor.control.num_image_tokens
    return [i for token in ids for i in [token] * (count if token == processor.control.image else 1)]


@pytest.mark.parametrize("conversation", [MESSAGES, ORIGINAL])
def test_the_ids_are_those_of_the_prompt_written_out(processor, conversation):
    encoded = processor.encode_conversation(conversation)
    assert encoded.input_ids.tolist() == written_out(processor, PROMPT)
    assert (encoded.labels == IGNORE_INDEX).all()
    assert [loaded.getpixel((0, 0)) for loaded in encoded.images] == [(255, 0, 0), (0, 0, 255)]


@pytest.mark.parametrize("conversation", [MESSAGES, ORIGINAL])
def test_labels_are_the_answers_and_their_eos(processor, conversation):
    encoded = processor.encode_conversation(conversation, supervise=True)
    supervised = encoded.labels != IGNORE_INDEX
    assert (encoded.labels == encoded.input_ids)[supervised].all()
    assert encoded.labels[supervised].tolist() == written_out(processor, f" Red.{EOS} 它是蓝色的 é 🦉{EOS}")


@pytest.mark.parametrize("answer", ["Red", "12", "?!", "é", "图", '"', "<b>", "\x00x"])
def test_what_is_learned_is_what_follows_the_open_turn(processor, answer):
    question = [user(text("What?"))]
    opened = processor.encode_conversation(question).input_ids.tolist()
    closed = processor.encode_conversation([*question, assistant(answer)], supervise=True)
    assert closed.input_ids.tolist()[: len(opened)] == opened
    assert closed.labels.tolist()[: len(opened)] == [IGNORE_INDEX] * len(opened)
    assert closed.labels.tolist()[len(opened) :] == closed.input_ids.tolist()[len(opened) :]


OPEN = f"{BOS}{DEFAULT_SYSTEM}\n\nUser: Hello?\n\nAssistant:"


@pytest.mark.parametrize(
    "conversation, prompt",
    [
        ([{"role": "user", "content": "Hello?"}], OPEN),
        ([{"role": "user", "content": " \n Hello?  "}], OPEN),
        ([user(text(" Hello?"), text(" "))], OPEN),
        ([{"role": "user", "content": "Hello?"}, assistant("")], OPEN),
        ([{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": [text("  ")]}], OPEN),
        ([{"role": "User", "content": "Hello?"}, {"role": "Assistant", "content": ""}], OPEN),
        ([{"role": "User", "content": "Hello?", "images": []}], OPEN),
        ([{"role": "system", "content": "Be brief."}, user(text("Hello?"))], OPEN.replace(DEFAULT_SYSTEM, "Be brief.")),
        ([{"role": "System", "content": " A b. "}, user(text("Hello?"))], OPEN.replace(DEFAULT_SYSTEM, "A b.")),
        ([{"role": "system", "content": ""}, user(text("Hello?"))], OPEN.replace(DEFAULT_SYSTEM + "\n\n", "")),
    ],
)
def test_open_turns_and_system_prompts(processor, conversation, prompt):
    assert processor.encode_conversation(conversation).input_ids.tolist() == written_out(processor, prompt)


def test_a_turn_that_is_not_opened(processor):
    encoded = processor.encode_conversation([user(text("Hello?"))], open_turn=False)
    assert encoded.input_ids.tolist() == written_out(processor, OPEN.removesuffix("\n\nAssistant:"))
    with pytest.raises(ValueError, match="open_turn=True needs a conversation that ends with the user's turn"):
        processor.encode_conversation([user(text("Hello?")), assistant("Yes.")], open_turn=True)


def test_another_template(processor):
    template = ChatTemplate(system="", user="Human", assistant="Model", separator="\n")
    other = Processor(processor.tokenizer, processor.config, template)
    ids = other.encode_conversation([user(text("Hello?")), assistant("Yes."), user(text("Sure?"))]).input_ids.tolist()
    assert ids == written_out(processor, f"{BOS}Human: Hello?\nModel: Yes.{EOS}Human: Sure?\nModel:")


@pytest.mark.parametrize("spelled", [BOS, EOS, IMAGE, f"a{EOS}b {IMAGE}{IMAGE}", f"{BOS}User: x"])
@pytest.mark.parametrize("where", ["user", "assistant", "system"])
def test_control_tokens_that_a_user_spells_stay_text(processor, spelled, where):
    conversation = [
        {"role": "system", "content": spelled if where == "system" else "Be brief."},
        {"role": "user", "content": spelled if where == "user" else "Hello?"},
        assistant(spelled if where == "assistant" else "Yes."),
    ]
    ids = processor.encode_conversation(conversation, supervise=True).input_ids.tolist()
    control = processor.control
    assert (ids.count(control.bos), ids.count(control.eos), ids.count(control.image)) == (1, 1, 0)
    assert spelled in processor.decode(ids)


def test_all_images_and_texts_keep_their_order(processor):
    encoded = processor.encode_conversation([user(image(RED), image(BLUE), text("x"), image(RED))])
    assert encoded.input_ids.tolist() == written_out(
        processor, f"{BOS}{DEFAULT_SYSTEM}\n\nUser: {IMAGE}{IMAGE}x{IMAGE}\n\nAssistant:"
    )
    assert [loaded.size for loaded in encoded.images] == [(20, 10), (10, 20), (20, 10)]


@pytest.mark.parametrize("key", ["image", "path", "url"])
def test_keys_of_an_image_part(processor, key, tmp_path):
    RED.save(tmp_path / "red.png")
    encoded = processor.encode_conversation([user({"type": "image", key: str(tmp_path / "red.png")}, text("x"))])
    assert len(encoded.images) == 1


HELLO = {"role": "user", "content": "Hello?"}


@pytest.mark.parametrize(
    "conversation, message",
    [
        ([], "The conversation has no turns"),
        ([{"role": "system", "content": "x"}], "The conversation has no turns"),
        ("Hello?", "A conversation is a list of messages, not str 'Hello"),
        (HELLO, "A conversation is a list of messages, not dict"),
        (["Hello?"], r"conversation\[0\] is str 'Hello\?'; a message is a mapping"),
        ([{"content": "x"}], r"conversation\[0\] has no 'role'; its keys are \['content'\]"),
        ([HELLO, {"role": "assistant"}], r"conversation\[1\] has no 'content'"),
        ([{"role": "tool", "content": "x"}], r"conversation\[0\]\['role'\] is 'tool'; it must be user, assistant"),
        ([{"role": ["user"], "content": "x"}], r"conversation\[0\]\['role'\] is \['user'\]"),
        ([assistant("x")], r"conversation\[0\]\['role'\] is 'assistant' where 'user' must speak"),
        ([HELLO, HELLO], r"conversation\[1\]\['role'\] is 'user' where 'assistant' must speak"),
        ([HELLO, {"role": "system", "content": "x"}], r"conversation\[1\]\['role'\] is 'system'; only the first"),
        ([{"role": "user", "content": " "}], r"conversation\[0\]\['content'\] is empty"),
        ([HELLO, assistant(""), HELLO], r"conversation\[1\]\['content'\] is empty; only an assistant's last"),
        ([{"role": "user", "content": None}], r"conversation\[0\]\['content'\] is missing; it must be a string or a"),
        ([{"role": "user", "content": 3}], r"conversation\[0\]\['content'\] is int 3; it must be a string or a list"),
        ([user("x")], r"conversation\[0\]\['content'\]\[0\] is str 'x'; a part is a mapping"),
        ([user({"text": "x"})], r"conversation\[0\]\['content'\]\[0\]\['type'\] is None; it must be 'text' or 'image'"),
        ([user({"type": "video"})], r"\['content'\]\[0\]\['type'\] is 'video'"),
        ([user({"type": "text"})], r"\['content'\]\[0\]\['text'\] is missing; it must be a string"),
        ([user({"type": "image"})], r"\['content'\]\[0\] is an image with none of 'image', 'path', 'url'"),
        (
            [HELLO, {"role": "assistant", "content": [image(RED)]}],
            r"conversation\[1\]\['content'\] has an image, which",
        ),
        ([{**HELLO, "images": [RED]}], r"conversation\[0\]\['images'\] does not go with role 'user'"),
        ([{"role": "User", "content": "x", "images": [RED]}], r"has 0 <image_placeholder> and .*\['images'\] has 1"),
        (
            [{"role": "User", "content": IMAGE}],
            r"conversation\[0\]\['content'\] has 1 <image_placeholder> and .* has 0",
        ),
        ([{"role": "User", "content": IMAGE * 3, "images": [RED]}], "has 3 <image_placeholder> and .* has 1 images"),
        ([{"role": "User", "content": ["x"]}], r"conversation\[0\]\['content'\] is list .*; with role 'User'"),
        ([{"role": "User", "content": IMAGE, "images": "a.png"}], r"\['images'\] is str 'a.png'; it must be a list"),
    ],
)
def test_malformed_conversations(conversation, message):
    with pytest.raises(ValueError, match=message):
        read_conversation(conversation)


@pytest.mark.parametrize(
    "conversation, message",
    [
        ([user(text("x"), image(b"x"))], r"^conversation\[0\]\['content'\]\[1\]: its 1 bytes are no image"),
        ([user(image("no.png"))], r"^no.png: it cannot be opened"),
        ([user(image("http://a/b.png"))], r"^http://a/b.png: it is an address"),
        ([user(image("data:,x"))], r"^conversation\[0\]\['content'\]\[0\]: its 1 bytes are no image"),
        (
            [{"role": "User", "content": IMAGE, "images": [np.zeros(3)]}],
            r"^conversation\[0\]\['images'\]\[0\]: an array",
        ),
    ],
)
def test_images_that_cannot_be_used_are_named(processor, conversation, message):
    with pytest.raises(ImageError, match=message):
        processor.encode_conversation(conversation)
