"""Near-duplicates by perceptual hashes."""
