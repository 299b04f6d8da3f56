"""Public benchmarks: layouts on disk to items, items to raw answers, answers to scores beside the published ones."""
