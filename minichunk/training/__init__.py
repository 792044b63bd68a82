"""Training runs: the loop, its options and reports, evaluation, generation."""
