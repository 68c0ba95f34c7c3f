"""One settings object, three ways to make it: Python, a mapping (study.yaml), a command line."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_prune import methods, verbs
from megatron_prune.errors import CommandLineError, UsageError
from megatron_prune.methods import options
from megatron_prune.settings import Settings, add_flags, count, nearest, setting, value_of


@dataclass(frozen=True, kw_only=True)
class Base(Settings):
    TITLE = "base"

    load: str = setting(metavar="CKPT", help="required")


@dataclass(frozen=True, kw_only=True)
class Example(Base):
    TITLE = "own"

    count: int = setting(3, help="a number")
    share: float | None = setting(None, help="between 0 and 1, in %")
    names: tuple[str, ...] = setting((), choices=("a", "b", "c"), help="several")
    sizes: tuple[int, ...] | None = setting(None, help="several numbers")
    ranges: tuple[str, ...] = setting((), repeated=True, help="one at a time")
    on: bool = setting(False, help="a switch")
    kept: bool = setting(True, help="switches off what is on")


def command_line(cls: type[Settings], words: list[str]) -> Settings:
    parser = argparse.ArgumentParser()
    add_flags(parser, cls)
    return cls.of(parser.parse_args(words))


EXAMPLES = st.builds(
    Example,
    load=st.text("abc/.", min_size=1),
    count=st.integers(-5, 10**12),
    share=st.none() | st.floats(allow_nan=False, allow_infinity=False, min_value=0),
    names=st.lists(st.sampled_from("abc"), max_size=3).map(tuple),
    sizes=st.none() | st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple),
    ranges=st.lists(st.sampled_from(["0:3", "3:9"]), max_size=3).map(tuple),
    on=st.booleans(),
    kept=st.booleans(),
)


@given(EXAMPLES)
def test_words_and_json_make_the_same_settings_again(made: Example) -> None:
    assert command_line(Example, made.words()) == made
    assert Example.read(made.to_json()) == made
    assert Example.read({name.replace("_", "-"): value for name, value in made.to_json().items()}) == made


def test_what_was_written_is_known_even_where_it_is_the_default() -> None:
    made = command_line(Example, ["--load", "x", "--count", "3"])
    assert made == Example(load="x") and made.was_given("count") and not made.was_given("share")
    assert made.words() == ["--load", "x", "--count", "3"] and Example(load="x").words() == ["--load", "x"]
    assert not Example(load="x").was_given("count") and Example(load="x", count=4).was_given("count")
    assert Example(load="x", kept=False).words() == ["--load", "x", "--no-kept"]
    assert command_line(Example, ["--load", "x", "--no-kept"]) == Example.read({"load": "x", "kept": False})


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"count": "many"}, r"methods\.0\.count: expected a whole number, got many"),
        ({"count": True}, r"methods\.0\.count: .*one value"),
        ({"count": [1, 2]}, r"methods\.0\.count: .*one value"),
        ({"share": "much"}, r"methods\.0\.share: .*a number"),
        ({"names": ["a", "d"]}, r"methods\.0\.names: expected one of a, b, c, got d"),
        ({"sizes": ["x"]}, r"methods\.0\.sizes: expected a whole number, got x"),
        ({"on": "yes"}, r"methods\.0\.on: expected true or false, got yes"),
        ({"nmaes": ["a"]}, r"methods\.0\.nmaes: .*unknown key.*did you mean names\?"),
    ],
)
def test_a_wrong_value_is_named_where_it_is_written(values, said) -> None:
    with pytest.raises(UsageError, match=said):
        Example.read({"load": "x", **values}, "methods.0")


def test_one_word_stands_for_several_and_numbers_may_be_written_as_text() -> None:
    assert Example.read({"load": "x", "names": "a", "sizes": 4, "count": "7"}) == Example(
        load="x", names=("a",), sizes=(4,), count=7
    )
    assert Example.read({"load": "x", "share": None, "count": None}) == Example(load="x")


def test_what_is_missing_is_said_at_once() -> None:
    with pytest.raises(CommandLineError, match=r"--load CKPT is required \(required\)"):
        command_line(Example, [])
    with pytest.raises(CommandLineError, match=r"^here: --load CKPT is required"):
        Example.read({}, "here")


def test_help_has_a_group_for_each_class_and_no_percent_sign_breaks_it() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, Example, Base)
    text = parser.format_help().partition("\n\n")[2]
    assert text.index("base:") < text.index("--load") < text.index("own:") < text.index("--count")
    assert "in %" in text and "(default: 3)" in text and "(default: False)" not in text


def test_every_method_has_its_settings_and_no_two_share_a_flag() -> None:
    """A method's file defines METHOD or SPARSE; options.py must list the same."""
    import importlib
    import pkgutil

    found = {"METHOD": set(), "SPARSE": set()}
    for module in (one for one in pkgutil.iter_modules(methods.__path__) if one.name != "options"):
        loaded = importlib.import_module(f"megatron_prune.methods.{module.name}")
        for kind, names in found.items():
            if hasattr(loaded, kind):
                names.add(module.name.replace("_", "-"))
    assert found == {"METHOD": set(options.STRUCTURED), "SPARSE": set(options.SPARSE)}
    own = [flag for cls in {*options.STRUCTURED.values()} for flag in cls.flags()]
    alike = {flag.name: flag for flag in own}
    assert all(flag == alike[flag.name] for flag in own)  # or they have it from one class
    assert {flag.name for flag in verbs.PruneSettings.flags()} & alike.keys() == {
        "allocation", "least_kept", "owl_threshold", "owl_bound", "search_generations",  # of both kinds
    }  # fmt: skip


