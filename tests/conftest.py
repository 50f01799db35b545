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
    """Tests marked cuda(operator) run where a device and the operator's kernel are, and say so elsewhere."""
    from reasoners import ops

    for item in items:
        for mark in item.iter_markers("cuda"):
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
            elif missing := [name for name in mark.args if not ops.has_kernel(name, "cuda")]:
                item.add_marker(pytest.mark.skip(reason=f"no CUDA kernel of {', '.join(missing)}"))
