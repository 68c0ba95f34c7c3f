"""The limits of what is read from strangers: each at its border, and messages that are short whatever the value is."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any, TypedDict

import pytest

from megatron_prune import screen
from megatron_prune.checkpoint.index import Box, Piece, covers
from megatron_prune.checkpoint.pickle_limits import DEEPEST, refuse_absurd
from megatron_prune.errors import MegatronPruneError
from megatron_prune.screen import Printable, printable
from megatron_prune.untrusted import check, parse_json, read_bytes, refuse_irregular, refuse_link_outside, show


def doubled(times: int, kind: Any = tuple) -> Any:
    value: Any = kind()
    for _ in range(times):
        value = kind((value, value))
    return value


# -- files and JSON ---------------------------------------------------------------------------------


def test_a_file_of_the_largest_size_is_read_and_one_byte_more_is_not(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 100)
    assert read_bytes(tmp_path / "file", 100) == b"x" * 100
    with pytest.raises(MegatronPruneError, match=r"file: expected at most 99 bytes, got 100$"):
        read_bytes(tmp_path / "file", 99)
    with pytest.raises(FileNotFoundError):
        read_bytes(tmp_path / "nothing", 99)


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path / "pipe", "a pipe"), (Path("/dev/null"), "a device"), (tmp_path, "a directory")):
        for read in (read_bytes, refuse_irregular):
            with pytest.raises(MegatronPruneError, match=f"{path}: expected a regular file, got {kind}"):
                read(path, 100)
    with pytest.raises(MegatronPruneError, match="embedded null"):
        read_bytes("a\0b", 100)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("NaN", "NaN is not a finite number"), ("[-Infinity]", "not a finite number"), ("1e999", "not a finite number"),
        ("-1e+400", "not a finite number"), ("9" * 30, "a number of 30 digits"),
        ('"\\ud800"', "surrogates not allowed"),
        ("[" * 101 + "]" * 101, "more than 100 levels"), ("[" * 10**6, "recursion|depth"), ("", "Expecting value"),
    ],
)  # fmt: skip
def test_json_that_is_none_here(text: str, says: str) -> None:
    with pytest.raises(MegatronPruneError, match=f"^here.*{says}"):
        parse_json(text.encode(), "here")


@pytest.mark.parametrize(
    "value",
    [1e308, -(2**63), 2**63 - 1, 0.1, "é😀", {"a": [1, {"b": None}]}, [[]] * 1000, "e1234", "0" * 64, [1e-300]],
)
def test_json_that_is_read_as_before(value: Any) -> None:
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False), json.dumps(value, indent=2)):
        assert parse_json(text.encode(), "here") == json.loads(text) == value


def test_json_never_needs_more_memory_than_is_said(tmp_path: Path) -> None:
    """The estimate, made before parsing, is above what the values really take."""

    def size(value: Any) -> int:
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        keys = sum(map(sys.getsizeof, value)) if isinstance(value, dict) else 0
        return sys.getsizeof(value) + keys + sum(map(size, inside))

    for value in ([[]] * 999, [{}] * 999, list(range(10**6, 10**6 + 999)), {f"k{n}": n for n in range(999)},
                  [f"é{n}" for n in range(999)], [{"a": 0.5 + n} for n in range(999)]):  # fmt: skip
        text = json.dumps(value, separators=(",", ":")).encode()
        with pytest.raises(MegatronPruneError, match="expected JSON whose values need at most 0 MB"):
            parse_json(text, "here", most_memory=size(value) // 2)


class _Row(TypedDict):
    name: str
    sizes: list[int]


def test_a_wrong_type_is_named_with_its_place() -> None:
    assert check(_Row, {"name": "a", "sizes": [1], "more": None}, "here") == {"name": "a", "sizes": [1], "more": None}
    for value, says in (
        ({"name": "a", "sizes": [1, "2"]}, r"sizes\.1: expected a valid integer, got '2'"),
        ({"name": "a", "sizes": [True]}, r"sizes\.0: expected a valid integer, got True"),
        ({"name": "a", "sizes": [1.0]}, r"sizes\.0: expected a valid integer, got 1\.0"),
        ({"sizes": []}, "name: expected this key, got nothing"),
        ([], r"expected a valid dictionary, got \[\]"),
        ({"name": "a", "sizes": [doubled(60, list)]}, r"sizes\.0: expected a valid integer, got \[a list of 2 values"),
    ):
        with pytest.raises(MegatronPruneError, match=f"^here is damaged: {says}"):
            check(_Row, value, "here")


def test_every_value_is_shown_shortly() -> None:
    for value in (
        doubled(60), doubled(60, list), {"a": doubled(60, list)}, "x" * 10**7, 1 << 10**7, [1 << 10**6], b"x" * 10**6,
        float("nan"), None, [["x" * 1000] * 9] * 9, ("a" * 10**6,) * 8,
    ):  # fmt: skip
        assert 0 < len(show(value)) < 700


def test_links_that_leave_their_folder(tmp_path: Path) -> None:
    model = tmp_path / "models--a--b" / "snapshots" / "0"
    for folder in (model, tmp_path / "models--a--b" / "blobs", tmp_path / "plain"):
        folder.mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs" / "x").touch()
    (tmp_path / "secret").touch()
    (model / "config.json").symlink_to("../../blobs/x")  # as the Hub's cache does
    (model / "leak").symlink_to("../../../secret")
    (tmp_path / "plain" / "own").symlink_to("file")
    (tmp_path / "plain" / "leak").symlink_to("../secret")
    refuse_link_outside(model / "config.json", model)
    refuse_link_outside(tmp_path / "plain" / "own", tmp_path / "plain")
    for folder in (model, tmp_path / "plain"):
        with pytest.raises(MegatronPruneError, match=f"leak is a link to {tmp_path}/secret, outside of {folder}"):
            refuse_link_outside(folder / "leak", folder)


# -- pickles ------------------------------------------------------------------------------------------


class Thing:
    def __init__(self, *parts: Any) -> None:
        self.parts = parts


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "value",
    [None, {"a": [1, 2.5, b"x", "y", (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)], "b": {1, 2}, "c": frozenset("ab")},
     Thing(1, Thing(2), [Thing(3)]), [("x",) * 3] * 1000, {n: str(n) for n in range(5000)}, doubled(12), -(2**63)],
)  # fmt: skip
def test_pickles_of_any_protocol_are_measured(value: Any, protocol: int) -> None:
    refuse_absurd(pickle.dumps(value, protocol))


@pytest.mark.parametrize("protocol", [1, 2, 4, 5])
@pytest.mark.parametrize("kind", [tuple, list, lambda pair=(): dict(enumerate(pair)), lambda p=(): Thing(*p)])
def test_what_doubles_is_refused(kind: Any, protocol: int) -> None:
    with pytest.raises(ValueError, match="stands for more than"):
        refuse_absurd(pickle.dumps(doubled(60, kind), protocol))


def test_what_doubles_from_the_top_down_is_refused() -> None:
    """Each list is put twice into the one above it while it is still empty, and filled afterwards."""
    steps = b"".join(b"]" + b"q" + bytes([n]) for n in range(41)) + b"".join(
        b"h" + bytes([n]) + b"h" + bytes([n + 1]) + b"ah" + bytes([n + 1]) + b"a0" for n in range(40)
    )
    payload = b"\x80\x02" + steps + b"h\x00."
    found = pickle.loads(payload)
    assert len(found) == 2 and found[0] is found[1]
    with pytest.raises(ValueError, match="stands for more than"):
        refuse_absurd(payload)


def nested(times: int) -> Any:
    value: Any = ()
    for _ in range(times):
        value = (value,)
    return value


def test_the_borders_of_depth_and_steps() -> None:
    refuse_absurd(pickle.dumps(nested(DEEPEST - 3)))
    with pytest.raises(ValueError, match="levels deep"):
        refuse_absurd(pickle.dumps(nested(DEEPEST + 1)))
    refuse_absurd(pickle.dumps(list(range(100))), most_opcodes=200)
    with pytest.raises(ValueError, match="more than 50 steps"):
        refuse_absurd(pickle.dumps(list(range(100))), most_opcodes=50)


@pytest.mark.parametrize(
    ("payload", "says"),
    [
        (b"\x80\x04\x85.", "damaged at its 1th step"), (b"\x80\x04h\x07.", "damaged"), (b"\x80\x04t.", "damaged"),
        (b"\x80\x04(0N.", ""), (b"\x80\x04N(\x86.", "damaged"), (b"\x80\x04NNb.", "no parts"),
        (b"\x80\x04N", "exhausted"),
        (b"\x80\x04\x82\x01.", "uses EXT1"), (pickle.dumps(1 << 100), "more than 64 bits"),
        (b"\x80\x02]q\x00h\x00a.", "contains itself"),
    ],
)  # fmt: skip
def test_damaged_pickles(payload: bytes, says: str) -> None:
    if not says:
        refuse_absurd(payload)
        return
    with pytest.raises(ValueError, match=says):
        refuse_absurd(payload)


# -- shards ---------------------------------------------------------------------------------------------


def box(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Box:
    return Box(Piece("key", None, offsets, sizes, "file", 0, 0), offsets, sizes, 0)  # type: ignore[arg-type]


def test_covers_is_what_counting_every_element_says() -> None:
    """All ways to choose up to four of twelve rectangles of a 3 x 4 tensor."""
    import itertools

    shape = (3, 4)
    rows = [(0, 1), (0, 3), (1, 2), (2, 1)]
    columns = [(0, 4), (0, 2), (2, 2)]
    boxes = [box((r, c), (h, w)) for (r, h), (c, w) in itertools.product(rows, columns)]
    agreed = 0
    for count in range(5):
        for chosen in itertools.combinations_with_replacement(boxes, count):
            held = [[0] * 4 for _ in range(3)]
            for one in chosen:
                for r in range(one.sizes[0]):
                    for c in range(one.sizes[1]):
                        held[one.offsets[0] + r][one.offsets[1] + c] += 1
            exactly = all(number == 1 for row in held for number in row)
            assert covers(chosen, shape) == exactly
            agreed += exactly
    assert agreed > 3
    assert not covers([box((0, 0), (3, 4)), box((3, 0), (1, 4))], shape)  # beyond the tensor
    assert covers([box((0, 0), (3, 4)), box((1, 0), (0, 4))], shape)  # nothing, in addition


# -- the screen -----------------------------------------------------------------------------------------


def test_control_characters_are_escaped() -> None:
    text = "a\x1b[2J\x07\r\x9b\u202eb\tc\nd\x7f\ud800é"
    assert printable(text) == "a\\x1b[2J\\x07\\r\\x9b\\u202eb\tc\nd\\x7f\\ud800é"
    assert printable("a\nb", lines=False) == "a\\nb"


@pytest.mark.parametrize(("terminal", "colour"), [(True, "\x1b[1m"), (False, "\\x1b[1m")])
def test_only_a_terminal_gets_colours(terminal: bool, colour: str) -> None:
    import io

    class Stream(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    stream = Stream()
    print("\x1b[1mbold\x1b[2J", file=Printable(stream))  # type: ignore[arg-type]
    assert stream.getvalue() == f"{colour}bold\\x1b[2J\n"


LIBRARY = r"""
import logging, sys, warnings
from megatron_prune import screen
bad = "no\x1b[2Jwhere\x07"
with screen.escaping():
    logger = logging.getLogger("with_a_handler")
    logger.addHandler(logging.StreamHandler())
    logger.warning("%s is odd", bad)
    logging.getLogger("without").error(f"{bad} is wrong")
    warnings.warn(bad)
    print(bad)
