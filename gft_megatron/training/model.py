"""Build the Megatron-Core model of a Hugging Face configuration: one chunk for each (virtual) pipeline stage."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import HAVE_TE
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.module import Float16Module

from gft_megatron.config import ModelConfig, ParallelConfig
from gft_megatron.convert.families import MlaShape, MoeShape
from gft_megatron.convert.model_shape import ModelShape
from gft_megatron.training.moe import mend_mla_without_transformer_engine, mend_moe_without_transformer_engine
from gft_megatron.training.spec import WholeLinear, block_spec

_SECTIONS = {
    "transformer": TransformerConfig,
    "optimizer": OptimizerConfig,
    "ddp": DistributedDataParallelConfig,
}


def megatron_fields(assignments: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Parse --megatron SECTION.FIELD=VALUE (values as in YAML) into keyword arguments of Megatron's own configs.

    Raises:
        ValueError: a section or a field that this megatron-core does not have.
    """
    fields: dict[str, dict[str, Any]] = {section: {} for section in _SECTIONS}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        section, dot, field = name.partition(".")
        if not equals or not dot or section not in _SECTIONS:
            raise ValueError(f"--megatron {assignment}: expected SECTION.FIELD=VALUE with sections {list(_SECTIONS)}")
        if field not in {f.name for f in dataclasses.fields(_SECTIONS[section])}:
            raise ValueError(f"--megatron {assignment}: {_SECTIONS[section].__name__} has no field {field!r}")
        fields[section][field] = yaml.safe_load(value)
    return fields


def transformer_config(
    shape: ModelShape, model: ModelConfig, parallel: ParallelConfig, overrides: dict[str, Any]
) -> TransformerConfig:
    """Megatron's configuration of this model under this layout.

    Raises:
        ValueError: the layout does not divide the model.
    """
    require_divisible(shape, parallel)
    if not overrides.get("calculate_per_token_loss", True):
        raise ValueError("--megatron transformer.calculate_per_token_loss=false: losses here are sums over tokens")
    dtype = torch.bfloat16 if model.bf16 else torch.float32
    on_gpu = torch.cuda.is_available()
    interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    settings: dict[str, Any] = {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_query_groups": shape.num_query_groups,
        "kv_channels": shape.kv_channels,
        "ffn_hidden_size": shape.ffn_hidden_size,
        "layernorm_epsilon": shape.layernorm_epsilon,
        "add_qkv_bias": shape.add_qkv_bias,
        "qk_layernorm": shape.qk_layernorm,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method_std": shape.initializer_range,
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline_model_parallel_size,
        "context_parallel_size": parallel.context_parallel_size,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.expert_tensor_parallel_size,
        "sequence_parallel": parallel.sequence_parallel,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": model.bf16,
        "use_cpu_initialization": not on_gpu,
        # Even where weights are loaded next: initialisation is what marks parameters as tensor-parallel
        # (tensor_parallel/layers.py), and without the mark the gradient norm counts one rank's shards only.
        "perform_initialization": True,
        # Needs Apex's fused weight-gradient kernel.
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        # Divide by the global number of tokens, not by micro-batches: see losses/reduce.py.
        "calculate_per_token_loss": True,
        # schedules.py frees a stage's output once it is sent; the interleaved schedule does so while gloo still reads
        # it, and the next stage then trains on garbage without an error.
        "deallocate_pipeline_outputs": not interleaved,
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
    }
    if shape.sliding_window is not None:
        settings["window_size"] = (shape.sliding_window - 1, 0)  # tokens before and after one
    if shape.moe is not None:
        settings |= _moe_settings(shape.moe)
    if shape.mla is not None:
        settings |= _mla_settings(shape.mla, shape.rotary_base)
    try:
        return (MLATransformerConfig if shape.mla else TransformerConfig)(**{**settings, **overrides})
    except (ValueError, AssertionError, TypeError) as error:
        raise ValueError(f"Megatron's TransformerConfig refuses these settings: {error}") from error


