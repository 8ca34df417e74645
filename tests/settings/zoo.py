"""Sections of settings for tests: a root with a section, and one of several by name, in which another is nested."""

import dataclasses
from typing import Any, ClassVar, Literal

from lin_jax.settings.base import require, require_positive, section, setting, variants
from lin_jax.settings.registry import Registry
from lin_jax.settings.typed import Settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Food(Settings):
    """What is eaten."""

    kind: str
    grams: int = setting(100, "how much")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaves(Food):
    """Green things."""

    kind: Literal["leaves"] = setting("leaves", "which food")
    colour: Literal["green", "yellow"] = setting("green", "of the leaves")
    dew: float = setting(0.0, "drops on each")
    former: ClassVar[dict[str, str | None]] = {"color": "colour", "price": None}

    def _check(self) -> None:
        require_positive(self, "grams")
        require(self.colour == "green" or self.dew == 0, "dew is on green leaves alone")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Meat(Food):
    """Red things."""

    kind: Literal["meat"] = setting("meat", "which food")
    raw: bool = setting(True, "not cooked")


class LeavesEntry:
    settings = Leaves
    presets: ClassVar[dict[str, dict[str, Any]]] = {"autumn": {"colour": "yellow"}, "spring": {"grams": 7, "dew": 2.0}}


class MeatEntry:
    settings = Meat


FOODS: Registry[Any] = Registry("food", "kind", {})
FOODS.register("leaves", LeavesEntry)
FOODS.register("meat", MeatEntry)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Animal(Settings):
    """What lives."""

    species: str
    weight: float = setting(1.0, "in kilograms", most=1e6)
    food: Food = variants(Leaves, FOODS, "what it eats")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cat(Animal):
    """A cat."""

    species: Literal["cat"] = setting("cat", "which animal")
    lives: int = setting(9, "that are left", most=9)
    food: Food = variants(Meat, FOODS, "what it eats")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hare(Animal):
    """A hare."""

    species: Literal["hare"] = setting("hare", "which animal")
    ears: tuple[float, ...] = setting((10.0, 10.0), "their lengths")


class CatEntry:
    settings = Cat


class HareEntry:
    settings = Hare


ANIMALS: Registry[Any] = Registry("animal", "species", {})
ANIMALS.register("cat", CatEntry)
ANIMALS.register("hare", HareEntry)


@dataclasses.dataclass(frozen=True, kw_only=True)
class House(Settings):
    """Where they live."""

    rooms: int = setting(3, "without the kitchen", most=100)
    garden: bool = setting(False, "whether there is one")
    street: str | None = setting(None, "where it is")
    doors: tuple[str, ...] = setting(("front",), "which there are")
    number: int | None = setting(None, "on the street", most=1000)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Zoo(Settings):
    """All of it."""

    name: str = setting("zoo", "what it is called")
    house: House = section(House, "where they live")
    animal: Animal = variants(Hare, ANIMALS, "who lives there")
