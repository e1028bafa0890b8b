"""What a run shows: files to read later, a terminal or a log to read now. Figures in are plain floats."""
