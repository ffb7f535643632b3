"""Everything between files on disk and tensors; imports none of the model files."""
