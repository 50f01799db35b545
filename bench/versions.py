"""Versions of the scan's Hopper kernel beside each other.

A device's clocks fall while it works, so that a version which is timed after another one looks slower: here
they alternate. Each is a shared library with nothing but ssd_scan_wgmma.cu in it, which takes half a minute
to compile and no binding to load, so that a device can time many in one call.

    python bench/versions.py build before HEAD~1
    python bench/versions.py build now
    python bench/versions.py build unfolded . 's/kMostFolded = 8/kMostFolded = 0/'
    python bench/versions.py time before now unfolded [-k 'llamba-1b 1 x']

build NAME [TREE [SED...]]: a commit's tree or a folder's (the working tree's), in which `sed` may change
ssd_scan_wgmma.cu. Needs nvcc; compiled for sm_90a into build/versions.
time NAME...: medians in microseconds; = and != say whether y has the bits that the first version gives.
"""

import argparse
import ctypes
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "versions"
ROUNDS = 11


def build(name, tree, edits):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise SystemExit("versions.py: no nvcc to compile with")
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as copy:
        if Path(tree).is_dir():
            shutil.copytree(Path(tree) / "csrc", Path(copy) / "csrc")
        else:
            archive = subprocess.run(
                ["git", "archive", tree, "csrc"], cwd=ROOT, check=True, capture_output=True
            )
            subprocess.run(["tar", "-x", "-C", copy], input=archive.stdout, check=True)
        sources = Path(copy) / "csrc"
        for edit in edits:
            file = sources / "cuda" / "ssd_scan_wgmma.cu"
            before = file.read_text()
            subprocess.run(["sed", "-i", edit, file], check=True)
            if file.read_text() == before:
                raise SystemExit(f"versions.py: {edit!r} changes nothing")
        target = FOLDER / f"{name}.so"
        subprocess.run(
            [
                nvcc, "-shared", "-std=c++17", "-O3", "-lineinfo", "--expt-relaxed-constexpr",
                "-Xcompiler=-fPIC", "-gencode=arch=compute_90a,code=sm_90a",
                f"-I{sources}", f"-I{sources / 'cuda'}", ROOT / "bench" / "versions.cu",
                "-o", target,
            ],
            check=True,
        )  # fmt: skip
    print(target.relative_to(ROOT))


def load(name):
    library = ctypes.CDLL(str(FOLDER / f"{name}.so"))
    library.count_scratch.restype = ctypes.c_int64
    return library


def prepare(library, inputs, case):
    """call() -> y, by this version."""
    import torch

    batch, length, heads, head_dim, state_dim, shared = case
    sizes = (ctypes.c_int64 * 8)(batch, length, heads, *shared, head_dim, state_dim)
    y = torch.empty(batch, length, heads, head_dim, dtype=torch.bfloat16, device="cuda")
    state = torch.empty(batch, heads, head_dim, state_dim, device="cuda")
    scratch = torch.empty(max(library.count_scratch(sizes), 1), device="cuda")
    tickets = torch.zeros(1024, dtype=torch.int32, device="cuda")
    tensors = *inputs.values(), y, state, scratch, tickets
    pointers = (ctypes.c_void_p * 9)(*(tensor.data_ptr() for tensor in tensors))

    def call():
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        error = library.scan(sizes, pointers, stream)
        if error:
            raise RuntimeError(f"versions.py: CUDA error {error}")
        return tensors[5]

    return call


def time(names, words):
    import bench_ssd_scan
    import torch
    from conftest import device_timer

    libraries = {name: load(name) for name in names}
    print(f"{torch.cuda.get_device_name()}, us: {', '.join(names)}")
    for title, case in bench_ssd_scan.CASES.items():
        if words not in title:
            continue
        torch.manual_seed(0)
        inputs = bench_ssd_scan.make_cuda(*case)
        calls = {name: prepare(library, inputs, case) for name, library in libraries.items()}
        first = calls[names[0]]()
        bits = {name: "=" if torch.equal(call(), first) else "!=" for name, call in calls.items()}
        timers = {name: device_timer([call], graph=True) for name, call in calls.items()}
        times = {name: [] for name in names}
        for turn in range(ROUNDS):
            begin = turn % len(names)
            for name in [*names[begin:], *names[:begin]]:
                times[name].append(timers[name]() * 1e6)
        cells = (f"{statistics.median(times[name]):8.1f} {bits[name]:2}" for name in names)
        print(f"{title:28}{''.join(cells)}", flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    building = commands.add_parser("build")
    building.add_argument("name")
    building.add_argument("tree", nargs="?", default=str(ROOT))
    building.add_argument("edits", nargs="*")
    timing = commands.add_parser("time")
    timing.add_argument("names", nargs="+")
    timing.add_argument("-k", dest="words", default="", help="cases whose names have this in them")
    arguments = parser.parse_args()
    if arguments.command == "build":
        build(arguments.name, arguments.tree, arguments.edits)
    else:
        time(arguments.names, arguments.words)
