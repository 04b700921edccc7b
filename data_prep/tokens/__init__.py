"""SentencePiece tokenizers, and what they make of captions."""
