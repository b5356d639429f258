"""Many runs, compared or searched."""
