"""study.yaml as a file: lines in errors, several errors at once, includes, anchors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_prune.errors import UsageError
from megatron_prune.study import schema, study_file
from tests.study.test_config import GOOD

TEXT = """\
name: a-study
data:
  train: a
  calibration: c
  validation: v
  test: t
  seq_length: 8
parent:
  pretrain:
    tokens: 1.5M
    arguments: {num_layers: 2}
recipe:
  lr: 3e-4
  global_batch_size: 16
  micro_batch_size: 8
methods:
  - name: shortgpt
  - name: wanda
    pattern: 2:4
ratios: [0.5]
budgets: [400k]
"""


pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")


def write(text: str, name: str = "study.yaml") -> str:
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text(text)
    return name


def refused(text: str) -> list[str]:
    """The error lines for a study.yaml with that text."""
    with pytest.raises(UsageError) as raised:
        schema.load_all(write(text))
    return str(raised.value).splitlines()


def test_the_text_is_a_study() -> None:
    study = schema.load(write(TEXT))
    assert study.name == "a-study" and study.methods[1].pattern == "2:4"


@pytest.mark.parametrize(
    ("old", "new", "begins", "says"),
    [
        ("  seq_length: 8", "  seqlength: 8", "study.yaml, line 7: data.seqlength", "did you mean seq_length?"),
        ("  seq_length: 8", "  seq-length: 8", "study.yaml, line 7: data.seq-length", "did you mean seq_length?"),
        ("ratios:", "ratio:", "study.yaml, line 20: ratio", "did you mean ratios?"),
        ("ratios:", "epochs: 2\nratios:", "study.yaml, line 20: epochs", "did you mean data.epochs?"),
        ("    pattern: 2:4", "    patern: 2:4", "study.yaml, line 19: methods.1.patern", "did you mean pattern?"),
        ("    tokens: 1.5M", "    token: 1.5M", "study.yaml, line 10: parent.pretrain.token", "did you mean tokens?"),
        ("    pattern: 2:4", "    pattern: 4:2", "study.yaml, line 19: methods.1.pattern", "'4:2'"),
        ("[400k]", "[400k, 40 apples]", "study.yaml, line 21: budgets.1", "40 apples"),
        ("  lr: 3e-4\n", "", "study.yaml, line 12: recipe.lr", "required"),
        ("name: a-study\n", "", "study.yaml: name", "required"),
        ("  global_batch_size: 16", "  global_batch_size: 12", "study.yaml, line 14: recipe.global_batch_size", "= 8"),
        ("    pattern: 2:4", "    pattern: 2:4\n    target: {num-layers: 2}",
         "study.yaml, line 20: methods.wanda-2-4.target", "a pattern"),
        ("  - name: shortgpt", "  - name: shortgpt\n    compare: {equal-total: [masked]}",
         "study.yaml, line 18: methods.shortgpt.compare", "without a pattern"),
        ("  validation: v", "  validation: a", "study.yaml, line 5: data.validation", "data.train"),
    ],
)  # fmt: skip
def test_an_error_is_one_line_with_file_line_and_key(old: str, new: str, begins: str, says: str) -> None:
    assert TEXT.count(old) == 1
    (line,) = refused(TEXT.replace(old, new))  # a misspelt key is not reported as missing too
    assert line.startswith(f"{begins}: ") and says in line


def test_all_errors_are_named_at_once() -> None:
    """Errors of pydantic, and of the sections' own checks."""
    text = TEXT.replace("seq_length: 8", "seqlength: 8").replace("lr: 3e-4", "lr: fast")
    text = text.replace("[0.5]", "[1.5]").replace("  pretrain:", "  load: x\n  pretrain:") + "lunch: {}\n"
    found = refused(text)
    begin = [line.partition(": ")[0] + ": " + line.split(": ")[1] for line in found]
    assert sorted(begin) == sorted([
        "study.yaml, line 7: data.seqlength", "study.yaml, line 8: parent",
        "study.yaml, line 14: recipe.lr", "study.yaml, line 21: ratios.0", "study.yaml, line 23: lunch",
    ])  # fmt: skip
    assert all(line.startswith("study.yaml, line ") for line in found)
    assert "did you mean launch?" in next(line for line in found if "lunch" in line)


def test_a_value_of_several_types_is_one_error() -> None:
    (line,) = refused(TEXT.replace("{num_layers: 2}", "{num_layers: {a: 1}}"))
    assert line.startswith("study.yaml, line 11: parent.pretrain.arguments.num_layers: ") and "integer or " in line


def test_every_key_that_is_there_twice_is_named() -> None:
    found = refused(TEXT + "name: b\n" + "budgets: [1]\n")
    assert [line.split(": expected")[0] for line in found] == [
        "study.yaml, line 22: name",
        "study.yaml, line 23: budgets",
    ]
    assert "1 and 22" in found[0]


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("name: a\ndata:\n\ttrain: a\n", 3, "tab"),
        ("name: a\ndata: [1,\n  b: {\n", 4, ""),
        ("a: &a [x, *a]\n", 1, "alias"),
        ("a: &a {<<: *a}\n", 1, "alias"),
        ("name: *nobody\n", 1, "nobody"),
        ("? [a, b]\n: 1\n", 1, "key"),
        ("name: !!python/object:os.system x\n", 1, "python"),
    ],
)
def test_what_is_no_yaml_is_named_by_its_line(text: str, line: int, says: str) -> None:
    (found,) = refused(text)
    assert f"study.yaml, line {line}" in found and says in found


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["lists", "merges"])
def test_aliases_that_multiply_are_refused(kind: str) -> None:
    """Nine lists of nine of the one before: 9**9 values of 400 bytes of text."""
    first = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" if kind == "lists" else "a0: &a0 {x: 1}\n"
    step = "a{n}: &a{n} [" if kind == "lists" else "a{n}: &a{n} {{v: ["
    close = "]\n" if kind == "lists" else "]}\n"
    lines = [step.format(n=n) + ", ".join([f"*a{n - 1}"] * 9) + close for n in range(1, 10)]
    (found,) = refused(first + "".join(lines))
    assert "aliases" in found


