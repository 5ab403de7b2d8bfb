"""What happens to one tensor: bytes in, bytes out, no files."""
