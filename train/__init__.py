"""Train networks with large batches: `python -m train`."""
