"""Reading and writing: files, folders, the hub and object stores; outputs with journal, lock and manifest."""
