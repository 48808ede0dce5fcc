"""What `python -m jaxmoe demo` trains: the text, the model, the loop and the picture. The command is `bridge.demo`."""
