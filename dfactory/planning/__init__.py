"""What a recipe will need and do, computed without weights and without a GPU."""
