"""AdamW on float32 copies of the weights, and the learning rates of a stage."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def learning_rate(
    step: int, steps: int, peak: float, schedule: str, warmup: float, decay: float
) -> float:
    """The rate of step `step` of `steps`, counted from 0.

    Linear warm-up, then "wsd": the peak, and a linear way down to 0 at the end; "cosine": half a cosine
    from the peak to 0. warmup, decay: below 1 shares of the steps, else numbers of steps.
    """
    warmup_steps = warmup * steps if warmup < 1 else warmup
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    if schedule == "cosine":
        done = (step - warmup_steps) / max(steps - warmup_steps, 1)
        return peak * 0.5 * (1 + math.cos(math.pi * done))
    decay_steps = decay * steps if decay < 1 else decay
    return peak * min(1.0, (steps - step) / (decay_steps + 1))


def decayed_names(model: nn.Module) -> set[str]:
    """Parameters that weight decay pulls on: the matrices of linear layers and embeddings."""
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding)
    }


class Optimizer:
    """AdamW whose weights, gradients and moments are float32 whatever the model's dtype.

    parameters: (name, parameter) pairs to train; those of 16 bits get a float32 copy that is rounded
    into them after every step. Gradients of several backward passes add up in float32. decayed: names
    that weight_decay applies to.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        betas: tuple[float, float],
        weight_decay: float,
        decayed: set[str],
    ):
        self.rounded: list[tuple[nn.Parameter, Tensor]] = []
        self.masters: dict[str, Tensor] = {}
        self._hooks = []
        for name, parameter in parameters:
            master = parameter
            if parameter.element_size() < 4:
                master = parameter.detach().float()
                self.rounded.append((parameter, master))
                hook = self._gradient_to(master)
                self._hooks.append(parameter.register_post_accumulate_grad_hook(hook))
            self.masters[name] = master
        if not self.masters:
            raise ValueError("Optimizer: parameters expected at least one, got none")
        # One call cannot take sharded and whole tensors together, hence the groups.
        groups: dict[tuple[bool, bool], list[Tensor]] = {}
        for name, master in self.masters.items():
            groups.setdefault((isinstance(master, DTensor), name in decayed), []).append(master)
        self.adamw = torch.optim.AdamW(
            [
                {"params": tensors, "weight_decay": weight_decay if pulled else 0.0}
                for (_, pulled), tensors in groups.items()
            ],
            lr=0.0, betas=betas, fused=True,
        )  # fmt: skip
        # As AdamW itself starts, so that a checkpoint has places to load into.
        for master in self.masters.values():
            self.adamw.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=master.device),
                "exp_avg": torch.zeros_like(master, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(master, requires_grad=False),
            }

    @staticmethod
    def _gradient_to(master: Tensor):
        def move(parameter: Tensor):
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad += parameter.grad
            parameter.grad = None

        return move

    def clip(self, max_norm: float) -> float:
        """Scale all gradients so that their common norm is at most max_norm; returns what it was."""
        norms = []
        for group in self.adamw.param_groups:
            grads = [tensor.grad for tensor in group["params"] if tensor.grad is not None]
            norm = torch.nn.utils.get_total_norm(grads)
            norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        total = torch.nn.utils.get_total_norm(norms)
        for group in self.adamw.param_groups:
            torch.nn.utils.clip_grads_with_norm_(group["params"], max_norm, total)
        return float(total)

    def step(self, lr: float):
        """One AdamW step, and the new weights into the model."""
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        self.round()
        self.forget_gradients()

    @torch.no_grad()
    def round(self):
        """Write the float32 weights into the model's."""
        if self.rounded:
            parameters, masters = zip(*self.rounded, strict=True)
            torch._foreach_copy_(parameters, masters)

    def forget_gradients(self):
        """Drop what backward passes have added up."""
        for master in self.masters.values():
            master.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """Everything a checkpoint must keep, by name; load in place, then `round`."""
        found = {}
        for name, master in self.masters.items():
            found[f"{name}/master"] = master.detach()
            for kind, tensor in self.adamw.state[master].items():
                found[f"{name}/{kind}"] = tensor
        return found

    def close(self):
        """Let go of the model's gradients."""
        for hook in self._hooks:
            hook.remove()
