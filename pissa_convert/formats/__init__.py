"""What lies where in a file or folder, and nothing about what is done with it."""
