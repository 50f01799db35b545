"""`reasoners doctor`: what is installed, what was compiled, and whether every operator is right here."""

import importlib.metadata
import inspect
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One line of the report: a subject, what was found, and whether that is well."""

    subject: str
    found: str
    ok: bool = True


def examine() -> Iterator[Finding]:
    """Look at one thing after the other; later ones are left out when an earlier one makes them moot."""
    yield Finding("python", f"{platform.python_version()} at {sys.executable}")
    yield _owner()
    try:
        import torch
    except ImportError as error:
        yield Finding("torch", f"{error}: run `pip install 'torch>=2.11'`", False)
        return
    yield Finding("torch", f"{torch.__version__}, {torch.get_num_threads()} threads")
    try:
        from reasoners import ops
    except ImportError as error:
        yield Finding("extension", f"{error}: build it with `pip install -e .`", False)
        return
    build = ops.build
    same = build["torch_version"] == torch.__version__.split("+")[0]
    against = f"built against torch {build['torch_version']}"
    yield Finding("extension", against + ("" if same else ": build it again"), same)
    yield Finding("CPU kernels", f"{build['cpu_vectors']} vectors")
    yield _cuda(torch, build)
    for package in ("transformers", "safetensors", "math-verify", "matplotlib"):
        try:
            yield Finding(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(package, f"missing: run `pip install {package}`", False)
    devices = ["cpu"]
    if build["compiled_with_cuda"] and torch.cuda.is_available():
        devices.append("cuda")
    for device in devices:
        yield from _operators(device)


def _owner() -> Finding:
    """Another distribution on the index installs an import of the same name."""
    import reasoners

    owners = set(importlib.metadata.packages_distributions().get("reasoners", ()))
    others = owners - {"distilled-reasoners"}
    if others:
        return Finding(
            "package",
            f"the import `reasoners` also belongs to {', '.join(sorted(others))}: run "
            f"`pip uninstall {' '.join(sorted(others))}`, then install distilled-reasoners again",
            False,
        )
    return Finding("package", f"distilled-reasoners {reasoners.__version__}")


def _cuda(torch, build) -> Finding:
    if not build["compiled_with_cuda"]:
        return Finding("CUDA kernels", "not built: this torch has no CUDA")
    kernels = f"archs {build['cuda_archs']}, CUTLASS {build['cutlass_version'] or 'not found'}"
    if not torch.cuda.is_available():
        return Finding("CUDA kernels", f"{kernels}; no GPU here")
    major, minor = torch.cuda.get_device_capability()
    name = f"{torch.cuda.get_device_name()} (sm_{major}{minor})"
    archs = build["cuda_archs"].replace("a", "").split()
    if f"{major}{minor}" not in archs and not any("PTX" in arch for arch in archs):
        wanted = f"TORCH_CUDA_ARCH_LIST={major}.{minor} pip install -e ."
        return Finding("CUDA kernels", f"{kernels} do not run on {name}: run `{wanted}`", False)
    return Finding("CUDA kernels", f"{kernels} on {name}")


def _operators(device: str) -> Iterator[Finding]:
    """Each operator against its definition, in float32 and bfloat16, on small random inputs."""
    import torch

    from reasoners import ops, reference

    for name, (_, make, _) in reference.OPERATORS.items():
        if not ops.has_kernel(name, device):
            yield Finding(f"{name} ({device})", "no kernel yet")
            continue
        # What only counts has no dtype to choose.
        counts = not inspect.signature(make).parameters.keys() & {"dtype", "change"}
        try:
            if counts:
                reference.check(getattr(ops, name), name, device)
            for dtype in () if counts else (torch.float32, torch.bfloat16):
                reference.check(getattr(ops, name), name, device, dtype=dtype)
        except AssertionError as error:
            yield Finding(f"{name} ({device})", str(error), False)
        except Exception as error:
            yield Finding(f"{name} ({device})", f"{type(error).__name__}: {error}", False)
        else:
            words = "right" if counts else "right in float32 and bfloat16"
            yield Finding(f"{name} ({device})", words)
