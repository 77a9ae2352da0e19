"""What `relevo bench …` runs."""
