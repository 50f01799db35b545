"""Builds reasoners._C, the torch extension that holds every kernel.

    pip install -e .               build against the torch of the target environment
    python setup.py build_ext -i   the same without pip
    python setup.py build_device   only the CUDA device code, to objects in build/device (needs nvcc, no GPU)

CUDA is built when the torch at hand was (`torch.version.cuda`), not when nvcc happens to exist.
Device code includes no torch header, so each csrc/cuda/*.cu compiles in about a second to an object
that is named by its content and reused: a GPU machine that finds the objects in build/device
compiles only csrc/cuda/bindings.cpp and links.

Environment: TORCH_CUDA_ARCH_LIST (default 9.0a), MAX_JOBS, REASONERS_CPU_ARCH (default native).
"""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Command, setup

ROOT = Path(__file__).parent.resolve()
os.chdir(ROOT)


def import_torch():
    """The torch of the environment that will load the extension, also under build isolation."""
    if importlib.util.find_spec("torch") is None:
        sys.path.append(sysconfig.get_paths()["purelib"])
    try:
        import torch
    except ImportError:
        sys.exit("reasoners: PyTorch not found: run `pip install 'torch>=2.11'` first, then again")
    found = tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2])
    if found < (2, 11):
        sys.exit(f"reasoners: torch expected >= 2.11, got {torch.__version__}")
    return torch


def cutlass_include():
    """(include directory, version) of third_party/cutlass or the nvidia-cutlass wheel, else (None, "")."""
    sys.path.append(sysconfig.get_paths()["purelib"])
    wheel = importlib.util.find_spec("cutlass_library")
    candidates = [ROOT / "third_party/cutlass/include"]
    if wheel is not None and wheel.origin:
        candidates.append(Path(wheel.origin).parent / "source/include")
    for include in candidates:
        header = include / "cutlass/version.h"
        if header.exists():
            text = header.read_text()
            parts = [
                re.search(rf"#define CUTLASS_{p} (\d+)", text) for p in ("MAJOR", "MINOR", "PATCH")
            ]
            return include, ".".join(p.group(1) for p in parts if p)
    return None, ""


def cuda_archs():
    """Targets as nvcc numbers, from TORCH_CUDA_ARCH_LIST: "9.0a 8.0+PTX" -> ["90a", "80+PTX"]."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split() or ["9.0a"]
    return [arch.replace(".", "") for arch in listed]


def gencode(arch):
    number = arch.removesuffix("+PTX")
    flags = [f"-gencode=arch=compute_{number},code=sm_{number}"]
    if arch.endswith("+PTX"):
        flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def included(source):
    """A source and the project's own headers that it includes, directly or through others."""
    found, queue = set(), [source]
    while queue:
        path = queue.pop()
        if path in found:
            continue
        found.add(path)
        for name in re.findall(r'#include "(.*?)"', path.read_text()):
            queue += [p for p in (path.parent / name, Path("csrc") / name) if p.exists()][:1]
    return found


