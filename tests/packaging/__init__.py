"""What is shipped, and what each place needs of it."""
