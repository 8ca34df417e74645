"""Settings on the command line: types, names, variants in any order, and messages."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lin_jax.settings.base import ConfigError
from lin_jax.settings.command_line import OneLineParser, apply_overrides, describe
from tests.settings.zoo import Cat, Hare, House, Leaves, Meat, Zoo


def changed(*overrides, start=None):
    return apply_overrides(start or Zoo(), [f"--config.{text}" for text in overrides])


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("house.rooms=1_0", lambda c: c.house.rooms, 10),
        ("animal.weight=1e-4", lambda c: c.animal.weight, 1e-4),
        ("animal.weight=1", lambda c: c.animal.weight, 1.0),
        ("house.garden", lambda c: c.house.garden, True),
        ("house.garden=False", lambda c: c.house.garden, False),
        ("animal.food.colour=yellow", lambda c: c.animal.food.colour, "yellow"),
        ("house.street=a=b", lambda c: c.house.street, "a=b"),
        ("house.street=None", lambda c: c.house.street, None),
        ("house.number=7", lambda c: c.house.number, 7),
        ("house.doors=front,b*", lambda c: c.house.doors, ("front", "b*")),
        ("house.doors=('a,b',)", lambda c: c.house.doors, ("a,b",)),
        ("house.doors=", lambda c: c.house.doors, ()),
        ("animal.ears=1,2.5", lambda c: c.animal.ears, (1.0, 2.5)),
        ("name=", lambda c: c.name, ""),
    ],
)
def test_values_are_read_by_their_annotation(override, read, value):
    result = read(changed(override))
    assert result == value and type(result) is type(value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["house.roomz=3"], "unknown field config.house.roomz; did you mean rooms?"),
        (["hose.rooms=3"], "unknown field config.hose; did you mean house?"),
        (["house.rooms=1.5"], 'config.house.rooms must be a whole number, but is "1.5"'),
        (["house.rooms"], "config.house.rooms needs a value (a whole number)"),
        (["house.rooms=101"], "config.house.rooms must be at most 100, but is 101"),
        (["house.rooms=" + "9" * 30], "config.house.rooms must lie between -2**63 and 2**63 - 1"),
        (["house.rooms=" + "9" * 5000], "config.house.rooms must be a whole number, but is"),
        (["animal.weight=high"], 'config.animal.weight must be a number, but is "high"'),
        (["animal.weight=nan"], "config.animal.weight must be a finite number, but is nan"),
        (["animal.weight=1e999"], "config.animal.weight must be a finite number, but is inf"),
        (["animal.weight=1e7"], "config.animal.weight must be at most 1000000.0, but is 10000000.0"),
        (["house.garden=maybe"], 'config.house.garden must be true or false, but is "maybe"'),
        (["animal.food.colour=red"], 'config.animal.food.colour must be one of green, yellow, but is "red"'),
        (["house.number=x"], 'config.house.number must be a whole number or None, but is "x"'),
        (["house.doors=(1"], "config.house.doors must be a list of texts, but is"),
        (["house.doors=(1)"], "config.house.doors must be a list of texts, but is"),
        (["house.doors=" + "(" * 10_000], "config.house.doors must be a list of texts, but is"),
        (["name=\ud800"], "config.name holds half of a surrogate pair"),
        (["house=big"], "config.house is a section: set its fields, --config.house.field=value"),
        (["name.first=x"], "config.name is not a section"),
        (["name=x", "name.first=x"], "config.name is not a section"),
        (["animal=dog"], 'config.animal must be one of cat, hare, but is "dog"; did you mean'),
        (["animal"], "config.animal needs a value (one of cat, hare), or set its fields"),
        (["animal.species=hair"], "config.animal.species: unknown animal 'hair'; did you mean hare?"),
        (["animal.species"], "config.animal.species needs a value"),
        (["animal.species.of=x"], "config.animal.species is not a section"),
        (["animal.lives=3"], "config.animal.lives is a setting of species=cat, but config.animal.species is hare"),
        (["animal.species=cat", "animal.ears=3"], "config.animal.ears is a setting of species=hare, but"),
        (["animal.tail=3"], "unknown field config.animal.tail; did you mean"),
        (["animal.food=autumn", "animal.food.kind=meat"], "config.animal.food names one with kind=leaves, but"),
        (["animal.food=autumn", "animal.food.dew=1"], "config.animal.food.dew is on green leaves alone"),
        (["animal.food.grams=0"], "config.animal.food.grams must be greater than 0, but is 0"),
        (["animal.food=Autumn"], "config.animal.food must be one of leaves, meat, autumn, spring, but is"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_is_wrong_is_named(overrides, message):
    with pytest.raises(ConfigError) as error:
        changed(*overrides)
    told = str(error.value)
    assert told.isprintable() and message in told


def test_an_argument_that_is_no_setting_is_refused():
    with pytest.raises(ConfigError, match="unexpected argument '--rooms=3'"):
        apply_overrides(Zoo(), ["--rooms=3"])


def test_nothing_given_changes_nothing():
    zoo = Zoo(animal=Cat(lives=3), house=House(doors=("back",)))
    assert changed(start=zoo) == zoo


HARE = Hare(food=Leaves(grams=5))


@pytest.mark.parametrize(
    ("start", "overrides", "expected"),
    [
        (
            HARE,
            ["species=cat", "lives=4", "food.raw=false", "food.kind=meat", "weight=3"],
            Cat(lives=4, weight=3.0, food=Meat(raw=False, grams=5)),
        ),
        (HARE, ["food=spring", "food.grams=8"], Hare(food=Leaves(grams=8, dew=2.0))),
        (HARE, ["food=spring"], Hare(food=Leaves(grams=7, dew=2.0))),
        (HARE, ["food.grams=8", "food.kind=meat"], Hare(food=Meat(grams=8))),
        (HARE, ["food=meat"], Hare(food=Meat(grams=5))),
        (HARE, ["species=cat", "food=autumn"], Cat(food=Leaves(grams=5, colour="yellow"))),
        (HARE, ["species=cat", "species=hare"], HARE),
        (Cat(food=Meat(raw=False)), ["species=hare", "ears=3"], Hare(food=Meat(raw=False), ears=(3.0,))),
        (Cat(food=Meat(raw=False)), ["food.kind=leaves", "food.dew=1"], Cat(food=Leaves(dew=1.0))),
    ],
    ids=lambda value: str(value)[:40],
)
def test_variants_keep_what_both_have_in_any_order(start, overrides, expected):
    orders = itertools.permutations(overrides) if overrides[:2] != ["species=cat", "species=hare"] else [overrides]
    for order in orders:
        assert changed(*(f"animal.{text}" for text in order), start=Zoo(animal=start)) == Zoo(animal=expected)


@given(st.text(), st.text())
def test_any_text_is_a_value_or_one_line(path, text):
    try:
        apply_overrides(Zoo(), [f"--config.{path}={text}"])
    except ConfigError as error:
        assert str(error).isprintable()


def test_every_variant_is_described_once():
    text = describe(Zoo())
    for line in (
        "  --config.house.rooms=3  (a whole number)",
        "  --config.house.number=None  (a whole number or None)",
        "  --config.animal.species=hare  (one of cat, hare)",
        "config.animal, where species=cat: A cat.",
        "  --config.animal.lives=9  (a whole number)",
        "  --config.animal.ears=10.0,10.0  (a list of numbers)",
        "  --config.animal.food=NAME  (one of leaves, meat, autumn, spring)",
        "  --config.animal.food.colour=green  (one of green, yellow)",
        "  --config.animal.food.raw=True  (true or false)",
    ):
        assert text.splitlines().count(line) == (2 if "food=NAME" in line else 1), line


def parser():
    made = OneLineParser("What it does.")
    made.add_argument("--window", type=int)
    made.add_argument("--task", choices=["a", "b"])
    return made


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--widnow=3"], 'unexpected argument "--widnow=3"; did you mean --window?'),
        (["--widnow", "3"], 'unexpected argument "--widnow"; did you mean --window?'),
        (["--windo=3"], "did you mean --window?"),
        (["3"], 'unexpected argument "3"'),
        (["--window=x"], "argument --window: invalid int value: 'x'"),
        (["--window"], "argument --window: expected one argument"),
        (["--task=c"], "argument --task: invalid choice: 'c'"),
    ],
)
def test_a_program_refuses_what_it_does_not_know(arguments, message):
    for parse in (parser().parse_args, parser().parse_with_settings):
        with pytest.raises(ConfigError) as error:
            parse(arguments)
        assert message in str(error.value)


def test_settings_stand_beside_options():
    known, settings = parser().parse_with_settings(["--config.a=1", "--window", "3", "--config.b"])
    assert known.window == 3 and settings == ["--config.a=1", "--config.b"]
    with pytest.raises(ConfigError, match="unexpected argument"):
        parser().parse_args(["--config.a=1"])
