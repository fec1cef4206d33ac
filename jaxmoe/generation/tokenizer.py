"""A checkpoint's tokenizer: text to token ids and back."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as RustTokenizer

from jaxmoe.config import read_json, way_to_file
from jaxmoe.generation.chat import ChatTemplates, Message


class Tokenizer:
    """``tokenizer.json`` and the checkpoint's chat templates.

    Args:
        rust: tokenizer of the ``tokenizers`` library.
        chat_templates: templates for conversations; None where the checkpoint has none.

    Attributes:
        special_tokens: texts of the special tokens by their ids; `decode` leaves them out.

    Example:
        >>> tokenizer = Tokenizer.from_directory("demo")
        >>> tokenizer.decode(tokenizer.encode("import os"))
        'import os'
    """

    def __init__(self, rust: RustTokenizer, chat_templates: ChatTemplates | None = None):
        self._rust = rust
        # Settings of the training run that some files still carry; a prompt is neither cut nor filled up.
        rust.no_truncation()
        rust.no_padding()
        self.chat_templates = chat_templates
        self.special_tokens = {
            token_id: token.content for token_id, token in rust.get_added_tokens_decoder().items() if token.special
        }

    @classmethod
    def from_directory(cls, directory: str | Path) -> "Tokenizer":
        """Read ``tokenizer.json``, ``tokenizer_config.json`` and the files of chat templates.

        Raises:
            FileNotFoundError: there is no ``tokenizer.json``.
            ValueError: a file is there but not readable as what it should be.
        """
        directory = Path(directory)
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"text prompts need the checkpoint's tokenizer.json, and {directory} has none; "
                f"pass token ids instead (lists of int, --prompt-ids), or put the file there"
            )
        try:
            rust = RustTokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            way_out = way_to_file(path.read_bytes())
            raise ValueError(f"{path} is not readable as a tokenizer: {error}{way_out}") from error
        config = read_json(directory / "tokenizer_config.json")
        return cls(rust, ChatTemplates.from_directory(directory, config))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Encode a text to token ids.

        Args:
            text: any text.
            add_special_tokens: whether the tokenizer's own post-processor adds what it adds (often a
                leading BOS). False for text that a chat template made, which has them already.
        """
        return self._rust.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Decode token ids to text, special tokens left out."""
        return self._rust.decode(list(token_ids), skip_special_tokens=True)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones too."""
        return self._rust.get_vocab_size(with_added_tokens=True)

    def to_json(self) -> str:
        """Text of a ``tokenizer.json``, for other libraries."""
        return self._rust.to_str()

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Make the prompt text of a conversation; see `ChatTemplate.render`.

        Args:
            messages: dictionaries with "role" and "content", oldest first.
            chat_template: name of one of several templates; None for "tool_use" where `tools` are among the
                variables and there is one of that name, and "default" otherwise.
            add_generation_prompt: whether to end with what opens the assistant's turn.
            variables: further variables for the template.

        Raises:
            ValueError: the checkpoint has no chat template or none of that name, or it refused the messages.
        """
        if self.chat_templates is None:
            raise ValueError(
                "a chat needs the checkpoint's chat template, and there is neither chat_template.jinja nor "
                'a "chat_template" in tokenizer_config.json; give the prompt as plain text instead'
            )
        template = self.chat_templates.choose(chat_template, variables.get("tools"))
        return template.render(messages, add_generation_prompt=add_generation_prompt, **variables)


def tokenizer_of(directory: str | Path) -> Tokenizer:
    """Read a directory's tokenizer, again only when ``tokenizer.json`` has changed.

    A vocabulary of 150,000 takes about half a second to read, too long for every call.
    """
    path = Path(directory) / "tokenizer.json"
    return _read(Path(directory), path.stat().st_mtime_ns if path.is_file() else None)


@functools.lru_cache(maxsize=4)
def _read(directory: Path, changed: int | None) -> Tokenizer:
    del changed  # part of the key only
    return Tokenizer.from_directory(directory)
