"""What clients have, who takes part, and what is promised to them."""
