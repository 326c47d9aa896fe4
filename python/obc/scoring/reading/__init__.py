"""The parts that work while a backward runs: gates, gradients, module readers, chains, flat rows, the first row."""
