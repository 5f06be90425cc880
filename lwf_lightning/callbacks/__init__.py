"""Lightning callbacks of the package."""
