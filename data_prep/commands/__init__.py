"""The parsers of `data-prep`'s commands: options in, a call of the module that does the work."""
