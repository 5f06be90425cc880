"""Questions about the method itself, one file each: ``python -m lwf_lightning.study.questions``."""
