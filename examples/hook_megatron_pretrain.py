"""DFT in the style of Megatron-LM's pretrain_gpt.py: one line in model_provider.

It needs megatron.training, which megatron-core has from 0.19 on, and a GPU. The wheel of 0.19.2 lacks the Makefile that
megatron.training runs (in core/datasets); a checkout of Megatron-LM has it. Tried with stand-ins for both on two CPU
ranks (TP 2, PP 2), not on a GPU yet:

torchrun --nproc-per-node 2 examples/hook_megatron_pretrain.py --tensor-model-parallel-size 2 --num-layers 2 \
    --hidden-size 64 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32 --micro-batch-size 2 \
    --train-iters 5 --lr 1e-3 --log-interval 1 --eval-interval 100 --eval-iters 0 --calculate-per-token-loss \
    --transformer-impl local --no-persist-layer-norm --no-masked-softmax-fusion --no-gradient-accumulation-fusion \
    --tokenizer-type NullTokenizer --vocab-size 127
"""

import torch
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import core_transformer_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args

from gft_megatron import hook_loss


def model_provider(pre_process=True, post_process=True, vp_stage=None, config=None, pg_collection=None):
    args = get_args()
    model = GPTModel(
        config or core_transformer_config_from_args(args), get_gpt_layer_local_spec(), args.padded_vocab_size,
        args.max_position_embeddings, pre_process=pre_process, post_process=post_process, vp_stage=vp_stage,
    )  # fmt: skip
    hook_loss(model, "dft")  # the one line
    return model


def forward_step(data_iterator, model):
    batch = {name: values.cuda() for name, values in next(data_iterator).items()}

    def loss_func(losses):  # [b, s]: stays as it was
        loss, num_tokens = (losses * batch["loss_mask"]).sum(), batch["loss_mask"].sum().int()
        return loss, num_tokens, {"lm loss": torch.stack([loss.detach(), num_tokens.float()])}

    return model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"]), loss_func


def datasets_provider(num_samples):
    rows = torch.randint(0, 127, (num_samples[0], get_args().seq_length + 1))
    constant = {"position_ids": torch.arange(rows.shape[1] - 1), "loss_mask": torch.ones(rows.shape[1] - 1)}
    return [{"tokens": row[:-1], "labels": row[1:], **constant} for row in rows], None, None


datasets_provider.is_distributed = True  # every rank makes the same rows itself

if __name__ == "__main__":
    cfg = pretrain_cfg_container_from_args(parse_and_validate_args())
    pretrain(cfg, datasets_provider, ModelType.encoder_or_decoder, forward_step, model_provider)
