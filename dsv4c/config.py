"""What to compile: the model (`ModelConfig`, from any dialect of `config.json`) and its `Deployment`.

Both are frozen and valid by construction: a wrong field, a contradiction between fields or a schedule nobody
wrote down is a ConfigError that names the field as the file spells it, what it holds and what was expected.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from dsv4c import dialects, strict_json
from dsv4c.arch import ARCHS
from dsv4c.buckets import ROWS, Bucket, bucket_named
from dsv4c.dialects import problem, shown
from dsv4c.errors import ConfigError, listed
from dsv4c.exchange import MOST_RANKS

BUILTIN = ("deepseek-v4-flash", "deepseek-v4-pro", "tiny")
HUB = "deepseek-ai"
BUILTIN_FOLDER = Path(__file__).parent / "models" / "configs"
TARGETS = ("cpu", *ARCHS)
RATIOS = {0: "SWA", 4: "CSA", 128: "HCA"}
FP8_BLOCK = 128
MOST_EXPERTS = 1 << 17  # of all layers: each has tensors of its own
MOST_SEQUENCES = 1 << 16
MOST_PROBLEMS = 50  # that one error lists


@dataclass(frozen=True)
class _Rule:
    """What a field must be. `most` bounds what a compile does, far above any model, before it does it."""

    expected: str
    accepts: Callable[[Any], bool]
    most: int | None = None


def _integer(least: int, expected: str) -> _Rule:
    return _Rule(expected, lambda value: type(value) is int and value >= least, 1 << 24)


def _at_most(most: int, rule: _Rule) -> _Rule:
    return replace(rule, most=most)


def _positive_number(value: Any) -> bool:
    return (type(value) is int or (type(value) is float and math.isfinite(value))) and value > 0


def _one_of(*values: str) -> _Rule:
    return _Rule(" or ".join(map(repr, values)), lambda value: value in values)


_SIZE = _integer(1, "a positive integer")
_COUNT = _integer(0, "an integer of at least 0")
_NUMBER = _Rule("a positive number", _positive_number, 1 << 53)
_POSITIONS = _at_most((1 << 31) - 1, _SIZE)
_TOKEN = _Rule("a token id or null", lambda value: value is None or (type(value) is int and value >= 0))
_LAYERS = _Rule(
    "a list of layer numbers",
    lambda value: isinstance(value, (list, tuple)) and all(type(item) is int for item in value),
)
_SCHEDULE = _Rule(
    "a list of compress ratios, one per layer",
    lambda value: (
        isinstance(value, (list, tuple)) and len(value) > 0 and all(type(item) is int for item in value)
    ),
)


def _ruled(rule: _Rule) -> Any:
    return field(metadata={"rule": rule})


def _of_some(default: Any, rule: _Rule) -> Any:
    """A field of some models, which the others leave at its default."""
    return field(default=default, metadata={"rule": rule})


@dataclass(frozen=True)
class ModelConfig:
    """One DeepSeek-V4 model. Configs that describe the same model are equal; name and notes do not count."""

    name: str = field(compare=False)
    vocab_size: int = _ruled(_SIZE)
    hidden_size: int = _ruled(_SIZE)
    num_layers: int = _ruled(_at_most(512, _SIZE))  # without the MTP blocks
    num_attention_heads: int = _ruled(_SIZE)
    head_dim: int = _ruled(_SIZE)  # K and V are the same vector of this width
    qk_rope_head_dim: int = _ruled(_SIZE)  # the last dims of a head, rotated in interleaved pairs
    q_lora_rank: int = _ruled(_SIZE)
    o_groups: int = _ruled(_SIZE)
    o_lora_rank: int = _ruled(_SIZE)  # per group
    n_routed_experts: int = _ruled(_at_most(8192, _SIZE))
    n_shared_experts: int = _ruled(_SIZE)
    num_experts_per_tok: int = _ruled(_SIZE)
    moe_intermediate_size: int = _ruled(_SIZE)  # routed and shared experts alike
    routed_scaling_factor: float = _ruled(_NUMBER)
    swiglu_limit: float = _ruled(_NUMBER)
    num_hash_layers: int = _ruled(_COUNT)  # the first layers, routed by token id
    index_n_heads: int = _ruled(_COUNT)
    index_head_dim: int = _ruled(_COUNT)
    index_topk: int = _ruled(_COUNT)
    sliding_window: int = _ruled(_SIZE)  # raw tokens a query sees, itself included
    hc_mult: int = _ruled(_at_most(64, _SIZE))  # residual streams of the hyper-connections
    hc_sinkhorn_iters: int = _ruled(_at_most(256, _SIZE))
    hc_eps: float = _ruled(_NUMBER)
    rms_norm_eps: float = _ruled(_NUMBER)
    rope_theta: float = _ruled(_NUMBER)  # sliding-window layers
    compress_rope_theta: float = _ruled(_NUMBER)  # everything in a compressed layer, with YaRN
    rope_factor: float = _ruled(_NUMBER)  # YaRN; 1 is no scaling
    rope_original_max_position: int = _ruled(_POSITIONS)
    rope_beta_fast: float = _ruled(_NUMBER)
    rope_beta_slow: float = _ruled(_NUMBER)
    max_position_embeddings: int = _ruled(_POSITIONS)
    compress_ratios: tuple[int, ...] = _ruled(_SCHEDULE)  # one per layer: 0 SWA, 4 CSA, 128 HCA
    mtp_layers: int = _ruled(_at_most(16, _COUNT))  # sliding-window blocks after the last layer
    linear_format: str = _ruled(_one_of("bf16", "fp8"))  # what the checkpoint stores
    expert_format: str = _ruled(_one_of("bf16", "fp8", "mxfp4", "nvfp4"))
    bos_token_id: int | None = _ruled(_TOKEN)
    eos_token_id: int | None = _ruled(_TOKEN)
    dspark_stages: int = _of_some(0, _at_most(16, _COUNT))  # sliding-window blocks that draft a block at once
    dspark_block_size: int = _of_some(0, _at_most(64, _COUNT))  # rows that they run: anchor, then noise
    dspark_noise_token_id: int = _of_some(0, _COUNT)
    dspark_target_layers: tuple[int, ...] = _of_some((), _LAYERS)  # whose streams they look back to
    dspark_markov_rank: int = _of_some(0, _COUNT)
    notes: tuple[str, ...] = field(default=(), compare=False)  # what a reader of the config should know

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", _one_line(self.name))
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        _raise_if_any(self.name, list(_problems(values, {}, set())))
        for item in fields(self):
            if item.type == "float":  # JSON writes 10000 and 10000.0 for the same model
                object.__setattr__(self, item.name, float(values[item.name]))
        object.__setattr__(self, "compress_ratios", tuple(self.compress_ratios))
        object.__setattr__(self, "dspark_target_layers", tuple(self.dspark_target_layers))
        object.__setattr__(self, "notes", tuple(self.notes))

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of everything that makes two models differ."""
        described = {key: value for key, value in self.to_dict().items() if key not in ("name", "notes")}
        if not self.dspark_stages:  # such models are what they were before there was DSpark
            described = {key: value for key, value in described.items() if not key.startswith("dspark_")}
        return hashlib.sha256(
            json.dumps(described, sort_keys=True, separators=(",", ":")).encode()
        ).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_dict` reads it back."""
        lists = ("compress_ratios", "dspark_target_layers", "notes")
        return asdict(self) | {name: list(getattr(self, name)) for name in lists}

    @property
    def drafts_with(self) -> str:
        """What the checkpoint drafts with: "mtp", "dspark", or "" for nothing."""
        return "dspark" if self.dspark_stages else "mtp" if self.mtp_layers else ""

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> ModelConfig:
        """The config that `to_dict` wrote. ConfigError on a missing, unknown or wrong field."""
        if not isinstance(data, Mapping):
            raise ConfigError(f"config: {shown(data)}; expected the fields of ModelConfig by name")
        name, notes = str(data.get("name", "config")), data.get("notes", ())
        known = {item.name for item in fields(ModelConfig)}
        extra = [
            problem(key, "is unknown", "one of ModelConfig's fields") for key in sorted(set(data) - known)
        ]
        if not isinstance(notes, list | tuple) or not all(isinstance(note, str) for note in notes):
            extra.append(problem("notes", shown(notes), "a list of sentences"))
        _raise_if_any(name, extra + list(_problems(data, {}, set())))
        return ModelConfig(**{**data, "name": name})


@dataclass(frozen=True)
class Deployment:
    """What a plan is compiled for: `slots` sequences of at most `max_context` tokens, called by `buckets`, on
    `ranks` devices together.
    """

    target: str = "cpu"
    recipe: str = "official"
    max_context: int = 4096
    slots: int = 1
    buckets: tuple[Bucket, ...] = (Bucket("decode"), Bucket("prefill", tokens=64))
    ranks: int = 1

    def __post_init__(self) -> None:
        problems = []
        if self.target not in TARGETS:
            problems.append(problem("target", shown(self.target), " or ".join(map(repr, TARGETS))))
        if not isinstance(self.recipe, str) or not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", self.recipe):
            problems.append(problem("recipe", shown(self.recipe), "a name of lowercase words joined by '-'"))
        for name, most in (("max_context", (1 << 31) - 1), ("slots", MOST_SEQUENCES), ("ranks", MOST_RANKS)):
            value = getattr(self, name)
            if not _SIZE.accepts(value):
                problems.append(problem(name, shown(value), _SIZE.expected))
            elif value > most:
                problems.append(problem(name, shown(value), f"at most {most:,}"))
        _raise_if_any("deployment", problems or list(_bucket_problems(self)))

    @property
    def batch(self) -> int:
        """The most sequences of a decode step."""
        return max(bucket.sequences for bucket in self.buckets if bucket.kind == "decode")

    @property
    def drafts(self) -> bool:
        """Is there a bucket that drafts, so that all others keep what it looks back to?"""
        return any(bucket.drafts for bucket in self.buckets)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, the buckets by their names; `from_dict` reads it back."""
        described = {item.name: getattr(self, item.name) for item in fields(self)}
        return described | {"buckets": [bucket.name for bucket in self.buckets]}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Deployment:
        """The deployment that `to_dict` wrote. ConfigError on a missing, unknown or wrong field."""
        if not isinstance(data, Mapping):
            raise ConfigError(f"deployment: {shown(data)}; expected the fields of Deployment by name")
        known = [item.name for item in fields(Deployment)]
        problems = [
            problem(key, "is unknown", "one of Deployment's fields") for key in data if key not in known
        ]
        problems += [
            problem(key, "is missing", "all of Deployment's fields") for key in known if key not in data
        ]
        _raise_if_any("deployment", problems)
        names = data["buckets"]
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise ConfigError(f"deployment: {problem('buckets', shown(names), 'a list of names of buckets')}")
        try:
            buckets = tuple(map(bucket_named, names))
        except ValueError as error:
            raise ConfigError(f"deployment: buckets: {error}") from None
        return Deployment(**{**data, "buckets": buckets})


def _bucket_problems(deployment: Deployment) -> Iterator[str]:
    """What the buckets must be by themselves, to each other, to the slots and to the target."""
    names = [bucket.name for bucket in deployment.buckets]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield problem("buckets", f"has {name} {names.count(name)} times", "every bucket once")
    if not any(bucket.kind == "decode" for bucket in deployment.buckets):
        yield problem("buckets", f"is {', '.join(names) or 'empty'}", "at least one decode bucket")
    for bucket in deployment.buckets:
        tokens, rows = f"takes {bucket.tokens} tokens", f"has {bucket.rows} rows"
        if bucket.rows < 1:
            yield problem(bucket.name, rows, "at least 1")
        if bucket.sequences > deployment.slots:
            expected = f"at least {bucket.sequences}, the sequences of {bucket.name}"
            yield problem("slots", shown(deployment.slots), expected)
        if bucket.tokens > deployment.max_context:
            yield problem(bucket.name, tokens, f"at most {deployment.max_context}, max_context")
        if bucket.kind == "decode" and bucket.tokens != 1:
            yield problem(bucket.name, tokens, "1 of each sequence")
        if bucket.kind in ("accept", "round") and not 2 <= bucket.tokens <= ROWS:
            yield problem(bucket.name, tokens, f"2 to {ROWS}: a token and its drafts")
        if bucket.kind == "verify" and not 2 <= bucket.tokens <= ROWS:
            yield problem(bucket.name, tokens, f"2 to {ROWS}: more could not be taken back")


def check_deployment(config: ModelConfig, deployment: Deployment) -> None:
    """ConfigError when `deployment` asks of the model what it was not made for."""
    problems = []
    if deployment.max_context > config.max_position_embeddings:
        expected = f"at most {config.max_position_embeddings}, max_position_embeddings of {config.name}"
        problems.append(problem("max_context", shown(deployment.max_context), expected))
    most = config.dspark_block_size or ROWS - 1
    for bucket in deployment.buckets:
        if bucket.drafts and not config.drafts_with:
            expected = f"no draft: {config.name} has no block that drafts"
            problems.append(problem("buckets", f"has {bucket.name}", expected))
        drafted, rows = bucket.tokens - bucket.judges, bucket.sequences * config.dspark_block_size
        if bucket.drafts and config.drafts_with and drafted > most:
            problems.append(problem(bucket.name, f"drafts {drafted} tokens", f"at most {most}"))
        if bucket.drafts and config.dspark_block_size > ROWS:
            expected = f"at most {ROWS}, the rows that rings take ahead"
            problems.append(problem("dspark_block_size", shown(config.dspark_block_size), expected))
        elif bucket.drafts and deployment.target != "cpu" and rows > ROWS:
            expected = f"at most {ROWS}: {deployment.target} has no kernels for more"
            problems.append(problem(bucket.name, f"drafts in {rows} rows", expected))
    _raise_if_any("deployment", problems)


def load_config(source: str | Path | Mapping[str, Any]) -> ModelConfig:
    """The model that `source` names: a built-in name, a `config.json`, or a checkpoint folder that holds one;
    or the contents of a `config.json` as a dict, from which the model is called `config`.

    A built-in name comes before a folder that is called so: write `./tiny` for the folder. The id of its
    release on the hub, deepseek-ai/DeepSeek-V4-Flash, leads to it where there is no such folder. Raises
    ConfigError that lists every problem of the file. What was ignored or filled in is in `notes`.
    """
    if isinstance(source, Mapping):
        return _config(_parsed(source), "config", None, "config", [])
    builtin = _builtin(source)
    if builtin != source and os.path.exists(source):
        builtin = None  # a clone of the release, under its id
    path = BUILTIN_FOLDER / f"{builtin}.json" if builtin is not None else _config_file(Path(source))
    notes = []
    if builtin == source and os.path.isdir(source):
        notes.append(f"{source} is the built-in config; the folder here is ./{source}")
    elif builtin is not None and builtin != source:
        notes.append(f"{source} is the built-in {builtin}; nothing was downloaded")
    in_folder = path.name == "config.json"
    name = path.parent.resolve().name if in_folder else path.stem
    where = str(path) if builtin is None else str(source)
    return _config(_parse(path), where, path.parent if in_folder else None, name, notes)


def _config(
    raw: Mapping[str, Any], where: str, folder: Path | None, name: str, notes: list[str]
) -> ModelConfig:
    """What a `config.json` says, completed from the tensors in `folder`. Raises ConfigError for `where`."""
    reading = dialects.read(raw)
    dialects.settle(reading, folder)
    if not reading.spelling:  # not a dialect we read: nothing else about it can be judged
        _raise_if_any(where, reading.problems)
    _raise_if_any(
        where, reading.problems + list(_problems(reading.fields, reading.spelling, reading.refused))
    )
    return ModelConfig(name=name, notes=(*reading.notes, *notes), **reading.fields)


def save_config(config: ModelConfig, folder: str | Path) -> Path:
    """Write `config.json` in the release's dialect, so that `load_config(folder)` gives an equal config."""
    path = Path(folder) / "config.json"
    path.write_text(json.dumps(dialects.release_dict(asdict(config)), indent=2) + "\n")
    return path


# Reading the file


def _builtin(source: str | Path) -> str | None:
    """The built-in model that `source` names, by its own name or its release's id on the hub."""
    if not isinstance(source, str):
        return None
    hub, _, name = source.rpartition("/")
    return name.lower() if hub == HUB and name.lower() in BUILTIN else source if source in BUILTIN else None


def _expected_source(meant: str = "") -> str:
    name = meant.rstrip("/").rpartition("/")[2]
    return f"expected a config.json, a checkpoint folder or one of {listed(BUILTIN, name)}"


def _config_file(path: Path) -> Path:
    try:
        if path.is_dir():
            if (path / "plan.json").exists():
                raise ConfigError(f"{path}: is a compiled plan; {_expected_source()}")
            path = path / "config.json"
        if not path.exists():
            raise ConfigError(f"{path}: no such file; {_expected_source(str(path))}")
    except OSError as error:  # a folder above that may not be entered
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    return path


def _parse(path: Path) -> dict[str, Any]:
    try:
        raw = strict_json.parse(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}:{error.colno}: malformed JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text at byte {error.start}; expected a JSON file") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: holds a JSON {type(raw).__name__}; expected an object")
    return raw


def _parsed(given: Mapping[str, Any]) -> dict[str, Any]:
    """A dict as its JSON would be read, so that it is judged alike."""
    try:
        found: dict[str, Any] = strict_json.parse(json.dumps(dict(given)))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"config: cannot be written as JSON: {error}; expected a config.json's data"
        ) from None
    return found


# Judging the fields


def _one_line(name: str) -> str:
    """A folder may be called anything; the first line of a graph's text, and a terminal, take no controls."""
    return "".join(c if c.isprintable() else "_" for c in name)


def _raise_if_any(where: str, problems: list[str]) -> None:
    if not problems:
        return
    if len(problems) == 1:
        raise ConfigError(f"{where}: {problems[0]}")
    more = [f"and {len(problems) - MOST_PROBLEMS} more"] if len(problems) > MOST_PROBLEMS else []
    lines = "\n".join(f"  {line}" for line in problems[:MOST_PROBLEMS] + more)
    raise ConfigError(f"{where}: {len(problems)} problems\n{lines}")


def _problems(values: Mapping[str, Any], spelling: Mapping[str, str], refused: set[str]) -> Iterator[str]:
    """Every field by its own rule; then, when those hold, what the fields must be to each other."""
    sound = not refused
    for item in fields(ModelConfig):
        rule = item.metadata.get("rule")
        if rule is None or item.name in refused:
            continue
        key = spelling.get(item.name, item.name)
        if item.name not in values and item.default is not MISSING:
            continue
        if item.name not in values:
            sound = False
            yield problem(key, "is missing", rule.expected + _why(item.name))
        elif not rule.accepts(values[item.name]):
            sound = False
            yield problem(key, shown(values[item.name]), rule.expected)
        elif rule.most is not None and values[item.name] > rule.most:
            sound = False
            yield problem(key, shown(values[item.name]), f"at most {rule.most:,}")
    if sound:
        yield from _contradictions(values, lambda name: spelling.get(name, name))


def _why(name: str) -> str:
    return ", as CSA layers (ratio 4) have an indexer" if name.startswith("index_") else ""


def _contradictions(values: Mapping[str, Any], key: Callable[[str], str]) -> Iterator[str]:
    """What the fields must be to each other, once each is right by itself. `key` spells as the file does."""

    def must(holds: bool, name: str, expected: str) -> Iterator[str]:
        if not holds:
            yield problem(key(name), shown(values[name]), expected)

    v = values.__getitem__
    ratios, layers, csa = v("compress_ratios"), v("num_layers"), 4 in v("compress_ratios")
    if len(ratios) != layers:
        yield problem(key("compress_ratios"), f"has {len(ratios)} entries", f"{layers}, one per layer")
    for index, ratio in enumerate(ratios[:layers]):
        if ratio not in RATIOS:
            kinds = " or ".join(f"{known} ({kind})" for known, kind in RATIOS.items())
            yield problem(f"{key('compress_ratios')}[{index}]", shown(ratio), kinds)
    if csa:
        for name in ("index_n_heads", "index_head_dim", "index_topk"):
            yield from must(v(name) > 0, name, _SIZE.expected + _why(name))
        width, rotated = v("index_head_dim"), v("qk_rope_head_dim")
        expected = f"a power of two (Hadamard) of at least {key('qk_rope_head_dim')}, {rotated}"
        yield from must(width & (width - 1) == 0 and width >= rotated, "index_head_dim", expected)
    heads, groups, head_dim = v("num_attention_heads"), v("o_groups"), v("head_dim")
    yield from must(heads % groups == 0, "num_attention_heads", f"a multiple of {key('o_groups')}, {groups}")
    rotated = v("qk_rope_head_dim")
    expected = f"an even number of at most {key('head_dim')}, {head_dim}"
    yield from must(rotated % 2 == 0 and rotated <= head_dim, "qk_rope_head_dim", expected)
    yield from must(
        v("num_hash_layers") <= layers, "num_hash_layers", f"at most {key('num_layers')}, {layers}"
    )
    experts = v("n_routed_experts")
    expected = f"at most {MOST_EXPERTS:,} over all {layers} layers of {key('num_layers')}"
    yield from must(experts * layers <= MOST_EXPERTS, "n_routed_experts", expected)
    expected = f"at most {key('n_routed_experts')}, {experts}"
    yield from must(v("num_experts_per_tok") <= experts, "num_experts_per_tok", expected)
    yield from must(v("n_shared_experts") == 1, "n_shared_experts", "1, the only number DeepSeek-V4 uses")
    for name in ("rope_theta", "compress_rope_theta"):
        yield from must(v(name) > 1, name, "more than 1, the base of falling frequencies")
    yield from must(v("rope_factor") >= 1, "rope_factor", "at least 1")
    slow = v("rope_beta_slow")
    expected = f"at least {key('rope_beta_slow')}, {slow}: fast pairs turn more often"
    yield from must(v("rope_beta_fast") >= slow, "rope_beta_fast", expected)
    for name in ("bos_token_id", "eos_token_id"):
        expected = f"a token id below {key('vocab_size')}, {v('vocab_size')}"
        yield from must((v(name) or 0) < v("vocab_size"), name, expected)
    yield from _dspark_contradictions(values, key)
    quantized = v("linear_format") == "fp8"
    formats = "'fp8', 'mxfp4' or 'nvfp4'" if quantized else "'bf16'"
    expected = f"{formats}, as linear_format is {v('linear_format')!r}"
    yield from must((v("expert_format") != "bf16") == quantized, "expert_format", expected)
    if quantized:
        widths = {key(name): v(name) for name in ("hidden_size", "q_lora_rank", "moe_intermediate_size")}
        widths[f"{key('o_groups')} * {key('o_lora_rank')}"] = groups * v("o_lora_rank")
        widths[f"{key('num_attention_heads')} * {key('head_dim')} / {key('o_groups')}"] = (
            heads * head_dim // groups
        )
        for name, width in widths.items():
            if width % FP8_BLOCK:
                expected = f"a multiple of {FP8_BLOCK}, the block of the checkpoint's FP8 scales"
                yield problem(name, shown(width), expected)


def _dspark_contradictions(values: Mapping[str, Any], key: Callable[[str], str]) -> Iterator[str]:
    """What DSpark's fields must be to each other and to the model's, where it has stages."""
    if not values.get("dspark_stages"):
        return
    v = values.__getitem__
    if v("mtp_layers"):
        yield problem(
            key("mtp_layers"), shown(v("mtp_layers")), "0, as the mtp.* tensors are DSpark's stages"
        )
    for name in ("dspark_block_size", "dspark_markov_rank"):
        if v(name) < 1:
            yield problem(key(name), shown(v(name)), _SIZE.expected)
    noise, chosen, layers = v("dspark_noise_token_id"), list(v("dspark_target_layers")), v("num_layers")
    if noise >= v("vocab_size"):
        expected = f"a token id below {key('vocab_size')}, {v('vocab_size')}"
        yield problem(key("dspark_noise_token_id"), shown(noise), expected)
    if not chosen or chosen != sorted(set(chosen)) or not 0 <= chosen[0] <= chosen[-1] < layers:
        expected = f"ascending numbers of layers, 0 to {layers - 1}"
        yield problem(key("dspark_target_layers"), shown(chosen), expected)
