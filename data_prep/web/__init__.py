"""Requests to strangers: which addresses, how often, how long, how much, and with whose permission."""
