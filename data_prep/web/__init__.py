"""Downloads: polite, bounded and restartable."""
