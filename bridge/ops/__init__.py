"""The torch ops of jaxmoe, defined when imported."""
