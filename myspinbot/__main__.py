"""`python -m myspinbot` is the command `myspinbot`."""
from .cli.app import main

if __name__ == "__main__": main()
