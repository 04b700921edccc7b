"""Concepts of captions: what is counted, how concepts are connected, in which stage each is taught."""
