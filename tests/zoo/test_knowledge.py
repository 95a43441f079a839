"""The chat domain: reproducible, and no test question is ever asked in training."""

import pytest

from sensmerge.zoo.documents import seeded
from sensmerge.zoo.knowledge import ATTRIBUTES, BASE_PEOPLE, TEST_FACTS, KnowledgeBase
from sensmerge.zoo.names import FIRST_NAMES

SEEDS = range(8)


def test_the_world_has_the_promised_size():
    assert len(set(FIRST_NAMES)) == len(FIRST_NAMES) == 48
    assert len(ATTRIBUTES) == 5
    assert all(len(set(attribute.values)) == 8 for attribute in ATTRIBUTES)
    knowledge = KnowledgeBase(0)
    assert len({fact.person for fact in knowledge.base_facts}) == BASE_PEOPLE
    assert len(knowledge.expert_facts) == 160
    assert len(knowledge.test_items()) == 2 * TEST_FACTS == 138


def test_the_same_seed_gives_the_same_world_and_another_seed_another():
    assert KnowledgeBase(3).test_items() == KnowledgeBase(3).test_items()
    assert KnowledgeBase(3).expert_facts != KnowledgeBase(4).expert_facts


@pytest.mark.parametrize("seed", SEEDS)
def test_no_test_question_can_be_drawn_in_training(seed):
    knowledge = KnowledgeBase(seed)
    asked = {item["prompt"] for item in knowledge.test_items()}
    # every question the base or the expert can ever see, not a sample of them
    trainable = {text.prompt for fact in (*knowledge.base_facts, *knowledge.asked_facts) for text in fact.questions()}
    assert not asked & trainable
    assert not set(knowledge.test_facts) & set(knowledge.asked_facts)
    draw = seeded(seed, "test of training streams")
    drawn = {knowledge.expert_question(draw).prompt for _ in range(3000)}
    drawn |= {knowledge.base_question(draw).prompt for _ in range(1000)}
    assert drawn <= trainable


@pytest.mark.parametrize("seed", SEEDS)
def test_the_base_knows_nothing_about_the_experts_people(seed):
    knowledge = KnowledgeBase(seed)
    assert not {fact.person for fact in knowledge.base_facts} & {fact.person for fact in knowledge.expert_facts}
    draw = seeded(seed, "test of base statements")
    told = {knowledge.base_statement(draw).response for _ in range(1000)}
    assert told <= {text.response for fact in knowledge.base_facts for text in fact.statements()}


@pytest.mark.parametrize("seed", SEEDS)
def test_every_test_question_can_be_answered_from_a_told_fact(seed):
    knowledge = KnowledgeBase(seed)
    truth = {text.prompt: text.response for fact in knowledge.expert_facts for text in fact.questions()}
    for item in knowledge.test_items():
        assert len(set(item["choices"])) == 4
        assert item["choices"][item["answer"]] == truth[item["prompt"]]


def test_the_right_choice_stands_at_every_place():
    answers = [item["answer"] for item in KnowledgeBase(0).test_items()]
    assert min(answers.count(place) for place in range(4)) > 15
