"""What `DePassCallback` does, without Lightning's hooks."""
