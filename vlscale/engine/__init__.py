"""Training: the DeepSpeed engine, its loop, checkpoints and logs."""