def test_what_a_verb_shares_with_a_method_both_get() -> None:
    values = {"method": "flap", "ratio": 0.5, "allocation": "global", "compensate": False}
    asked, own = options.read(verbs.PruneSettings, "flap", values, known=options.PRUNED)
    assert asked.allocation == "global" and own == options.FlapOptions(allocation="global", compensate=False)
    assert own.words() == ["--allocation", "global", "--no-compensate"]
    asked, own = options.read(verbs.PruneSettings, "wanda", values | {"method": "wanda", "allocation": "owl"}
                              | {"compensate": None}, known=options.PRUNED)  # fmt: skip
    assert asked.allocation == "owl" and own == options.NoOptions()


def test_one_mapping_has_a_verbs_settings_and_its_methods() -> None:
    values = {
        "ratio": 0.5,
        "ratio-of": None,
        "search": "ffn",
        "max-candidates": 3,
        "target-params": "1.5k",
        "axis": None,
    }
    target, own = options.read(verbs.TargetSettings, "minitron-width", values, "here")
    assert target == verbs.TargetSettings(ratio=0.5, target_params=1500)
    assert own == options.MinitronWidthOptions(search=("ffn",), max_candidates=3)
    for wrong, said in (
        ({"axis": "depth"}, "here.axis: expected --method random with it, got --method minitron-width"),
        (
            {"serach": "ffn"},
            r"here.serach: expected one of ratio, .*, search, .*did you mean search\?",
        ),
        ({"divisible_by": "x"}, "here.divisible_by: expected a whole number, got x"),
    ):
        with pytest.raises(UsageError, match=said):
            options.read(verbs.TargetSettings, "minitron-width", wrong, "here")
    # --retrain-tokens is a flag of `prune --hf` itself: there it is not the method's.
    asked = {"method": "minitron-width", "hf": "x", "out": "y", "retrain_tokens": 5}
    found = options.read(verbs.PruneHFSettings, "minitron-width", asked, known=options.ONE_LINE)
    assert found[0].retrain_tokens == 5 and found[1] == options.MinitronWidthOptions()
    with pytest.raises(UsageError, match="retrain_candidates: expected one of .*, got an unknown key"):
        options.read(verbs.PruneHFSettings, "minitron-width", asked | {"retrain_candidates": 2}, known=options.ONE_LINE)


@pytest.mark.parametrize(
    ("text", "number"),
    [("7", 7), ("163_840", 163_840), ("160k", 160_000), ("1.5M", 1_500_000), ("50B", 50 * 10**9), ("1e9", 10**9)],
)
def test_numbers_have_suffixes(text: str, number: int) -> None:
    assert count(text) == count(f" {text} ") == number


@pytest.mark.parametrize("text", ["0", "-5", "many", "5 apples", "1e-3", "0.4", "k", "", "٣"])
def test_what_is_not_a_positive_number_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a positive number such as"):
        count(text)


def test_choices_are_those_of_the_rooms() -> None:
    """Help imports no other package; its choices must be those that the packages accept."""
    from megatron_prune.data import local_text, readers, tokenizers, train_tokenizer
    from megatron_prune.engine import fp8
    from megatron_prune.methods import base
    from megatron_prune.preflight import cost
    from megatron_prune.sparse import matrices
    from megatron_prune.study.advise import question

    def choices(cls: type[Settings], name: str) -> tuple[str, ...]:
        (flag,) = [flag for flag in cls.flags() if flag.name == name]
        return tuple(flag.choices or ())

    assert verbs.GPUS == tuple(cost.GPUS) and verbs.FP8_PRESETS == tuple(fp8.PRESETS)
    assert verbs.TOKENIZERS == tokenizers.TYPES and verbs.FORMATS == readers.FORMATS
    assert verbs.MODULES == matrices.MODULES
    assert choices(verbs.PreprocessSettings, "text_documents") == readers.DOCUMENTS
    assert choices(verbs.TrainTokenizerSettings, "model_type") == train_tokenizer.MODEL_TYPES
    assert choices(verbs.AdviseSettings, "setting") == question.SETTINGS
    assert verbs.BuildCorpusSettings(output="x").split == ",".join(map(str, local_text.SHARES))
    for cls in (verbs.TargetSettings, verbs.AdviseSettings):
        sizes = [flag.name for flag in cls.flags() if flag.name.startswith("target_") and flag.name != "target_params"]
        assert sizes == [f"target_{dimension}" for dimension in base.DIMENSIONS]


def test_the_last_value_of_a_flag_counts() -> None:
    assert value_of(["--save", "a", "--lr", "1", "--save=b"], "--save") == "b"
    assert value_of(["--lr", "1"], "--save") is None and value_of(["--save"], "--save") is None


def test_the_nearest_is_near() -> None:
    assert nearest("--laod", ["--load", "--save"]) == "--load"
    assert nearest("--nonsense", ["--seed", "--load"]) is None
