"""The training system: ``python -m train``."""
