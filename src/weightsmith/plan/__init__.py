"""What will be done: tasks, and their memory, time and reading, from headers alone."""
