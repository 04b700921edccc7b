"""Reading training data: manifest -> order -> samples -> batches of pixels and tokens."""
