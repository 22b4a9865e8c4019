"""``python -m medmap`` is ``medmap``."""

from medmap.cli import main

main()
