"""Tables as people write them, for url lists and for local pictures."""
