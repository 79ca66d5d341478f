"""`python -m myspinbot.cli`, as before there were chapters."""
from .app import main

if __name__ == "__main__": main()
