"""What the text of a compiled program and the trace of its steps tell of ``benchmarks.gpu``: kernels, and what they are for."""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from benchmarks.gpu_ways import RANK

BASE, THIN, BOTH = "products of the base", "thin products", "base and thin in one kernel"
KINDS = (BASE, THIN, BOTH, "attention", "head and loss", "optimiser", "elementwise and the rest", "of no operation")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_SHAPE = re.compile(r"\b[a-z]+\d+\w*\[([\d,]*)\]")
_PRODUCT = re.compile(r'custom_call_target="[^"]*(?:gemm|matmul|cublas)')
_CONTROL = ("while", "call", "conditional", "async-start", "async-update", "async-done")


class Instruction(NamedTuple):
    """One of a compiled program: the dimensions of its results, and the rest of its line."""

    shapes: list[tuple[int, ...]]
    opcode: str
    rest: str


class Program:
    """The text of a compiled program, taken apart."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if found := _COMPUTATION.match(line):
                current = self.computations.setdefault(found[1], {})
            elif found := _INSTRUCTION.match(line):
                shapes = [tuple(int(n) for n in dims.split(",") if n) for dims in _SHAPE.findall(found[2])]
                current[found[1]] = Instruction(shapes, found[3], found[4])
        self.home = {name: of for of, inside in self.computations.items() for name in inside}

    def called(self, one: Instruction, attribute: str = r"\w+") -> list[str]:
        """The computations that an instruction names in attributes of that name."""
        names = re.findall(rf"\b{attribute}=\{{?%?([\w.\-]+)", one.rest)
        return [name for name in names if name in self.computations]

    def products(self, of: str, one: Instruction) -> list[bool]:
        """For each product of matrices in an instruction of computation ``of``, whether the rank is one of its sides."""
        if one.opcode == "fusion":
            return [
                thin for name in self.called(one, "calls") for inner in self.computations[name].values()
                for thin in self.products(name, inner)
            ]  # fmt: skip
        if one.opcode != "dot" and not (one.opcode == "custom-call" and _PRODUCT.search(one.rest)):
            return []
        operands = [self.computations[of].get(name) for name in re.findall(r"[\w.\-]+", one.rest.split("), ")[0])]
        shapes = one.shapes + [shape for x in operands if x is not None for shape in x.shapes]
        # Of a stack the first axis counts layers; one product for several factors has a multiple of the rank.
        sides = {n for shape in shapes if len(shape) > 1 for n in shape[-2:]}
        return [bool(sides & {RANK, 2 * RANK, 3 * RANK})]

    def kind(self, name: str) -> str:
        """What an instruction is for, by the scopes the model gives names to and by the sizes of its products."""
        of = self.home[name]
        one = self.computations[of][name]
        found = re.search(r'op_name="([^"]*)"', one.rest)
        scope = found[1] if found else ""
        if "fmha" in one.rest:
            return "attention"
        for word, kind in (("optimiser", "optimiser"), ("attention", "attention"), ("head", "head and loss")):
            if re.search(rf"\b{word}\b", scope):
                return kind
        thin = self.products(of, one)
        if not thin:
            return "elementwise and the rest"
        return THIN if all(thin) else BOTH if any(thin) else BASE

    def products_in_loops(self) -> dict[str, int]:
        """How many instructions of each kind that multiplies the bodies of loops have: what one layer takes, forward and back."""
        instructions = [one for inside in self.computations.values() for one in inside.values()]
        todo = [name for one in instructions if one.opcode == "while" for name in self.called(one, "body")]
        seen: list[str] = []
        while todo:
            name = todo.pop()
            if name not in seen:
                seen.append(name)
                todo += [
                    n for one in self.computations[name].values() if one.opcode in _CONTROL for n in self.called(one)
                ]
        found = Counter(self.kind(name) for of in seen for name in self.computations[of])
        return {kind: found[kind] for kind in (BASE, THIN, BOTH)}


def events(trace: Path) -> Iterator[Any]:
    """What ran on the device: of a GPU its streams, of a CPU the threads of XLA."""
    planes = list(jax.profiler.ProfileData.from_file(str(trace)).planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    threads = [plane for plane in planes if plane.name == "/host:CPU" and jax.default_backend() == "cpu"]
    for plane in devices or threads:
        for line in plane.lines:
            if not devices or line.name.startswith(
                "Stream"
            ):  # other lines of a device repeat these by operation or module
                yield from line.events


def profile(trace: Path, program: Program, steps: int) -> dict[str, dict[str, float]]:
    """Milliseconds of the device and kernels of a step, by what they are for."""
    found = {kind: {"ms": 0.0, "kernels": 0.0} for kind in KINDS}
    for event in events(trace):
        name = dict(event.stats).get("hlo_op")
        if name is None and event.name.startswith(("Memcpy", "Memset")):
            kind = "of no operation"
        elif name is None:
            continue
        elif name not in program.home:
            kind = "of no operation"
        elif program.computations[program.home[name]][name].opcode in _CONTROL:
            continue  # its body is there too
        else:
            kind = program.kind(name)
        found[kind]["ms"] += event.duration_ns / 1e6 / steps
        found[kind]["kernels"] += 1 / steps
    return found
