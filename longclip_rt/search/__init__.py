"""What is nearest, and a page that shows it."""
