"""Small changes to large networks, and the files in which they travel."""
