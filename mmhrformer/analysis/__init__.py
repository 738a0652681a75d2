"""What models cost and what happens inside them."""
