"""What an optimizer forgets when a phase asks for it."""

from types import SimpleNamespace

import torch

from gft_megatron.training.optimizer import reset_optimizer


def test_moments_and_steps_are_forgotten_and_weights_are_not():
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    adam = torch.optim.AdamW([weight], lr=0.1)
    weight.grad = torch.tensor([3.0, -1.0])
    adam.step()
    # Transformer Engine's FusedAdam: a step for all, and main weights among the state (use_precision_aware_optimizer).
    adam.param_groups[0]["step"] = 1
    adam.state[weight]["master_param"] = weight.detach().clone()
    before = weight.detach().clone()
    reset_optimizer(SimpleNamespace(chained_optimizers=[SimpleNamespace(optimizer=adam, param_groups=None)]))
    state = adam.state[weight]
    assert [float(state[name].abs().sum()) for name in ("step", "exp_avg", "exp_avg_sq")] == [0, 0, 0]
    assert adam.param_groups[0]["step"] == 0
    assert torch.equal(weight, before) and torch.equal(state["master_param"], before)
