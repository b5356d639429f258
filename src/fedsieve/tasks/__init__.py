"""From rows to tensors, a file a task."""
