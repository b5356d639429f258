"""The round loop, and who carries its bytes."""
