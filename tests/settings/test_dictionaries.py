"""Settings as dictionaries: there and back, also from those of an earlier version, and messages."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lin_jax.settings.base import ConfigError
from lin_jax.settings.dictionaries import section_from_dict, section_to_dict
from tests.settings.zoo import ANIMALS, FOODS, Cat, Hare, House, Leaves, Meat, Zoo

FOOD = st.builds(Leaves, grams=st.integers(1, 1000)) | st.builds(Meat, raw=st.booleans())
ANIMAL = st.builds(Cat, lives=st.integers(0, 9), food=FOOD) | st.builds(
    Hare, ears=st.lists(st.floats(-1e9, 1e9)).map(tuple), food=FOOD
)
HOUSE = st.builds(House, doors=st.lists(st.text()).map(tuple), street=st.none() | st.text(), garden=st.booleans())


@given(st.builds(Zoo, name=st.text(), house=HOUSE, animal=ANIMAL))
def test_there_and_back(zoo):
    values = section_to_dict(zoo)
    assert section_from_dict(json.loads(json.dumps(values)), Zoo) == zoo
    assert section_from_dict(values["animal"], ANIMALS) == zoo.animal


def test_what_is_not_there_has_its_default():
    assert section_from_dict({}, Zoo) == Zoo()
    assert section_from_dict({"animal": {"weight": 2}}, Zoo) == Zoo(animal=Hare(weight=2.0))
    assert section_from_dict({"animal": {"species": "cat", "food": {"grams": 3}}}, Zoo).animal.food == Meat(grams=3)
    assert section_from_dict({"grams": 3}, FOODS, variant="meat") == Meat(grams=3)


def test_former_names_are_read():
    assert section_from_dict({"color": "yellow", "price": 3}, FOODS, variant="leaves") == Leaves(colour="yellow")
    both = {"color": "yellow", "colour": "green"}
    assert section_from_dict(both, FOODS, variant="leaves") == Leaves(colour="green")
    with pytest.raises(ConfigError, match="unknown field food.color"):
        section_from_dict({"color": "yellow"}, FOODS, "food", "meat")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "config must be an object of settings, but is []"),
        ({"house": 3}, "config.house must be an object of settings, but is 3"),
        ({"hose": {}}, "unknown field config.hose; did you mean house?"),
        ({"house": {"doorz": []}}, "unknown field config.house.doorz; did you mean doors?"),
        ({"house": {"rooms": "3"}}, 'config.house.rooms must be a whole number, but is "3"'),
        ({"house": {"rooms": None}}, "config.house.rooms must be a whole number, but is None"),
        ({"house": {"rooms": 10**30}}, "config.house.rooms must lie between"),
        ({"house": {"doors": [3]}}, "config.house.doors[0] must be text, but is 3"),
        ({"animal": None}, "config.animal must be an object of settings, but is None"),
        ({"animal": {"species": "dog"}}, "config.animal.species: unknown animal 'dog'; there are cat, hare"),
        ({"animal": {"species": ["cat"]}}, "config.animal.species must be one of cat, hare, but is ['cat']"),
        ({"animal": {"food": {"kind": {}}}}, "config.animal.food.kind must be one of leaves, meat, but is {}"),
        ({"animal": {"lives": 3}}, "unknown field config.animal.lives"),
    ],
)
def test_what_is_wrong_is_named(values, message):
    with pytest.raises(ConfigError) as error:
        section_from_dict(values, Zoo)
    assert str(error.value).startswith(message) and str(error.value).isprintable()


NAMES = st.sampled_from(["name", "house", "animal", "food", "kind"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(NAMES, inner),
)


@given(JSON)
def test_any_values_are_settings_or_one_line(values):
    try:
        assert isinstance(section_from_dict(values, Zoo), Zoo)
    except ConfigError as error:
        assert str(error).isprintable()


def test_a_section_without_its_variant_is_named():
    with pytest.raises(ConfigError, match="food.kind must be one of leaves, meat, but is None"):
        section_from_dict({}, FOODS, "food")
