"""From a checkpoint to benchmark figures: zero-shot classification, retrieval, composition."""
