"""What works while a backward runs: gates, gradients, module readers, chains, the flat row, the first row."""
