"""What data_prep and pipeline share: the format in which they meet, written and read here alone, and habits of both."""
