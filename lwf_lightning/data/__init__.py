"""From rows on disk to batches of token ids."""