def _mla_settings(mla: MlaShape, rotary_base: float) -> dict[str, Any]:
    if not mla.q_lora_rank and importlib.util.find_spec("megatron.core.transformer.mla_qk_norm_config"):
        raise ValueError(
            f"q_lora_rank is null: megatron-core {importlib.metadata.version('megatron-core')} would norm what queries "
            f"are projected from a second time; use megatron-core 0.16.1"
        )
    yarn = dict(mla.yarn) if mla.yarn else {}
    return {
        "multi_latent_attention": True,
        "qk_layernorm": True,  # the norms of the latents
        "q_lora_rank": mla.q_lora_rank or None,
        "kv_lora_rank": mla.kv_lora_rank,
        "qk_head_dim": mla.qk_head_dim,
        "qk_pos_emb_head_dim": mla.qk_pos_emb_head_dim,
        "v_head_dim": mla.v_head_dim,
        "rope_type": "yarn" if yarn else "rope",
        "rotary_base": rotary_base,
        "rotary_scaling_factor": yarn.pop("factor", 1.0),  # read without YaRN too, for the scale of the scores
        **yarn,
    }


def _moe_settings(moe: MoeShape) -> dict[str, Any]:
    router: dict[str, Any] = {"moe_router_score_function": "softmax", "moe_router_pre_softmax": moe.router_pre_softmax}
    if moe.sigmoid is not None:
        router = {
            "moe_router_score_function": "sigmoid",
            "moe_router_num_groups": moe.sigmoid.num_groups,
            "moe_router_group_topk": moe.sigmoid.group_topk,
            "moe_router_topk_scaling_factor": moe.sigmoid.scaling_factor,
            "moe_router_enable_expert_bias": True,
            "moe_router_bias_update_rate": 0.0,  # stays as it was pretrained
        }
    return {
        **router,
        "num_moe_experts": moe.num_experts,
        "moe_ffn_hidden_size": moe.ffn_hidden_size,
        # A list, even of equal layers, changes the names in a checkpoint (TransformerBlock.sharded_state_dict).
        "moe_layer_freq": 1 if all(moe.layers) else [int(has_experts) for has_experts in moe.layers],
        "moe_router_topk": moe.router_topk,
        "moe_shared_expert_intermediate_size": moe.shared_ffn_hidden_size or None,
        # Rounded to bfloat16, experts tie and a token goes to others than it was generated with.
        "moe_router_dtype": "fp32",
        # None, as in transformers; --megatron transformer.moe_aux_loss_coeff=0.001 turns it on.
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 0.0,
        "moe_expert_capacity_factor": None,  # no token is dropped
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": HAVE_TE,
    }


def require_divisible(shape: ModelShape, parallel: ParallelConfig) -> None:
    """Refuse a layout that this model cannot be divided by.

    Raises:
        ValueError: names the flag, and what it may be.
    """
    shape.check_tensor_parallel_size(parallel.tensor_model_parallel_size)
    shape.check_expert_parallel_size(parallel.expert_model_parallel_size)
    shape.check_expert_tensor_parallel_size(parallel.expert_tensor_parallel_size)
    if (shape.moe or shape.mla) and parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel:
        raise ValueError(
            f"a model with experts or latent attention under --tensor-model-parallel-size "
            f"{parallel.tensor_model_parallel_size} needs --sequence-parallel: without it Megatron sends every token "
            f"to its experts once for each rank, and sums gradients wrong"
        )
    stages = parallel.pipeline_model_parallel_size * (parallel.virtual_pipeline_model_parallel_size or 1)
    if shape.num_layers % stages:
        raise ValueError(
            f"the model's {shape.num_layers} layers cannot be divided over {stages} pipeline stages "
            f"(--pipeline-model-parallel-size x --virtual-pipeline-model-parallel-size)"
        )


