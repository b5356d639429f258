"""Local fine-tuning: a resident base model, a client's adapter in it, and steps on its examples."""
