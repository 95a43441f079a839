"""What a person reads about a merge (floor 5)."""
