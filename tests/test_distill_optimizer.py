"""AdamW on float32 weights, and the learning rates of a stage."""

import pytest
import torch
from torch import nn

from reasoners.distill.optimizer import Optimizer, decayed_names, learning_rate
from reasoners.model import CONFIGS, HybridLM


def rates(steps, **settings):
    settings = {"peak": 1.0, "schedule": "wsd", "warmup": 0.0, "decay": 0.0} | settings
    return [round(learning_rate(step, steps, **settings), 6) for step in range(steps)]


def test_warmup_stable_decay():
    assert rates(10, warmup=0.3, decay=0.4) == [
        0.25, 0.5, 0.75, 1, 1, 1, 0.8, 0.6, 0.4, 0.2,
    ]  # fmt: skip
    assert rates(10, warmup=3, decay=4) == rates(10, warmup=0.3, decay=0.4)
    assert rates(3) == [1, 1, 1]


def test_cosine():
    assert rates(6, schedule="cosine", warmup=2) == [0.333333, 0.666667, 1, 0.853553, 0.5, 0.146447]


def test_peak_scales():
    assert learning_rate(2, 6, 3e-4, "cosine", 2, 0) == 3e-4


def named(*tensors):
    return [(str(i), nn.Parameter(t)) for i, t in enumerate(tensors)]


def test_steps_below_the_resolution_of_bfloat16_add_up():
    (pair,) = named(torch.ones(1, dtype=torch.bfloat16))
    optimizer = Optimizer([pair], betas=(0.0, 0.0), weight_decay=0.0, decayed=set())
    for step in range(40):
        (pair[1] * 1.0).sum().backward()
        optimizer.step(1e-3)  # a bfloat16 below 1 ends at 1 - 2^-8 = 1 - 0.0039
        if step == 0:
            assert pair[1].item() == 1.0
    assert pair[1].item() == pytest.approx(0.96, abs=2**-9)
    assert pair[1].dtype == torch.bfloat16


def test_gradients_of_several_passes_add_up_in_float32():
    (pair,) = named(torch.ones(1, dtype=torch.bfloat16))
    optimizer = Optimizer([pair], betas=(0.9, 0.95), weight_decay=0.0, decayed=set())
    for _ in range(512):
        (pair[1] * 1.0).sum().backward()  # in bfloat16 the sum would stay at 256
    assert pair[1].grad is None
    assert optimizer.masters["0"].grad.item() == 512
    assert optimizer.clip(1.0) == pytest.approx(512)
    assert optimizer.masters["0"].grad.item() == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_adamw_of_pytorch(dtype):
    torch.manual_seed(0)
    start = [torch.randn(3, 4).to(dtype), torch.randn(4).to(dtype)]
    ours, theirs = named(*(t.clone() for t in start)), [nn.Parameter(t.float()) for t in start]
    optimizer = Optimizer(ours, betas=(0.9, 0.95), weight_decay=0.1, decayed={"0"})
    groups = [{"params": theirs[:1]}, {"params": theirs[1:], "weight_decay": 0.0}]
    peer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for _ in range(5):
        for (_, p), q in zip(ours, theirs):
            grad = torch.randn(p.shape).to(dtype)
            p.backward(grad)
            q.grad = grad.float()
        optimizer.step(1e-2)
        peer.step()
    for (_, p), q in zip(ours, theirs):
        torch.testing.assert_close(p.detach(), q.detach().to(dtype), rtol=1e-6, atol=1e-7)


def test_a_checkpoint_holds_everything():
    torch.manual_seed(0)

    def fresh():
        return Optimizer(
            named(torch.ones(4, dtype=torch.bfloat16), torch.zeros(2)),
            betas=(0.9, 0.95), weight_decay=0.1, decayed={"0"},
        )  # fmt: skip

    grads = [torch.randn(4).bfloat16(), torch.randn(2)]

    def step(optimizer):
        optimizer.rounded[0][0].backward(grads[0])
        optimizer.masters["1"].backward(grads[1])
        optimizer.step(1e-2)

    one, two = fresh(), fresh()
    step(one)
    for name, tensor in two.tensors().items():
        tensor.copy_(one.tensors()[name])
    two.round()
    step(one)
    step(two)
    for name, tensor in one.tensors().items():
        assert torch.equal(tensor, two.tensors()[name]), name


def test_decay_pulls_on_matrices_alone():
    names = decayed_names(HybridLM(CONFIGS["tiny-mamba2"]))
    assert {
        "embedding.weight",
        "layers.0.mixer.in_proj.weight",
        "layers.1.mlp.down_proj.weight",
    } <= names
    assert not {
        n for n in names if any(part in n for part in ("norm", "conv", "A_log", "bias", ".D"))
    }


def test_nothing_to_train():
    with pytest.raises(ValueError, match="parameters expected at least one, got none"):
        Optimizer([], betas=(0.9, 0.95), weight_decay=0.0, decayed=set())
