"""`train_family`: a base and three experts in a cache folder, trained once and whole or not at all."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import progress
from .corpus import Corpus, Encoder, answer_batches, packed_batches, padded
from .documents import DOMAINS, seeded
from .sizes import VERSION, Size, size_named

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

TOKENIZER_TEXTS = 6000
TARGET_EXAMPLES = 128
LOSSES_AVERAGED = 20


@dataclass(frozen=True)
class Family:
    """A trained family in `folder`: paths of its models, calibration data and tests."""

    folder: Path
    size: str
    seed: int

    @property
    def base(self) -> Path:
        """The folder of the base model."""
        return self.folder / "base"

    @property
    def experts(self) -> dict[str, Path]:
        """The folder of each expert: chat, math, code."""
        return {domain: self.folder / domain for domain in DOMAINS}

    @property
    def calibration(self) -> dict[str, Path]:
        """A JSONL file of {prompt, response} rows for each expert, from the distribution it was trained on."""
        return {domain: self.folder / "calibration" / f"{domain}.jsonl" for domain in DOMAINS}

    @property
    def test(self) -> Path:
        """The folder of the tests: chat.jsonl, math.jsonl, code.jsonl."""
        return self.folder / "test"


def train_family(size: str, seed: int = 0, cache: Path | None = None) -> Family:
    """The family of `size` ("small" or "standard") and `seed`, from the cache or trained now.

    `cache` is $XDG_CACHE_HOME/sensmerge/zoo by default. A folder in it is complete or absent, whoever else trains at the same
    time. Cost on two quiet cores: a little over a minute (small), about four (standard). RecipeError for an unknown size.
    """
    recipe = size_named(size)
    root = default_cache() if cache is None else cache
    folder = root / f"{size}-seed{seed}-{recipe.fingerprint()}"
    if not (folder / "family.json").is_file():
        root.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=root))
        try:
            _train_into(staging, recipe, seed)
            _publish(staging, folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return Family(folder=folder, size=size, seed=seed)


def default_cache() -> Path:
    """`$XDG_CACHE_HOME/sensmerge/zoo`, by default below ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sensmerge" / "zoo"


def _publish(staging: Path, folder: Path) -> None:
    """Give a finished family its name; if another process was first, its family stays and ours goes."""
    staging.chmod(0o755)  # mkdtemp made it private
    try:
        staging.rename(folder)
    except OSError:
        if not (folder / "family.json").is_file():
            raise


@dataclass
class _Log:
    """What family.json tells about the making: seconds and final losses of each stage."""

    seconds: dict[str, float] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    extra_steps: int = 0
    target_loss: float | None = None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times the block."""
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 2)

    def losses_of(self, name: str, losses: Sequence[float]) -> None:
        """Keeps the mean of the last losses of a stage."""
        last = losses[-LOSSES_AVERAGED:]
        self.losses[name] = round(sum(last) / len(last), 4)


def _train_into(folder: Path, recipe: Size, seed: int) -> None:
    """Generate all data, train base and experts, write everything into `folder`."""
    from .tokenizer import train_tokenizer
    from .training import threads

    log = _Log()
    corpus = Corpus(seed)
    with log.stage("data"):
        _write_data(folder, corpus, recipe)
        texts = corpus.tokenizer_texts(TOKENIZER_TEXTS, recipe.question_share)
        tokenizer = train_tokenizer(texts, recipe.vocabulary)
    total = recipe.base_steps + sum(stage.steps for stage in recipe.experts.values())
    label = f"training the {recipe.name} family, seed {seed}"
    with threads(recipe.threads), progress.task(label, total) as advance:
        with log.stage("base"):
            base = _train_base(corpus, Encoder(tokenizer), recipe, log, advance)
        _save(base, tokenizer, folder / "base")
        for domain in DOMAINS:
            with log.stage(domain):
                expert = _train_expert(base, corpus, Encoder(tokenizer), domain, recipe, log, advance)
            _save(expert, tokenizer, folder / domain)
    _write_description(folder, recipe, seed, log)


def _train_base(
    corpus: Corpus, encoder: Encoder, recipe: Size, log: _Log, advance: Callable[[int], None]
) -> LlamaForCausalLM:
    """The base model: a fixed number of steps, then chunks until the loss on math answers reaches the target."""
    from .training import Trainer, cosine, new_model

    model = new_model(recipe.layers, recipe.hidden, recipe.heads, recipe.feed_forward, recipe.vocabulary, corpus.seed)
    trainer = Trainer(model, recipe.base_decay)
    draw = seeded(corpus.seed, "base", "stream")
    batches = packed_batches(corpus, encoder, draw, recipe.base_rows, recipe.base_width, recipe.question_share)
    rate = recipe.base_rate
    losses = trainer.run(batches, recipe.base_steps, lambda step: cosine(step, recipe.base_steps, rate), advance)
    if recipe.target is not None:
        share = recipe.chunk_question_share
        batches = packed_batches(corpus, encoder, draw, recipe.base_rows, recipe.base_width, share)
        for chunk in range(recipe.most_chunks + 1):
            log.target_loss = _math_loss(model, corpus, encoder)
            log.extra_steps = chunk * recipe.chunk_steps
            if log.target_loss <= recipe.target or chunk == recipe.most_chunks:
                break
            losses += trainer.run(batches, recipe.chunk_steps, lambda _: recipe.chunk_rate, lambda _: None)
    log.losses_of("base", losses)
    return model


def _math_loss(model: LlamaForCausalLM, corpus: Corpus, encoder: Encoder) -> float:
    """The mean loss on the answers of fixed word problems from the training distribution."""
    import torch

    from .training import batch_loss

    draw = seeded(corpus.seed, "math", "target")
    documents = [corpus.expert_question("math", draw) for _ in range(TARGET_EXAMPLES)]
    with torch.inference_mode():
        return float(batch_loss(model, padded(encoder.encode(documents))))


def _train_expert(
    base: LlamaForCausalLM,
    corpus: Corpus,
    encoder: Encoder,
    domain: str,
    recipe: Size,
    log: _Log,
    advance: Callable[[int], None],
) -> LlamaForCausalLM:
    """A copy of the base, fully fine-tuned on one domain."""
    from .training import Trainer, cosine

    stage = recipe.experts[domain]
    model: LlamaForCausalLM = copy.deepcopy(base)
    batches = answer_batches(corpus, encoder, domain, seeded(corpus.seed, domain, "stream"), stage.rows)
    trainer = Trainer(model, recipe.expert_decay)
    losses = trainer.run(batches, stage.steps, lambda step: cosine(step, stage.steps, stage.rate), advance)
    log.losses_of(domain, losses)
    return model


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """An ordinary Hugging Face folder."""
    from ..calibration.models import without_bars

    with without_bars():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _write_data(folder: Path, corpus: Corpus, recipe: Size) -> None:
    """The calibration and test files."""
    for domain in DOMAINS:
        rows = [asdict(document) for document in corpus.calibration(domain, recipe.calibration_rows)]
        _write_rows(folder / "calibration" / f"{domain}.jsonl", rows)
        _write_rows(folder / "test" / f"{domain}.jsonl", corpus.test_items(domain, recipe.test_items))


def _write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """One JSON object a line."""
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _write_description(folder: Path, recipe: Size, seed: int, log: _Log) -> None:
    """family.json: what this is and how it was made; written last, so that its presence means complete."""
    import torch

    description = {
        "size": recipe.name,
        "seed": seed,
        "hash": recipe.fingerprint(),
        "version": VERSION,
        "torch": torch.__version__,
        "recipe": asdict(recipe),
        **asdict(log),
    }
    (folder / "family.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
