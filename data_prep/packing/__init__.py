"""Local images and captions into shards."""
