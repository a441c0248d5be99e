"""What `compile` is asked for, checked and completed to a job."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from dsv4c.arch import ARCHS
from dsv4c.buckets import ROWS, Bucket, Kind, Logits
from dsv4c.compiler.job import Job, choose_rules, rules_of
from dsv4c.config import Deployment, ModelConfig, check_deployment, load_config
from dsv4c.cuts import Cut, cuts_for, read_rows
from dsv4c.errors import ConfigError
from dsv4c.exchange import MOST_ROWS
from dsv4c.models.drafting import gain
from dsv4c.passes.pipeline import Contributions, Pipeline, Quantize, Shard, parse_pipeline
from dsv4c.passes.recipes import Recipe, recipe_for

# Tokens per prefill call by target, none of them more than the context; elsewhere as many as a step takes.
# On wgmma 64 read the weights as fast as a step does, and from 4096 on products take more time than weights.
CHUNKS = {"cpu": (64,), "sm_90a": (64, 512, 4096)}
BATCHES = (1, 2, 4, 8)  # sequences that decode together on a GPU
VERIFY = 4  # tokens of a sequence that one step can verify

# Tokens drafted behind one: those that gain most by `dsv4c roofline --draft` of Flash where seven of ten of
# MTP's drafts hold, and up to each of DSpark's, as published of agents' traffic, 83, 64, 46, 32, 23 of 100.
MTP_TOKENS = 1
DSPARK_TOKENS = 3

Draft = Literal["off", "auto", "mtp", "dspark", "given"]


@dataclass(frozen=True)
class Request:
    """A model (a config, a built-in name, a config.json, its contents as a dict, or a checkpoint folder), and
    how to compile it.

    target: cpu, sm_90a or sm_100a. batch: sequences that decode together, a bucket for each number (1; on a
    GPU 1, 2, 4 and 8). slots: sequences whose state a plan holds (the largest batch). max_context: tokens
    that each has room for. verify: tokens of one sequence that a verify step takes, 1 for no such bucket.
    chunk: tokens of one sequence that prefill calls take, a bucket for each size, none beyond the context
    (64; on sm_90a 64, 512 and 4096; on sm_100a, and where ranks exchange rows, 8). logits: of every token of
    a chunk, or of its last alone (of every one; on a GPU of the last alone in chunks of more than 8). draft:
    adds rounds, which draft tokens and judge them, by the MTP block ("mtp"), by DSpark's stages ("dspark"),
    or by what the checkpoint has, if anything ("auto": for as many sequences as rows allow, on a GPU only
    where `models.drafting.gain` says that it pays); "given" adds steps that judge the caller's. draft_tokens:
    drafts of a round (of MTP 1, else 3, or as many as the model's block has rows). draft_confidence: rounds
    of DSpark judge as many drafts as their slots' trust in them says, steps that judge given drafts read
    experts for those that are given. sampled: steps draw the next token as their slots say (temperature,
    top-p, ...), in place of taking the likeliest. pipeline: passes (or their spec) in place of the default
    ones, whose recipe is `recipe`. rules: what may fold, by default the built-in ones and those of installed
    packages, without
    those of `disable` ("all": every one) that `enable` does not take back. expected: applications by rule
    that must hold for the smallest decode bucket. require_fused: rules whose ops must find a kernel wherever
    they apply. kernels: a folder of edited kernel files, which take the place of generated ones of the same
    names. tuned: a table that `dsv4c tune` wrote, in place of dsv4c's own.
    """

    model: ModelConfig | str | Path | Mapping[str, Any]
    target: str = "cpu"
    recipe: str = "official"
    batch: int | Sequence[int] | None = None
    slots: int | None = None
    max_context: int = 4096
    verify: int | None = None
    chunk: int | Sequence[int] | None = None
    logits: Logits | None = None
    draft: Draft = "off"
    draft_tokens: int | None = None
    draft_confidence: bool = False
    sampled: bool = False
    ranks: int = 1
    pipeline: str | Pipeline | None = None
    rules: Contributions | None = None
    disable: Iterable[str] = ()
    enable: Iterable[str] = ()
    expected: Mapping[str, int] = field(default_factory=dict)
    require_fused: Iterable[str] = ()
    kernels: str | Path | None = None
    tuned: str | Path | None = None

    def job(self) -> Job:
        """Everything that decides the plan. Raises ConfigError for a model, deployment or recipe that cannot
        be, GraphError for a rule or a pipeline.
        """
        config = self.model if isinstance(self.model, ModelConfig) else load_config(self.model)
        known = rules_of() if self.rules is None else self.rules
        required = frozenset(self.require_fused)
        for name in (*self.expected, *required):
            known.rule(name)
        recipe = recipe_for(self.recipe, config.expert_format)
        deployment = self._deployment(config, recipe)
        passes = pipeline_of(self.pipeline, recipe, known, self.ranks)
        line = choose_rules(passes, known, self.disable, self.enable)
        kernels = None if self.kernels is None else Path(self.kernels)
        cuts = None if self.tuned is None else cuts_of(self.tuned, self.target)
        return Job(config, deployment, recipe, line, known, self.expected, required, kernels, cuts)

    def _deployment(self, config: ModelConfig, recipe: Recipe) -> Deployment:
        for name, given, known in (("logits", self.logits, Logits), ("draft", self.draft, Draft)):
            if given is not None and given not in get_args(known):
                choices = " or ".join(map(repr, get_args(known)))
                raise ConfigError(f"{name}: {given!r} is unknown; expected {choices}")
        on_cpu = self.target == "cpu"
        batches = _numbers("batch", self.batch, (1,) if on_cpu else BATCHES)
        sizes = (ROWS,) if self.ranks > 1 and not on_cpu else CHUNKS.get(self.target, (ROWS,))
        chunks = _numbers("chunk", self.chunk, tuple({min(n, self.max_context) for n in sizes}))
        verify = self.verify if self.verify is not None else min(VERIFY, self.max_context)
        if not 1 <= verify <= ROWS:
            raise ConfigError(f"verify: {verify} tokens, expected 1 (no such bucket) to {ROWS}")
        buckets = [Bucket("decode", sequences=n, sampled=self.sampled) for n in batches]
        if verify > 1:
            buckets.append(Bucket("verify", tokens=verify))
        shapes = {(b.sequences, b.tokens, b.logits) for b in buckets}
        for tokens in chunks:
            logits = self.logits or ("all" if on_cpu or tokens <= ROWS else "last")
            if (1, tokens, logits) not in shapes:  # a verify bucket may do a chunk's work
                buckets.append(Bucket("prefill", tokens=tokens, logits=logits))
        buckets += self._drafting(config, batches)
        slots = max(batches) if self.slots is None else self.slots
        self._check_ranks(buckets)
        deployment = Deployment(self.target, recipe.name, self.max_context, slots, tuple(buckets), self.ranks)
        check_deployment(config, deployment)
        return deployment

    def _check_ranks(self, buckets: Sequence[Bucket]) -> None:
        """Raises ConfigError for what several ranks do not do together."""
        if self.ranks == 1:
            return
        for bucket in buckets:
            if bucket.drafts:
                raise ConfigError(
                    f"ranks: {self.ranks}, but blocks that draft are not cut over ranks; compile with draft "
                    "'given' or 'off', or for one rank"
                )
            if self.target != "cpu" and bucket.rows > MOST_ROWS:
                raise ConfigError(
                    f"ranks: {self.ranks} exchange at most {MOST_ROWS} rows of a step, {bucket.name} has "
                    f"{bucket.rows}; compile with smaller chunks"
                )

    def _drafting(self, config: ModelConfig, batches: Sequence[int]) -> list[Bucket]:
        """Buckets that draft, or judge drafts, for as many sequences as their rows allow."""
        draft = (config.drafts_with or "off") if self.draft == "auto" else self.draft
        if self.draft_confidence and draft not in ("dspark", "given"):
            raise ConfigError(
                f"draft_confidence: draft {draft!r} comes with none; expected 'dspark' or 'given'"
            )
        if draft == "off":
            if self.draft_tokens is not None:
                raise ConfigError(f"draft_tokens: {self.draft_tokens}, but nothing drafts; give a draft, too")
            return []
        if draft != "given" and draft != config.drafts_with:
            found = DRAFTS_WITH[config.drafts_with]
            raise ConfigError(
                f"{config.name}: draft {draft!r}, but the model {found}; compile with draft "
                f"{config.drafts_with or 'off'!r}"
            )
        block = config.dspark_block_size if draft == "dspark" else ROWS - 1
        usual = {"mtp": MTP_TOKENS, "dspark": min(block, DSPARK_TOKENS), "given": VERIFY - 1}[draft]
        count = usual if self.draft_tokens is None else self.draft_tokens
        if type(count) is not int or not 1 <= count <= min(block, ROWS - 1):
            why = f"DSpark's block of {block}" if block < ROWS - 1 else f"{ROWS} rows of a step, less one"
            raise ConfigError(f"draft_tokens: {count!r}, expected 1 to {min(block, ROWS - 1)}: {why}")
        rows = 1 + count
        if draft == "dspark" and self.target != "cpu":
            rows = max(rows, block)  # all of the block's are run
        fitting = [n for n in batches if n * rows <= ROWS]
        if self.draft == "auto":
            on_gpu = self.target != "cpu"  # where time is bytes
            fitting = [n for n in fitting if not on_gpu or gain(config, count, n) > 1]
        elif not fitting:
            raise ConfigError(
                f"draft_tokens: {count} behind a token of {min(batches)} sequences are "
                f"{min(batches) * rows} rows; a step takes {ROWS}: give fewer, or a smaller batch"
            )
        kind: Kind = "accept" if draft == "given" else "round"
        steps = [
            Bucket(kind, n, 1 + count, sampled=self.sampled, trusts=self.draft_confidence) for n in fitting
        ]
        return [Bucket("draft", tokens=count), *steps] if steps and draft != "given" else steps


def cuts_of(table: str | Path, target: str) -> dict[str, Cut]:
    """What a table that `dsv4c tune` wrote has for a target's GPU, by key. Raises ConfigError."""
    if target == "cpu":
        raise ConfigError(f"tuned: {table} is for a GPU's kernels, the target is cpu")
    return cuts_for(ARCHS[target].gpu, read_rows(Path(table)))


DRAFTS_WITH = {
    "": "has nothing that drafts",
    "mtp": "drafts with an MTP block",
    "dspark": "drafts with DSpark's stages, which lie under the names of MTP blocks",
}


def _numbers(name: str, given: int | Sequence[int] | None, default: tuple[int, ...]) -> tuple[int, ...]:
    """Sizes of buckets, ascending. Raises ConfigError for one that is no positive number or given twice."""
    numbers = default if given is None else (given,) if isinstance(given, int) else tuple(given)
    if not numbers:
        raise ConfigError(f"{name}: no sizes, expected at least one")
    for n in numbers:
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ConfigError(f"{name}: {n!r} is no size of a bucket, expected a number of at least 1")
    if len(set(numbers)) < len(numbers):
        raise ConfigError(f"{name}: {', '.join(map(str, numbers))} names a size twice")
    return tuple(sorted(numbers))


def pipeline_of(
    pipeline: str | Pipeline | None, recipe: Recipe, rules: Contributions, ranks: int = 1
) -> Pipeline:
    """The passes of a compile: the given ones, or the default ones under `recipe`, for so many ranks, and
    contributed ones.

    Raises GraphError for a spec that does not parse or an order that does not work, ConfigError for one that
    quantizes by another recipe or shards for another number of ranks.
    """
    if pipeline is not None:
        given = parse_pipeline(pipeline, rules.passes) if isinstance(pipeline, str) else pipeline
        for p in given.passes:
            if isinstance(p, Quantize) and p.recipe != recipe.name:
                raise ConfigError(f"pipeline: quantizes by {p.recipe}, the recipe is {recipe.name}; give one")
        found = [p.ranks for p in given.passes if isinstance(p, Shard)] or [1]
        if found != [ranks]:
            raise ConfigError(
                f"pipeline: shards for {', '.join(map(str, found))} ranks, ranks is {ranks}; give one"
            )
        return given
    line = Pipeline().with_options("quantize", recipe=recipe.name)
    if ranks > 1:
        line = line.with_pass(Shard(ranks))
    for extra in rules.instances:
        line = line.with_pass(extra)
    return line
