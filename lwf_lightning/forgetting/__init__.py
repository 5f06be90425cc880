"""The method itself, as functions that need no Lightning."""
