"""Transformer layers for Megatron-Core without Transformer Engine; Transformer Engine's own where it is installed.

megatron-core's local spec (models/gpt/gpt_layer_specs.py) stops short of what training needs: its norm refuses
sequence parallelism (transformer/torch_norm.py) and its attention refuses packed sequences and context parallelism
(transformer/dot_product_attention.py). The two classes here do all three with torch alone, on CPU and GPU.

Legend: t packed tokens of this rank, h query heads, g key-value heads, d head width, c context-parallel size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import groupby, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import HAVE_TE, get_gpt_decoder_block_spec
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from torch import Tensor


def block_spec(config: TransformerConfig, *, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Layers of this pipeline stage (or virtual stage) and the final norm."""
    if HAVE_TE:
        return get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    layers = range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage))
    specs = [_layer_spec(config, has_experts=_has_experts(config, layer)) for layer in layers]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=RMSNorm)


def _has_experts(config: TransformerConfig, layer: int) -> bool:
    if config.num_moe_experts is None:
        return False
    every = config.moe_layer_freq
    return bool(every[layer]) if isinstance(every, list) else layer % every == 0


def _layer_spec(config: TransformerConfig, *, has_experts: bool) -> ModuleSpec:
    head_norm = RMSNorm if config.qk_layernorm else IdentityOp
    self_attention = SelfAttention
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=SdpaAttention,
        linear_proj=RowParallelLinear,
        q_layernorm=head_norm,
        k_layernorm=head_norm,
    )
    mlp = ModuleSpec(
        module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    )
    # Transformer Engine's names in the distributed checkpoint, so that either spec can load it.
    checkpoint_names = {
        "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
        "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
    }
    if config.multi_latent_attention:
        self_attention = MLASelfAttention
        attention = MLASelfAttentionSubmodules(
            linear_q_proj=ColumnParallelLinear,
            linear_q_down_proj=WholeLinear,
            linear_q_up_proj=ColumnParallelLinear,
            linear_kv_down_proj=WholeLinear,
            linear_kv_up_proj=ColumnParallelLinear,
            core_attention=SdpaAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=RMSNorm if config.q_lora_rank else IdentityOp,
            kv_layernorm=RMSNorm,
        )
        del checkpoint_names["input_layernorm."]
        checkpoint_names |= {
            "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
            "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
        }
    if has_experts:
        mlp = get_moe_module_spec(use_te=False, num_experts=config.num_moe_experts, moe_grouped_gemm=False)
        del checkpoint_names["pre_mlp_layernorm."]
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=self_attention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=checkpoint_names,
        ),
    )


