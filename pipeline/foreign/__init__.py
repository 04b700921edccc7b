"""Models of other libraries: read from their files and written into them, each library's form in one module."""
