"""The command line: one module per command, arguments and help → one call into vlscale. No torch at import."""
