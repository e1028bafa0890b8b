"""Measure loss operators side by side: forward + backward of the mean negative log-likelihood, in one run.

python tools/bench_loss.py --device cpu --dtype bf16 --vocab-size 151936 --num-tokens 432 --entropy --json out.json
python tools/bench_loss.py --device cuda --dtype bf16 --num-tokens 8192 --tensor-parallel 1 2 --markdown table.md
python tools/bench_loss.py --linear --hidden-size 896 --num-tokens 2048 --dtype bf16 --ignored-share 0.75

The candidates take turns, and the smallest time of all rounds counts. Each finds fresh logits, which no time is taken
for. The fields of a row:

seconds: wall clock, or the GPU's own clock; with tensor parallelism until the last rank is done.

cpu_seconds: user + system time of all threads of a process, the mean of the ranks. null on a GPU.

gb_per_s: the least bytes (read, read again, write: 3 times the logits of a rank) / seconds; `copy` moves 2 times them.

floor_share: the time that the least bytes take at the speed of `copy` / the time. With --linear, the time of the three
bare matrix products (its share, where tokens are ignored) / the time. In CPU-seconds on a CPU.

peak_extra_bytes: the most memory held at one time beyond what was held before, of the rank with the most.

collectives: started on the tensor-parallel group by one forward + backward.

max_abs_error: of the per-token loss and of the gradient of its sum, against float64, on 8 rows spread over all.
"""

from __future__ import annotations

import dataclasses
import json

from bench.picture import draw
from bench.ranks import measure
from bench.settings import BenchLoss
from bench.tables import markdown, show

from gft_megatron.command_line import parse_flags


def main() -> None:
    try:
        settings = parse_flags(BenchLoss, description=__doc__)
        rows, reasons = measure(settings)
        show(rows, reasons, settings)
        if settings.json is not None:
            settings.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")
        if settings.markdown is not None:
            settings.markdown.write_text(markdown(rows, reasons, settings))
        if settings.picture is not None:
            draw(rows, settings, settings.picture)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
