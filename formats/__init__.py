"""The format in which data_prep and pipeline meet, written and read here alone."""
