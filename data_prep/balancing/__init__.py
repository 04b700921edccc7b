"""Clusters of pictures by meaning, and how often to read the samples of each."""
