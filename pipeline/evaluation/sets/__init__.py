"""Evaluation sets: their layouts, their files, and what is known of the common ones."""
