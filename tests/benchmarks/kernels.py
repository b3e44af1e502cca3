"""What a compiled program moves: bytes of each kernel, by family, read from its HLO.

Every operand and result of a kernel counts once, of operands that are only sliced the slices. A
program can be compiled for a card that is not there (`topology`): XLA's CUDA plugin needs none.
"""

import collections
import dataclasses
import re
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "f16": 2,
    "bf16": 2,
    "c64": 8,
    "c128": 16,
}
_BYTES |= {f"{kind}{bits}": bits // 8 for kind in "suf" for bits in (32, 64)}
_SHAPE = re.compile(rf"\b({'|'.join(_BYTES)})\[([\d,]*)\](?:\{{([\d,]*))?")
_NO_KERNEL = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}
_NO_KERNEL |= {"copy-start", "copy-done", "opt-barrier"}
# The compiler's facts of an H100 (80 GB, SXM).
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84978434048
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One launch of a compiled program.

    Attributes:
      name: as the profiler shows it.
      family: convolution, product, reduction, concatenation, transposition, elementwise, ...
      lanes: of a reduction over leading axes, elements of the contiguous axes that stay; else 0.
      bytes: read and written.
      operation: where it comes from.
    """

    name: str
    family: str
    lanes: int
    bytes: int
    operation: str


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str


def absent_h100() -> NamedSharding:
    """The sharding of arrays on an H100 that need not be there; needs `jax[cuda12]`."""
    shape = "1 x 1 x 1"
    topology = topologies.get_topology_desc(shape, "cuda", topology=shape, target_config=H100)
    return NamedSharding(Mesh(np.array(topology.devices), ("data",)), PartitionSpec())


def kernels(compiled: jax.stages.Compiled) -> list[Kernel]:
    """The kernels of a program's main computation, in the order in which they run."""
    computations, entry = _parse(compiled.as_text())
    shapes = {i.name: i.shape for i in computations[entry]}
    found = []
    for instruction in computations[entry]:
        if instruction.opcode in _NO_KERNEL:
            continue
        body = _body(instruction, computations)
        family, lanes = _family(instruction, body)
        size = _size(instruction.shape)
        for place, operand in enumerate(instruction.operands):
            if operand not in instruction.operands[:place]:
                size += _read(place, _size(shapes.get(operand, "")), body)
        operation = re.search(r'op_name="([^"]*)"', instruction.rest)
        operation = operation.group(1) if operation else ""
        found.append(Kernel(instruction.name, family, lanes, size, operation))
    return found


def by_family(found: list[Kernel]) -> dict[str, tuple[int, int]]:
    """Family -> number of kernels and their bytes, the largest first."""
    totals: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
    for kernel in found:
        totals[kernel.family][0] += 1
        totals[kernel.family][1] += kernel.bytes
    return {k: tuple(v) for k, v in sorted(totals.items(), key=lambda row: -row[1][1])}


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """Instructions of every computation, and the name of the main one."""
    computations: dict[str, list[_Instruction]] = {}
    entry = current = ""
    for line in text.splitlines():
        head = re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)
        if head:
            current = head.group(2)
            computations[current] = []
            entry = current if head.group(1) else entry
        elif current and (instruction := _instruction(line.strip())):
            computations[current].append(instruction)
    return computations, entry


def _instruction(line: str) -> _Instruction | None:
    match = re.match(r"^(?:ROOT )?%?([\w.\-]+) = (.*)$", line)
    if not match:
        return None
    name, rest = match.groups()
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, call = rest[:end], rest[end:].strip()
    opcode = re.match(r"([\w\-]+)\(", call)
    if not opcode:
        return None
    begin = opcode.end() - 1
    end = _closing(call, begin)
    operands = tuple(re.findall(r"%([\w.\-]+)", call[begin:end]))
    if opcode.group(1) == "parameter":
        operands = (call[begin + 1 : end],)
    return _Instruction(name, shape, opcode.group(1), operands, call[end + 1 :])


def _closing(text: str, begin: int) -> int:
    """Index of the parenthesis that closes the one at `begin`."""
    depth = 0
    for index in range(begin, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if not depth:
            return index
    return len(text)


def _size(shape: str) -> int:
    return sum(
        _BYTES[kind] * int(np.prod([int(n) for n in sizes.split(",") if n]))
        for kind, sizes, _ in _SHAPE.findall(shape)
    )


def _body(instruction: _Instruction, computations: dict[str, Any]) -> list[_Instruction]:
    called = re.search(r"calls=%?([\w.\-]+)", instruction.rest)
    return computations.get(called.group(1), []) if called else []


def _family(instruction: _Instruction, body: list[_Instruction]) -> tuple[str, int]:
    if instruction.opcode == "custom-call":
        target = re.search(r'custom_call_target="([^"]+)"', instruction.rest).group(1)
        convolution = re.search(r"conv(BackwardFilter|BackwardInput|)", target)
        if convolution:
            names = {"BackwardFilter": "filter gradient", "BackwardInput": "input gradient"}
            return f"convolution, {names.get(convolution.group(1), 'forward')}", 0
        return ("product" if "cublas" in target else target), 0
    opcodes = {i.opcode for i in body} | {instruction.opcode}
    if opcodes & {"dot"} or "gemm" in instruction.name:
        return "product", 0
    if "convolution" in opcodes:
        return "convolution", 0
    if "reduce" in opcodes:
        lanes = _lanes(body)
        return ("reduction over the last axes" if lanes == 1 else "reduction"), lanes
    for opcode, family in (("concatenate", "concatenation"), ("transpose", "transposition")):
        if opcode in opcodes:
            return family, 0
    return ("elementwise" if instruction.opcode == "fusion" else instruction.opcode), 0


def _lanes(body: list[_Instruction]) -> int:
    """Elements of the contiguous axes that the largest reduction of a fusion leaves."""
    shapes = {i.name: i.shape for i in body}
    largest = (0, 1)
    for instruction in body:
        if instruction.opcode != "reduce":
            continue
        _, sizes, order = _SHAPE.search(shapes[instruction.operands[0]]).groups()
        sizes = [int(n) for n in sizes.split(",") if n]
        order = [int(n) for n in (order or "").split(",") if n] or range(len(sizes))[::-1]
        axes = re.search(r"dimensions=\{([\d,]*)\}", instruction.rest).group(1)
        reduced = {int(n) for n in axes.split(",") if n}
        lanes = 1
        for axis in order:
            if axis in reduced:
                break
            lanes *= sizes[axis]
        largest = max(largest, (int(np.prod(sizes)), lanes))
    return largest[1]


def _read(place: int, size: int, body: list[_Instruction]) -> int:
    """Bytes read of a kernel's operand: of one that is only sliced, the slices."""
    names = [i.name for i in body if i.opcode == "parameter" and i.operands == (str(place),)]
    shapes = {i.name: i.shape for i in body}

    def sliced(name: str) -> int | None:
        total = 0
        for user in (i for i in body if name in i.operands):
            if user.opcode == "slice":
                total += size * _size(user.shape) // max(_size(shapes[name]), 1)
            elif user.opcode in ("bitcast", "convert", "copy"):
                part = sliced(user.name)
                if part is None:
                    return None
                total += part
            else:
                return None
        return total

    part = sliced(names[0]) if names else None
    return size if part is None else min(part, size)
