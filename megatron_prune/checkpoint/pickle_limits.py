"""What unpickling would build, measured before it happens.

A pickle is a program. The allow-lists of ``safe.py`` and ``safe_objects.py`` decide which names it may use; this module
decides how much it may build. A few hundred bytes can describe a tuple of two tuples of two tuples …, whose hash, text
or traversal takes 2^60 steps, and a memo index of 2^31 makes an unpickler allocate gigabytes. ``measure`` runs the
program on sizes in place of values: every value is a number of parts, and references to parts that were stored in the
memo are counted each time. It executes nothing, and takes about as long as unpickling.
"""

from __future__ import annotations

import hashlib
import pickletools

MOST_OPCODES = 1_000_000
DEEPEST = 200  # a checkpoint's index has about 12 levels
_SHARED = 16  # how often the parts of a value may be referred to, on average
_FEW = 100_000  # values that may be reached in any case

_LARGEST = 1 << 70

# What an opcode does to the stack.
_PUSH, _GET, _MEMOIZE, _MARK, _MAKE, _ADD, _FIND, _DROP, _EMPTY, _PUT, _POP, _DUP, _NOTHING, _REFUSED = range(14)
_TAKING = (_MAKE, _ADD, _FIND, _DROP)
# With the number of values that it takes; 0: those after the last mark.
_BY_NAME = {
    **dict.fromkeys(
        "INT BININT BININT1 BININT2 LONG LONG1 LONG4 STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES "
        "BINBYTES8 BYTEARRAY8 NONE NEWTRUE NEWFALSE UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 FLOAT BINFLOAT "
        "GLOBAL PERSID".split(),
        (_PUSH, 0),
    ),
    **dict.fromkeys(["GET", "BINGET", "LONG_BINGET"], (_GET, 0)),
    **dict.fromkeys(["PUT", "BINPUT", "LONG_BINPUT"], (_PUT, 0)),
    **dict.fromkeys(["EMPTY_LIST", "EMPTY_TUPLE", "EMPTY_DICT", "EMPTY_SET"], (_EMPTY, 0)),
    **dict.fromkeys(["TUPLE", "LIST", "DICT", "FROZENSET", "INST", "OBJ"], (_MAKE, 0)),
    **dict.fromkeys(["APPENDS", "SETITEMS", "ADDITEMS"], (_ADD, 0)),
    **dict.fromkeys(["PROTO", "FRAME", "STOP"], (_NOTHING, 0)),
    "TUPLE1": (_MAKE, 1), "TUPLE2": (_MAKE, 2), "TUPLE3": (_MAKE, 3), "REDUCE": (_MAKE, 2), "NEWOBJ": (_MAKE, 2),
    "NEWOBJ_EX": (_MAKE, 3), "APPEND": (_ADD, 1), "SETITEM": (_ADD, 2), "BUILD": (_ADD, 1),
    "STACK_GLOBAL": (_FIND, 2), "BINPERSID": (_FIND, 1), "POP_MARK": (_DROP, 0), "MEMOIZE": (_MEMOIZE, 0),
    "MARK": (_MARK, 0), "POP": (_POP, 0), "DUP": (_DUP, 0),
}  # fmt: skip
_KINDS = {opcode.code: _BY_NAME.get(opcode.name, (_REFUSED, 0)) for opcode in pickletools.opcodes}


def refuse_absurd(payload: bytes, most_opcodes: int = MOST_OPCODES) -> None:
    """Raise ValueError for a pickle that would build too much, contains itself, or is not a pickle.

    The walk takes longer than unpickling, and a run opens the same index up to nine times: an answer is remembered.
    """
    digest = hashlib.sha256(payload).digest()
    if _sound.get(digest, most_opcodes + 1) > most_opcodes:
        _sound[digest] = _measure(payload, most_opcodes)


_sound: dict[bytes, int] = {}  # steps of the pickles that were accepted in this process, by their digest


def _measure(payload: bytes, most_opcodes: int) -> int:
    """The number of steps of an acceptable pickle."""
    parts: list[list[int]] = [[0]]  # of every value: how many, and which of them have parts; 0 stands for those without
    stack: list[int] = []
    marks: list[int] = []
    memo: dict[int, int] = {}
    kinds = _KINDS
    number = 0
    try:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(payload)):
            kind, count = kinds[opcode.code]
            if kind == _PUSH:
                if argument.__class__ is int and not -_LARGEST < argument < _LARGEST:
                    raise ValueError("it holds a number of more than 64 bits")
                stack.append(0)
            elif kind == _GET:
                stack.append(memo[int(argument or 0)])
            elif kind == _MEMOIZE:
                memo[len(memo)] = stack[-1]
            elif kind == _MARK:
                marks.append(len(stack))
            elif kind in _TAKING:
                first = len(stack) - count if count else marks.pop()
                if first < (marks[-1] if marks else 0):
                    raise IndexError
                items = stack[first:]
                del stack[first:]
                if kind == _MAKE:
                    parts.append([len(items), *filter(None, items)])
                    stack.append(len(parts) - 1)
                elif kind == _ADD:
                    if not stack[-1]:
                        raise ValueError("it adds to a value that has no parts")
                    whole = parts[stack[-1]]
                    whole[0] += len(items)
                    whole.extend(filter(None, items))
                elif kind == _FIND:
                    stack.append(0)
            elif kind == _EMPTY:
                parts.append([0])
                stack.append(len(parts) - 1)
            elif kind == _PUT:
                if not 0 <= int(argument or 0) <= number:
                    raise ValueError(f"it numbers its {number}th value {argument}")
                memo[int(argument or 0)] = stack[-1]
            elif kind == _POP:
                if marks and marks[-1] == len(stack):
                    marks.pop()
                else:
                    stack.pop()
            elif kind == _DUP:
                stack.append(stack[-1])
            elif kind == _REFUSED:
                raise ValueError(f"it uses {opcode.name}, which no checkpoint needs")
            if number >= most_opcodes:
                raise ValueError(f"it has more than {most_opcodes:,} steps")
    except (IndexError, KeyError) as error:
        raise ValueError(f"it is damaged at its {number}th step") from error
    _refuse_large(parts, _FEW + _SHARED * number)
    return number + 1


def _refuse_large(parts: list[list[int]], most: int) -> None:
    """Raise ValueError if a value, with all that it refers to, has more than ``most`` parts or contains itself."""
    size = [1 + part[0] if len(part) == 1 else 0 for part in parts]  # 0: not measured yet
    depth = [1 + (count > 1) for count in size]
    for start in range(1, len(parts)):
        waiting = [start] if not size[start] else []
        while waiting:
            here = waiting[-1]
            if size[here] > 0:
                waiting.pop()
                continue
            inner = parts[here][1:]
            if size[here] == 0 and inner:
                size[here] = -1  # its parts are being measured
                for part in inner:
                    if size[part] < 0:
                        raise ValueError("it contains itself")
                    if size[part] == 0:
                        waiting.append(part)
                continue
            size[here] = 1 + parts[here][0] + sum([size[part] for part in inner])
            depth[here] = 1 + max([depth[part] for part in inner], default=1)
            if size[here] > most:
                raise ValueError(f"it stands for more than {most:,} values")
            if depth[here] > DEEPEST:
                raise ValueError(f"it is nested more than {DEEPEST} levels deep")
            waiting.pop()
