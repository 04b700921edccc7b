"""DeepSpeed, its configuration, and the optimisers that it drives."""
