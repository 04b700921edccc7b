"""What other libraries want, and whether they get the same features."""
