"""From disk to batches: layouts, files, checks, preparation, store, splits, augmentation."""
