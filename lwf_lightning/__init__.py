"""Learning With Forgetting (LWF): fine-tune a language model while it forgets what stands in the way."""

__version__ = "0.1.0"
