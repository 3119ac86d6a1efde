"""What a kind of model is trained for, and what a row of its data is."""
