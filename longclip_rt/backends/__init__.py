"""What runs a bundle's graphs, one backend a file."""
