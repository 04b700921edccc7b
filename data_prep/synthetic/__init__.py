"""The synthetic corpus: captions, scenes and pictures from a seed."""
