"""The loss over all ranks: what is exchanged, what is cached."""
