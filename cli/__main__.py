"""`python -m relora_opt_cli` is `relora-opt`."""

from .app import main

if __name__ == "__main__":
    main()
