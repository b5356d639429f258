"""From rows to tensors and from outputs to scores, a file a task (task.py says what that is)."""
