"""Group Fine-Tuning from a Hugging Face checkpoint and a file of prompts to a Hugging Face checkpoint and a report.

torchrun --nproc-per-node 2 examples/pretrain_gft.py --hf-checkpoint DIR --prompt-data FILE --train-iters 300
`--help` lists the flags.
"""

from gft_megatron.training.main import main

if __name__ == "__main__":  # dist_checkpointing spawns a process that imports this file again
    main()