class RMSNorm(torch.nn.RMSNorm):
    """Under sequence parallelism each rank norms its own tokens, so the weight's gradient is a partial sum: marking it
    lets distributed/finalize_model_grads.py add the parts up over the tensor-parallel group."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight.sequence_parallel = config.sequence_parallel


class WholeLinear(torch.nn.Linear):
    """Every tensor-parallel rank holds all of it and applies it to its own tokens, as Transformer Engine's does in
    latent attention. Divided over the ranks instead (ColumnParallelLinear, as megatron-core's local spec has it), the
    gradient of the keys' rotated part, which all heads share, would be that of one rank's heads."""

    def __init__(
        self, input_size: int, output_size: int, *, config: TransformerConfig, init_method: Any, **_: Any
    ) -> None:
        super().__init__(
            input_size, output_size, bias=False, dtype=config.params_dtype, device=torch.cuda.current_device()
        )
        init_method(self.weight)
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return super().forward(x), None


class SdpaAttention(MegatronModule):
    """Causal attention by torch's scaled_dot_product_attention: grouped queries, packed sequences, context parallelism,
    a sliding window.

    Under context parallelism each sequence is cut into 2c chunks and rank r holds chunks r and 2c-1-r, as Transformer
    Engine and rope_utils.py have it. Keys and values of all ranks are gathered (their gradient is reduce-scattered), so
    memory for them is that of the whole sequence.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        if config.attention_dropout:
            raise ValueError(
                f"attention_dropout is {config.attention_dropout}; without Transformer Engine it has to be 0"
            )
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.window = config.window_size[0] + 1 if config.window_size else None  # tokens, a query's own included
        self.cp_group = pg_collection.cp

    def forward(
        self,
        query: Tensor,  # packed [t, h, d], else [s, b, h, d]
        key: Tensor,  # packed [t, g, d], else [s, b, g, d]
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:  # packed [t, h*d], else [s, b, h*d]
        if packed_seq_params is not None:
            context = self._attend(query, key, value, packed_seq_params.cu_seqlens_q.tolist())
            return context.flatten(1)
        seq_length, batch_size = query.shape[:2]
        full_length = seq_length * self.cp_group.size()
        packed = [x.transpose(0, 1).flatten(0, 1) for x in (query, key, value)]  # [b*s, ., d]
        context = self._attend(*packed, [full_length * i for i in range(batch_size + 1)])
        return context.view(batch_size, seq_length, -1).transpose(0, 1).contiguous()

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: list[int]) -> Tensor:  # [t, h, d]
        c, rank = self.cp_group.size(), self.cp_group.rank()
        if c > 1:
            gathered = gather_from_sequence_parallel_region(torch.cat([key, value], dim=-1), group=self.cp_group)
            # [c, t, g, d]; values of latent attention have a width of their own
            key, value = gathered.unflatten(0, (c, -1)).split([key.shape[-1], value.shape[-1]], dim=-1)
        outputs = []
        for start, length, count in equal_runs(cu_seqlens):
            part = slice(start // c, (start + length * count) // c)
            q = query[part].unflatten(0, (count, -1)).transpose(1, 2)  # [count, h, length / c, d]
            if c == 1:
                k, v = (x[part].unflatten(0, (count, -1)).transpose(1, 2) for x in (key, value))
                context = self._sdpa(q, k, v)
            else:
                k, v = (_in_sequence_order(x[:, part], count) for x in (key, value))  # [count, g, length, d]
                chunk = length // (2 * c)
                context = torch.cat(
                    [
                        self._sdpa(part_of_q, k, v, first=index * chunk)
                        for part_of_q, index in zip(q.chunk(2, dim=2), (rank, 2 * c - 1 - rank), strict=True)
                    ],
                    dim=2,
                )
            outputs.append(context.transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs)

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor, first: int = 0) -> Tensor:
        """Queries at positions first, first + 1, ... attend to the keys at and before them, or a window of these."""
        last = first + q.shape[2]
        mask = None
        if first or (self.window and last > self.window):
            mask = torch.ones(q.shape[2], last, dtype=torch.bool, device=q.device).tril(first)
        if self.window and mask is not None:
            mask = mask.triu(first - self.window + 1)
        return F.scaled_dot_product_attention(
            q, k[:, :, :last], v[:, :, :last], attn_mask=mask, is_causal=mask is None, scale=self.softmax_scale,
            enable_gqa=True,
        )  # fmt: skip


def equal_runs(cu_seqlens: list[int]) -> Iterator[tuple[int, int, int]]:
    """(start, length, count) of neighbouring sequences of equal length, which one attention call can batch."""
    start = 0
    for length, run in groupby(end - begin for begin, end in pairwise(cu_seqlens)):
        count = sum(1 for _ in run)
        if length:
            yield start, length, count
        start += length * count


def _in_sequence_order(x: Tensor, count: int) -> Tensor:  # [c, count * length/c, g, d] -> [count, g, length, d]
    halves = x.unflatten(1, (count, 2, -1))  # [c, count, 2, length/2c, g, d]
    chunks = torch.cat([halves[:, :, 0], halves[:, :, 1].flip(0)])  # [2c, count, length/2c, g, d]
    return chunks.permute(1, 3, 0, 2, 4).flatten(2, 3)
