"""Safe pickle parsing by a closed set of instructions: nothing is imported, looked up, built or called.

torch.save and PyTorch's distributed checkpoints describe their contents by pickles. Here a class or function is a name
that must be in the caller's list, and a call of it is a `Call`, which the caller interprets. Other instructions
(extensions, protocol 0, out-of-band buffers) are refused.
"""

import struct
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, NoReturn

from switti.suggestions import printable

# Module, qualified name.
Global = tuple[str, str]
_MAX_MARKS = 1000
# The hashes of larger numbers can be made to collide.
_LARGEST_KEY = 2**31


class PickleError(ValueError):
    """A pickle that is corrupt, or that asks for more than data."""


@dataclass(slots=True, eq=False)
class Call:
    """What unpickling would have called or built. It would then get `state` (BUILD), an OrderedDict also `items`."""

    name: Global
    arguments: tuple[Any, ...]
    state: Any = None
    items: dict[Any, Any] | None = None


@dataclass(frozen=True, slots=True)
class Reference:
    """The name of a class, function or constant, as a value."""

    name: Global


@dataclass(slots=True, eq=False)
class Persistent:
    """Something that lies outside the pickle, by the identifier that the pickle gives it."""

    identifier: Any


def parse_pickle(content: bytes, allowed: Collection[Global]) -> tuple[Any, int]:
    """(the value, the number of bytes it takes): containers, numbers, text, and `Call`, `Reference`, `Persistent`.

    allowed: every (module, name) that may occur. Time and memory are proportional to the length of `content`. Raises
    PickleError, in one line, for anything but a complete pickle of protocol 2 to 5 that names only those.
    """
    return _Machine(content, allowed).run()


class _Machine:
    def __init__(self, content: bytes, allowed: Collection[Global]) -> None:
        self.content, self.allowed = content, allowed
        self.position = 0
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> tuple[Any, int]:
        content, steps = self.content, _STEPS
        try:
            if content[:1] != b"\x80" or not 2 <= content[1] <= 5:
                raise PickleError("it is not a pickle of protocol 2 to 5")
            self.position = 2
            while (code := content[self.position]) != _STOP:
                self.position += 1
                step = steps.get(code)
                if step is None:
                    raise PickleError(
                        f"it holds the pickle instruction 0x{code:02x}, which data does not need"
                    )
                step(self)
            if len(self.stack) != 1 or self.marks:
                raise PickleError("it is corrupt")
            return self.stack[0], self.position + 1
        except PickleError:
            raise
        except (IndexError, KeyError, ValueError, AttributeError, TypeError, struct.error) as error:
            raise PickleError("it is corrupt or cut off") from error

    # ---- bytes -----------------------------------------------------------------------------------------------

    def take(self, count: int) -> bytes:
        end = self.position + count
        if count < 0 or end > len(self.content):
            raise PickleError("it is cut off")
        part = self.content[self.position : end]
        self.position = end
        return part

    def number(self, form: str, size: int) -> Any:
        return struct.unpack(form, self.take(size))[0]

    def line(self) -> str:
        end = self.content.index(b"\n", self.position)
        return self.take(end + 1 - self.position)[:-1].decode()

    # ---- containers ------------------------------------------------------------------------------------------

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def mark(self) -> None:
        if len(self.marks) == _MAX_MARKS:
            raise PickleError("it is nested too deeply")
        self.marks.append(self.stack)
        self.stack = []

    def above_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise PickleError("it is corrupt")
        items = tuple(self.stack[len(self.stack) - count :])
        self.stack[len(self.stack) - count :] = [items]

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            self.refuse(target)
        target.extend(items)

    def assign(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is Call and target.name == ("collections", "OrderedDict"):
            target.items = {} if target.items is None else target.items
            target = target.items
        if type(target) is not dict:
            self.refuse(target)
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not is_key(key):
                raise PickleError(f"it has a key of type {type(key).__name__}, which data does not need")
            target[key] = value

    def refuse(self, target: Any) -> NoReturn:
        raise PickleError(f"it fills a {type(target).__name__} as if it were a container")

    # ---- names and calls -------------------------------------------------------------------------------------

    def reference(self, module: Any, name: Any) -> None:
        if (module, name) not in self.allowed:
            named = printable(f"{module}.{name}")
            raise PickleError(
                f"it would run code ({named}) when loaded, which is refused; ask for plain tensors"
            )
        self.stack.append(Reference((module, name)))

    def stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if type(module) is not str or type(name) is not str:
            raise PickleError("it is corrupt")
        self.reference(module, name)

    def call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if type(function) is not Reference or type(arguments) is not tuple:
            raise PickleError("it calls something that is not a name")
        self.stack.append(Call(function.name, arguments))

    def build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if type(target) is not Call or target.state is not None:
            raise PickleError("it changes something that it has not built")
        target.state = state

    def remember(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def recall(self, index: int) -> None:
        self.stack.append(self.memo[index])


def is_key(key: Any) -> bool:
    """Text, small numbers and calls (by identity): nobody can choose keys whose hashes take long or collide."""
    return type(key) in (str, Call) or (type(key) is int and 0 <= key < _LARGEST_KEY)


_STOP = ord(".")
_STEPS: dict[int, Callable[[_Machine], Any]] = {
    code[0]: step
    for code, step in {
        b"\x95": lambda m: m.take(8),  # FRAME
        b"(": _Machine.mark,
        b"N": lambda m: m.push(None),
        b"\x88": lambda m: m.push(True),
        b"\x89": lambda m: m.push(False),
        b"J": lambda m: m.push(m.number("<i", 4)),
        b"K": lambda m: m.push(m.number("<B", 1)),
        b"M": lambda m: m.push(m.number("<H", 2)),
        b"\x8a": lambda m: m.push(int.from_bytes(m.take(m.number("<B", 1)), "little", signed=True)),
        b"G": lambda m: m.push(m.number(">d", 8)),
        b"X": lambda m: m.push(m.take(m.number("<I", 4)).decode("utf-8", "surrogatepass")),
        b"\x8c": lambda m: m.push(m.take(m.number("<B", 1)).decode("utf-8", "surrogatepass")),
        b"B": lambda m: m.push(m.take(m.number("<I", 4))),
        b"C": lambda m: m.push(m.take(m.number("<B", 1))),
        b")": lambda m: m.push(()),
        b"]": lambda m: m.push([]),
        b"}": lambda m: m.push({}),
        b"t": lambda m: m.push(tuple(m.above_mark())),
        b"\x85": lambda m: m.tuple_of(1),
        b"\x86": lambda m: m.tuple_of(2),
        b"\x87": lambda m: m.tuple_of(3),
        b"a": lambda m: m.extend([m.stack.pop()]),
        b"e": lambda m: m.extend(m.above_mark()),
        b"s": lambda m: (m.tuple_of(2), m.assign(list(m.stack.pop()))),
        b"u": lambda m: m.assign(m.above_mark()),
        b"c": lambda m: m.reference(m.line(), m.line()),
        b"\x93": _Machine.stack_global,
        b"R": _Machine.call,
        b"\x81": _Machine.call,  # NEWOBJ
        b"b": _Machine.build,
        b"Q": lambda m: m.push(Persistent(m.stack.pop())),
        b"q": lambda m: m.remember(m.number("<B", 1)),
        b"r": lambda m: m.remember(m.number("<I", 4)),
        b"\x94": lambda m: m.remember(len(m.memo)),
        b"h": lambda m: m.recall(m.number("<B", 1)),
        b"j": lambda m: m.recall(m.number("<I", 4)),
    }.items()
}
