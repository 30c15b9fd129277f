"""The package within others' programs, a module for each."""