def compile_device_code():
    """Compile each csrc/cuda/*.cu to build/device/<name>-<digest>.o; returns the objects."""
    include, version = cutlass_include()
    flags = ["-std=c++17", "-O3", "-lineinfo", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC"]
    flags += ["-Icsrc"] + [flag for arch in cuda_archs() for flag in gencode(arch)]
    sources = sorted(Path("csrc/cuda").glob("*.cu"))
    folder = Path("build/device")
    folder.mkdir(parents=True, exist_ok=True)

    def compile_one(source):
        text = "".join(path.read_text() for path in sorted(included(source))) + " ".join(flags)
        if re.search(r"#include <cut(e|lass)/", text):
            text += version
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        target = folder / f"{source.stem}-{digest}.o"
        if target.exists():
            print(f"reasoners: {source} is compiled already")
            return target
        home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
        nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
        if nvcc is None:
            sys.exit(f"reasoners: {source} needs nvcc, which is on neither PATH nor {home}/bin")
        command = [nvcc, *flags, "-c", str(source), "-o", f"{target}.tmp"]
        if include is not None:
            command.insert(1, f"-I{include}")
        print(" ".join(command), flush=True)
        if subprocess.run(command).returncode:
            sys.exit(f"reasoners: nvcc failed on {source}")
        os.replace(f"{target}.tmp", target)
        for stale in folder.glob(f"{source.stem}-*.o"):
            if stale != target and stale.stem.rpartition("-")[0] == source.stem:
                stale.unlink()
        return target

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        return [str(path) for path in pool.map(compile_one, sources)]


class BuildDevice(Command):
    """`python setup.py build_device`: the CUDA objects alone."""

    description = "compile csrc/cuda/*.cu to objects (no torch, no GPU)"
    user_options = []  # noqa: RUF012, distutils wants a list

    def initialize_options(self):
        pass

    def finalize_options(self):
        pass

    def run(self):
        for path in compile_device_code():
            print(path)


def cpu_flags():
    """Compiler flags for this machine's vector unit, and the macros that select ATen's vector type."""
    arch = [f"-march={os.environ.get('REASONERS_CPU_ARCH', 'native')}"]
    compiler = os.environ.get("CXX", "c++")
    probe = subprocess.run(
        [compiler, *arch, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True
    )
    if probe.returncode:
        return []
    if "__AVX512BW__" in probe.stdout and "__AVX512VL__" in probe.stdout:
        return [*arch, "-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512"]
    if "__AVX2__" in probe.stdout and "__FMA__" in probe.stdout:
        return [*arch, "-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2"]
    return arch


def extension():
    torch = import_torch()
    from torch.utils import cpp_extension

    cuda = torch.version.cuda is not None
    sources = ["csrc/ops.cpp", *sorted(map(str, Path("csrc/cpu").glob("*.cpp")))]
    define = [f'-DREASONERS_CUDA_ARCHS="{" ".join(cuda_archs()) if cuda else ""}"']
    define.append(f'-DREASONERS_CUTLASS_VERSION="{cutlass_include()[1]}"')
    # No -ffast-math: infinities and NaN must stay visible. These two only free the vectoriser.
    flags = ["-std=c++20", "-O3", "-g0", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"]
    # torch's own vector headers carry pragmas of other compilers.
    flags += ["-Wno-unknown-pragmas", *cpu_flags()]
    # Link the OpenMP runtime that torch itself carries: a second one would bring a second pool of
    # spinning threads that fights torch's for the cores.
    openmp = sorted(Path(torch.__file__).parent.glob("lib/lib*omp*.so*"))
    arguments = {
        "name": "reasoners._C",
        "include_dirs": [str(ROOT / "csrc")],
        "depends": [str(p) for p in sorted(Path("csrc").rglob("*.h"))],
        "extra_compile_args": {"cxx": flags + define},
        "extra_link_args": [str(openmp[0])] if openmp else ["-fopenmp"],
    }
    if cuda:
        return cpp_extension.CUDAExtension(
            sources=[*sources, "csrc/cuda/bindings.cpp"],
            extra_objects=compile_device_code(),
            define_macros=[("REASONERS_WITH_CUDA", None)],
            **arguments,
        ), cpp_extension.BuildExtension
    return cpp_extension.CppExtension(sources=sources, **arguments), cpp_extension.BuildExtension


# The extension is configured only by the commands that build it, so that reading metadata and
# compiling device code work without torch.
BUILDS = {"build", "build_ext", "bdist_wheel", "editable_wheel", "develop", "install"}
if BUILDS & set(sys.argv):
    module, build_ext = extension()
    setup(
        ext_modules=[module],
        cmdclass={"build_ext": build_ext.with_options(use_ninja=True), "build_device": BuildDevice},
    )
else:
    setup(cmdclass={"build_device": BuildDevice})