def padded_vocab_size(shape: ModelShape, model: ModelConfig, parallel: ParallelConfig) -> int:
    """Rows of the embedding over all tensor-parallel ranks."""
    multiple = model.make_vocab_size_divisible_by * parallel.tensor_model_parallel_size
    return -(-shape.vocab_size // multiple) * multiple


def build_chunks(
    shape: ModelShape, config: TransformerConfig, *, vocab_size: int, max_sequence_length: int, device: torch.device
) -> list[torch.nn.Module]:
    """The model chunks of this rank, in the order of virtual stages; wrapped in Float16Module for bf16.

    Args:
        vocab_size: padded size, see `padded_vocab_size`.
    """
    if shape.moe is not None:
        mend_moe_without_transformer_engine()
    if shape.mla is not None:
        mend_mla_without_transformer_engine(WholeLinear)
    num_chunks = config.virtual_pipeline_model_parallel_size
    chunks: list[torch.nn.Module] = []
    for index in range(num_chunks or 1):
        vp_stage = index if num_chunks else None
        chunk: torch.nn.Module = GPTModel(
            config=config,
            transformer_layer_spec=block_spec(config, vp_stage=vp_stage),
            vocab_size=vocab_size,
            max_sequence_length=max_sequence_length,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            parallel_output=True,
            share_embeddings_and_output_weights=shape.tie_word_embeddings,
            position_embedding_type="rope",
            rotary_base=shape.rotary_base,
            rope_scaling=shape.rope_scaling_factor is not None,
            rope_scaling_factor=shape.rope_scaling_factor or 1.0,
            vp_stage=vp_stage,
        ).to(device)
        _reduce_experts_over_their_own_ranks(chunk, config)
        chunks.append(Float16Module(config, chunk) if config.bf16 else chunk)
    return chunks


def _reduce_experts_over_their_own_ranks(chunk: torch.nn.Module, config: TransformerConfig) -> None:
    """Make DDP sum the gradients of an expert over the ranks that hold it, where these are not the data-parallel ones.

    `allreduce` False is Megatron's mark for them. megatron-core 0.16.1 (tensor_parallel/layers.py) sets it under expert
    parallelism only: with --expert-tensor-parallel-size below the tensor-parallel size, each tensor-parallel rank would
    train an expert of its own on its own share of the tokens, without an error. 0.19.2 sets it as is done here.
    """
    if config.expert_tensor_parallel_size == config.tensor_model_parallel_size:
        return
    for name, parameter in chunk.named_parameters():
        if ".mlp.experts." in name:
            parameter.allreduce = False


def wrap_in_ddp(
    chunks: list[torch.nn.Module], config: TransformerConfig, parallel: ParallelConfig, overrides: dict[str, Any]
) -> list[DistributedDataParallel]:
    """Megatron's data parallelism around each chunk: gradient buffers in fp32, reduced once a step."""
    settings: dict[str, Any] = {
        "grad_reduce_in_fp32": True,
        "overlap_grad_reduce": parallel.overlap_grad_reduce,
        "overlap_param_gather": parallel.overlap_param_gather,
        "use_distributed_optimizer": parallel.use_distributed_optimizer,
        "check_for_nan_in_grad": True,
    }
    ddp_config = DistributedDataParallelConfig(**{**settings, **overrides})
    # Later chunks are reduced while earlier ones still run backward, so only the first has anything to overlap with.
    wrapped = [
        DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=i > 0) for i, chunk in enumerate(chunks)
    ]
    if parallel.overlap_grad_reduce:
        no_syncs = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = no_syncs if len(no_syncs) > 1 else no_syncs[0]
    return wrapped


def gather_updated_parameters(chunks: Sequence[torch.nn.Module]) -> None:
    """Whoever reads weights has to call this first; collective over the data-parallel ranks.

    With --overlap-param-gather the distributed optimizer leaves each rank with its own slice of the new weights, and
    gathers the rest in the next forward pass (distributed/param_and_grad_buffer.py, start_param_sync).
    """
    for chunk in chunks:
        if isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def unwrapped(chunk: torch.nn.Module) -> GPTModel:
    """The GPTModel inside DDP and Float16Module."""
    while not isinstance(chunk, GPTModel):
        chunk = chunk.module
    return chunk
