"""A tokenizer for tiny models: bytes, some words, and the special tokens of DeepSeek-V4 by their names."""

from __future__ import annotations

import json
from pathlib import Path

from dsv4c.config import load_config
from dsv4c.models.encoding.marks import ASSISTANT, BEGIN, DSML, END, REMINDER, TASKS, THINK, THOUGHT, USER
from dsv4c.models.synth import synthesize

CONFIG = Path(__file__).parents[1] / "dsv4c" / "models" / "configs" / "tiny.json"
SPECIAL = (BEGIN, END, "<｜▁pad▁｜>", USER, ASSISTANT, THINK, THOUGHT, DSML, REMINDER, *TASKS.values())


def byte_letters() -> list[str]:
    """A printable letter for each byte, as byte-level tokenizers have them."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(rest)) for byte in range(256)]


def write_tokenizer(folder: Path, size: int = 512) -> None:
    """A tokenizer.json of `size` ids: BEGIN 0 and END 1, the special tokens, bytes, and pairs of letters."""
    letters = byte_letters()
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *letters])}
    merges = []
    for first in "thaeinosr":
        for second in "aeiouthnsrldm y".replace(" ", "Ġ"):
            if len(vocabulary) < size and first + second not in vocabulary:
                vocabulary[first + second] = len(vocabulary)
                merges.append([first, second])
    added = [
        {
            "id": i,
            "content": token,
            "special": token not in (THINK, THOUGHT),
            "normalized": False,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
        }
        for i, token in enumerate(SPECIAL)
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": vocabulary, "merges": merges, "byte_fallback": False}
    tokenizer = {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": model,
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")


def small_checkpoint(root: Path, layers: int = 2, **changes: int) -> Path:
    """A random checkpoint of so many layers with a tokenizer, in the folder `weights` of `root`; `changes`
    to the tiny model's config.
    """
    config = json.loads(CONFIG.read_text())
    ratios = config["compress_ratios"]
    config |= {"num_hidden_layers": layers, "compress_ratios": [*ratios[:layers], *ratios[-1:]]} | changes
    (root / "config.json").write_text(json.dumps(config))
    weights = synthesize(load_config(root / "config.json"), root / "weights", 1)
    write_tokenizer(weights)
    return weights
