"""One file for each way to use unlabeled images in training."""
