"""From files to client batches: sources, partitions, tasks."""
