"""DFT in a plain Megatron-Core loop, with or without a GPU.

torchrun --nproc-per-node 2 examples/hook_megatron_core.py
"""

import os

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig

from gft_megatron import hook_loss
from gft_megatron.training import cpu


def forward_step(iterator, model):
    tokens, positions, labels, loss_mask = next(iterator)

    def loss_func(losses):  # [b, s]: DFT's, where the model gave cross-entropies before
        return (losses * loss_mask).sum(), loss_mask.sum().int(), {}

    return model(tokens, positions, None, labels=labels), loss_func


if __name__ == "__main__":
    cpu.install()  # stands in for CUDA where there is none, and does nothing elsewhere
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(
        num_layers=2, hidden_size=64, num_attention_heads=4, tensor_model_parallel_size=2, attention_dropout=0.0,
        hidden_dropout=0.0, calculate_per_token_loss=True, finalize_model_grads_func=finalize_model_grads,
    )  # fmt: skip
    model = GPTModel(config, get_gpt_layer_local_spec(), vocab_size=128, max_sequence_length=32).cuda()
    model = DistributedDataParallel(config, DistributedDataParallelConfig(), model)
    optimizer = get_megatron_optimizer(OptimizerConfig(lr=1e-2), [model])
    hook = hook_loss(model, "dft")  # the one line
    rows = torch.randint(0, 128, (4, 33), generator=torch.Generator().manual_seed(1)).cuda()
    batch = (rows[:, :-1], torch.arange(32).expand(4, 32).cuda(), rows[:, 1:], torch.ones(4, 32).cuda())
    for step in range(10):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        get_forward_backward_func()(
            forward_step_func=forward_step, data_iterator=iter([batch]), model=model, num_microbatches=1,
            seq_length=32, micro_batch_size=4, forward_only=False,
        )  # fmt: skip
        optimizer.step()
        print(step, {name: float(mean) for name, mean in hook.metrics.items()})
