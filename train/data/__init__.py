"""Where questions and pictures come from: one `Dataset` for every format (no torch here)."""
