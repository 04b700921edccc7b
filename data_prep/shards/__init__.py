"""Shard directories: reading, judging, rewriting, counting."""
