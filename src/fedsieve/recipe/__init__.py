"""From a TOML file to an experiment that is ready to run."""
