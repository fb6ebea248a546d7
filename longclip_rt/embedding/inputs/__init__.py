"""What is to be embedded: lists, folders, tables, and the content of each entry."""
