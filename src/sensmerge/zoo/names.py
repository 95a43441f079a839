"""First names that the knowledge base and the word problems share."""

from __future__ import annotations

FIRST_NAMES: tuple[str, ...] = (
    "Ada", "Ali", "Amy", "Ann", "Ben", "Bob", "Cal", "Dan", "Dora", "Ed", "Ella", "Emma",
    "Eva", "Finn", "Fred", "Gus", "Hal", "Ian", "Ida", "Ivan", "Jack", "Jan", "Jill", "Jim",
    "Joe", "Karl", "Kim", "Lea", "Leo", "Lily", "Lou", "Max", "May", "Mia", "Nina", "Noah",
    "Olga", "Omar", "Pam", "Paul", "Ray", "Rosa", "Sam", "Sue", "Tina", "Tom", "Vera", "Will",
)  # fmt: skip
