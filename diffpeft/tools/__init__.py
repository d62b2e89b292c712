"""Tools on adapter files and models: one a file, each a function in Python and a command."""
