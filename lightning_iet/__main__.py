"""``python -m lightning_iet`` is the same program as ``lightning-iet``."""

from lightning_iet.cli import main

if __name__ == "__main__":
    main()
