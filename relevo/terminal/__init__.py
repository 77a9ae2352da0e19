"""What runs in a terminal, against an endpoint that is up: relevo chat and relevo top."""
