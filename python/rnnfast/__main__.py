"""`python -m rnnfast`: the same as the command `rnnfast`."""

from .cli import main

if __name__ == "__main__":
    main(prog_name="rnnfast")