logging.getLogger("without").error(bad)
"""


def test_what_libraries_say_is_escaped() -> None:
    """Their warnings and their loggers, both those that have a handler and those that have none."""
    said = subprocess.run([sys.executable, "-c", LIBRARY], stderr=subprocess.STDOUT, stdout=subprocess.PIPE, check=True)
    assert said.stdout.count(rb"no\x1b[2Jwhere\x07") == 4
    assert said.stdout.endswith(b"no\x1b[2Jwhere\x07\n") and said.stdout.count(b"\x1b") == 1  # Python's own, afterwards


def test_the_traceback_of_a_bug_is_escaped(capsys: Any) -> None:
    try:
        raise ValueError("no\x1b[2Jwhere")
    except ValueError as error:
        screen.print_traceback(type(error), error, error.__traceback__)
    said = capsys.readouterr().err
    assert said.startswith("Traceback") and "ValueError: no\\x1b[2Jwhere\n" in said and "\x1b" not in said


def test_a_bad_name_is_escaped_in_every_error(capsys: Any) -> None:
    from megatron_prune.__main__ import main

    assert main(["inspect", "no\x1b[2Jwhere\nmegatron-prune: all is well"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "\x1b" not in said and "no\\x1b[2Jwhere\\nmegatron-prune" in said
