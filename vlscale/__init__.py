"""vlscale: vision-language models that speak through discrete visual concepts."""

__version__ = "0.1.0"
