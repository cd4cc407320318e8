"""Frozen teachers: where they come from, what of them is kept, and prototypes for those that have none."""
