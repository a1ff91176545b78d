"""Kernels cross-compiled without a GPU: registers, spills, shared memory and the code of each.

A session that interprets kernels (TRITON_INTERPRET=1) cannot compile them, so `cross_compile` starts one process
without that variable for a list of builds; the process is this file, pickled jobs in and JSON out.
"""

import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHARED_MEMORY = {
    80: 166_912,
    90: 232_448,
}  # bytes that a program may hold: 163 KiB of an A100, 227 KiB of an H100


@dataclass
class Build:
    """A kernel "package.module:function", the types of its arguments by name ("*fp32", "i32"; "i64", "fp32" …; left
    out: those in `constants`), the values of its constexpr arguments (None: an argument that is not there), and which
    arguments are divisible by 16, as those of aligned tensors are."""

    kernel: str
    types: dict[str, str]
    constants: dict = field(default_factory=dict)
    capability: int = 90
    num_warps: int = 4
    num_stages: int = 3
    divisible: Sequence[str] = ()


@dataclass
class Compiled:
    registers: int  # per thread
    spills: int  # bytes, stores and loads together
    shared: int  # bytes per program
    ttgir: str

    def fits(self, capability: int) -> bool:
        spilled = 32 if version("triton").startswith("3.8.") else 0  # bytes, in two kernels
        return self.spills <= spilled and self.shared <= SHARED_MEMORY[capability]


def cross_compile(builds: Sequence[Build]) -> list[Compiled]:
    """Compiles all in one process. Skips the test where the tools that read registers and spills are missing."""
    import pytest

    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, __file__],
        input=pickle.dumps([vars(build) for build in builds]),
        env=environment | {"PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
    )
    if ran.returncode == 3:
        pytest.skip(ran.stdout.decode().strip())
    assert ran.returncode == 0, ran.stderr.decode()[-4000:]
    return [Compiled(**result) for result in json.loads(ran.stdout)]


def compile_for(build: Build) -> Compiled:
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = build.kernel.split(":")
    kernel = getattr(importlib.import_module(module), name)
    signature = {argument: build.types.get(argument, "constexpr") for argument in kernel.arg_names}
    missing = [
        name
        for name, type in signature.items()
        if type == "constexpr" and name not in build.constants
    ]
    assert not missing, f"{name}: neither a type nor a value for {', '.join(missing)}"
    divisible = {
        (kernel.arg_names.index(argument),): [["tt.divisibility", 16]]
        for argument in build.divisible
    }
    compiled = triton.compile(
        ASTSource(kernel, signature, dict(build.constants), divisible),
        target=GPUTarget("cuda", build.capability, 32),
        options={"num_warps": build.num_warps, "num_stages": build.num_stages},
    )
    registers, spills = resources(compiled.asm["ptx"], build.capability)
    return Compiled(registers, spills, compiled.metadata.shared, compiled.asm["ttgir"])


def resources(ptx: str, capability: int) -> tuple[int, int]:
    """Registers per thread and bytes spilled, as the assembler that Triton brings along reports them."""
    architecture = f"sm_{capability}a" if capability == 90 else f"sm_{capability}"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        for tool in assemblers():
            flags = ["-v", f"-arch={architecture}", "-lineinfo", "-o", os.devnull]
            if "blackwell" in tool.name:
                flags.insert(0, "--regAllocOptLevel=2")
            report = subprocess.run([tool, *flags, source], capture_output=True, text=True)
            if report.returncode == 0:
                registers = re.search(r"Used (\d+) registers", report.stderr)
                spills = re.search(
                    r"(\d+) bytes spill stores, (\d+) bytes spill loads", report.stderr
                )
                return int(registers[1]), int(spills[1]) + int(spills[2])
    print("no assembler of this Triton reports registers and spills for its PTX")
    sys.exit(3)


def assemblers() -> list[Path]:
    import triton.backends.nvidia

    folder = Path(next(iter(triton.backends.nvidia.__path__))) / "bin"
    return [folder / name for name in ("ptxas-blackwell", "ptxas") if (folder / name).is_file()]


if __name__ == "__main__":
    results = [asdict(compile_for(Build(**job))) for job in pickle.load(sys.stdin.buffer)]
    print(json.dumps(results))
