"""One untrained model folder for the evaluation's own tests."""

from pathlib import Path

import pytest

from sensmerge.zoo.corpus import Corpus
from sensmerge.zoo.tokenizer import train_tokenizer
from sensmerge.zoo.training import new_model


@pytest.fixture(scope="session")
def random_model(tmp_path_factory) -> Path:
    """A random two-layer model with the family's tokenizer, in the folder `model` beside a folder `test`. Read only."""
    root = tmp_path_factory.mktemp("evaluated")
    corpus = Corpus(0)
    tokenizer = train_tokenizer(corpus.tokenizer_texts(1500, 0.5), 512)
    model = new_model(layers=2, hidden=32, heads=2, feed_forward=64, vocabulary=512, seed=1)
    for weight in model.parameters():
        if weight.dim() == 2:
            weight.data.mul_(6)  # larger weights: confident, so that rounding cannot change which token is chosen
    model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    (root / "test").mkdir()
    (root / "test" / "math.jsonl").write_text(
        '{"prompt": "Q: 1\\nA:", "answer": "2"}\n{"prompt": "Q: 3\\nA:", "answer": "4"}\n'
    )
    return root / "model"
