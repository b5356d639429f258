"""Runs over other machines: the server, the sites, and what passes between them."""
