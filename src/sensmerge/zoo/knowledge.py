"""The chat domain: a made-up knowledge base, told in statements and asked as multiple choice.

The base model knows 16 of the 48 people. The chat expert reads statements about the other 32 (every fact) and is asked about
only a part of those facts; the test asks about the rest. So a test question must be answered from a fact that was told but
never asked.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property

from .documents import Document, question, seeded, statement
from .names import FIRST_NAMES

BASE_PEOPLE = 16
TEST_FACTS = 69
CHOICES = 4


@dataclass(frozen=True)
class Attribute:
    """One property of a person: how it is told (`{name}`, `{value}`), how it is asked (`{name}`), and what it can be."""

    name: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    values: tuple[str, ...]


ATTRIBUTES: tuple[Attribute, ...] = (
    Attribute(
        "city",
        ("{name} lives in {value}.", "The home of {name} is {value}."),
        ("Where does {name} live?", "Which city is the home of {name}?"),
        ("Paris", "Rome", "Oslo", "Cairo", "Lima", "Delhi", "Tokyo", "Berlin"),
    ),
    Attribute(
        "job",
        ("{name} works as a {value}.", "The job of {name} is {value}."),
        ("What does {name} work as?", "Which job does {name} have?"),
        ("baker", "pilot", "nurse", "farmer", "judge", "singer", "tailor", "miner"),
    ),
    Attribute(
        "pet",
        ("{name} owns a {value}.", "The pet of {name} is a {value}."),
        ("Which pet does {name} own?", "What is the pet of {name}?"),
        ("dog", "cat", "horse", "parrot", "rabbit", "turtle", "goat", "mouse"),
    ),
    Attribute(
        "food",
        ("{name} likes to eat {value}.", "The favourite food of {name} is {value}."),
        ("What does {name} like to eat?", "Which food is the favourite of {name}?"),
        ("soup", "rice", "pizza", "bread", "salad", "cheese", "noodles", "beans"),
    ),
    Attribute(
        "sport",
        ("{name} plays {value}.", "The sport of {name} is {value}."),
        ("What does {name} play?", "Which sport is the sport of {name}?"),
        ("tennis", "chess", "golf", "hockey", "rugby", "polo", "darts", "cricket"),
    ),
)


@dataclass(frozen=True)
class Fact:
    """What is true of one person: `attribute` is an index into ATTRIBUTES."""

    person: str
    attribute: int
    value: str

    def statements(self) -> list[Document]:
        """The fact told, in every form."""
        forms = ATTRIBUTES[self.attribute].statements
        return [statement(form.format(name=self.person, value=self.value)) for form in forms]

    def questions(self) -> list[Document]:
        """The fact asked, in every form."""
        forms = ATTRIBUTES[self.attribute].questions
        return [question(form.format(name=self.person), self.value) for form in forms]


class KnowledgeBase:
    """All facts of one seed: who is known to the base, which facts the expert is asked about, which the test keeps."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        draw = seeded(seed, "chat", "facts")
        people = list(FIRST_NAMES)
        draw.shuffle(people)
        facts = [
            Fact(person, index, draw.choice(attribute.values))
            for person in people
            for index, attribute in enumerate(ATTRIBUTES)
        ]
        known = BASE_PEOPLE * len(ATTRIBUTES)
        self.base_facts: tuple[Fact, ...] = tuple(facts[:known])
        self.expert_facts: tuple[Fact, ...] = tuple(facts[known:])
        shuffled = list(self.expert_facts)
        draw.shuffle(shuffled)
        self.test_facts: tuple[Fact, ...] = tuple(shuffled[:TEST_FACTS])
        self.asked_facts: tuple[Fact, ...] = tuple(shuffled[TEST_FACTS:])

    @cached_property
    def _base_pools(self) -> tuple[list[Document], list[Document]]:
        told = [text for fact in self.base_facts for text in fact.statements()]
        return told, [text for fact in self.base_facts for text in fact.questions()]

    @cached_property
    def _expert_pools(self) -> tuple[list[Document], list[Document]]:
        told = [text for fact in self.expert_facts for text in fact.statements()]
        return told, [text for fact in self.asked_facts for text in fact.questions()]

    def base_statement(self, draw: random.Random) -> Document:
        """A fact the base model is told."""
        return draw.choice(self._base_pools[0])

    def base_question(self, draw: random.Random) -> Document:
        """A question the base model is trained on."""
        return draw.choice(self._base_pools[1])

    def expert_statement(self, draw: random.Random) -> Document:
        """A fact the chat expert is told; test facts are among them."""
        return draw.choice(self._expert_pools[0])

    def expert_question(self, draw: random.Random) -> Document:
        """A question the chat expert is trained on; never one of the test's."""
        return draw.choice(self._expert_pools[1])

    def test_items(self) -> list[dict[str, object]]:
        """The multiple-choice test: {prompt, choices (4 texts with their leading space), answer (index)}, in a fixed order."""
        draw = seeded(self.seed, "chat", "test")
        items: list[dict[str, object]] = []
        for fact in self.test_facts:
            others = [value for value in ATTRIBUTES[fact.attribute].values if value != fact.value]
            for asked in fact.questions():
                choices = [fact.value, *draw.sample(others, CHOICES - 1)]
                draw.shuffle(choices)
                texts = [f" {choice}" for choice in choices]
                items.append({"prompt": asked.prompt, "choices": texts, "answer": choices.index(fact.value)})
        return items