def test_an_alias_may_be_used_often() -> None:
    text = TEXT.replace("seq_length: 8", "seq_length: &length 8") + "calibration: {seq_length: *length}\n"
    assert schema.load(write(text)).calibration_seq_length == 8


def test_deeply_nested_values_are_refused() -> None:
    (found,) = refused("name: " + "[" * 5000 + "]" * 5000)
    assert "study.yaml" in found


def test_a_file_includes_others_and_has_the_last_word() -> None:
    write("recipe: {lr: 1e-3, global_batch_size: 16, micro_batch_size: 4}\nbudgets: [1M, 2M]\n", "shared/recipe.yaml")
    write("include: recipe.yaml\ndata: {train: a, calibration: c, validation: v, test: t, seq_length: 8}\n",
          "shared/common.yaml")  # fmt: skip
    own = "include: shared/common.yaml\nname: b\nparent: {load: x}\nrecipe: {micro_batch_size: 8}\n"
    own += "methods: [{name: shortgpt}]\nratios: [0.5]\nbudgets: [3M]\n"
    study = schema.load(write(own))
    assert study.recipe.lr == 1e-3 and study.recipe.micro_batch_size == 8  # merged key by key
    assert study.budgets == [3_000_000]  # a list is replaced
    assert "include" not in schema.resolved(study)
    two = own.replace("shared/common.yaml", "[shared/common.yaml, shared/other.yaml]")
    write("recipe: {lr: 2e-3}\n", "shared/other.yaml")
    assert schema.load(write(two)).recipe.lr == 2e-3  # the later of two wins


def test_an_error_names_the_file_that_has_the_line() -> None:
    write("\nrecipe: {lr: 1e-3, global_batch_size: 16,\n  micro_batch_sise: 8}\n", "common.yaml")
    text = "include: common.yaml\n" + TEXT[: TEXT.index("recipe:")] + TEXT[TEXT.index("methods:") :]
    found = refused(text)
    assert any(line.startswith("common.yaml, line 3: recipe.micro_batch_sise: ") for line in found), found
    write("recipe: {lr: 1e-3, global_batch_size: 16}\n", "common.yaml")
    (line,) = refused(text.replace("methods:", "recipe:\n  micro_batch_size: many\nmethods:"))
    assert line.startswith("study.yaml, line 14: recipe.micro_batch_size: ")


@pytest.mark.parametrize(
    ("included", "says"),
    [
        ("include: study.yaml\n", "common.yaml, line 1: include"),
        ("include: common.yaml\n", "common.yaml, line 1: include"),
        ("include: nowhere.yaml\n", "common.yaml, line 1: include"),
        ("- 1\n", "study.yaml, line 1: include"),
        ("", "study.yaml, line 1: include"),
        ("a: b: c\n", "common.yaml, line 1"),
    ],
)
def test_includes_that_cannot_be_are_refused(included: str, says: str) -> None:
    write(included, "common.yaml")
    (line,) = refused("include: common.yaml\n" + TEXT)
    assert says in line


@pytest.mark.parametrize("named", ["5", "[]", "[5]", "{a: b}", "''"])
def test_include_is_a_file_or_a_list_of_files(named: str) -> None:
    (line,) = refused(f"name: a\ninclude: {named}\n")
    assert line.startswith("study.yaml, line 2: include: ")


def test_parents_keep_the_lines_of_their_own() -> None:
    parents = "parents:\n  small: {load: x}\n  large:\n    load: y\n    declared_token: 5\n"
    text = TEXT[: TEXT.index("parent:")] + parents + TEXT[TEXT.index("recipe:") :]
    (line,) = refused(text)
    assert line.startswith("study.yaml, line 12: parent.declared_token: ") and "did you mean declared_tokens?" in line


def test_errors_that_are_found_later_have_the_line_too() -> None:
    study = schema.load(write(TEXT))
    error = study_file.placed(UsageError("data.test", got="x", expected="y"), schema.written(study))
    assert str(error).startswith("study.yaml, line 6: data.test: ")
    assert str(study_file.placed(error, schema.written(study))) == str(error)  # once
    nowhere = study_file.placed(
        UsageError("data.test", got="x", expected="y"), schema.written(schema.from_mapping(GOOD))
    )
    assert "line" not in str(nowhere)


def merged(above: Any, below: Any) -> Any:
    return study_file._merged((below, {}), (above, {}))[0]


def test_merging_leaves_what_it_merges_alone() -> None:
    below = {"a": {"b": 1, "c": [1]}, "d": 2}
    above = {"a": {"c": [2]}, "d": {"e": 3}}
    copies = yaml.safe_dump([below, above])
    assert merged(above, below) == {"a": {"b": 1, "c": [2]}, "d": {"e": 3}}
    assert yaml.safe_dump([below, above]) == copies
