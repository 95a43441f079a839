"""The training loop: restores what it borrows, is reproducible, learns."""

import itertools

import pytest
import torch

from sensmerge.zoo.corpus import IGNORED, Batch
from sensmerge.zoo.training import FINAL_RATE, WARM_UP, Trainer, batch_loss, cosine, new_model, threads


def tiny_model(seed=0):
    return new_model(layers=1, hidden=16, heads=2, feed_forward=32, vocabulary=32, seed=seed)


def random_batch(ignore=False):
    ids = torch.randint(0, 32, (4, 9), generator=torch.Generator().manual_seed(0))
    labels = ids[:, 1:].clone()
    if ignore:
        labels[:, :4] = IGNORED
    return Batch(ids=ids[:, :-1], labels=labels)


def test_threads_are_restored_even_after_an_error():
    before = torch.get_num_threads()

    def failing_work():
        with threads(before + 1):
            raise ValueError(torch.get_num_threads())

    with pytest.raises(ValueError, match=f"^{before + 1}$"):
        failing_work()
    assert torch.get_num_threads() == before


def test_a_new_model_depends_on_its_seed_and_leaves_the_global_generator_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, again, other = tiny_model(0), tiny_model(0), tiny_model(1)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


@pytest.mark.parametrize("ignore", [False, True])
def test_the_loss_is_that_of_transformers(ignore):
    model, batch = tiny_model(), random_batch(ignore)
    logits = model(input_ids=batch.ids).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED)
    assert batch_loss(model, batch).item() == pytest.approx(expected.item(), abs=1e-5)


def test_the_learning_rate_warms_up_peaks_and_falls_to_a_tenth():
    rates = [cosine(step, 200, 1.0) for step in range(200)]
    assert rates[0] == 1 / WARM_UP
    assert max(rates) == rates[WARM_UP] == 1.0
    assert rates[-1] == pytest.approx(FINAL_RATE, abs=1e-3)
    assert rates[WARM_UP:] == sorted(rates[WARM_UP:], reverse=True)


def test_training_learns_and_is_reproducible():
    def train():
        model = tiny_model()
        steps = []
        losses = Trainer(model, 0.01).run(itertools.repeat(random_batch()), 30, lambda step: 1e-2, steps.append)
        assert steps == [1] * 30
        assert not model.training
        return losses

    losses = train()
    assert losses[-1] < 0.5 * losses[0]
    assert losses == train()
