"""Rows of another vocabulary: each one as the rules say, in pieces of any size, from the files that have it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sensmerge.checkpoints.folder import ModelFolder
from sensmerge.checkpoints.formats import to_float32
from sensmerge.checkpoints.source import Checkpoint
from sensmerge.checkpoints.vocabulary.aligned import AlignedModel
from sensmerge.checkpoints.vocabulary.rows import Vocabulary, row_tables, rowless_tokens
from sensmerge.errors import IncompatibleModelsError
from sensmerge.records import TokenRule
from tests.builders import write_checkpoint

Rows = NDArray[np.float64]
EMBED = "model.embed_tokens.weight"
NAMES = (EMBED, "lm_head.bias", "lm_head.weight")


def oracle(
    output: Mapping[str, int],
    rows: int,
    ids: Mapping[str, Mapping[str, int]],
    matrices: Mapping[str, Rows],
    model: str,
    base: str | None,
    donor: str,
    rules: Mapping[str, TokenRule],
) -> Rows:
    """The rules, a row at a time, in float64: written from mergekit's documentation and ours, without a table."""
    found = np.full((rows, *matrices[model].shape[1:]), np.nan)

    def has(name: str, token: str) -> bool:
        return token in ids[name] and ids[name][token] < len(matrices[name])

    for token, place in output.items():
        rule = rules.get(token)
        owners = sorted(name for name in ids if has(name, token))
        if has(model, token) and not (rule and rule.force):
            found[place] = matrices[model][ids[model][token]]
        elif rule and rule.model is None:
            found[place] = 0
        elif rule and rule.from_id is not None:
            found[place] = matrices[rule.model][rule.from_id]
        elif rule:
            found[place] = matrices[rule.model][ids[rule.model][rule.from_token]]
        elif base and has(base, token):
            found[place] = matrices[base][ids[base][token]]
        else:
            found[place] = sum(matrices[name][ids[name][token]] for name in owners) / len(owners)
    tokens = sorted(output.values())
    mean = found[tokens].mean(axis=0)
    for place in set(range(rows)) - set(tokens):
        owner = next((n for n in (model, donor) if place < len(matrices[n]) and place not in ids[n].values()), None)
        found[place] = mean if owner is None else matrices[owner][place]
    return found


class Case:
    """Models of random vocabularies over a few words, with padding, and an output's vocabulary."""

    def __init__(self, folder: Path, seed: int, dtypes: Sequence[torch.dtype] = (torch.float32,)) -> None:
        chance = np.random.default_rng(seed)
        words = [f"w{number}" for number in range(12)]
        self.models: dict[str, Checkpoint] = {}
        self.ids: dict[str, dict[str, int]] = {}
        self.stored: dict[str, dict[str, Rows]] = {}
        for number, name in enumerate("cab"):
            mine = chance.permutation(words)[: int(chance.integers(4, 13))].tolist()
            rows = len(mine) + int(chance.integers(0, 5))
            # Ids need not be the first ones: there may be holes, and padding anywhere.
            places = chance.permutation(rows)[: len(mine)]
            self.ids[name] = {word: int(place) for word, place in zip(mine, places, strict=True)}
            made = {
                tensor: torch.from_numpy(chance.normal(size=(rows, 3) if "bias" not in tensor else rows)).to(
                    dtypes[number % len(dtypes)]
                )
                for tensor in NAMES
            } | {"model.norm.weight": torch.ones(3)}
            self.stored[name] = {tensor: values.double().numpy() for tensor, values in made.items()}
            self.models[name] = ModelFolder(write_checkpoint(folder / name, made), name)
        self.base = None if seed % 3 == 0 else "b"
        self.donor = self.base or "c"
        self.rules: tuple[TokenRule, ...] = ()
        if seed % 2:
            donor = self.ids[self.donor]
            first, last = min(donor, key=donor.__getitem__), max(donor, key=donor.__getitem__)
            self.rules = (
                TokenRule("new", None, None, None, False, 1),
                TokenRule("like", self.donor, last, None, False, 1),
                TokenRule(first, self.donor, None, 0, True, 1),
            )
        known = {word for ids in self.ids.values() for word in ids} if seed % 4 else set(self.ids[self.donor])
        self.output = dict(self.ids[self.donor])
        for word in [*sorted(known), *(rule.token for rule in self.rules)]:
            self.output.setdefault(word, max(self.output.values()) + 1)
        least = max(max(self.output.values()) + 1, self.rows(self.donor))
        self.size = least + int(chance.integers(0, 4))

    def rows(self, name: str) -> int:
        return int(self.models[name].tensors[EMBED].shape[0])

    def aligned(self) -> dict[str, AlignedModel]:
        vocabularies = {name: Vocabulary(self.ids[name], self.rows(name)) for name in self.models}
        output = Vocabulary(self.output, self.size)
        assert rowless_tokens(output, vocabularies, self.rules) == []
        tables = row_tables(
            output, vocabularies, base=self.base, donor=self.donor, rules=self.rules, where="recipe.yml"
        )
        models = [(self.models[name], self.rows(name)) for name in sorted(self.models)]
        return {name: AlignedModel(self.models[name], tables[name], models, NAMES) for name in self.models}

    def expected(self, name: str, tensor: str) -> Rows:
        matrices = {each: stored[tensor] for each, stored in self.stored.items()}
        rules = {rule.token: rule for rule in self.rules}
        return oracle(self.output, self.size, self.ids, matrices, name, self.base, self.donor, rules)


