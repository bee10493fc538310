"""Text out of tokens as they come, in whole characters."""

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"


class TextStream:
    """Turns token ids into pieces of text that are final.

    A token may end inside of a character: its bytes wait until the character is whole, so that a piece holds U+FFFD
    only where the bytes are no UTF-8, or spell it. The pieces together are the text of all the ids, without the white
    space that it begins with, which belongs to the chat template, and without a last character that was cut off.

    Attributes:
        text: what was given so far.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        """
        Args:
            decode: ids -> text, with U+FFFD for a character that is not whole, such as `Processor.decode`.
        """
        self.text = ""
        self._decode = decode
        # The last ids, of whose text the first `_given` characters were given.
        self._ids: list[int] = []
        self._given = 0

    def push(self, token: int) -> str:
        """The text that the next token makes final; it may be empty."""
        self._ids.append(token)
        text = self._decode(self._ids)
        is_whole = not text.endswith(REPLACEMENT)
        final = text if is_whole else text[:-1]
        piece = final[self._given :]
        self._given = max(self._given, len(final))
        if is_whole:
            # The last token stays, for the decoders that look at a token's neighbour.
            self._ids = [token]
            self._given = len(self._decode(self._ids))
        if not self.text:
            piece = piece.lstrip()
        self.text += piece
        return piece
