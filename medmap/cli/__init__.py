"""The command line. A verb is one function; `medmap.cli.app` lists them, and no verb imports torch before it must."""

from medmap.cli.app import app, main

__all__ = ["app", "main"]