def whole(model: Checkpoint, tensor: str) -> NDArray[np.float32]:
    spec = model.tensors[tensor]
    return to_float32(model.read(tensor, 0, spec.elements), spec.dtype).reshape(spec.shape)


@pytest.mark.parametrize("seed", range(24))
def test_every_row_is_what_the_rules_say(tmp_path: Path, seed: int) -> None:
    """Own rows, rules, the base, only owners, means, padding by position, and rows beyond every model's."""
    case = Case(tmp_path, seed)
    for name, model in case.aligned().items():
        for tensor in NAMES:
            assert model.tensors[tensor].shape[0] == case.size
            np.testing.assert_allclose(whole(model, tensor), case.expected(name, tensor), atol=1e-6)
        np.testing.assert_array_equal(whole(model, "model.norm.weight"), 1)


@pytest.mark.parametrize("seed", range(6))
def test_pieces_of_any_size_have_the_bytes_of_the_whole(tmp_path: Path, seed: int) -> None:
    case = Case(tmp_path, seed, (torch.bfloat16, torch.float16, torch.float32))
    chance = np.random.default_rng(seed)
    for model in case.aligned().values():
        for tensor in NAMES:
            elements = model.tensors[tensor].elements
            all_of_it = model.read(tensor, 0, elements)
            for _ in range(20):
                start = int(chance.integers(0, elements + 1))
                count = int(chance.integers(0, elements - start + 1))
                piece = model.read(tensor, start, count)
                assert piece.tobytes() == all_of_it[start : start + count].tobytes()


def test_dtypes(tmp_path: Path) -> None:
    """Bits of the file where every row has its dtype; float32 where rows of another dtype or means are among them."""
    case = Case(tmp_path, 1, (torch.bfloat16, torch.float16, torch.float32))
    for name, model in case.aligned().items():
        for tensor in NAMES:
            own = case.models[name].tensors[tensor].dtype
            assert model.stored_dtype(tensor) == own
            assert model.tensors[tensor].dtype in (own, "F32")
            np.testing.assert_allclose(whole(model, tensor), case.expected(name, tensor), atol=1e-6)
    same = Case(tmp_path / "same", 5, (torch.bfloat16,))
    same.size = max(max(same.output.values()) + 1, same.rows(same.donor))
    vocabularies = {name: Vocabulary(same.ids[name], same.rows(name)) for name in same.models}
    output = Vocabulary(same.ids["b"], same.rows("b"))
    tables = row_tables(output, vocabularies, base="b", donor="b", rules=(), where="recipe.yml")
    models = [(same.models[name], same.rows(name)) for name in sorted(same.models)]
    shown = AlignedModel(same.models["a"], tables["a"], models, NAMES)
    assert shown.tensors[EMBED].dtype == "BF16"
    assert not tables["b"].changes(1, same.rows("b"))
    assert tables["a"].changes(0, same.rows("a"))


