"""What a method costs a client, without training."""
