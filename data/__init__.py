"""Images: where they come from, how they are split, what was found of them."""