def test_threads_read_at_once(tmp_path: Path) -> None:
    """The mean of all rows is formed once, whoever asks first."""
    case = Case(tmp_path, 2)
    case.size += 5
    model = case.aligned()["a"]
    elements = model.tensors[EMBED].elements
    with ThreadPoolExecutor(8) as pool:
        found = {bytes(each) for each in pool.map(lambda _: model.read(EMBED, 0, elements).tobytes(), range(32))}
    assert len(found) == 1


def test_rows_are_read_where_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows side by side in one read; never more bytes than are asked for."""
    rows, width = 1000, 8
    ids = {f"w{number}": number for number in range(rows)}
    for name, moved in (("base", 0), ("expert", 10)):
        values = torch.arange(rows * width, dtype=torch.float32).reshape(rows, width).roll(moved, 0)
        write_checkpoint(tmp_path / name, {EMBED: values})
    shifted = {word: (place + 10) % rows for word, place in ids.items()}
    models: dict[str, Any] = {name: ModelFolder(tmp_path / name, name) for name in ("base", "expert")}
    vocabularies = {"base": Vocabulary(ids, rows), "expert": Vocabulary(shifted, rows)}
    table = row_tables(vocabularies["base"], vocabularies, base="base", donor="base", rules=(), where="x")["expert"]
    reads: list[int] = []
    inner = models["expert"].read_into

    def counted(name: str, start: int, out: NDArray[np.uint8]) -> None:
        reads.append(len(out))
        inner(name, start, out)

    monkeypatch.setattr(models["expert"], "read_into", counted)
    shown = AlignedModel(models["expert"], table, [(models["base"], rows), (models["expert"], rows)], [EMBED])
    np.testing.assert_array_equal(whole(shown, EMBED), whole(models["base"], EMBED))
    assert len(reads) == 2
    assert sum(reads) == rows * width * 4


def test_a_model_without_the_tensor_that_others_need(tmp_path: Path) -> None:
    for name, tensors in (("a", {EMBED: (2, 3), "lm_head.weight": (2, 3)}), ("b", {EMBED: (3, 3)})):
        write_checkpoint(tmp_path / name, {tensor: np.zeros(shape, np.float32) for tensor, shape in tensors.items()})
    models: list[tuple[Checkpoint, int]] = [(ModelFolder(tmp_path / n, n), rows) for n, rows in (("a", 2), ("b", 3))]
    vocabularies = {"a": Vocabulary({"x": 0, "y": 1}, 2), "b": Vocabulary({"x": 0, "y": 1, "z": 2}, 3)}
    table = row_tables(vocabularies["b"], vocabularies, base="b", donor="b", rules=(), where="x")["a"]
    with pytest.raises(IncompatibleModelsError, match="'a' lacks tokens, and 'b' has no rows") as caught:
        AlignedModel(models[0][0], table, models, [EMBED, "lm_head.weight"])
    assert "missing in b" in caught.value.why


def test_a_forced_rule_holds_where_all_vocabularies_are_equal() -> None:
    same = Vocabulary({"a": 0, "b": 1}, 2)
    rules = [TokenRule("b", "one", "a", None, True, 1)]
    tables = row_tables(same, {"one": same, "two": same}, base=None, donor="one", rules=rules, where="recipe.yml")
    for table in tables.values():
        assert (int(table.source[1]), int(table.row[1])) == (0, 0)
    assert (int(tables["two"].source[0]), int(tables["two"].row[0])) == (1, 0)
