"""Url lists: known sets, readers, cleaning, filters, exact de-duplication."""
