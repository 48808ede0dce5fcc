"""The sub-commands of `python -m jaxmoe` that need nothing but jax."""
