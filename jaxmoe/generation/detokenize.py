"""Token ids to text as they come: whole characters only, stop strings never shown."""

from collections.abc import Callable, Mapping, Sequence

from jaxmoe.generation.requests import FinishReason

# What decoders write for bytes that are no UTF-8.
REPLACEMENT = "�"

# The longest character that may still be completed is four bytes, of which three are there. A byte-level
# decoder writes one replacement for them, a byte-fallback decoder one each.
_MAX_INCOMPLETE = 3


class Detokenizer:
    """Turns a growing list of token ids into pieces of text.

    A piece is handed out once no later token can complete it differently. For byte-level
    tokenizers the pieces joined are exactly ``decode(all ids)``. A byte-fallback decoder may
    take characters back (it gives up a whole run of bytes for one bad byte at its end); what was
    shown stays shown.

    Only a window of the last tokens is decoded each time, so the cost of a token does not grow
    with the text. The window begins with tokens whose text is out already: many decoders treat the
    first token differently (they drop its leading space).

    Args:
        decode: function from token ids to text.

    Example:
        >>> detokenizer = Detokenizer(lambda ids: bytes(ids).decode(errors="replace"))
        >>> [detokenizer.push(byte) for byte in "aé".encode()]
        ['a', '', 'é']
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        self._decode = decode
        self._window: list[int] = []
        self._context = 0  # tokens at the start of the window that a whole number of characters ends with
        self._shown = ""  # text of the window that is out already

    def push(self, token_id: int) -> str:
        """Add a token and return the text that is certain now, often "" in the middle of a character."""
        self._window.append(token_id)
        text = self._decode(self._window)
        certain = _without_incomplete_end(text)
        if certain != text and not certain.startswith(self._shown):
            # A run of fallback bytes reads as replacements up to the byte that completes its last character.
            return ""
        piece = certain[len(self._shown) :]
        if piece and certain == text:
            self._window = self._window[self._context :]
            self._context = len(self._window)
            self._shown = self._decode(self._window)
        elif piece:
            self._shown = certain
        return piece

    def finish(self) -> str:
        """Hand out what was held back: the replacement characters of an unfinished end."""
        text = self._decode(self._window) if self._window else ""
        piece = text[len(self._shown) :]
        self._shown = text
        return piece


def possible_start(text: str, wanted: Sequence[str]) -> int:
    """Length of the longest end of a text that one of some others begins with, and may be about to.

    >>> possible_start("the EN", ("END",))
    2
    """
    longest = max(map(len, wanted), default=0)
    for length in range(min(longest - 1, len(text)), 0, -1):
        if text.endswith(tuple(one[:length] for one in wanted if len(one) > length)):
            return length
    return 0


class StopStrings:
    """Passes text on up to the first stop string, holding back what may be the beginning of one.

    Some of the text may be hidden: it is searched like the rest, and never passes.

    Args:
        stop: texts that are not empty; without any, everything passes.

    Example:
        >>> stop = StopStrings(["END"])
        >>> stop.push("the E"), stop.push("N"), stop.push("D of it"), stop.found
        ('the ', '', '', True)
    """

    def __init__(self, stop: Sequence[str]):
        self._stop = tuple(stop)
        self._held = ""
        self._hidden: list[bool] = []  # of every held character, whether it is hidden
        self.found = False

    def push(self, text: str, *, hidden: bool = False) -> str:
        """Add text and return what may be shown. Nothing passes once a stop string was found."""
        if self.found:
            return ""
        self._held += text
        self._hidden += [hidden] * len(text)
        starts = [start for start in (self._held.find(stop) for stop in self._stop) if start >= 0]
        if starts:
            self.found = True
            shown = self._pass(min(starts))
            self._held, self._hidden = "", []
            return shown
        return self._pass(len(self._held) - possible_start(self._held, self._stop))

    def finish(self) -> str:
        """Hand out what was held back and turned out to be no stop string."""
        return self._pass(len(self._held))

    def _pass(self, count: int) -> str:
        """Let go of the first characters held, and return those that are not hidden."""
        passing = zip(self._held[:count], self._hidden[:count], strict=True)
        self._held, self._hidden = self._held[count:], self._hidden[count:]
        return "".join(character for character, hidden in passing if not hidden)


class TextStream:
    """`Detokenizer` and `StopStrings` in a row, for one generated text.

    A stop string may be a special token, hold one, or be a part of one, as in transformers: their texts are searched
    where they stand, though they are no part of what is shown.

    Args:
        decode: function from token ids to text, without special tokens.
        stop: stop strings.
        special_tokens: texts of the special tokens by their ids.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        stop: Sequence[str] = (),
        special_tokens: Mapping[int, str] | None = None,
    ):
        self._detokenizer = Detokenizer(decode)
        self._stop = StopStrings(stop)
        self._special_tokens = special_tokens or {}
        self._pieces: list[str] = []

    def push(self, token_id: int) -> str:
        """Add a token and return the piece of text to show."""
        piece = self._stop.push(self._detokenizer.push(token_id))
        if token_id in self._special_tokens:
            piece += self._stop.push(self._special_tokens[token_id], hidden=True)
        return self._show(piece)

    def push_end(self, token_id: int) -> str:
        """Add the token that ended the text, which is no text even where it is not special."""
        return self.push(token_id) if token_id in self._special_tokens else ""

    def finish(self) -> str:
        """Hand out the last piece; call it once, after the last token."""
        return self._show(self._stop.push(self._detokenizer.finish()) + self._stop.finish())

    def take(self, token_id: int, finish_reason: FinishReason | None) -> tuple[str, FinishReason | None]:
        """Add a token that the model gave, with its reason to end there, if any.

        Returns:
            The piece of text to show, with what was held back where the text ends, and the reason of the end: "stop" too
            where a stop string was reached.
        """
        # Of itself the model stops at EOS only.
        piece = self.push_end(token_id) if finish_reason == "stop" else self.push(token_id)
        reason: FinishReason | None = "stop" if self.stopped else finish_reason
        return piece + (self.finish() if reason else ""), reason

    @property
    def stopped(self) -> bool:
        """Whether a stop string was reached."""
        return self._stop.found

    @property
    def text(self) -> str:
        """Everything shown so far."""
        return "".join(self._pieces)

    def _show(self, piece: str) -> str:
        self._pieces.append(piece)
        return piece


def _without_incomplete_end(text: str) -> str:
    end = len(text)
    while end > 0 and len(text) - end < _MAX_INCOMPLETE and text[end - 1] == REPLACEMENT:
        end -= 1
    return text[:end]
