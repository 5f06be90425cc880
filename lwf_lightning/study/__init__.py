"""Studies: methods compared over tasks and seeds."""
