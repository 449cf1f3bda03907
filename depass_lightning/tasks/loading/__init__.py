"""Read tasks' rows from files, folders and the hub."""
