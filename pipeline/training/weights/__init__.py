"""The model that a stage trains, and the weights that it begins with."""
