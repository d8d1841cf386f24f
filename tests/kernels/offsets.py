"""Where a compiled kernel computes an address that an integer was too small for."""

import re
from operator import add, floordiv, mul, sub

Interval = tuple[int, int]

LARGEST = {32: 2**31 - 1, 64: 2**63 - 1}
LOOP = re.compile(r"scf\.for %(\w+) = %([\w#]+) to %([\w#]+) step")
ASSIGNMENT = re.compile(r'%(\w+)(?::\d+)? = "?([\w.]+)"?(.*)')
INTEGER_RESULT = re.compile(r"(?:\b|x)i(32|64)[>)]*(?: \{)?$")
ARITHMETIC = {"arith.addi": add, "arith.subi": sub, "arith.muli": mul, "arith.divsi": floordiv}
# results have the values of their operand
COPIES = ("tt.splat", "tt.expand_dims", "tt.broadcast", "tt.reshape", "tt.trans", "arith.extsi", "arith.extui")


def overflowing_addresses(ttir: str, arguments: dict[str, int], grid: tuple[int, int, int]) -> list[str]:
    """The lines that move a pointer by an integer that may have overflowed, or that cannot be followed.

    Every integer is followed as an interval from the launch's integer `arguments` and its grid; divisors are taken to
    be positive. An integer that was loaded may be as large as its type allows, so that arithmetic on it is reported.
    """
    known: dict[str, Interval] = {name: (value, value) for name, value in arguments.items()}
    broken: set[str] = set()
    found = []
    for line in (line.partition(" loc(")[0].strip() for line in ttir.splitlines()):
        if loop := LOOP.search(line):
            index, start, end = loop.groups()
            is_followed = {start, end} <= known.keys() - broken
            known[index] = (known[start][0], known[end][1] - 1) if is_followed else (0, 0)
            (broken.discard if is_followed else broken.add)(index)
            # what the loop carries from trip to trip is not followed; its name may have been used before
            for carried in re.findall(r"%(\w+) = %", line[loop.end() :]):
                known.pop(carried, None)
        if not (assignment := ASSIGNMENT.match(line)):
            continue
        name, operation, rest = assignment.groups()
        operands = re.findall(r"%([\w#]+)", rest)
        if operation == "tt.addptr" and (operands[1] in broken or operands[1] not in known):
            found.append(line)
        if integer := INTEGER_RESULT.search(line):
            largest = LARGEST[int(integer[1])]
            everything = -largest - 1, largest
            low, high = _interval(operation, rest, [known.get(o, everything) for o in operands], grid) or everything
            overflows = low < everything[0] or high > everything[1] or operation.startswith("scf.")
            known[name] = everything if overflows else (low, high)
            (broken.add if overflows or broken & set(operands) else broken.discard)(name)
    return found


def _interval(operation: str, rest: str, operands: list[Interval], grid: tuple[int, int, int]) -> Interval | None:
    """Bounds of a result before it is cut to its type; None where the operation is not followed."""
    numbers = [int(number) for number in re.findall(r"-?\b\d+", rest)]
    if operation == "arith.constant":
        return numbers[0], numbers[0]
    if operation == "tt.get_program_id":
        return 0, grid["xyz".index(rest.split()[0])] - 1
    if operation == "tt.make_range":
        end, _, start, *_ = numbers
        return start, end - 1
    if operation in COPIES:
        return operands[0]
    if operation in ("arith.select", "arith.minsi", "arith.maxsi"):
        lows, highs = zip(*operands[-2:], strict=True)
        choose = {"arith.minsi": (min, min), "arith.maxsi": (max, max)}.get(operation, (min, max))
        return choose[0](lows), choose[1](highs)
    if operation == "arith.remsi":
        largest = max(operands[1][1], 1) - 1
        return (-largest if operands[0][0] < 0 else 0), min(largest, max(map(abs, operands[0])))
    if operation == "arith.divsi":
        operands[1] = tuple(max(bound, 1) for bound in operands[1])
    if operation not in ARITHMETIC:
        return None
    corners = [ARITHMETIC[operation](a, b) for a in operands[0] for b in operands[1]]
    return min(corners), max(corners)
