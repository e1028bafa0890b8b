"""Weights between Hugging Face folders and Megatron-Core parameters: names, layouts, files. Imports no Megatron."""

from gft_megatron.convert.hf_folder import HfFolder
from gft_megatron.convert.hf_writer import write_hf_folder
from gft_megatron.convert.mapping import expected_hf_shapes, hf_names_of, merge_to_hf, tensor_spec
from gft_megatron.convert.model_shape import ModelShape

__all__ = [
    "HfFolder",
    "ModelShape",
    "expected_hf_shapes",
    "hf_names_of",
    "merge_to_hf",
    "tensor_spec",
    "write_hf_folder",
]
