"""From data files to packed micro-batches: rows -> encode -> store (once a run), order, packing (every step)."""
