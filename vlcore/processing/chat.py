"""Conversations of both public styles, checked, and DeepSeek-VL's chat template."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlcore.processing.segments import Bos, Eos, Picture, Segment, Text

IMAGE_PLACEHOLDER = "<image_placeholder>"
DEFAULT_SYSTEM = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
IMAGE_KEYS = ("image", "path", "url")
ORIGINAL_ROLES = {"User": "user", "Assistant": "assistant", "System": "system"}


@dataclass(frozen=True)
class Turn:
    """What one side says: texts and pictures in reading order, outer white space gone."""

    role: str
    parts: tuple[Text | Picture, ...]


@dataclass(frozen=True)
class Conversation:
    """A checked conversation: user and assistant take turns, the user first.

    Attributes:
        system: what replaces the template's system prompt; "" leaves it out, None keeps the template's.
        turns: at least one.
    """

    system: str | None
    turns: tuple[Turn, ...]

    @property
    def ends_with_user(self) -> bool:
        return self.turns[-1].role == "user"


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """The public DeepSeek-VL prompt.

    `{BOS}{system}\\n\\n`, then `User: …\\n\\n` and `Assistant: …{EOS}` in turn; where an answer is to be generated the
    prompt ends with `Assistant:`.
    """

    system: str = DEFAULT_SYSTEM
    user: str = "User"
    assistant: str = "Assistant"
    separator: str = "\n\n"

    def render(self, conversation: Conversation, *, supervise: bool, open_turn: bool) -> list[Segment]:
        """The prompt of a conversation; with `supervise`, its answers and their EOS are marked to be learned."""
        system = self.system if conversation.system is None else conversation.system
        segments: list[Segment] = [Bos()]
        if system:
            segments.append(Text(system + self.separator))
        for turn in conversation.turns:
            if turn.role == "user":
                segments += [Text(f"{self.user}: "), *turn.parts, Text(self.separator)]
            else:
                answer = "".join(part.text for part in turn.parts if isinstance(part, Text))
                segments += [Text(f"{self.assistant}:"), Text(f" {answer}", supervise), Eos(supervise)]
        if open_turn:
            segments.append(Text(f"{self.assistant}:"))
        elif conversation.ends_with_user:
            segments.pop()
        return segments


def read_conversation(conversation: Sequence[Mapping[str, Any]]) -> Conversation:
    """Check a conversation of either style; the role of each message tells which it is.

    - Hugging Face messages: roles "user", "assistant", "system"; `content` a string or a list of
      {"type": "text", "text": …} and {"type": "image", "image" | "path" | "url": …}. A string is text, even where it
      spells a placeholder. Two texts in a row are joined by a space, as in transformers' template.
    - The original's: roles "User", "Assistant", "System"; `content` a string in which each `<image_placeholder>` stands
      for the next entry of the message's `images`.

    Contents are stripped of outer white space, as both public templates do. A last assistant message without content
    is the turn to be generated, and is left out.

    Raises:
        ValueError: naming the message and key that is missing, of a wrong type, out of turn, or whose placeholders do
            not match its images.
    """
    if isinstance(conversation, (str, bytes, Mapping)) or not isinstance(conversation, Sequence):
        raise ValueError(f"A conversation is a list of messages, not {_kind(conversation)}.")
    system: str | None = None
    turns: list[Turn] = []
    for index, message in enumerate(conversation):
        where = f"conversation[{index}]"
        turn = _read_message(message, where)
        if turn.role == "system":
            if index:
                raise ValueError(f"{where}['role'] is 'system'; only the first message can be.")
            system = "".join(part.text for part in turn.parts if isinstance(part, Text))
            continue
        expected = "assistant" if len(turns) % 2 else "user"
        if turn.role != expected:
            raise ValueError(
                f"{where}['role'] is {turn.role!r} where {expected!r} must speak: user and assistant take turns, "
                "the user first."
            )
        if not turn.parts:
            if turn.role == "assistant" and index == len(conversation) - 1:
                break
            raise ValueError(f"{where}['content'] is empty; only an assistant's last one may be.")
        turns.append(turn)
    if not turns:
        raise ValueError("The conversation has no turns.")
    return Conversation(system, tuple(turns))


def _read_message(message: Any, where: str) -> Turn:
    if not isinstance(message, Mapping):
        raise ValueError(f"{where} is {_kind(message)}; a message is a mapping with 'role' and 'content'.")
    for key in ("role", "content"):
        if key not in message:
            raise ValueError(f"{where} has no {key!r}; its keys are {sorted(map(str, message))}.")
    role, content = message["role"], message["content"]
    if role in ("user", "assistant", "system"):
        if message.get("images"):
            raise ValueError(
                f"{where}['images'] does not go with role {role!r}: put the images into 'content', or use the original "
                f"roles {', '.join(ORIGINAL_ROLES)} and one {IMAGE_PLACEHOLDER} for each image."
            )
        parts = _read_parts(content, where)
    elif isinstance(role, str) and role in ORIGINAL_ROLES:
        parts = _read_placeholders(content, message.get("images"), where)
        role = ORIGINAL_ROLES[role]
    else:
        raise ValueError(f"{where}['role'] is {role!r}; it must be user, assistant or system.")
    if role != "user" and any(isinstance(part, Picture) for part in parts):
        raise ValueError(f"{where}['content'] has an image, which only a user can show; its role is {role!r}.")
    return Turn(role, _strip(parts))


def _read_parts(content: Any, where: str) -> list[Text | Picture]:
    if isinstance(content, str):
        return [Text(content)]
    if not isinstance(content, (list, tuple)):
        raise ValueError(f"{where}['content'] is {_kind(content)}; it must be a string or a list of parts.")
    parts: list[Text | Picture] = []
    for index, item in enumerate(content):
        part = _read_part(item, f"{where}['content'][{index}]")
        if isinstance(part, Text) and parts and isinstance(parts[-1], Text):
            part = Text(f"{parts.pop().text} {part.text}")  # type: ignore[union-attr]
        parts.append(part)
    return parts


def _read_part(item: Any, where: str) -> Text | Picture:
    if not isinstance(item, Mapping):
        raise ValueError(f"{where} is {_kind(item)}; a part is a mapping with 'type'.")
    kind = item.get("type")
    if kind == "text":
        if not isinstance(item.get("text"), str):
            raise ValueError(f"{where}['text'] is {_kind(item.get('text'))}; it must be a string.")
        return Text(item["text"])
    if kind == "image":
        for key in IMAGE_KEYS:
            if item.get(key) is not None:
                return Picture(item[key], where)
        raise ValueError(f"{where} is an image with none of {', '.join(map(repr, IMAGE_KEYS))}.")
    raise ValueError(f"{where}['type'] is {kind!r}; it must be 'text' or 'image'.")


def _read_placeholders(content: Any, images: Any, where: str) -> list[Text | Picture]:
    if not isinstance(content, str):
        raise ValueError(f"{where}['content'] is {_kind(content)}; with role 'User' or 'Assistant' it is a string.")
    images = [] if images is None else images
    if not isinstance(images, (list, tuple)):
        raise ValueError(f"{where}['images'] is {_kind(images)}; it must be a list.")
    first, *others = content.split(IMAGE_PLACEHOLDER)
    if len(others) != len(images):
        raise ValueError(
            f"{where}['content'] has {len(others)} {IMAGE_PLACEHOLDER} and {where}['images'] has {len(images)} images."
        )
    parts: list[Text | Picture] = [Text(first)]
    for index, (image, text) in enumerate(zip(images, others, strict=True)):
        parts += [Picture(image, f"{where}['images'][{index}]"), Text(text)]
    return parts


def _strip(parts: list[Text | Picture]) -> tuple[Text | Picture, ...]:
    stripped = list(parts)
    if stripped and isinstance(stripped[0], Text):
        stripped[0] = Text(stripped[0].text.lstrip())
    if stripped and isinstance(stripped[-1], Text):
        stripped[-1] = Text(stripped[-1].text.rstrip())
    return tuple(part for part in stripped if isinstance(part, Picture) or part.text)


def _kind(value: Any) -> str:
    return "missing" if value is None else f"{type(value).__name__} {value!r:.60}"
