"""The tasks: from features and labels to metrics, each with its chance and its interval."""
