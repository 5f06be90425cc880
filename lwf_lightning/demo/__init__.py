"""The embedded world: a tiny pretrained language model, its clean twin, and two tasks."""
