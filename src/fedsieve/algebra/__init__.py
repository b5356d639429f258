"""The algebra of methods: pure functions over trees of tensors."""
