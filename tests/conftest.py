import os

# Set before torch starts its threads: waiting threads sleep instead of spinning, or tests crawl
# wherever another process wants the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing in the suite may depend on a network

import pytest
import torch

# With deterministic algorithms on, at::empty is filled with NaN: an element that a kernel forgets to
# write cannot pass for a lucky zero.
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True


def pytest_collection_modifyitems(items):
    """Tests marked cuda run where there is a device and a build for it, and say so elsewhere."""
    from reasoners import ops

    if torch.cuda.is_available() and ops.build["compiled_with_cuda"]:
        return
    skip = pytest.mark.skip(reason="no CUDA device, or a build without CUDA")
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(skip)
