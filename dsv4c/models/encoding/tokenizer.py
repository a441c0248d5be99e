"""A checkpoint's tokenizer: prompts to ids, and ids to text as they come."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsv4c.errors import PromptError

FILE = "tokenizer.json"
INCOMPLETE = "\ufffd"  # what decoding makes of bytes that are no whole character, or not yet


class Tokenizer:
    """Special tokens are found in texts by their names, and none is added."""

    def __init__(self, path: Path, given: Any) -> None:
        self.path, self._given = path, given
        self.size: int = given.get_vocab_size(with_added_tokens=True)

    @classmethod
    def open(cls, path: Path) -> Tokenizer:
        """The tokenizer of a checkpoint folder, or of a tokenizer.json. Raises PromptError without one."""
        file = tokenizer_file(path)
        try:
            text = file.read_bytes().decode()
        except OSError as error:
            raise PromptError(f"{file}: cannot be read: {error.strerror or error}") from None
        except UnicodeDecodeError as error:
            raise PromptError(f"{file}: byte {error.start} is no UTF-8; download it again") from None
        if text.startswith("version https://git-lfs"):
            raise PromptError(
                f"{file}: is a pointer of Git LFS, not the file; run `git lfs pull` in the folder"
            )
        try:
            import tokenizers
        except ImportError:
            raise PromptError("tokenizers is not installed; run `pip install tokenizers`") from None
        try:
            return cls(file, tokenizers.Tokenizer.from_str(text))
        except Exception as error:  # the library raises no narrower one
            raise PromptError(f"{file}: is no tokenizer: {error}; download it again") from None

    def require(self, vocab_size: int, names: Sequence[str]) -> None:
        """Raise PromptError unless its ids are ids of a model and it has special tokens of these names."""
        highest = max(self._given.get_vocab(with_added_tokens=True).values(), default=-1)
        if highest >= vocab_size:
            raise PromptError(
                f"{self.path}: has ids up to {highest}, the model only to {vocab_size - 1}: it is another's"
            )
        for name in names:
            if self.id_of(name) is None:
                raise PromptError(f"{self.path}: has no token {name!r}: it is no tokenizer of DeepSeek-V4")

    def id_of(self, name: str) -> int | None:
        """The id of a special token."""
        found: int | None = self._given.token_to_id(name)
        return found

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._given.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Their text, special tokens by name; an id that the tokenizer lacks has none."""
        text: str = self._given.decode(list(ids), skip_special_tokens=False)
        return text


def tokenizer_file(path: Path) -> Path:
    """The tokenizer.json of a checkpoint folder, or itself. Raises PromptError where there is none."""
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise PromptError(f"{path}: has no {FILE}; copy the model's there, or give token ids with --tokens")
    return file


class Decoding:
    """The text of ids that come one by one. What may be the beginning of a character is held back."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._known = 0  # of `_ids`, those whose text was given; they are kept as what the others follow

    def feed(self, id_: int) -> str:
        """What this id adds."""
        self._ids.append(id_)
        return "" if self._new().endswith(INCOMPLETE) else self._give()

    def finish(self) -> str:
        """What was held back."""
        return self._give()

    def _new(self) -> str:
        return self._tokenizer.decode(self._ids)[len(self._tokenizer.decode(self._ids[: self._known])) :]

    def _give(self) -> str:
        text = self._new()
        self._ids = self._ids[self._known :]
        self._known = len(self._ids)
        return text
